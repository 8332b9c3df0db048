"""Command lines that are killed and continued, and what they leave."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Zygote = Callable[[dict[str, Any]], int]


@contextmanager
def zygote() -> Iterator[Zygote]:
    """zygote.py at work: a function from its job to the exit status of the child, negative for a signal."""
    source = Path(__file__).resolve().parents[2] / "src"
    env = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def run(job: dict[str, Any]) -> int:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            return int(json.loads(process.stdout.readline())["status"])

        yield run
        process.stdin.close()


class Case:
    """A folder in which one command line runs, perhaps several times."""

    def __init__(self, root: Path, zygote: Zygote, command: list[str]) -> None:
        self.root, self._zygote, self.command = root, zygote, command
        self.folder = root / "work"
        self.folder.mkdir(parents=True)

    def run(self, argv: list[str] | None = None, **job: Any) -> int:
        return self._zygote(
            {"argv": argv or self.command, "cwd": str(self.folder), "calls": str(self.root / "calls"), **job}
        )

    @property
    def calls(self) -> int:
        """How often a transformer was called, in all runs together."""
        log = self.root / "calls"
        return log.stat().st_size if log.exists() else 0

    @property
    def out(self) -> str:
        return (self.root / "out.txt").read_text()

    @property
    def err(self) -> str:
        return (self.root / "err.txt").read_text()

    def hashes(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
        }
