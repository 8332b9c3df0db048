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
    "rates": "how fast machines are",
    "runs": "what runs took",
}


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
    """The files of one kind.  limit: bytes that they may take together; suffix: what their names end in."""

    kind: str
    limit: int
    suffix: str = ".safetensors"

    def path(self, key: str) -> Path:
        """Where the file of this key (hexadecimal digits) is, or would be."""
        return home() / self.kind / f"{key}{self.suffix}"

    def open(self) -> None:
        """Make the directory, for its owner alone.  OSError where that cannot be."""
        (home() / self.kind).mkdir(parents=True, exist_ok=True, mode=0o700)

    def trim(self) -> None:
        """Delete the files that were not used for longest until the rest is within the limit."""
        files = sorted((stat.st_mtime, stat.st_size, path) for path, stat in _files(self.kind))
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size


def sizes() -> dict[str, tuple[int, int]]:
    """Kind -> number of files and their bytes."""
    return {kind: (len(found := _files(kind)), sum(stat.st_size for _, stat in found)) for kind in KINDS}


def clear() -> int:
    """Delete everything that was kept; how many bytes that was.  Other files in the directory stay."""
    total = sum(size for _, size in sizes().values())
    for kind in KINDS:
        shutil.rmtree(home() / kind, ignore_errors=True)
    return total


def _files(kind: str) -> list[tuple[Path, os.stat_result]]:
    folder = home() / kind
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            found.append((path, path.stat()))
        except OSError:  # another run deleted it
            continue
    return found
