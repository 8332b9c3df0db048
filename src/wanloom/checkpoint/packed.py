"""Loading that keeps weights in few bits: those a file holds so (ComfyUI's fp8, int8, GGUF), or all, as they come.

    with torch.device("meta"):
        dit = build_dit(config)
    packed = load_packed(dit, weights, dtype=torch.bfloat16, device="cuda")             # 8-bit as the file has it
    packed = load_packed(dit, weights, dtype=torch.bfloat16, device="cuda", how="fp8")  # whatever the file has

It does what `load_into` does, with the same checks, and replaces the linear layers of the blocks by those of `runtime`
on the way: at no time are more than the few that are read ahead there in full, so a model needs hardly more memory to
be loaded than it has afterwards.  What is kept has the values that `load_into` would have read, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wanloom.checkpoint.gguf import BLOCKS, read_blocks, read_packed
from wanloom.checkpoint.header import Entry
from wanloom.checkpoint.load import (
    ahead,
    match_names,
    natural_dtype,
    place_on_disk,
    read_entry,
    read_source,
    require_finite,
    verified,
)
from wanloom.checkpoint.names import OPERATIONS
from wanloom.checkpoint.weights import Source, Weights, open_weights
from wanloom.errors import InputError
from wanloom.runtime.fp8 import E4M3, Fp8Compute, Fp8Linear
from wanloom.runtime.frozen import FrozenLinear
from wanloom.runtime.ggml import GgufLinear
from wanloom.runtime.int8 import Int8Compute, Int8Linear
from wanloom.runtime.quant import METHODS, block_linears, require

FP8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Packed:
    """How many layers were kept as the file has them, how many quantised on the way, and the bytes of both."""

    kept: int
    quantised: int
    bytes: int


def load_packed(
    module: nn.Module,
    weights: Weights | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    how: str | None = None,
    skip: Sequence[str] | None = None,
) -> Packed:
    """Fill a module (built on the meta device) with the tensors of a checkpoint, in place.

    how: a name of `runtime.quant.METHODS`; layers that the file has in that method's format are kept, others become
    it.  None keeps what the file has in few bits, in whatever format, and nothing else.  skip: a layer is loaded in
    full when its name in the module holds one of these; by default none for how=None, else as in `quantise`.  dtype:
    of everything else, as in `load_into`.  Errors: those of `load_into`, and E2039, E8009 of `quantise`; after one the
    module is as it was.
    """
    if how is not None:
        require(how, device)
    if not isinstance(weights, Weights):
        weights = open_weights(weights)
    targets = _targets(module, how, skip)
    plan = match_names(weights, {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})
    loaded: dict[str, Tensor] = {}
    layers: dict[str, FrozenLinear] = {}
    kept = 0

    def freezes(official: str) -> bool:
        return plan[official][0][0] in targets and (how is not None or keepable(weights.tensors[official]))

    def read(official: str) -> FrozenLinear | Tensor:
        source = weights.tensors[official]
        return (kept_layer(source, how) or _read(source, None)) if freezes(official) else _read(source, dtype)

    with verified(weights):
        ordered = sorted(plan, key=lambda official: place_on_disk(weights.tensors[official]))
        for official, found in ahead(ordered, read):
            (names, operation), source = plan[official], weights.tensors[official]
            if freezes(official):
                kept += isinstance(found, FrozenLinear)
                layer = found if isinstance(found, FrozenLinear) else METHODS[how or ""].layer.of(found, None)
                layers[targets[names[0]]] = _checked(source, layer).to(device)
                continue
            assert isinstance(found, Tensor)
            for name, value in zip(names, OPERATIONS[operation].out(found), strict=True):
                loaded[name] = _settled(source, value, dtype, device)
    with torch.no_grad():
        _put(module, layers, loaded)
    size = sum(tensor.nbytes for layer in layers.values() for tensor in layer.buffers())
    return Packed(kept, len(layers) - kept, size)


def _targets(module: nn.Module, how: str | None, skip: Sequence[str] | None) -> dict[str, str]:
    """Name in the state dict of the weight of a layer in a block -> the layer's own name.

    They differ where an adapter lets the state dict say published names.
    """
    if skip is None:
        names = block_linears(module, ()) if how is None else block_linears(module)
    else:
        names = block_linears(module, skip)
    owners = {id(module.get_submodule(name).weight): name for name in names}
    state = module.state_dict(keep_vars=True)
    return {key: owners[id(tensor)] for key, tensor in state.items() if id(tensor) in owners}


def _put(module: nn.Module, layers: Mapping[str, FrozenLinear], loaded: Mapping[str, Tensor]) -> None:
    """The layers into their places and all else into theirs."""
    for name, layer in layers.items():
        layer.bias = module.get_submodule(name).bias  # type: ignore[assignment]  # of the nn.Linear that goes
        module.set_submodule(name, layer)
    there = {name: tensor for name, tensor in module.state_dict().items() if name not in loaded}
    module.load_state_dict({**there, **loaded}, strict=True, assign=True)


def _checked(source: Source, layer: FrozenLinear) -> FrozenLinear:
    """E4010 for weights that are not finite."""
    if not layer.finite():
        entry = source.entries[0]
        raise InputError("E4010", f"{entry.file}: tensor {entry.name}: values are not finite ({entry.dtype}).")
    return layer


def _read(source: Source, dtype: torch.dtype | None) -> Tensor:
    """The values of a tensor; those of GGUF's blocks in `dtype` already."""
    if source.dtype in BLOCKS:
        return OPERATIONS[source.operation].into([read_blocks(entry, dtype) for entry in source.entries])
    return read_source(source)


