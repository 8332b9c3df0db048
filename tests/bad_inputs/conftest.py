"""Small models to get wrong, and `refused`, which runs a command line that must not be obeyed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rows import ANIMATE, I2V, I2V_21, S2V, SMALL, T2V, TI2V, check_refusal

import tiny
from command_line import Ran, run_here


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small checkpoints of seven released models; not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    for name in (T2V, I2V, TI2V, SMALL, I2V_21, S2V, ANIMATE):
        tiny.checkpoint(folder, name)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], here: Path) -> Callable[..., Ran]:
    """A command line in this process, in the folder `here`."""
    return partial(run_here, capsys)


@pytest.fixture
def refused(run: Callable[..., Ran], here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`refused("E2005", *words)`: refused with this code, nothing left behind; returns the message."""

    def read_entry(entry: object) -> None:
        pytest.fail(f"tensor data was read: {entry}")

    monkeypatch.setattr("wanloom.checkpoint.load.read_entry", read_entry)

    def call(code: str, *words: object) -> str:
        before = sorted(here.rglob("*"))
        ran = run("generate", *words)
        check_refusal(ran, code)
        assert sorted(here.rglob("*")) == before
        return ran.err

    return call


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`model("t2v-1.3B")`: a copy of that small checkpoint, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(models / name, tmp_path / "damaged" / name))

    return copy


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return tiny.picture(tmp_path / "picture.png")
