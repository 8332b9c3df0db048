"""The user's cache directory: what can be made again, kept because making it takes long.

    store = Store("prompts", limit=2**30)
    path = store.path(key)          # a file of that key, there or not
    store.trim()                    # what was not used for longest goes first

`WANLOOM_CACHE` names the directory; without it the system's own place for such files is taken.  Nothing here is needed:
a directory that cannot be written costs time and a warning, never a run.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

KINDS = {
    "prompts": "encoded prompts",
    "fits": "what step caches know of models",
    "weights": "weights in the number format of the runs",
    "rates": "how fast machines are",
    "runs": "what runs took",
}

LOCK = ".lock"  # in a folder where one process at a time writes


def home() -> Path:
    """The cache directory, there or not."""
    if named := os.environ.get("WANLOOM_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "wanloom"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "wanloom"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wanloom"


@dataclass(frozen=True)
class Store:
    """The files of one kind, or folders where the suffix is empty.

    limit: bytes that they may take together; suffix: what their names end in.
    """

    kind: str
    limit: int
    suffix: str = ".safetensors"

    def path(self, key: str) -> Path:
        """Where the file or folder of this key (hexadecimal digits) is, or would be."""
        return home() / self.kind / f"{key}{self.suffix}"

    def open(self) -> None:
        """Make the directory, for its owner alone.  OSError where that cannot be."""
        (home() / self.kind).mkdir(parents=True, exist_ok=True, mode=0o700)

    def trim(self) -> None:
        """Delete what was not used for longest until the rest is within the limit; not what is being written."""
        found = sorted(_kept(self.kind))
        total = sum(size for _, size, _ in found)
        for _, size, path in found:
            if total <= self.limit:
                return
            if path.name.startswith("."):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            total -= size


def sizes() -> dict[str, tuple[int, int]]:
    """Kind -> how many files (or folders) there are, and their bytes."""
    return {kind: (len(found := _kept(kind)), sum(size for _, size, _ in found)) for kind in KINDS}


def clear() -> int:
    """Delete everything that was kept; how many bytes that was.  Other files in the directory stay."""
    total = sum(size for _, size in sizes().values())
    for kind in KINDS:
        shutil.rmtree(home() / kind, ignore_errors=True)
    return total


def _kept(kind: str) -> list[tuple[float, int, Path]]:
    """When it was used last, its bytes, and the path, of all that is there."""
    folder = home() / kind
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name == LOCK:
            continue
        try:
            inside = [file.stat().st_size for file in path.iterdir()] if path.is_dir() else [path.stat().st_size]
            found.append((path.stat().st_mtime, sum(inside), path))
        except OSError:  # another run deleted it
            continue
    return found
