"""A `.pth` file read as a table of tensors: nothing in it is ever executed.

torch.save writes a zip: one pickle with the structure, and one uncompressed member for each storage.  A pickle is a
program, and unpickling runs it.  Here it is not unpickled at all: its opcodes are walked (the standard library's
disassembler), and a handful of harmless ones are understood: text, numbers, tuples, dicts, and "a tensor of this
storage with this shape".  Any other global, `os.system` say, ends the reading and is named (E4003).  What comes out is
the same `Header` that a safetensors file gives: the tensors are then read from their places in the zip like all others.

Errors (InputError): E4001 no such file, E4003 code, E4004 truncated or damaged, E4007 a tensor outside its storage,
E4009 something that is not a dense tensor, E4012 not a weight file.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from wanloom.checkpoint.header import (
    DTYPES,
    MAX_NAME,
    MAX_RANK,
    MAX_TENSORS,
    Entry,
    Header,
    refuse_impostor,
    stamp,
)
from wanloom.errors import InputError

MAX_PICKLE = 16 * 2**20  # the structure without the storages; the largest published one has 0.2 MB
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of name and extra field

# torch's storage classes; everything else a pickle may name is in ALLOWED.
STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip
ALLOWED = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        *(("torch", name) for name in STORAGES),
    }
)
# A training checkpoint may hold the weights one level down.
WRAPPERS = ("state_dict", "model", "module", "ema")


@dataclass(frozen=True)
class Global:
    """A class or function named by a pickle; never looked up."""

    module: str
    name: str


@dataclass(frozen=True)
class Storage:
    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class View:
    """A tensor: where in which storage its values lie."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_MARK = object()


def read_pickled(path: Path) -> Header:
    """The checked table of contents of a `.pth` file.  Errors: see the module."""
    path = Path(path)
    before = stamp(path)
    try:
        with path.open("rb") as file:
            first = file.read(64)
            if not first.startswith(b"PK"):
                refuse_impostor(path, first)
                _refuse_bare(path, first)
            with zipfile.ZipFile(file) as archive:
                members = _members(path, archive, before.size)
                raw = archive.read(next(name for name in members if name.endswith("data.pkl")))
        root = _Machine(path).run(raw)
        tensors = _find_tensors(path, root)
        folder = next(name for name in members if name.endswith("data.pkl")).removesuffix("data.pkl")
        entries = {name: _entry(path, name, view, members, folder) for name, view in tensors.items()}
    except InputError:
        raise
    except OSError as error:
        raise InputError("E4001", f"{path}: cannot be read ({error.strerror or error}).") from error
    except (zipfile.BadZipFile, struct.error, zlib.error, StopIteration, NotImplementedError, EOFError) as error:
        raise InputError("E4004", f"{path}: truncated or damaged (not a whole torch file).") from error
    except (
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
        RuntimeError,
    ) as error:
        raise InputError("E4004", f"{path}: damaged (its table of tensors cannot be read).") from error
    return Header(path, before, entries)


def _refuse_bare(path: Path, first: bytes) -> NoReturn:
    """A file that is no zip: empty, a bare pickle, torch's format of before 2020, or anything else."""
    if len(first) < 8:
        raise InputError("E4004", f"{path}: truncated ({len(first)} bytes).")
    if first[:1] == b"\x80":
        with path.open("rb") as file:
            _Machine(path).run(file.read(MAX_PICKLE))  # names the global, if it holds code
        raise InputError(
            "E4003", f"{path}: a bare pickle (torch's format of before 2020 or no torch file). Save it as safetensors."
        )
    raise InputError("E4012", f"{path}: not a weight file (neither a torch file nor safetensors).")


def _members(path: Path, archive: zipfile.ZipFile, size: int) -> dict[str, tuple[int, int]]:
    """Name -> (offset of the data, bytes) of each member, all stored as they are and inside the file."""
    infos = archive.infolist()
    if len(infos) > 2 * MAX_TENSORS:
        raise InputError("E4004", f"{path}: {len(infos)} members, expected at most {2 * MAX_TENSORS}.")
    out = {}
    file = archive.fp
    assert file is not None
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise InputError("E4004", f"{path}: {info.filename[:80]} is compressed; torch stores tensors as they are.")
        file.seek(info.header_offset)
        signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        start = info.header_offset + _LOCAL_HEADER.size + name + extra
        if signature != b"PK\x03\x04" or start + info.file_size > size:
            raise InputError("E4004", f"{path}: truncated or damaged ({info.filename[:80]} lies outside the file).")
        if info.filename in out:
            raise InputError("E4008", f"{path}: {info.filename[:80]} is there twice.")
        out[info.filename] = (start, info.file_size)
        if info.filename.endswith("data.pkl") and info.file_size > MAX_PICKLE:
            raise InputError("E4005", f"{path}: a table of {info.file_size} bytes, expected at most {MAX_PICKLE}.")
        if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
            raise InputError("E4009", f"{path}: written on a big-endian machine.")
    return out


