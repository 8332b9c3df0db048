"""What the checkpoint tests share beside tests/conftest.py."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def manifests(golden: Path) -> Path:
    """The folder of the published checkpoints' tensor names and shapes."""
    folder = golden.parent / "spec" / "manifests"
    if not folder.is_dir():
        pytest.skip("no published manifests beside the golden data")
    return folder
