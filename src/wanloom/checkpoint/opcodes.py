"""A pickle's structure as plain data, without unpickling it.

A pickle is a program for a small stack machine, and two of its instructions call whatever the program names.  This is
the same machine without these two: it pushes text, numbers, tuples and dicts, and where torch's own functions are
called to make a tensor it notes which storage, offset, shape and stride were meant.  A pickle that names anything else
is refused, and the name is in the message (E4003).
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

from wanloom.errors import InputError

MAX_OPERATIONS = 1_000_000  # a tensor takes about 35, and a file has at most 20 000 tensors

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


def shown(name: object) -> str:
    """A name for a message, whatever it is."""
    return ascii(name[:80])[1:-1] if isinstance(name, str) else f"a {type(name).__name__}"


class Machine:
    """Walks a pickle's opcodes and builds plain data: dicts, tuples, Views.  It calls nothing that the file names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: list[Storage] = []  # in the order they are named

    def run(self, raw: BytesIO) -> object:
        """The object of the pickle that starts here; `raw` stands behind it afterwards.

        Malformed pickles raise ValueError, TypeError, IndexError, KeyError or AttributeError.
        """
        operations = pickletools.genops(raw)
        for count, (opcode, argument, _) in enumerate(operations):
            if count > MAX_OPERATIONS:
                raise InputError("E4005", f"{self.path}: its structure takes more than {MAX_OPERATIONS} steps.")
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _LITERALS:
                self.stack.append(argument)
            elif opcode.name not in ("PROTO", "FRAME"):
                step = getattr(self, f"_{opcode.name.lower()}", None)
                if step is None:
                    self._refuse_operation(opcode.name, operations)
                step(argument)
        raise ValueError("no STOP")

    def _refuse(self, what: str) -> NoReturn:
        raise InputError("E4003", f"{self.path}: contains {what[:120]}, which is code and not weights. Refused.")

    def _refuse_operation(self, name: str, rest: Iterator[tuple[Any, Any, Any]]) -> NoReturn:
        """An instruction that torch never writes: name the first global that follows, which is more telling."""
        for opcode, argument, _ in rest:
            if opcode.name in ("GLOBAL", "INST") and tuple(argument.split(" ")) not in ALLOWED:
                self._refuse(argument.replace(" ", "."))
        self._refuse(f"the pickle operation {name}")

    def _name(self, module: object, name: object) -> None:
        # Types first: hashing or printing a nest of tuples that share parts can take forever.
        if not isinstance(module, str) or not isinstance(name, str):
            self._refuse("a global without a name")
        if (module, name) not in ALLOWED:
            self._refuse(f"{module}.{name}")
        self.stack.append(Global(module, name))

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
            if not isinstance(key, str | int):
                raise InputError("E4009", f"{self.path}: a {type(key).__name__} where a tensor's name should be.")
            if key in table:
                raise InputError("E4008", f"{self.path}: {shown(key)} is there twice.")
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
        kind, storage, key, _device, count, *view = self.stack.pop()
        if kind != "storage" or storage.module != "torch" or not isinstance(key, str) or view not in ([], [None]):
            self._refuse("an unknown persistent object")
        self.storages.append(Storage(STORAGES[storage.name], key, int(count)))
        self.stack.append(self.storages[-1])

    def _reduce(self, _: object) -> None:
        arguments, what = self.stack.pop(), self.stack.pop()
        if what == Global("collections", "OrderedDict"):
            if arguments:
                raise ValueError("an OrderedDict is filled by instructions")
            self.stack.append({})
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