def _settled(source: Source, value: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    """A tensor as the module is going to have it, with memory of its own.  Error: E4010."""
    natural = torch.bfloat16 if source.dtype in BLOCKS else natural_dtype(value.dtype)
    value = value.to(device=device, dtype=dtype or natural).contiguous()
    if value.nbytes != value.untyped_storage().nbytes():
        value = value.clone()
    require_finite(source, value)
    return value


# ---------------------------------------------------------------- layers from files


def holds_packed(weights: Weights) -> bool:
    """Whether a checkpoint has matrices in few bits."""
    return any(keepable(source) for source in weights.tensors.values())


def keepable(source: Source) -> bool:
    """Whether a file holds a matrix in few bits, in a form that a layer can keep."""
    if len(source.shape) != 2 or source.operation != "same":
        return False
    if source.dtype in BLOCKS:
        return source.shape[1] % BLOCKS[source.dtype][0] == 0
    return source.dtype in FP8 or (source.dtype == "I8" and source.scales[0] is not None)


def kept_layer(source: Source, how: str | None = None) -> FrozenLinear | None:
    """The linear layer, still without its bias, of a matrix as its file has it; None where that is not what `how` says.

    Its weights are the values that `read_source` gives: stored ones times their scale.
    """
    if not keepable(source):
        return None
    (entry,), (scale,) = source.entries, source.scales
    if source.dtype in BLOCKS:
        return GgufLinear(read_packed(entry).view(source.shape[0], -1), entry.dtype) if how is None else None
    if source.dtype == "I8":
        classes = {None: Int8Linear, "int8": Int8Linear, "int8-compute": Int8Compute}
        return classes[how](read_entry(entry), _row_scale(entry, scale)) if how in classes else None
    codes = read_entry(entry)
    if how is None or how == "fp8":
        return Fp8Linear(codes, _row_scale(entry, scale))
    if how == "fp8-compute" and codes.dtype == E4M3:
        return Fp8Compute(codes, _row_scale(entry, scale))
    return None


def _row_scale(entry: Entry, scale: Entry | None) -> Tensor:
    """A scale for each row, [out] float32, of one for all, one a row, or none (a plain cast)."""
    rows = entry.shape[0]
    if scale is None:
        return torch.ones(rows)
    return read_entry(scale).float().reshape(-1).expand(rows).clone()
