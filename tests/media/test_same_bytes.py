"""The same frames become the same file in every process, whatever lies in the memory that it gets."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from command_line import run_process

PROGRAM = """
import sys
import numpy as np
from wanloom import media
y, x = np.mgrid[:128, :240]
t = np.arange(16)[:, None, None]
waves = 128 + 60 * np.sin((x + 5 * t) / 7) + 60 * np.sin((y - 3 * t) / 5)
frames = waves[..., None] + np.random.default_rng(0).normal(0, 15, (16, 128, 240, 3))
media.save_video(sys.argv[1], np.clip(frames, 0, 255).astype(np.uint8), fps=16)
"""


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".gif", ".png"])
def test_a_file_does_not_depend_on_the_process(suffix: str, tmp_path: Path) -> None:
    hashes = set()
    for filling in ("0", "1", "85"):  # MALLOC_PERTURB_ fills what glibc hands out
        path = tmp_path / f"{filling}{suffix}"
        environment = {"MALLOC_PERTURB_": filling} if os.name == "posix" else {}
        ran = run_process(tmp_path, path, program=("-c", PROGRAM), **environment)
        assert ran.code == 0, ran.err
        hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(hashes) == 1
