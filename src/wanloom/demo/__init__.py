"""The small models that ship inside the package, so that everything works on a laptop without a download.

They have the architecture and the directory layout of the published checkpoints, and were trained by this project on
the procedural world of `world.py`; they are not Wan checkpoints. Each lies in `demo/models/<name>/` beside its
`card.json` (data, recipe, seconds, what the judge measured). This file only says which are there, without torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wanloom.variants import VARIANTS

EXAMPLES = {
    "demo-t2v": "a red circle bounces on a sand background",
    "demo-i2v": "a purple star moves right on a sky background",
    "demo-ti2v": "a green heart grows on a white background",
    "demo-s2v": "a person speaks",
    "demo-animate": "a person dances",
}
MODELS = Path(__file__).resolve().parent / "models"


def path_of(name: str) -> Path:
    """The directory of a demo model; `available()` says whether it is filled. KeyError for any other name."""
    if not VARIANTS[name].demo:
        raise KeyError(name)
    return MODELS / name


def available() -> dict[str, Path]:
    """The demo models whose weights are present: name -> directory, in the order of `VARIANTS`."""
    names = [row.name for row in VARIANTS.values() if row.demo]
    return {name: path_of(name) for name in names if any(path_of(name).rglob("*.safetensors"))}


def card(name: str) -> dict[str, Any]:
    """What the model card of a demo says (`card.json`); empty when there is none."""
    file = path_of(name) / "card.json"
    if not file.is_file():
        return {}
    loaded = json.loads(file.read_text(encoding="utf-8"))
    return loaded if isinstance(loaded, dict) else {}


def is_smoke_test(name: str) -> bool:
    """True until the model's card says otherwise: such a model proves that the code runs, not that it can paint."""
    return bool(card(name).get("status", "smoke-test") == "smoke-test")


def size_of(name: str) -> int:
    """Bytes of all files of a demo model."""
    return sum(file.stat().st_size for file in path_of(name).rglob("*") if file.is_file())


def draw_first_frame(prompt: str, path: Path, size: int) -> None:
    """Write the picture (PNG, size x size) that a clip of the demo world with this prompt begins with."""
    import numpy as np
    from PIL import Image

    from wanloom.demo import world

    wanted = world.parse(prompt)
    rng = np.random.default_rng(0)
    asks = [(it.shape or "circle", it.colour or "red", it.motion or "still") for it in wanted.things]
    clip = world.compose(rng, wanted.background or "white", asks or [("circle", "red", "still")])
    if clip is None:
        clip = world.sample_clip(rng)
    Image.fromarray(world.first_frame(clip, size)).save(path)
