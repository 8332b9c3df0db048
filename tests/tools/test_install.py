"""`tools/install.py`: which torch is chosen, and what is said before it is fetched."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
MIRROR = "file:///wheels/torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl"
PUBLIC = "https://files.example/torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl"


@pytest.fixture
def install(monkeypatch):
    """The module, with a pip that only remembers what it was asked, on Linux, without a GPU or a torch."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.asked = []
    monkeypatch.setattr(module, "pip", lambda python, *words: module.asked.append(words))
    monkeypatch.setattr(module, "installed_torch", lambda python: None)
    monkeypatch.setattr(module, "pip_would_fetch", lambda python, requirement: PUBLIC)
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "DRIVER", Path("/no/driver/here"))
    return module


def choose(install: ModuleType, choice: str, tmp_path: Path) -> Path:
    return install.torch_first(Path("python"), choice, tmp_path, False)


@pytest.mark.parametrize(
    ("version", "fits"),
    [("2.10.0", True), ("2.13.0+cpu", True), ("3.0", True), ("2.9.1+cu128", False), ("1.13", False), (None, False)],
)
def test_a_torch_fits_from_2_10_on(install, version, fits):
    assert install.fits(version) is fits


def test_a_torch_that_fits_is_kept_and_pinned(install, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(install, "installed_torch", lambda python: "2.11.0+cu130")
    constraints = choose(install, "auto", tmp_path)
    assert install.asked == []
    assert "torch==2.11.0+cu130" in constraints.read_text()
    assert "torch==2.13.0" not in constraints.read_text()
    assert "torch 2.11.0+cu130 is there and is used" in capsys.readouterr().out


def test_auto_takes_the_cpu_build_without_a_gpu(install, tmp_path, capsys):
    choose(install, "auto", tmp_path)
    assert install.asked[0][-3:] == ("--index-url", install.TORCH_INDEX + "cpu", "torch==2.13.0")
    assert install.SIZES["cpu"] in capsys.readouterr().out


def test_auto_takes_what_pip_is_set_up_for_when_that_is_a_cpu_build(install, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "pip_would_fetch", lambda python, requirement: MIRROR)
    choose(install, "auto", tmp_path)
    assert install.asked == [("install", "torch==2.13.0")]


def test_auto_takes_the_cuda_build_beside_a_driver(install, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    choose(install, "auto", tmp_path)
    assert install.asked == [("install", "torch==2.13.0")]
    assert install.SIZES["cuda"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("choice", "asked"),
    [
        ("cuda", ("install", "torch==2.13.0")),
        ("cpu", ("install", "--index-url", "https://download.pytorch.org/whl/cpu", "torch==2.13.0")),
        ("cu130", ("install", "--index-url", "https://download.pytorch.org/whl/cu130", "torch==2.13.0")),
        ("torch==2.12.0", ("install", "torch==2.12.0")),
    ],
)
def test_a_person_decides_the_build(install, tmp_path, choice, asked):
    choose(install, choice, tmp_path)
    assert install.asked == [asked]


def test_the_size_is_said_before_anything_is_fetched(install, tmp_path, monkeypatch, capsys):
    said = []
    monkeypatch.setattr(install, "pip", lambda python, *words: said.append(capsys.readouterr().out))
    choose(install, "cpu", tmp_path)
    assert "To download: torch==2.13.0 (cpu): about 190 MB" in said[0]


def test_a_folder_that_is_no_environment_is_not_touched(install, tmp_path):
    (tmp_path / "work.txt").write_text("mine")
    with pytest.raises(SystemExit, match="no virtual environment"):
        install.environment(tmp_path)
    assert (tmp_path / "work.txt").read_text() == "mine"


@pytest.mark.parametrize(("version", "sees_system"), [("2.12.0", True), ("2.9.0", False), (None, False)])
def test_the_environment_sees_the_system_only_for_a_torch_that_fits(
    install, tmp_path, monkeypatch, version, sees_system
):
    made = []

    def make(words: list[str], check: bool) -> None:
        made.append(words[1:])
        Path(words[-1]).mkdir()

    monkeypatch.setattr(install.subprocess, "run", make)
    monkeypatch.setattr(install, "installed_torch", lambda python: version)
    folder = tmp_path / "venv"
    assert install.environment(folder) == folder / "bin" / "python"
    assert ("--system-site-packages" in made[-1]) is sees_system
