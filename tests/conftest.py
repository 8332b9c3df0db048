"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the reference's inputs and outputs: WANLOOM_GOLDEN, or shared/golden beside the repository."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
    folder = Path(os.environ.get("WANLOOM_GOLDEN", beside))
    if not folder.is_dir():
        pytest.skip(f"no golden data: {folder.name} is absent (set WANLOOM_GOLDEN to its folder)")
    return folder
