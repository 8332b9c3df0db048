"""Triton's compiler takes every kernel, for GPUs that need not be here; its interpreter is more lenient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_kernels.py")
SMALLEST_SHARED = 99 * 1024  # bytes a block may have on consumer GPUs (8.6, 8.9, 12.0), the least of those supported


@pytest.mark.triton
def test_every_kernel_compiles_for_ampere_ada_and_hopper(tmp_path: Path) -> None:
    told = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "80", "89", "90"],
        env=os.environ | told,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["_norm_modulate", "_gate_add", "_gate_add", "_rms_rotate", "_to_int8", "_to_int8", "_attend"]
    narrow = ["_to_fp8", "_to_int8", "_to_int8", "_attend"]  # values in 8 bits: from Ada on
    assert [line["kernel"] for line in lines] == names + 2 * (names + narrow)
    assert all(line["bytes"] > 0 and line["shared"] <= SMALLEST_SHARED for line in lines)
    attend = [line for line in lines if line["kernel"] == "_attend"]
    assert all(0 < line["integers"] < line["products"] for line in attend)  # scores by integers, values otherwise
    assert [line["integers"] + line["fp8"] == line["products"] for line in attend] == [False, False, True, False, True]
