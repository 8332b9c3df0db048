"""What the tests of the commands share: a command line run in this process, and one run as a real process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from command_line import Ran, run_here, run_process


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ran]:
    """`run("plan", "--json")` in this process, with an empty folder as the working directory."""
    monkeypatch.chdir(tmp_path)
    return partial(run_here, capsys)


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Ran]:
    """The same as a process of its own."""
    return partial(run_process, tmp_path)
