"""A transformer whose blocks stay in their files: where each tensor of a block lies, and reading it into given memory.

    with torch.device("meta"):
        dit = build_dit(config)
    source = load_streamed(dit, open_weights(path, kind="dit"), dtype=torch.bfloat16, device="cuda")
    dit.trunk = Streamed(dit.trunk, source, "cuda")          # runtime/streaming.py: calls source(block, tensors)

The checks are those of `load.py`, made at the same places: every tensor of the file has its place and every place its
tensor before anything is read; values are finite, looked at when a block is read for the first time; a file is the one
whose header was read, looked at after each block.  Reads are plain ones, for the reason given there, and so that what
the system keeps of a file does not count as this process's memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from wanloom.checkpoint.header import Entry, unchanged
from wanloom.checkpoint.load import (
    TORCH_DTYPES,
    dequantise,
    match_names,
    natural_dtype,
    place_on_disk,
    read_ahead,
    read_bytes,
    read_entry,
    read_source,
    require_digest,
    require_finite,
    verified,
)
from wanloom.checkpoint.weights import Source, Weights, open_weights
from wanloom.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)", re.ASCII)
TEXT_LAYER = re.compile(r"encoder\.block\.(\d+)\.(.+)", re.ASCII)  # of transformers' UMT5
# Values converted in one go.  Torch converts so few in the calling thread; with more it would start a second team of
# threads, which takes the processors from the team that computes.
PIECE = 2**14
LOOK = 2**18  # values looked at in one go by numpy, which has one thread

Files = dict[Path, FileIO]


@dataclass(frozen=True)
class FileBlocks:
    """Called with a block's number and its tensors (name in the block -> contiguous tensor on the host), fills these.

    Errors (InputError): E4001, E4006, E4011 for a file that was removed, cut, changed or is damaged, E4010 for values
    that are not finite.
    """

    weights: Weights
    places: Mapping[int, Mapping[str, Source]]  # block -> name in the block -> its values; in the order of the disk
    _finite: set[int] = field(default_factory=set, init=False)

    def __call__(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        sources = self.places[block]
        with ExitStack() as stack:
            files: Files = {}
            for name, source in sources.items():
                for entry in source.entries:
                    if entry.file not in files:
                        files[entry.file] = stack.enter_context(_open(entry.file))
                fill(tensors[name], source, files)
        for header in self.weights.headers:
            if header.path in files:
                unchanged(header.path, header.stamp)
        if block not in self._finite:
            for name, source in sources.items():
                check_finite(source, tensors[name])
                if source.entries[0].sha256 is not None:
                    require_digest(source.entries[0], _bytes(tensors[name]))
            self._finite.add(block)


def load_streamed(
    module: nn.Module,
    weights: Weights | Path,
    *,
    dtype: torch.dtype | Callable[[str], torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    block: re.Pattern[str] = BLOCK,
) -> FileBlocks:
    """`load_into` for a transformer whose blocks are streamed: fills, in place, what is outside of them.

    block: what the module's own names in a block look like: its number, and the name in it.
    Returned is the source of the blocks, which stay on the meta device in the dtypes they are going to have.  Errors:
    those of `load_into`; those of values in the blocks come when these are read.
    """
    import torch

    if not isinstance(weights, Weights):
        weights = open_weights(Path(weights), kind="dit")

    def target(name: str, stored: torch.dtype) -> torch.dtype:
        return dtype(name) if callable(dtype) else dtype or natural_dtype(stored)

    inside, outside = _divide(module, weights, block)
    loaded: dict[str, Tensor] = {}
    with verified(weights):
        for name, value in read_ahead(outside):
            value = value.to(device=device, dtype=target(name, value.dtype)).contiguous()
            require_finite(outside[name], value)
            loaded[name] = value
    with torch.no_grad():
        module.load_state_dict(loaded, strict=False, assign=True)
    state = module.state_dict(keep_vars=True)
    for name, (_, _, source) in inside.items():
        plain = source.scales[0] is None and source.dtype in TORCH_DTYPES
        stored = getattr(torch, TORCH_DTYPES[source.dtype]) if plain else torch.float32
        state[name].data = torch.empty_like(state[name], dtype=target(name, stored))  # still on the meta device
    return file_blocks(module, weights, block)


def file_blocks(module: nn.Module, weights: Weights, block: re.Pattern[str] = BLOCK) -> FileBlocks:
    """The source of a transformer's blocks in these files; nothing is read.  Errors: those of names and shapes."""
    places: dict[int, dict[str, Source]] = {}
    for number, inner, source in _divide(module, weights, block)[0].values():
        places.setdefault(number, {})[inner] = source
    return FileBlocks(weights, places)


