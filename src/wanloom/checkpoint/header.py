"""What is in a weight file, read from its first bytes and trusted in nothing.

A safetensors file is eight bytes of length, a JSON header (name -> dtype, shape, offsets) and the raw tensors.  The
usual library accepts duplicate names, headers of hundreds of megabytes and reused offsets, so the header is read here,
by our own rules, and the tensors are later read from the places checked here.  No torch: a checkpoint can be surveyed
in milliseconds.

Reading costs at most 8 MiB and never more than the file has.  Errors (InputError, exit 4): E4001 no such file, E4002 a
pickle, E4004 truncated header, E4005 impossible header, E4006 wrong file size, E4007 a tensor that does not fit, E4008
a name twice, E4009 unknown dtype, E4012 not a weight file at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanloom.errors import InputError

MAX_HEADER = 8 * 2**20  # the largest published header has 0.2 MB
MAX_TENSORS = 20_000  # the largest published model has 1 633
MAX_RANK = 8
MAX_NAME = 256

# Bytes of one value; the spellings are safetensors'.
DTYPES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
UNFINISHED = (".part", ".incomplete", ".crdownload", ".download", ".tmp")
# How files that only stand in for weights begin, and what to call them.
IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"<!doctype", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<?xml", "an XML page"),
    (b"{\"error\"", "an error message of a server"),
    (b"PK\x03\x04", "a zip archive or a pickle"),
    (b"GGUF", "a GGUF file"),
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One stored tensor: `size` bytes at `offset` of `file`.

    `stride` (in values) is given only by pickles whose tensor is a view that is not contiguous; its values then lie
    somewhere in these bytes.  `sha256` is given where somebody recorded what the bytes must be.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int
    stride: tuple[int, ...] | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Stamp:
    """What tells a file from its successor under the same name."""

    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class Header:
    """The table of contents of a weight file; `start` is where the tensors begin."""

    path: Path
    stamp: Stamp
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    start: int = 0


def stamp(path: Path) -> Stamp:
    """Size, time and inode of a file.  Errors: E4001."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError("E4001", f"{path}: cannot be read ({error.strerror}).") from error
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


def refuse_impostor(path: Path, first: bytes) -> None:
    """E4012 for what is no weight file: unfinished downloads, Git LFS pointers, web pages."""
    if path.suffix.lower() in UNFINISHED:
        raise InputError("E4012", f"{path}: not a weight file (looks like an unfinished download).")
    text = first.lstrip().lower() if first[:1] in b"<\n\r\t " else first
    for begin, what in IMPOSTORS:
        if text.startswith(begin):
            raise InputError("E4012", f"{path}: not a weight file (looks like {what}).")


def read_header(path: Path) -> Header:
    """The checked table of contents of a safetensors file.  Errors: see the module."""
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise InputError("E4002", f"{path}: a pickle, which can hold code. Run: wanloom convert {path} DIR")
    before = stamp(path)
    try:
        with path.open("rb") as file:
            first = file.read(64)
            refuse_impostor(path, first)
            if before.size < 8:
                raise InputError("E4004", f"{path}: truncated header ({before.size} bytes, expected at least 8).")
            length = int.from_bytes(first[:8], "little")
            if length > MAX_HEADER or length < 2:
                raise InputError("E4005", f"{path}: header of {length} bytes, expected 2 to {MAX_HEADER}.")
            if 8 + length > before.size:
                raise InputError(
                    "E4004", f"{path}: truncated header ({before.size - 8} bytes left of {length} announced)."
                )
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise InputError("E4001", f"{path}: cannot be read ({error.strerror}).") from error
    if len(raw) != length:
        raise InputError("E4004", f"{path}: truncated header ({len(raw)} bytes of {length}).")
    table = _parse(path, raw)
    metadata = _metadata(path, table.pop("__metadata__", {}))
    if len(table) > MAX_TENSORS:
        raise InputError("E4005", f"{path}: {len(table)} tensors, expected at most {MAX_TENSORS}.")
    start = 8 + length
    entries = {name: _entry(path, name, value, start) for name, value in table.items()}
    _check_tiling(path, entries, start, before.size)
    return Header(path, before, entries, metadata, start)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    """The header's JSON object.  Counts come first, so that a bloated one is refused before it becomes objects."""
    most = {b"data_offsets": 1, b"{": 2, b"[": 4, b":": 5, b",": 32}  # a tensor; shapes have up to eight numbers
    if any(raw.count(sign) > count * MAX_TENSORS for sign, count in most.items()):
        raise InputError("E4005", f"{path}: the header lists more than {MAX_TENSORS} tensors can fill.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise InputError("E4008", f"{path}: the header names {ascii(twice)[:80]} twice.")
        return table

    try:
        table = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise InputError("E4005", f"{path}: the header is not valid JSON.") from error
    if not isinstance(table, dict):
        raise InputError("E4005", f"{path}: the header is not a JSON object.")
    return table


def _refuse_constant(text: str) -> None:
    raise ValueError(text)  # NaN and Infinity are not JSON


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise InputError("E4005", f"{path}: __metadata__ must map text to text.")
    return value


def _entry(path: Path, name: str, value: object, start: int) -> Entry:
    """One line of the header as an Entry, each field checked."""
    shown = ascii(name)[1:-1][:80]
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise InputError("E4007", f"{path}: tensor {shown}: a name must be 1 to {MAX_NAME} printable characters.")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputError("E4007", f"{path}: tensor {shown}: expected dtype, shape and data_offsets.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError("E4009", f"{path}: tensor {shown}: unknown dtype {ascii(dtype)[:40]}.")
    if not _numbers(shape) or len(shape) > MAX_RANK:
        raise InputError("E4007", f"{path}: tensor {shown}: the shape must be at most {MAX_RANK} natural numbers.")
    if not _numbers(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise InputError("E4007", f"{path}: tensor {shown}: data_offsets must be two rising numbers.")
    size = DTYPES[dtype]
    for length in shape:
        size *= length
    if size != offsets[1] - offsets[0]:
        raise InputError(
            "E4007",
            f"{path}: tensor {shown}: {dtype} {list(shape)!s:.80} takes {size:.6g} bytes, "
            f"the offsets leave {offsets[1] - offsets[0]:.6g}.",
        )
    return Entry(name, dtype, tuple(shape), path, start + offsets[0], size)


def _numbers(value: object) -> bool:
    """Whether it is a list of natural numbers that 63 bits can hold (True is no number here)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_tiling(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """The tensors must lie one after the other, with nothing between, and end where the file ends."""
    end = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.size)):
        if entry.offset != end:
            fault = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            raise InputError("E4007", f"{path}: tensor {ascii(entry.name)[1:-1][:80]}: {fault}.")
        end += entry.size
    if end != size:
        raise InputError("E4006", f"{path}: expected {end} bytes, found {size}.")


def unchanged(path: Path, before: Stamp) -> None:
    """E4011 when the file is not the one that was looked at: removed, swapped or rewritten meanwhile."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError("E4001", f"{path}: was removed while it was read.") from error
    if Stamp(status.st_size, status.st_mtime_ns, status.st_ino) != before:
        raise InputError("E4011", f"{path}: changed while it was read. Run again when nothing writes to it.")
