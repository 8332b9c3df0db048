"""Low-rank changes of a model (LoRA) in PEFT's names, and adding them to its weights.

    lora = read_lora(root / RELIGHTING)
    count = merge(dit, lora)                      # every weight += strength * scale * up @ down

animate-14B comes with one, `relighting_lora.ckpt`, that fits a character to the light of the scene it is put into: rank
128, on every linear layer of the blocks but those of the face.  A `.ckpt` is read as a table of tensors and never
executed, like all pickles here (`pickled.py`).

Errors (InputError): those of `header.py` and `pickled.py`, and E4024 a LoRA that is damaged or of another model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wanloom.checkpoint.documents import read_json
from wanloom.checkpoint.header import Entry, Header, unchanged
from wanloom.checkpoint.load import read_entry, require_finite
from wanloom.checkpoint.weights import FLOATS, Source, few, list_files, prefer_safetensors, read_any
from wanloom.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wanloom.checkpoint.find import Files
    from wanloom.request import Request

    Lora = Mapping[str, tuple[Tensor, Tensor, float]]  # module -> down [r, in], up [out, r], scale

RELIGHTING = "relighting_lora.ckpt"  # in the directory of animate-14B

# PEFT's name of a tensor: an optional wrapper, the module, which half, an optional name of the adapter.
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.(?:lora_(?P<half>[AB])(?:\.default)?\.weight|alpha)")


def read_lora(path: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Module name -> down [r, in], up [out, r] float32 and the scale alpha / r.

    Alpha is a tensor beside the halves, or stands in the adapter_config.json beside an adapter_model file, as PEFT
    writes it; where neither says, the scale is 1 (the published LoRA has rank and alpha 128).
    """
    file = list_files(Path(path), pickles=True)[0][0]
    said = _alpha_beside(file)
    header, parts = _table(file)
    lora = {module: _pair(file, module, entries, said) for module, entries in parts.items()}
    unchanged(file, header.stamp)
    return lora


def relighting_file(request: Request, files: Files) -> Path | None:
    """The relighting LoRA that a request asks for: the file it names, or that of the checkpoint; None when it does not.

    Only its table is read.  Errors: E4001 it is not there, E4024 and those of `header.py` and `pickled.py`.
    """
    if not request.use_relighting_lora:
        return None
    path = request.relighting_lora or (files.root / RELIGHTING if files.root is not None else Path(RELIGHTING))
    file = prefer_safetensors(Path(path))
    if not file.is_file():
        raise InputError("E4001", f"the relighting LoRA is missing: {file}. Name it with --relighting-lora.")
    _table(file)
    return file


def _table(file: Path) -> tuple[Header, dict[str, dict[str, Entry]]]:
    """A LoRA's header, and module -> "A", "B" and "alpha" of what is in it."""
    header = read_any(file)
    parts: dict[str, dict[str, Entry]] = {}
    for name, entry in header.entries.items():
        match = _NAME.fullmatch(name)
        if match is None or entry.dtype not in FLOATS:
            raise InputError("E4024", f"{file}: tensor {name} ({entry.dtype}) is none of a LoRA in PEFT's names.")
        half = match["half"] or "alpha"
        if half in parts.setdefault(match["module"], {}):
            raise InputError("E4024", f"{file}: tensor {name}: {match['module']} has this half twice.")
        parts[match["module"]][half] = entry
    if not parts:
        raise InputError("E4024", f"{file}: holds no tensors.")
    return header, parts


def _alpha_beside(file: Path) -> float | None:
    """lora_alpha of PEFT's config, where the file has one; forms other than plain LoRA are refused."""
    config = file.with_name("adapter_config.json")
    if file.stem != "adapter_model" or not config.is_file():
        return None
    said = read_json(config)
    alpha = said.get("lora_alpha") if isinstance(said, dict) else None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise InputError("E4024", f"{config}: no number lora_alpha.")
    other = [key for key in ("alpha_pattern", "use_dora", "use_rslora", "fan_in_fan_out") if said.get(key)]
    if other:
        raise InputError("E4024", f"{config}: {few(other)}: only plain LoRA is read.")
    return float(alpha)


def _pair(file: Path, module: str, entries: Mapping[str, Entry], said: float | None) -> tuple[Tensor, Tensor, float]:
    """Both halves of a module's change, which share the rank."""
    if "A" not in entries or "B" not in entries:
        raise InputError(
            "E4024", f"{file}: {module} has one half of its change only (lora_A and lora_B belong together)."
        )
    a, b = entries["A"].shape, entries["B"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0:
        raise InputError("E4024", f"{file}: {module}: lora_A {list(a)} and lora_B {list(b)} do not share a rank.")
    down, up = _values(entries["A"]), _values(entries["B"])
    if "alpha" not in entries:
        return down, up, 1.0 if said is None else said / a[0]
    alpha = _values(entries["alpha"])
    if alpha.numel() != 1:
        raise InputError("E4024", f"{file}: {module}: alpha has {alpha.numel()} values, expected one.")
    return down, up, float(alpha) / a[0]


def _values(entry: Entry) -> Tensor:
    """A stored tensor in float32, finite (E4010)."""
    value = read_entry(entry).float()
    require_finite(Source(entry.shape, (entry,), (None,)), value)
    return value


def merge(module: nn.Module, lora: Lora, strength: float = 1.0) -> int:
    """Add a LoRA to the linear layers it names, in place, and say to how many.

    The sum is made in float32 and rounded to the dtype of the weight once; merging with -strength takes it out again up
    to that rounding.  Error: E4024 for a name that is no linear layer here or another shape; then nothing was changed.
    """
    import torch
    from torch import nn

    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    strange = [name for name in lora if name not in layers]
    if strange:
        raise InputError("E4024", f"lora: {len(strange)} of {len(lora)} layers are not in this model: {few(strange)}.")
    for name, (down, up, _) in lora.items():
        shape, fits = [up.shape[0], down.shape[1]], list(layers[name].weight.shape)
        if shape != fits:
            raise InputError("E4024", f"lora: {name} is changed by {shape}, the layer has {fits}: another model's.")
    with torch.no_grad():
        for name, (down, up, scale) in lora.items():
            weight = layers[name].weight
            change = up.to(weight.device) @ down.to(weight.device)
            weight.copy_(weight.float().add_(change, alpha=strength * scale))
    return len(lora)
