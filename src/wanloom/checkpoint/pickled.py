"""A `.pth` file read as a table of tensors: nothing in it is ever executed.

torch.save writes a pickle with the structure and the raw bytes of each storage, in a zip, or one behind the other in
its format of before 2020.  A pickle is a program, and unpickling runs it; here it is walked instead (`opcodes.py`), and
what comes out is the same `Header` that a safetensors file gives: the tensors are then read from their places like all
others.  That holds for any file, so the published pickles are read directly and all others by `convert`.

Errors (InputError): E4001 no such file, E4003 code, E4004 truncated or damaged, E4005 an impossible table, E4007 a
tensor outside its storage, E4008 a name twice, E4009 something that is not a dense tensor, E4012 not a weight file.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from io import BytesIO
from math import prod
from pathlib import Path
from typing import BinaryIO

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
from wanloom.checkpoint.opcodes import Machine, View, shown
from wanloom.errors import InputError

MAX_PICKLE = 4 * 2**20  # the structure without the storages; the largest published one has 0.3 MB
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of name and extra field

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# A training checkpoint may hold the weights one level down.
WRAPPERS = ("state_dict", "model", "module", "ema")


Places = Mapping[str, tuple[int, int]]  # key of a storage -> (offset, bytes) in the file


def read_pickled(path: Path) -> Header:
    """The checked table of contents of a `.pth` file.  Errors: see the module."""
    path = Path(path)
    before = stamp(path)
    try:
        with path.open("rb") as file:
            first = file.read(64)
            file.seek(0)
            if first.startswith(b"PK"):
                root, places = _read_zip(path, file, before.size)
            else:
                refuse_impostor(path, first)
                root, places = _read_legacy(path, file, before.size)
        entries = {name: _entry(path, name, view, places) for name, view in _find_tensors(path, root).items()}
    except InputError:
        raise
    except OSError as error:
        raise InputError("E4001", f"{path}: cannot be read ({error.strerror or error}).") from error
    except DAMAGE as error:
        raise InputError("E4004", f"{path}: truncated or damaged (its table of tensors cannot be read).") from error
    return Header(path, before, entries)


# What the standard library and the walk raise for bytes that make no sense.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, StopIteration, NotImplementedError, RuntimeError,
    ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError,
)  # fmt: skip


def _read_zip(path: Path, file: BinaryIO, size: int) -> tuple[object, Places]:
    """torch.save of 2020 and later: a zip with the pickle and one stored member for each storage."""
    with zipfile.ZipFile(file) as archive:
        members = _members(path, archive, size)
        name = next(name for name in members if name.endswith("data.pkl"))
        raw = archive.read(name)
    folder = name.removesuffix("data.pkl") + "data/"
    places = {key.removeprefix(folder): place for key, place in members.items() if key.startswith(folder)}
    return Machine(path).run(BytesIO(raw)), places


def _read_legacy(path: Path, file: BinaryIO, size: int) -> tuple[object, Places]:
    """torch.save of before 2020: five pickles, then each storage behind its length.

    By its size, the published Wan2.1 VAE is such a file.
    The pickles are a magic number, a version, the machine's number formats, the structure and the storages' order.
    """
    if size < 8:
        raise InputError("E4004", f"{path}: truncated ({size} bytes).")
    raw = BytesIO(file.read(MAX_PICKLE))
    if raw.getvalue()[:1] != b"\x80":
        raise InputError("E4012", f"{path}: not a weight file (neither a torch file nor safetensors).")
    magic = Machine(path).run(raw)
    if magic != LEGACY_MAGIC:
        raise InputError("E4003", f"{path}: a bare pickle, no torch file. Save it as safetensors.")
    Machine(path).run(raw)
    system = Machine(path).run(raw)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise InputError("E4009", f"{path}: written on a big-endian machine.")
    machine = Machine(path)
    root = machine.run(raw)
    keys = Machine(path).run(raw)
    if not isinstance(keys, list):
        raise ValueError("no list of storages")
    storages = {storage.key: storage for storage in machine.storages}
    places: dict[str, tuple[int, int]] = {}
    end = raw.tell()
    for key in keys:
        file.seek(end)
        count = int.from_bytes(file.read(8), "little")
        if count != storages[key].count or key in places:
            raise ValueError("storages out of order")
        length = count * DTYPES[storages[key].dtype]
        places[key] = end + 8, length
        end += 8 + length
        if end > size:
            break
    if end != size:
        raise InputError("E4004", f"{path}: truncated or damaged ({size} bytes, its storages end at {end}).")
    return root, places


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
            raise InputError("E4009", f"{path}: {shown(name)} is not a dense tensor.")
        out[name] = value
    if len(out) > MAX_TENSORS:
        raise InputError("E4005", f"{path}: {len(out)} tensors, expected at most {MAX_TENSORS}.")
    return out


def _entry(path: Path, name: str, view: View, places: Places) -> Entry:
    """A view as bytes of the file, when it lies inside its storage."""
    what = f"{path}: tensor {shown(name)}"
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise InputError("E4007", f"{what}: a name must be 1 to {MAX_NAME} printable characters.")
    item = DTYPES[view.storage.dtype]
    place = places.get(view.storage.key)
    if place is None:
        raise InputError("E4004", f"{what}: its storage is missing.")
    start, size = place
    shape, stride = view.shape, view.stride
    if len(shape) > MAX_RANK or len(shape) != len(stride) or min((*shape, *stride, view.offset), default=0) < 0:
        raise InputError("E4007", f"{what}: impossible shape.")
    count = prod(shape)
    # The last value's place bounds them all; counting values too refuses views that repeat a value without end.
    last = sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) if count else -1
    if count > view.storage.count or (view.offset + last + 1) * item > size:
        raise InputError("E4007", f"{what}: lies outside its storage.")
    whole = stride == _contiguous(shape) or count <= 1
    offset = start + view.offset * item
    return Entry(name, view.storage.dtype, shape, path, offset, (last + 1) * item, None if whole else stride)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