def _find_tensors(path: Path, root: object) -> dict[str, View]:
    """The state dict in what the pickle describes."""
    if isinstance(root, dict) and not any(isinstance(value, View) for value in root.values()):
        root = next((root[key] for key in WRAPPERS if isinstance(root.get(key), dict)), root)
    if not isinstance(root, dict) or not root:
        raise InputError("E4009", f"{path}: holds no dict of tensors.")
    out: dict[str, View] = {}
    for name, value in root.items():
        if not isinstance(name, str) or not isinstance(value, View):
            raise InputError("E4009", f"{path}: {ascii(name)[:80]} is not a dense tensor.")
        out[name] = value
    if len(out) > MAX_TENSORS:
        raise InputError("E4005", f"{path}: {len(out)} tensors, expected at most {MAX_TENSORS}.")
    return out


def _entry(path: Path, name: str, view: View, members: Mapping[str, tuple[int, int]], folder: str) -> Entry:
    """A view as bytes of the file, when it lies inside its storage."""
    shown = ascii(name)[1:81]
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise InputError("E4007", f"{path}: tensor {shown}: a name must be 1 to {MAX_NAME} printable characters.")
    item = DTYPES[view.storage.dtype]
    member = members.get(f"{folder}data/{view.storage.key}")
    if member is None:
        raise InputError("E4004", f"{path}: tensor {shown}: its storage is missing.")
    start, size = member
    shape, stride = view.shape, view.stride
    if len(shape) > MAX_RANK or len(shape) != len(stride) or min((*shape, *stride, view.offset), default=0) < 0:
        raise InputError("E4007", f"{path}: tensor {shown}: impossible shape.")
    count = prod(shape)
    # The last value's place bounds them all; counting values too refuses views that repeat a value without end.
    last = sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) if count else -1
    if count > view.storage.count or (view.offset + last + 1) * item > size:
        raise InputError("E4007", f"{path}: tensor {shown}: lies outside its storage.")
    whole = stride == _contiguous(shape) or count <= 1
    offset = start + view.offset * item
    return Entry(name, view.storage.dtype, shape, path, offset, (last + 1) * item, None if whole else stride)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


class _Machine:
    """Walks a pickle's opcodes and builds plain data: dicts, tuples, Views.  It calls nothing that the file names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, raw: bytes) -> object:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _LITERALS:
                self.stack.append(argument)
            elif opcode.name not in ("PROTO", "FRAME"):
                step = getattr(self, f"_{opcode.name.lower()}", None)
                if step is None:
                    self._refuse(f"the pickle operation {opcode.name}")
                step(argument)
        raise ValueError("no STOP")

    def _refuse(self, what: str) -> NoReturn:
        raise InputError("E4003", f"{self.path}: contains {what[:120]}, which is code and not weights. Refused.")

    def _name(self, module: object, name: object) -> None:
        if (module, name) not in ALLOWED:
            self._refuse(f"{module}.{name}")
        self.stack.append(Global(str(module), str(name)))

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._name(module, name)

    def _inst(self, argument: str) -> None:
        self._refuse(argument.replace(" ", "."))

    def _stack_global(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def _mark(self, _: object) -> None:
        self.stack.append(_MARK)

    def _to_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _tuple(self, _: object) -> None:
        self.stack.append(tuple(self._to_mark()))

    def _tuple1(self, _: object) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self, _: object) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _tuple3(self, _: object) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _empty_dict(self, _: object) -> None:
        self.stack.append({})

    def _empty_list(self, _: object) -> None:
        self.stack.append([])

    def _pop(self, _: object) -> None:
        self.stack.pop()

    def _setitem(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def _setitems(self, _: object) -> None:
        items = self._to_mark()
        self._set(self.stack[-1], items)

    def _set(self, table: dict[Any, Any], items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if key in table:
                raise InputError("E4008", f"{self.path}: {ascii(key)[:80]} is there twice.")
            table[key] = value

    def _append(self, _: object) -> None:
        value = self.stack.pop()
        self.stack[-1].append(value)

    def _appends(self, _: object) -> None:
        values = self._to_mark()
        self.stack[-1].extend(values)

    def _put(self, index: int) -> None:
        self.memo[int(index)] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[int(index)])

    _binget = _long_binget = _get

    def _binpersid(self, _: object) -> None:
        kind, storage, key, _device, count = self.stack.pop()
        if kind != "storage" or storage.module != "torch":
            self._refuse("an unknown persistent object")
        self.stack.append(Storage(STORAGES[storage.name], str(key), int(count)))

    def _reduce(self, _: object) -> None:
        arguments, what = self.stack.pop(), self.stack.pop()
        if what == Global("collections", "OrderedDict"):
            self.stack.append(dict(arguments[0]) if arguments else {})
        elif what == Global("torch._utils", "_rebuild_tensor_v2"):
            storage, offset, shape, stride = arguments[:4]
            if not isinstance(storage, Storage):
                raise ValueError("a tensor without storage")
            self.stack.append(View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride))))
        elif what == Global("torch._utils", "_rebuild_parameter"):
            self.stack.append(arguments[0])
        else:
            self._refuse(f"a call of {getattr(what, 'name', 'an object')}")

    def _build(self, _: object) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(state, dict) or not isinstance(target, dict):  # a state dict's own _metadata, which we drop
            self._refuse("an object with state")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT",
     "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
)  # fmt: skip
