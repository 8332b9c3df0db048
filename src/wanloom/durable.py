"""Files that appear under their final name complete, or not at all.

One function writes every file of this package: a temporary file beside the target, fsync, rename, fsync of the
directory.  A reader never sees half a file, a full disk leaves nothing behind, and what a killed process left is
recognised by its name (it carries the process) and swept by the next one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from wanloom.errors import InputError

# A temporary file of another boot or another machine cannot be asked whether its process lives; after a day nobody
# is still writing it.
FOREIGN_AGE = 24 * 3600.0

_TEMP = re.compile(r"^\..*\.(?P<pid>\d+)\.(?P<nonce>[0-9a-z]+)\.part(\.[^.]*)?$", re.DOTALL)
_OWNER = re.compile(r"^(?P<boot>[0-9a-f]{8})z(?P<start>[0-9a-f]+)z[0-9a-f]{8}$")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_passed: dict[str, int] = {}  # failpoint -> how often it was passed


def write_atomic(path: str | Path, data: bytes, *, overwrite: bool = True) -> None:
    """Put `data` into the file `path`, durably, in one step.  Errors: as `atomic_path`."""
    with atomic_path(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
        half = memoryview(data)[: len(data) // 2]
        file.write(half)
        failpoint(f"write{Path(path).suffix}")
        file.write(memoryview(data)[len(half) :])


@contextmanager
def atomic_path(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` when the block ends, and vanishes when the block raises.

    The temporary file has the suffix of `path` (encoders choose their format by it) and lies in the same directory.
    With overwrite=False an existing `path` is refused at the start, and again at the last step, where two writers can
    only meet one after the other.

    Errors: E5001 when the place cannot be written, E5002 when the file exists, E5003 when the disk is full.
    """
    path = Path(path)
    refuse_target(path, overwrite=overwrite)
    temporary = path.with_name(_temporary_name(path))
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o666))
    except OSError as error:
        raise _explain(error, path) from error
    try:
        try:
            yield temporary
        except OSError as error:
            if error.errno in _FULL:
                raise _explain(error, path) from error
            raise
        try:
            _sync(temporary)
            failpoint(f"rename{path.suffix}")
            _publish(temporary, path, overwrite=overwrite)
            sync_directory(path.parent)
        except OSError as error:
            raise _explain(error, path) from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `path` when the block ends, and vanishes when the block raises.

    Its files have to be durable by themselves, as `atomic_path` makes them.  Where another process made `path`
    meanwhile, that one stays.  Errors: OSError as it comes.
    """
    temporary = path.with_name(_temporary_name(path))
    temporary.mkdir(mode=0o700)
    try:
        yield temporary
        sync_directory(temporary)
        failpoint("rename folder")
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def failpoint(name: str) -> None:
    """Die here as by `kill -9` when WANLOOM_FAILPOINT says `name` (or `name:3`, the third time): for the tests only."""
    point, _, nth = os.environ.get("WANLOOM_FAILPOINT", "").partition(":")
    if point == name:
        _passed[name] = _passed.get(name, 0) + 1
        if _passed[name] == int(nth or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def refuse_target(path: Path, *, overwrite: bool) -> None:
    """Say before any work that `path` can not become a file: E5001 (no place for it) or E5002 (it is there)."""
    try:
        if path.is_dir():
            raise InputError("E5001", f"{path}: is a directory, expected a file name.")
        if not path.parent.is_dir():
            raise InputError("E5001", f"{path}: the directory {path.parent} does not exist. Make it first.")
        try:
            status = path.lstat()
        except FileNotFoundError:
            return
    except OSError as error:
        raise _explain(error, path) from error
    if not overwrite:
        raise _exists(path)
    if not (path.is_file() or status.st_mode & 0o170000 == 0o120000):
        raise InputError("E5001", f"{path}: is not a regular file.")


def sync_directory(directory: str | Path) -> None:
    """Make the names in `directory` survive a power cut (a rename is durable only after this)."""
    handle = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without directory fsync
            raise
    finally:
        os.close(handle)


def free_name(path: Path) -> Path:
    """The path itself, or with the first number behind its stem that nobody has yet, neither as file nor as job."""
    count, found = 2, path
    while found.exists() or found.with_suffix(".job").exists():
        found, count = path.with_name(f"{path.stem}_{count}{path.suffix}"), count + 1
    return found


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(directory: str | Path) -> list[Path]:
    """Remove the temporary files (and discarded folders) in `directory` whose process is gone; the removed paths."""
    removed = []
    for path in sorted(Path(directory).iterdir()):
        match = _TEMP.match(path.name)
        if match and _abandoned(int(match["pid"]), match["nonce"], path):
            with suppress(FileNotFoundError):
                _remove(path)
                removed.append(path)
    return removed


def discard(folder: Path) -> None:
    """Remove a folder with all that is in it: under its name it is there whole, or not at all."""
    doomed = folder.with_name(_temporary_name(folder))
    folder.rename(doomed)
    sync_directory(folder.parent)
    failpoint("discard")
    _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # another process may be sweeping it too
    else:
        path.unlink()


def _temporary_name(path: Path) -> str:
    """`.{stem}.{pid}.{nonce}.part{suffix}`, the stem cut so that no file system finds the name too long."""
    stem = os.fsdecode(os.fsencode(path.stem)[:120])
    nonce = f"{_boot()}z{_start_time(os.getpid()):x}z{secrets.token_hex(4)}"
    return f".{stem}.{os.getpid()}.{nonce}.part{path.suffix}"


def _publish(temporary: Path, path: Path, *, overwrite: bool) -> None:
    if overwrite:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)  # refuses an existing name in one step; rename would replace it
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        try:  # no hard links here (FAT, some network disks): claim the name, then replace our own claim
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            raise _exists(path) from None
        temporary.replace(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exists(path: Path) -> InputError:
    return InputError("E5002", f"{path}: exists already. Choose another name or give --overwrite.")


def _explain(error: OSError, path: Path) -> InputError:
    if error.errno in _FULL:
        return InputError("E5003", f"{path}: the disk is full ({error.strerror}). Free some space and resume.")
    return InputError("E5001", f"{path}: cannot be written ({error.strerror or error}).")


def _abandoned(pid: int, nonce: str, path: Path) -> bool:
    """Whether the writer of a temporary file is gone.  A process number alone lies: containers count from 1 again."""
    owner = _OWNER.match(nonce)
    if owner and owner["boot"] != _boot():
        try:
            return time.time() - path.lstat().st_mtime > FOREIGN_AGE
        except FileNotFoundError:
            return False
    if not alive(pid):
        return True
    return owner is not None and int(owner["start"], 16) != _start_time(pid)


def alive(pid: int) -> bool:
    """Whether a process with this number runs on this machine."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@lru_cache(maxsize=1)
def _boot() -> str:
    """Eight digits that name this boot of this machine."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        text = os.uname().nodename if hasattr(os, "uname") else ""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _start_time(pid: int) -> int:
    """When a process started, in ticks since boot; 0 where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The command's name, in brackets, may hold blanks: the fields after the last bracket are counted (proc(5)).
    return int(text.rpartition(")")[2].split()[19])
