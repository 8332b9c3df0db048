"""GGUF files: transformers as ComfyUI-GGUF names them (the published names), text encoders as llama.cpp names them.

A GGUF file is a magic word, counts, metadata (key -> value), one line for each tensor (name, sizes fastest first,
number format, offset), and the tensors.  Text encoders have their tokenizer in the metadata, a quarter of a million
strings; these are walked over, for which the usual library takes many seconds, and without bounds.  So the header is
read here, by rules like those of `header.py`: every count is held against what the file still has before anything is
made of it.  The number formats are in `runtime/ggml.py`.

    header = read_gguf(path)                       # names and shapes as safetensors would have them
    weights = open_gguf(path, kind="dit")          # what `open_weights` gives of other files

Errors (InputError, exit 4): E4001 no such file, E4004 truncated header, E4005 a header that cannot be, E4006 wrong file
size, E4007 a tensor that does not fit, E4008 a name twice, E4009 a number format that is not read, E4012 no GGUF file,
E4013 one part of a split file, or a tensor without a place; E4016 / E4020 another model.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from wanloom.checkpoint.header import MAX_NAME, MAX_RANK, MAX_TENSORS, Entry, Header, Stamp, refuse_impostor, stamp
from wanloom.checkpoint.names import Format, Rule, format_of
from wanloom.checkpoint.weights import FLOATS, KINDS, Source, Weights, few
from wanloom.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 64 * 2**20  # bytes; UMT5's tokenizer takes 8 MB
MAX_KEYS = 2 * MAX_TENSORS  # a converter may note each tensor's shape
MAX_STRINGS = 600_000  # in lists; UMT5 has 256 384 tokens
MAX_TEXT = 2**16  # bytes of a text that is kept
MAX_ALIGNMENT = 2**20
ALIGNMENT = 32  # where a file says nothing
WINDOW = 2**20  # bytes read ahead

# Types of metadata: how struct reads them, by their number in the file.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, LIST = 8, 9
SHAPE_KEY = "comfy.gguf.orig_shape."  # the shape of a tensor that was stored flattened, slowest first

# Number formats of tensors: name, values in a block, bytes of a block, by their number in the file.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}  # fmt: skip
BLOCKS = {name: (values, size) for name, values, size in TYPES.values() if values > 1}
# Those that are known and not read, for the message.
REFUSED = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

TEXT_NAMES = {
    "token_embedding.weight": "token_embd.weight",
    "norm.weight": "enc.output_norm.weight",
    "blocks.{i}.norm1.weight": "enc.blk.{i}.attn_norm.weight",
    "blocks.{i}.attn.{x:q|k|v|o}.weight": "enc.blk.{i}.attn_{x:q|k|v|o}.weight",
    "blocks.{i}.pos_embedding.embedding.weight": "enc.blk.{i}.attn_rel_b.weight",
    "blocks.{i}.norm2.weight": "enc.blk.{i}.ffn_norm.weight",
    "blocks.{i}.ffn.gate.0.weight": "enc.blk.{i}.ffn_gate.weight",
    "blocks.{i}.ffn.fc1.weight": "enc.blk.{i}.ffn_up.weight",
    "blocks.{i}.ffn.fc2.weight": "enc.blk.{i}.ffn_down.weight",
}
TEXT_LLAMA = Format(
    "text",
    "llama.cpp",
    ("token_embd.weight", "enc.blk.0.attn_q.weight"),
    tuple(Rule(official, (foreign,)) for official, foreign in TEXT_NAMES.items()),
)


# ---------------------------------------------------------------- one model


def open_gguf(path: Path, *, kind: str | None = None) -> Weights:
    """The weights in a GGUF file under the official names; `kind` (dit, text) refuses other models by name.

    Tensors in blocks have their format (Q4_K, say) as the dtype of their entries; `read_blocks` reads them.
    """
    header = read_gguf(Path(path))
    path, entries = header.path, dict(header.entries)
    found = (TEXT_LLAMA, "") if all(name in entries for name in TEXT_LLAMA.telling) else format_of(entries)
    if found is None:
        first = ascii(min(entries, default="none"))[1:-1][:80]
        raise InputError("E4016", f"{path}: not a Wan model ({len(entries)} tensors, the first is {first}).")
    format_, prefix = found
    if kind is not None and format_.kind != kind:
        code = {"vae": "E4017", "text": "E4020"}.get(kind, "E4016")
        raise InputError(code, f"{path}: this is a {KINDS[format_.kind]}, expected a {KINDS[kind]}.")
    tensors, ignored = _translate(path, format_, {name.removeprefix(prefix): row for name, row in entries.items()})
    return Weights(path=path, format=format_, headers=(header,), tensors=tensors, ignored=ignored)


def _translate(path: Path, format_: Format, entries: Mapping[str, Entry]) -> tuple[dict[str, Source], tuple[str, ...]]:
    """Entries under their names -> official sources, and the names that were left out on purpose."""
    aliases = {second: first for first, second in format_.aliases}
    tensors: dict[str, Source] = {}
    ignored, strangers = [], []
    for name, entry in entries.items():
        official = format_.official(aliases.get(name, name))
        if format_.ignores(name) or aliases.get(name) in entries:  # the same under its first name
            ignored.append(name)
        elif official is None or official[2] != "same":
            strangers.append(name)
        elif entry.dtype not in (*FLOATS, *BLOCKS):
            raise InputError("E4009", f"{path}: tensor {name}: {entry.dtype} values are not weights.")
        else:
            tensors[official[0]] = Source(entry.shape, (entry,), (None,))
    if strangers:
        raise InputError("E4013", f"{path}: {len(strangers)} tensors that are not read from GGUF: {few(strangers)}.")
    return tensors, tuple(ignored)


# ---------------------------------------------------------------- the header


def read_gguf(path: Path) -> Header:
    """The checked table of contents of a GGUF file.  Errors: see the module."""
    path = Path(path)
    before = stamp(path)
    try:
        with path.open("rb") as file:
            walk = _Walk(path, before, file)
            return walk.header()
    except OSError as error:
        raise InputError("E4001", f"{path}: cannot be read ({error.strerror}).") from error


@dataclass(frozen=True)
class _Line:
    """What the header says of a tensor."""

    name: str
    dtype: str
    sizes: tuple[int, ...]  # slowest first, as everywhere but in the file
    offset: int  # from where the tensors begin
    size: int


class _Walk:
    """A way through the header of a file, from its first byte on, that never asks for more than is there."""

    def __init__(self, path: Path, before: Stamp, file: BufferedReader) -> None:
        self._path, self._stamp, self._file = path, before, file
        self._data, self._at = b"", 0  # what was read so far, and where we are in it
        self._strings = 0

    def header(self) -> Header:
        first = self._file.peek(64)[:64]
        if first[:4] != MAGIC:
            refuse_impostor(self._path, first)
            raise InputError("E4012", f"{self._path}: not a GGUF file (it does not begin with GGUF).")
        self._take(4)
        version = self._number("I")
        if version not in VERSIONS:
            raise self._impossible(f"version {version}, expected {VERSIONS[0]} or {VERSIONS[1]} (little-endian)")
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            raise self._impossible(f"{tensors} tensors and {keys} keys, expected at most {MAX_TENSORS} and {MAX_KEYS}")
        notes, shapes = self._metadata(keys)
        if notes.get("split.count", "0") not in ("0", "1"):
            raise InputError("E4013", f"{self._path}: one part of a split file. Join them with `llama-gguf-split`.")
        lines: dict[str, _Line] = {}
        for _ in range(tensors):
            line = self._line()
            if line.name in lines:
                raise InputError("E4008", f"{self._path}: the header names {ascii(line.name)[:80]} twice.")
            lines[line.name] = line
        alignment = self._alignment(notes)
        start = -(-self._at // alignment) * alignment
        self._check_tiling(lines, start, alignment)
        entries = {name: self._entry(line, shapes.get(name), start) for name, line in lines.items()}
        return Header(self._path, self._stamp, entries, notes, start)

    # ------------------------------------------------------------ metadata

    def _metadata(self, keys: int) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
        """Single values as text, and the shapes that were noted of tensors; all other lists are passed over."""
        notes: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for _ in range(keys):
            key, type_ = self._text(MAX_NAME + len(SHAPE_KEY)), self._number("I")
            name = key.removeprefix(SHAPE_KEY)
            if key in notes or name in shapes:
                raise InputError("E4008", f"{self._path}: the header names {ascii(key)[:80]} twice.")
            if type_ == STRING:
                notes[key] = self._text(MAX_TEXT, cut=True)
            elif type_ == LIST:
                numbers = self._list(keep=name != key)
                if name != key:
                    shapes[name] = numbers
            else:
                notes[key] = str(self._number(self._scalar(type_)))
        return notes, shapes

    def _list(self, *, keep: bool) -> tuple[int, ...]:
        """A list of numbers or texts; its numbers when they are whole ones to be kept, else nothing."""
        type_, count = self._number("I"), self._number("Q")
        if type_ == STRING:
            self._pass_texts(count)
            return ()
        code = self._scalar(type_)
        raw = self._take(count * struct.calcsize("<" + code))
        if not keep:
            return ()
        if count > MAX_RANK or code in "fd?":
            raise self._impossible("the noted shape of a tensor is none")
        return struct.unpack(f"<{count}{code}", raw)

    def _pass_texts(self, count: int) -> None:
        """Go past so many texts."""
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise self._impossible(f"lists of {self._strings:.6g} texts, expected at most {MAX_STRINGS}")
        length, at = struct.Struct("<Q").unpack_from, self._at
        for _ in range(count):
            if at + 8 > len(self._data):
                self._read_up_to(at + 8)
            at += 8 + length(self._data, at)[0]
        self._read_up_to(at)
        self._at = at

    def _scalar(self, type_: int) -> str:
        if type_ not in SCALARS:
            raise self._impossible(f"metadata of the unknown type {type_}")
        return SCALARS[type_]

    def _alignment(self, notes: Mapping[str, str]) -> int:
        said = notes.get("general.alignment", str(ALIGNMENT))
        alignment = int(said) if said.isdecimal() and len(said) < 10 else 0
        if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._impossible(f"an alignment of {said[:20]}, expected a power of two")
        return alignment

    # ------------------------------------------------------------ tensors

    def _line(self) -> _Line:
        """The next line of the table, each field checked."""
        name = self._text(MAX_NAME)
        shown = ascii(name)[1:-1][:80]
        if not name or not name.isprintable():
            raise self._misfit(shown, f"a name must be 1 to {MAX_NAME} printable characters")
        rank = self._number("I")
        if rank > MAX_RANK:
            raise self._misfit(shown, f"{rank} dimensions, expected at most {MAX_RANK}")
        sizes = tuple(self._number("Q") for _ in range(rank))[::-1]
        type_, offset = self._number("I"), self._number("Q")
        if type_ not in TYPES:
            raise InputError(
                "E4009",
                f"{self._path}: tensor {shown}: {REFUSED.get(type_, f'number format {type_}')} is not read. "
                f"There are: {', '.join(sorted(row[0] for row in TYPES.values()))}.",
            )
        dtype, values, size = TYPES[type_]
        if any(length >= 2**63 for length in sizes) or (values > 1 and (not sizes or sizes[-1] % values)):
            raise self._misfit(shown, f"{dtype} {list(sizes)!s:.80} is no whole number of blocks")
        return _Line(name, dtype, sizes, offset, prod(sizes) // values * size)

    def _entry(self, line: _Line, shape: tuple[int, ...] | None, start: int) -> Entry:
        """A tensor in the shape that was noted of it, where one was."""
        if shape is not None and (any(length < 0 for length in shape) or prod(shape) != prod(line.sizes)):
            raise self._misfit(
                ascii(line.name)[1:-1][:80], f"shape {list(line.sizes)}, noted as {list(shape)}: not as many values"
            )
        return Entry(line.name, line.dtype, shape or line.sizes, self._path, start + line.offset, line.size)

    def _check_tiling(self, lines: Mapping[str, _Line], start: int, alignment: int) -> None:
        """Tensors must lie one after the other, each at the next multiple of the alignment, to the end of the file."""
        end = start if lines else self._at
        for line in sorted(lines.values(), key=lambda line: (line.offset, line.size)):
            at = -(-end // alignment) * alignment
            if start + line.offset != at:
                fault = "overlaps the tensor before it" if start + line.offset < at else "leaves a gap before it"
                raise self._misfit(ascii(line.name)[1:-1][:80], fault)
            end = at + line.size
        found = self._stamp.size
        if not end <= found < end + alignment:  # the last one may be filled up as well
            raise InputError("E4006", f"{self._path}: expected {end} bytes, found {found}.")

    # ------------------------------------------------------------ bytes

    def _take(self, count: int) -> bytes:
        """The next bytes."""
        begin, self._at = self._at, self._at + count
        self._read_up_to(self._at)
        return self._data[begin : self._at]

    def _read_up_to(self, end: int) -> None:
        """E4004 when the file has not as many bytes, E4005 when the header would be too large."""
        if end > self._stamp.size:
            raise InputError("E4004", f"{self._path}: truncated header, or one that asks for more than the file has.")
        if end > MAX_HEADER:
            raise self._impossible(f"more than {MAX_HEADER} bytes")
        while len(self._data) < end:
            more = self._file.read(max(WINDOW, len(self._data), end - len(self._data)))
            if not more:
                raise InputError("E4004", f"{self._path}: truncated header ({len(self._data)} bytes).")
            self._data += more

    def _number(self, code: str) -> int:
        """The next number of a struct code (a float's text is what is wanted of it)."""
        value: int = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]
        return value

    def _text(self, most: int, *, cut: bool = False) -> str:
        """The next text, of at most so many bytes; a longer one is an error, or cut."""
        length = self._number("Q")
        if length > most and not cut:
            raise self._impossible(f"a name of {length:.6g} bytes, expected at most {most}")
        try:
            return self._take(length)[:most].decode(errors="ignore" if cut else "strict")
        except UnicodeDecodeError as error:
            raise self._impossible("a name that is not UTF-8") from error

    def _impossible(self, what: str) -> InputError:
        return InputError("E4005", f"{self._path}: impossible header: {what}.")

    def _misfit(self, shown: str, what: str) -> InputError:
        return InputError("E4007", f"{self._path}: tensor {shown}: {what}.")


# ---------------------------------------------------------------- values


def read_packed(entry: Entry) -> Tensor:
    """The bytes of a tensor in blocks, as they lie in the file: [bytes] uint8.  Errors: E4001, E4006."""
    from wanloom.checkpoint.load import read_entry

    return read_entry(replace(entry, dtype="U8", shape=(entry.size,)))


def read_blocks(entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
    """The values of a tensor in blocks, in its shape; float32 unless another dtype is asked for.

    They are widened piece by piece: of UMT5's embedding, 4 GB in float32, no more is there than what comes out.
    """
    import torch

    from wanloom.runtime.frozen import pieces
    from wanloom.runtime.ggml import dequantise

    values, size = BLOCKS[entry.dtype]
    packed = read_packed(entry).view(-1, size)
    out = torch.empty(len(packed), values, dtype=dtype or torch.float32)
    for first, last in pieces(len(packed), values):
        out[first:last] = dequantise(packed[first:last], entry.dtype)
    return out.view(entry.shape)
