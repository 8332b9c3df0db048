"""`wanloom.sha256.json`: what every file of a checkpoint must be, byte for byte.

A header can be right and a weight wrong: one flipped bit passes every check of form.  `convert` and the trainer write
this file beside the weights, and loading compares.  Hashing runs beside the reading of the tensors, and a file that was
found good is not hashed again in the same process while its size, time and inode stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from wanloom.checkpoint.documents import read_json
from wanloom.checkpoint.header import Stamp, stamp, unchanged
from wanloom.durable import sha256_file, write_atomic
from wanloom.errors import InputError

NAME = "wanloom.sha256.json"
LEVELS = 3  # the file's directory and two above it: shards of an expert lie one below the root

_good: set[tuple[Path, Stamp]] = set()


@dataclass(frozen=True)
class Record:
    """What a manifest says of one file."""

    sha256: str
    size: int


def write(root: Path, files: Iterable[Path]) -> Path:
    """Hash `files` (under `root`) into root's manifest; what it already says of others stays.  Returns its path."""
    path = root / NAME
    table = (
        {name: {"sha256": record.sha256, "size": record.size} for name, record in read(path).items()}
        if path.is_file()
        else {}
    )
    for file in files:
        table[file.relative_to(root).as_posix()] = {"sha256": sha256_file(file), "size": file.stat().st_size}
    text = json.dumps({"files": dict(sorted(table.items()))}, indent=1)
    write_atomic(path, (text + "\n").encode())
    return path


def read(path: Path) -> dict[str, Record]:
    """Relative file name -> Record.  Errors: E4011 when the manifest itself is damaged."""
    table = read_json(path, code="E4011")
    files = table.get("files") if isinstance(table, dict) else None
    if not isinstance(files, dict):
        raise InputError("E4011", f"{path}: not a manifest (no files).")
    out = {}
    for name, record in files.items():
        if (
            not isinstance(record, dict)
            or not isinstance(record.get("sha256"), str)
            or type(record.get("size")) is not int
        ):
            raise InputError("E4011", f"{path}: {ascii(name)[:80]}: expected sha256 and size.")
        out[name] = Record(record["sha256"], record["size"])
    return out


def recorded(file: Path) -> Record | None:
    """What the nearest manifest says of a file, or None when none speaks of it."""
    file = file.absolute()
    for home in list(file.parents)[:LEVELS]:
        path = home / NAME
        if path.is_file():
            record = read(path).get(file.relative_to(home).as_posix())
            if record is not None:
                return record
    return None


def check_sizes(files: Iterable[Path]) -> None:
    """E4011 when a file has not even the recorded size; costs no reading."""
    for file in files:
        record = recorded(file)
        if record is not None and record.size != stamp(file).size:
            raise InputError("E4011", f"{file}: {stamp(file).size} bytes, its manifest says {record.size}.")


def verify(files: Iterable[Path]) -> None:
    """Hash files now; E4011 naming the first that is not what its manifest says."""
    Verification(files).finish()


class Verification:
    """Hashes files in the background; `finish()` raises E4011 naming the first that is not what it was."""

    def __init__(self, files: Iterable[Path]) -> None:
        check_sizes(files := list(files))
        todo = [(file, record) for file in files if (record := recorded(file)) and (file, stamp(file)) not in _good]
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256") if todo else None
        self._jobs: list[tuple[Path, Stamp, str, Future[str]]] = [
            (file, stamp(file), record.sha256, self._pool.submit(sha256_file, file))
            for file, record in todo
            if self._pool
        ]

    def finish(self) -> None:
        try:
            for file, before, expected, job in self._jobs:
                try:
                    actual = job.result()
                except OSError as error:
                    raise InputError("E4001", f"{file}: cannot be read ({error.strerror}).") from error
                if actual != expected:
                    raise InputError(
                        "E4011", f"{file}: SHA-256 mismatch: the file is damaged. Fetch or convert it again."
                    )
                unchanged(file, before)
                _good.add((file, before))
        finally:
            self.stop()

    def stop(self) -> None:
        """Do not hash what nobody waits for."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