def _divide(
    module: nn.Module, weights: Weights, block: re.Pattern[str]
) -> tuple[dict[str, tuple[int, str, Source]], dict[str, Source]]:
    """The module's published names -> (block, name in the block, values) of those in blocks; -> values of all others.

    Both in the order of the disk.  A part that an adapter put into a block may be published under any name.
    """
    state = module.state_dict(keep_vars=True)
    own = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    inside: dict[str, tuple[int, str, Source]] = {}
    outside: dict[str, Source] = {}
    plan = match_names(weights, {name: tuple(tensor.shape) for name, tensor in state.items()})
    for official in sorted(plan, key=lambda official: place_on_disk(weights.tensors[official])):
        (name,), operation = plan[official]
        assert operation == "same", "a transformer's module has the official tensors"
        found = block.fullmatch(own[id(state[name])])
        if found:
            inside[name] = int(found[1]), found[2], weights.tensors[official]
        else:
            outside[name] = weights.tensors[official]
    return inside, outside


# ---------------------------------------------------------------- values


def fill(target: Tensor, source: Source, files: Files) -> None:
    """Write the values of one official tensor into `target` [shape], in its dtype: the bits that `load_into` makes.

    What has to be converted is so in small pieces, so that no second copy of a tensor is ever there.
    """
    import torch

    entry, scale = source.entries[0], source.scales[0]
    odd = source.operation != "same" or entry.stride is not None  # no transformer that was published has such a tensor
    if odd or entry.dtype not in TORCH_DTYPES:  # GGUF's blocks
        target.copy_(read_source(source))
        return
    stored = getattr(torch, TORCH_DTYPES[entry.dtype])
    if scale is None and stored == target.dtype:
        _read(files[entry.file], entry, 0, target)
        return
    factor = None if scale is None else read_entry(scale)
    rows = target.view(-1, 1) if factor is None else target.view(target.shape[0], -1)
    width = rows.shape[1]
    step = max(1, PIECE // width)
    room = torch.empty(step, width, dtype=stored)
    for first in range(0, rows.shape[0], step):
        part = rows[first : first + step]
        value = room[: part.shape[0]]
        _read(files[entry.file], entry, first * width * stored.itemsize, value)
        if factor is not None:
            value = dequantise(value, factor if factor.numel() == 1 else factor[first : first + step])
        part.copy_(value)


def check_finite(source: Source, value: Tensor) -> None:
    """`require_finite`, told by the exponents: in this thread, without a copy in another dtype."""
    import torch

    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.itemsize]
    mask = torch.tensor([torch.inf], dtype=value.dtype).view(integer).item()
    bits = value.view(-1).view(integer).numpy()
    for first in range(0, bits.size, LOOK):
        if (bits[first : first + LOOK] & mask).max() == mask:
            require_finite(source, value)


def _open(file: Path) -> FileIO:
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise InputError("E4001", f"{file}: cannot be read ({error.strerror}).") from error


def _read(file: FileIO, entry: Entry, at: int, target: Tensor) -> None:
    """Fill `target` with the bytes of a stored tensor from byte `at` on.  Errors: E4001, E4006."""
    try:
        read_bytes(file, entry, at, _bytes(target))
    except OSError as error:
        raise InputError("E4001", f"{entry.file}: cannot be read ({error.strerror}).") from error


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    import torch

    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # as in load.read_entry
