"""Parts of a model: which there are, in which numbers they are loaded, and when they go again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from wanloom.budget import part_bytes
from wanloom.checkpoint.find import resolve
from wanloom.checkpoint.load import survey
from wanloom.encoders import encode_audio
from wanloom.models.adapters.animate import Animate
from wanloom.models.adapters.speech import Speech
from wanloom.parts import Parts
from wanloom.variants import VARIANTS

KINDS = {"s2v-14B": ("dit", "text", "vae", "audio"), "animate-14B": ("dit", "text", "vae", "clip")}
CASES = [(name, part) for name, parts in KINDS.items() for part in parts]


def parts_of(models: Path, name: str, **options: object) -> Parts:
    files = resolve(VARIANTS[name], ckpt_dir=models / name)
    return Parts(survey(VARIANTS[name], files), files, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "part"), CASES)
def test_every_part_is_loaded_in_its_dtype_and_gone_afterwards(models: Path, name: str, part: str) -> None:
    parts = parts_of(models, name, dtype="bfloat16", resident=False)
    with parts.use(part, "model" if part == "dit" else None) as module:
        wide = part in ("vae", "audio")
        assert {p.dtype for p in module.parameters()} == {torch.float32 if wide else torch.bfloat16}
        assert not any(p.is_meta or p.requires_grad for p in module.parameters())
        counted = sum(p.nbytes for p in module.parameters())
        head = tiny.CLIP.dim * tiny.CLIP.projection * 2 if part == "clip" else 0  # in the file, not in our tower
        assert part_bytes(parts.variant, "bfloat16")[part] == counted + head
    assert all(p.is_meta for p in module.parameters())


def test_a_transformer_has_the_parts_of_its_config(models: Path) -> None:
    for name, kind in (("s2v-14B", Speech), ("animate-14B", Animate)):
        with parts_of(models, name).use("dit", "model") as dit:
            assert [type(part) for part in dit.prepare] == [kind]
            config = dit.config.speech or dit.config.animate
            assert config in (tiny.SPEECH, tiny.ANIMATE)
            heard = [i for i, block in enumerate(dit.blocks) if len(block.after)]
            assert tuple(heard) == config.layers


def test_the_loaded_audio_encoder_hears(models: Path) -> None:
    with parts_of(models, "s2v-14B", dtype="bfloat16").use("audio") as model:
        states: Tensor = encode_audio(model, torch.sin(torch.arange(8000) * 0.1))
    assert states.shape[::2] == (tiny.SPEECH.audio_states, tiny.SPEECH.audio_dim)
    assert states.dtype == torch.float32 and bool(states.isfinite().all())


def test_files_and_precision_name_the_audio_encoder(models: Path) -> None:
    parts = parts_of(models, "s2v-14B", dtype="bfloat16")
    home = models / "s2v-14B" / "wav2vec2-large-xlsr-53-english"
    assert parts.weight_files()["audio"] == [home / "model.safetensors"]
    assert parts.precision == {"dit": "bfloat16", "text": "bfloat16", "vae": "float32", "audio": "float32"}
    other = parts_of(models, "animate-14B")
    assert {"clip", "dit model"} <= other.weight_files().keys() and "audio" not in other.precision
    with pytest.raises(AssertionError, match="no part audio"), other.use("audio"):
        pass
