"""Running `wanloom` in tests: in this process, which is fast, or as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from wanloom.cli import main

SOURCE = Path(__file__).resolve().parents[1] / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}


class Ran(NamedTuple):
    """What a command line left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def run_here(capsys: pytest.CaptureFixture[str], *words: object) -> Ran:
    """The command line in this process."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return Ran(code, out, err)


def start(
    folder: Path, *words: object, program: tuple[str, ...] = ("-m", "wanloom"), **environment: str
) -> subprocess.Popen[str]:
    """The command line as a process in `folder`, running; with program=() the words are Python's own."""
    command = [sys.executable, *program, *map(str, words)]
    env = {**ENVIRONMENT, **environment}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_process(folder: Path, *words: object, program: tuple[str, ...] = ("-m", "wanloom"), **environment: str) -> Ran:
    """The command line as a process in `folder`, run to its end."""
    with start(folder, *words, program=program, **environment) as process:
        out, err = process.communicate(timeout=300)
    return Ran(process.returncode, out, err)
