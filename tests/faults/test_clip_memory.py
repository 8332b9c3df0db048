"""Memory does not grow with the number of clips: frames are written, and let go, as clips finish."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.faults
def test_sixty_clips_take_the_memory_of_two(tmp_path: Path) -> None:
    """All frames of the long video would be a third of the peak."""
    words = ["--clips", "2", "60", "--size", "128x128", "--json", str(tmp_path / "a.json")]
    words += ["--ckpt-dir", str(tiny.checkpoint(tmp_path, "s2v-14B"))]
    program = [sys.executable, str(ROOT / "benchmarks" / "clip_memory.py")]
    subprocess.run([*program, *words], check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    found = json.loads((tmp_path / "a.json").read_text())
    few, many = found["rows"]["2"], found["rows"]["60"]
    assert many["peak"] <= 1.1 * few["peak"]
    assert many["peak"] - few["peak"] <= found["all_frames"] / 4
