"""Wide checkpoints, narrowed once: float32 files become one file in the number format of the runs, in the user's cache.

    load_into_narrowed(dit, weights, dtype=torch.bfloat16, device="cuda")      # `load.load_into`, the same bits
    source = load_streamed_narrowed(dit, weights, dtype=..., device="cuda")    # `blocks.load_streamed`, the same bits

The transformers of A14B are published in float32, 57 GB an expert, and computed in bfloat16: every run reads twice the
bytes that it keeps.  The first run writes what it keeps, and later ones read that.  It is done where it pays (`pays`)
and where there is room; whatever goes wrong with it costs a warning (W5006, W4011), and the checkpoint itself is read.

**Which weights.**  Hashing 57 GB would take longer than it saves, so a file is known by its size, the SHA-256 that a
manifest beside it records (without one: its time), and every tensor's name, form, place and 4096 bytes from its middle.
Another training changes all of these samples, a swapped shard or another conversion the table, and an edit that no
sample shows still moves the time.  Where a manifest speaks, the whole file is held against it before what was made of
it is kept.  Paths do not matter: a checkpoint that was moved is known again.

**Whether it is whole.**  A folder appears under its name complete or not at all, and one process at a time makes one;
another that comes meanwhile reads the checkpoint.  `table.json` beside the file has the digest of the file's header and
the SHA-256 of each tensor.  All are compared once after writing, and again in each run as the tensors are read, by the
threads that read them: a file of this size hashed as a whole would take longer than reading it.

Files are read, not mapped, for the reason given in `load.py`: on a disk of the network another machine may delete what
this one has mapped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from wanloom.checkpoint import manifest
from wanloom.checkpoint.blocks import FileBlocks, file_blocks, load_streamed
from wanloom.checkpoint.documents import read_json
from wanloom.checkpoint.header import Header
from wanloom.checkpoint.load import ahead, load_into, read_ahead, read_source, verified
from wanloom.checkpoint.weights import Source, Weights, open_weights
from wanloom.checkpoint.write import NAMES, Item, write_file
from wanloom.durable import atomic_folder, discard, sweep, write_atomic
from wanloom.errors import InputError, WanloomWarning
from wanloom.runtime import machine
from wanloom.store import LOCK, Store, home

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")

FORMAT = 1  # of a folder; raised when other bytes are written for the same weights
SETTING = "WANLOOM_NARROWED"  # gigabytes that all folders may take together; 0: none is made or read
LIMIT = 120.0  # gigabytes: two models of two experts
WORTH = 2**31  # bytes of a model below which reading it takes no time that anybody would notice
GAIN = 1.5  # the file must be smaller by this
SPARE = 10**10  # bytes of the disk that stay free: videos are to be written, too
SAMPLE = 4096  # bytes of every tensor that decide which weights these are
PLAIN = ("F64", "F32", "F16", "BF16")
FILE, TABLE = "model.safetensors", "table.json"


def load_into_narrowed(
    module: nn.Module, weights: Weights, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """`load_into`, from the narrowed file where there is one or it pays to make it.  Errors: those of `load_into`."""
    _load(weights, dtype, lambda source: load_into(module, source, dtype=dtype, device=device))


def load_streamed_narrowed(
    module: nn.Module, weights: Weights, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Blocks:
    """`load_streamed` in the same way.  Should the narrowed file go or be damaged later, the checkpoint is read."""

    def load(source: Weights) -> Blocks:
        blocks = load_streamed(module, source, dtype=dtype, device=device)
        return Blocks(blocks, None if source is weights else file_blocks(module, weights))

    return _load(weights, dtype, load)


class Blocks:
    """`FileBlocks` with others of the same values behind them, in place of the first from its first fault on."""

    def __init__(self, first: FileBlocks, instead: FileBlocks | None) -> None:
        self._now, self._instead = first, instead

    def __call__(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        try:
            self._now(block, tensors)
        except InputError as error:
            if self._instead is None:
                raise
            _drop(self._now.weights.path.parent, error)
            self._now, self._instead = self._instead, None
            self._now(block, tensors)


def _load(weights: Weights, dtype: torch.dtype, load: Callable[[Weights], T]) -> T:
    """What `load` makes of the narrowed weights, made anew where they are damaged, else of the weights themselves."""
    for _ in range(2):
        narrowed = find_or_make(weights, dtype)
        if narrowed is None:
            break
        try:
            return load(narrowed)
        except InputError as error:
            _drop(narrowed.path.parent, error)
    return load(weights)


# ---------------------------------------------------------------- whether, and which


def pays(weights: Weights, dtype: torch.dtype) -> bool:
    """Whether a model is large, plain (not in few bits), and much wider than it is going to be."""
    sources = weights.tensors.values()
    if any(source.dtype not in PLAIN or any(source.scales) for source in sources):
        return False
    return WORTH <= sum(source.size for source in sources) >= GAIN * _bytes_in(weights, dtype)


def limit() -> int:
    """Bytes that narrowed weights may take together; 0, and W5006, for a setting that is no number of gigabytes."""
    said = os.environ.get(SETTING, str(LIMIT))
    try:
        gigabytes = float(said)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < 2**32:
        _warn("W5006", f"{SETTING}: got '{said}', expected a number of gigabytes. Weights are not kept.")
        return 0
    return round(gigabytes * 1e9)


def key_of(weights: Weights, dtype: torch.dtype) -> str:
    """What a folder is called: which weights these are, and what becomes of them; see the module."""
    digest = hashlib.sha256(f"{FORMAT} {dtype} {weights.kind}".encode())
    for header in weights.headers:
        recorded = manifest.recorded(header.path)
        mark = header.stamp.mtime_ns if recorded is None else recorded.sha256
        digest.update(f"{header.stamp.size} {mark} {_digest(header)}".encode())
        with header.path.open("rb") as file:
            for entry in sorted(header.entries.values(), key=lambda entry: entry.offset):
                file.seek(entry.offset + max(0, entry.size - SAMPLE) // 2)
                digest.update(file.read(min(SAMPLE, entry.size)))
    for official, source in sorted(weights.tensors.items()):
        digest.update(f"{official} {source.operation} {[entry.name for entry in source.entries]}".encode())
    return digest.hexdigest()


def _digest(header: Header) -> str:
    """The digest of a table of contents."""
    rows = [(e.name, e.dtype, e.shape, e.offset, e.size, e.stride) for e in header.entries.values()]
    return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()


def _bytes_in(weights: Weights, dtype: torch.dtype) -> int:
    return sum(prod(source.shape) for source in weights.tensors.values()) * dtype.itemsize


# ---------------------------------------------------------------- finding and making


def find_or_make(weights: Weights, dtype: torch.dtype) -> Weights | None:
    """The narrowed weights under the official names; None where the weights themselves are to be read.

    Warnings: W5006 they could not be kept, W5003 they are kept from now on, W4011 they were damaged.
    """
    if not pays(weights, dtype):
        return None
    store = Store("weights", limit=limit(), suffix="")
    if store.limit == 0:
        return None
    try:
        folder = store.path(key_of(weights, dtype))
        if folder.is_dir():
            try:
                return _open(folder, weights.kind)
            except InputError as error:
                _drop(folder, error)
        return _make(store, folder, weights, dtype)
    except (OSError, InputError) as error:
        if not isinstance(error, InputError) or error.code.startswith("E5"):  # others are said when they are read
            why = error.message if isinstance(error, InputError) else f"{error}."
            _warn("W5006", f"weights: not kept in {8 * dtype.itemsize} bits: {why} They are read as they are.")
    return None


def _open(folder: Path, kind: str) -> Weights:
    """The weights in a folder, each tensor with its digest.  Errors: E4... for a folder that is damaged."""
    table = read_json(folder / TABLE, code="E4011")
    found = open_weights(folder / FILE, kind=kind)
    (header,) = found.headers
    said = table.get("sha256") if isinstance(table, dict) else None
    if not isinstance(said, dict) or table.get("header") != _digest(header) or said.keys() != found.tensors.keys():
        raise InputError("E4011", f"{folder / TABLE}: does not belong to {FILE}.")

    def marked(source: Source) -> Source:
        (entry,) = source.entries
        return replace(source, entries=(replace(entry, sha256=str(said[entry.name])),))

    with suppress(OSError):  # a cache that may only be read
        os.utime(folder)
    return replace(found, tensors={name: marked(source) for name, source in found.tensors.items()})


def _make(store: Store, folder: Path, weights: Weights, dtype: torch.dtype) -> Weights | None:
    """Write a folder; None while another process writes one.  Errors: E5003, E5001, OSError; those of the weights."""
    size = _bytes_in(weights, dtype)
    free, place = machine.disk_free(home()), folder.parent
    if size > store.limit:
        raise InputError("E5003", f"{size / 1e9:.1f} GB are above the limit of {store.limit / 1e9:g} GB ({SETTING}).")
    if size + SPARE > free:
        needed = f"{size / 1e9:.1f} GB and {SPARE / 1e9:.0f} GB to spare"
        raise InputError("E5003", f"they take {needed}, {free / 1e9:.1f} GB are free in {home()}.")
    store.open()
    with _alone(place) as alone:
        if not alone:
            return None
        if not folder.is_dir():  # else another process has just made it
            sweep(place)
            with atomic_folder(folder) as part:
                _write(part, weights, dtype)
            store.trim()
            text = f"weights: kept in {dtype.itemsize * 8} bits from now on, {size / 1e9:.1f} GB in {place}"
            _warn("W5003", f"{text}; `wanloom doctor --cache clear` deletes them.")
    return _open(folder, weights.kind)


def _write(part: Path, weights: Weights, dtype: torch.dtype) -> None:
    """The file and its table in a folder, read again as it will be.  In memory are the few tensors read ahead."""
    digests: dict[str, str] = {}
    word = NAMES[str(dtype).removeprefix("torch.")]

    def read(name: str) -> Tensor:
        import torch

        value = read_source(weights.tensors[name]).to(dtype).contiguous()
        raw = memoryview(value.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # as in load.read_entry
        digests[name] = hashlib.sha256(raw).hexdigest()
        return value

    def take(name: str, values: Iterator[tuple[str, Tensor]]) -> Tensor:
        found, value = next(values)
        assert found == name, "a file of one number format is written in the order of names"
        return value

    with verified(weights), closing(ahead(sorted(weights.tensors), read)) as values:
        shapes = weights.shapes.items()
        items = [Item(name, word, shape, partial(take, name, values)) for name, shape in shapes]
        write_file(part / FILE, items, weights.metadata)
    (header,) = open_weights(part / FILE, kind=weights.kind).headers
    text = json.dumps({"format": FORMAT, "header": _digest(header), "sha256": digests})
    write_atomic(part / TABLE, text.encode())
    for _ in read_ahead(_open(part, weights.kind).tensors):
        pass


@contextmanager
def _alone(place: Path) -> Iterator[bool]:
    """Whether this process is the only one that writes here, for as long as the block lasts."""
    handle = os.open(place / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _drop(folder: Path, error: InputError) -> None:
    """Say that a folder is damaged, and delete it."""
    why = error.message.rstrip(".")
    _warn("W4011", f"weights: what was kept of them cannot be used ({why}). The checkpoint is read again.")
    with suppress(OSError):
        discard(folder)


def _warn(code: str, text: str) -> None:
    warnings.warn(WanloomWarning(f"{code}: {text}"), stacklevel=3)
