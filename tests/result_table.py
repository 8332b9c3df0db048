"""`pytest --result-table FILE`: what the long tests gave, as a table to commit: one row for each test function."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    """The cases of one test function: how many there were, and how many passed, failed and were left out."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--result-table", type=Path, metavar="FILE", help="write what the tests gave, as Markdown")


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    path = config.getoption("--result-table")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table(terminalreporter.stats, config.getoption("markexpr")))


def table(stats: dict[str, list[Any]], mark: str) -> str:
    """The page: machine, versions, revision and date, then the rows in the order of their files."""
    rows: dict[str, Row] = defaultdict(Row)
    for outcome, field in (("passed", "passed"), ("failed", "failed"), ("error", "failed"), ("skipped", "skipped")):
        for report in stats.get(outcome, ()):
            row = rows[report.nodeid.partition("[")[0]]
            setattr(row, field, getattr(row, field) + 1)
            row.seconds += report.duration
    total = Row(*(sum(getattr(row, name) for row in rows.values()) for name in Row.__dataclass_fields__))
    kind = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"
    counts = f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped"
    lines = [
        f"# `make {mark}`", "",
        f"{counts}; {time.strftime('%Y-%m-%d')}, revision {revision()}, {kind}, Python {platform.python_version()}, "
        f"torch {torch.__version__}. Seconds are those of the tests alone, which may have run beside one another.", "",
        "| test | passed | failed | skipped | seconds |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {name.removeprefix('tests/')} | {row.passed} | {row.failed} | {row.skipped} | {row.seconds:.0f} |"
        for name, row in sorted(rows.items())
    ]
    return "\n".join(lines) + "\n"


def revision() -> str:
    """The commit that was tested; "+" for a tree with changes."""
    try:
        words = ["git", "describe", "--always", "--dirty=+", "--abbrev=9", "--exclude=*"]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
