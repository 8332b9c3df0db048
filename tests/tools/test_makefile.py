"""The Makefile's targets and what CI calls, without running them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def steps(target: str, tmp_path: Path) -> str:
    """The commands that `make target` would run on a fresh machine."""
    words = ["make", "-n", target, f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


@pytest.mark.parametrize(
    ("target", "commands"),
    [
        ("demo", ["tools/install.py", "wanloom demo"]),
        (
            "test",
            [
                "tools/install.py",
                "--dev",
                "ruff format --check",
                "ruff check",
                "mypy",
                'pytest -n auto --maxprocesses 4 --dist loadfile -m "not faults and not matrix"',
            ],
        ),
        ("faults", ["pytest -n auto --maxprocesses 4 -m faults --result-table docs/results/faults.md"]),
        ("matrix", ["pytest -m matrix --result-table docs/results/matrix.md"]),
        ("bench", ["benchmarks/cpu.py"]),
        ("check", ["ruff format --check", "mypy"]),
    ],
)
def test_targets_do_what_their_names_say(target, commands, tmp_path):
    said = steps(target, tmp_path)
    places = [said.index(command) for command in commands]
    assert places == sorted(places)


def test_demo_does_not_install_the_tools_of_development(tmp_path):
    assert "--dev" not in steps("demo", tmp_path)


def test_ci_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -eu" in text
    assert re.search(r"^make test </dev/null$", text, re.MULTILINE)
