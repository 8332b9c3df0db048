"""What all tests share."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch

import tiny

pytest_plugins = ["result_table"]


def pytest_configure(config: pytest.Config) -> None:
    """Started in the background, a shell hands down "ignore Ctrl-C", to us and to what we start; tests press it.

    What runs leave behind for later ones goes into a cache of this session, not into the user's.  Without a GPU
    Triton's kernels run in its interpreter, which has to be said before Triton is imported.  Of several sessions that
    share the machine (`-n`) each computes on one processor, and so does what it starts.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cache = tempfile.mkdtemp(prefix="wanloom-tests-")
    os.environ["WANLOOM_CACHE"] = cache
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are left out where there is no GPU, those marked `triton` where Triton is not installed."""
    here = {"gpu": torch.cuda.is_available(), "triton": importlib.util.find_spec("triton") is not None}
    absent = [name for name, there in here.items() if not there]
    left_out = [item for item in items if any(item.get_closest_marker(name) is not None for name in absent)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the reference's inputs and outputs: WANLOOM_GOLDEN, or shared/golden beside the repository."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
    folder = Path(os.environ.get("WANLOOM_GOLDEN", beside))
    if not folder.is_dir():
        pytest.skip(f"no golden data: {folder.name} is absent (set WANLOOM_GOLDEN to its folder)")
    return folder


@pytest.fixture(scope="session")
def golden_models(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the golden checkpoints Wan2.2-T2V-A14B, -I2V-A14B, -TI2V-5B and -S2V-14B; not to be changed."""
    spec = importlib.util.spec_from_file_location("materialize", golden / "materialize.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("golden")
    for name in ("Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B", "Wan2.2-TI2V-5B", "Wan2.2-S2V-14B"):
        module.materialize(folder, name)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of every released model in the published layout; not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    for name in tiny.TINY:
        tiny.checkpoint(folder, name)
    return folder
