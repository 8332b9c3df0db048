"""Watching processes: small programs stand in for those of a run."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from wanloom.cli import supervise
from wanloom.cli.supervise import _Crew, continue_words

# RANK 0 runs the first program, 1 the second.
BOTH = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
SLEEP = "time.sleep(60)"
BUSY = """
from pathlib import Path
board = os.open(Path(os.environ['WANLOOM_CREW'], 'board'), os.O_RDWR)
import struct
for i in range({beats}):
    os.pwrite(board, struct.pack('<qd', i, 0.5), 16 * rank)
    time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanloom.cli.console._seen", set())  # a warning is said once in a run
    monkeypatch.setattr(supervise, "LEAVE", 0.5)
    monkeypatch.setattr(supervise, "END", 1.5)
    monkeypatch.setattr(supervise, "SPEAK_LAST", 0.5)


def outcome(folder: Path, first: str, second: str, press: tuple[float, ...] = ()) -> int:
    """The exit code of a run of two programs; `press`: seconds after which this process gets SIGINT."""
    text = BOTH + f"exec({first!r} if rank == 0 else {second!r})"
    crew = _Crew(folder, [sys.executable, "-c", text], 2, on_gpu=False)
    timers = [threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)) for seconds in press]
    try:
        with crew.hearing_signals():
            for timer in timers:
                timer.start()
            return crew.watch()
    finally:
        crew.kill()
        assert all(process.returncode is not None for process in crew._processes)


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        ("sys.exit(0)", "sys.exit(0)", 0),
        ("time.sleep(0.4)", "sys.exit(0)", 0),  # the others may be the first to end, when all is done
        ("sys.exit(2)", SLEEP, 2),  # the run has said what is wrong
        ("time.sleep(0.3); sys.exit(7)", "os.kill(os.getpid(), 9)", 7),
        ("time.sleep(0.3); sys.exit(7)", "sys.exit(4)", 4),  # the other has said what is wrong
    ],
)
def test_the_exit_code_is_that_of_the_first_or_of_the_cause(tmp_path: Path, first: str, second: str, code: int) -> None:
    assert outcome(tmp_path, first, second) == code


def test_a_run_that_does_not_notice_is_told_and_then_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); time.sleep(60)"
    assert outcome(tmp_path, told, "time.sleep(0.2); os.kill(os.getpid(), 9)") == 7
    assert "warning[W7002]: process 1 of 2 was killed by signal 9." in capsys.readouterr().err
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    started = time.monotonic()
    assert outcome(tmp_path, deaf, "time.sleep(0.2); os.kill(os.getpid(), 9)") == 7
    assert time.monotonic() - started < 30
    assert "error[E7002]: process 1 of 2 is gone. Run the command again." in capsys.readouterr().err


def test_a_first_process_that_was_killed_leaves_the_way_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "a.job"
    job.mkdir()
    (job / "plan.json").touch()
    (tmp_path / "job").write_text(str(job))
    assert outcome(tmp_path, "os.kill(os.getpid(), 9)", SLEEP) == 7
    said = capsys.readouterr().err
    assert "error[E7002]: process 0 of 2 was killed by signal 9." in said
    assert f"Continue: wanloom generate --resume {job}" in said
    (job / "plan.json").unlink()
    assert continue_words(job) == "No step was saved: run the command again."


def test_processes_that_do_nothing_any_more_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANLOOM_PATIENCE", "3")
    assert outcome(tmp_path, BUSY.format(beats=100), SLEEP) == 0  # five seconds in which one of them does something
    (tmp_path / "board").unlink()
    started = time.monotonic()
    assert outcome(tmp_path, BUSY.format(beats=3) + SLEEP, SLEEP) == 7
    assert time.monotonic() - started < 30
    assert "no process of this run did anything for" in capsys.readouterr().err


def test_ctrl_c_goes_to_the_first_alone_and_the_second_one_ends_all(tmp_path: Path) -> None:
    hears = "signal.signal(signal.SIGINT, lambda *_: sys.exit(7)); time.sleep(60)"
    assert outcome(tmp_path, hears, f"signal.signal(signal.SIGINT, lambda *_: sys.exit(9)); {SLEEP}", (1.5,)) == 7
    deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    assert outcome(tmp_path, deaf, SLEEP, (1.5, 2.5)) == 130
