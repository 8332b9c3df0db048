"""When a process waits in vain, and when it only waits."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from wanloom import pulse
from wanloom.errors import InputError
from wanloom.runtime import watchdog
from wanloom.runtime.watchdog import EVERY, FileBoard, Reading, Standstill, StoreBoard, Watch, patience


class Clock:
    """A time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)

    def passes(self, seconds: float, judge: Standstill, readings: list[Reading] | None) -> list[float]:
        """What the judge says in so many seconds, asked every half second."""
        said = []
        for _ in range(int(seconds / EVERY)):
            self.now += EVERY
            still = judge.look(readings)
            if still is not None:
                said.append(still)
        return said


def test_nothing_done_for_two_minutes_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    judge = Standstill()
    assert not clock.passes(119, judge, [(1, 120.0), (5, 120.0)])
    assert not clock.passes(119, judge, [(1, 120.0), (6, 120.0)])  # one of two did something
    assert clock.passes(4, judge, [(1, 120.0), (6, 120.0)])


def test_slow_steps_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    judge = Standstill(extra=10)
    assert not clock.passes(309, judge, [(1, 300.0), (5, 120.0)])
    assert clock.passes(4, judge, [(1, 300.0), (5, 120.0)])[0] == pytest.approx(310, abs=1.5)


def test_no_news_is_no_progress_and_sleep_is_none_either(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    judge = Standstill()
    assert not clock.passes(60, judge, [(1, 120.0)])
    clock.now += 1000  # this process was stopped, as others perhaps
    assert not clock.passes(50, judge, None)
    assert clock.passes(15, judge, None)


def test_patience_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert patience() == 120
    monkeypatch.setenv("WANLOOM_PATIENCE", "2.5")
    assert patience() == 2.5
    for odd in ("0", "-1", "soon", "nan", "inf"):
        monkeypatch.setenv("WANLOOM_PATIENCE", odd)
        with pytest.raises(InputError) as error:
            patience()
        assert error.value.code == "E8001"


def test_steps_say_how_long_one_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    pulse._ends.clear()
    before = pulse.count()
    assert pulse.median_step() == 0
    for seconds in (0, 30, 20, 500, 30):
        now[0] += seconds
        pulse.step()
    assert pulse.median_step() == 30
    assert pulse.count() == before + 5
    pulse._ends.clear()


class Store(dict[str, bytes]):
    """What a store of torch.distributed does."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]


def test_boards_show_what_all_have_written(tmp_path: Path) -> None:
    store: Any = Store()
    for boards in (
        [FileBoard(tmp_path / "board", rank) for rank in range(2)],
        [StoreBoard(store, rank, 2) for rank in range(2)],
    ):
        boards[1].write((2**40, 120.0))
        boards[0].write((7, 12.25))
        assert list(boards[0].read()) == list(boards[1].read()) == [(7, 12.25), (2**40, 120.0)]
    assert FileBoard(tmp_path / "board").read() == [(7, 12.25), (2**40, 120.0)]


def wait_for(ended: list[str], seconds: float) -> list[str]:
    until = time.monotonic() + seconds
    while not ended and time.monotonic() < until:
        time.sleep(0.05)
    return ended


def test_the_thread_ends_what_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANLOOM_PATIENCE", "1.2")
    ended: list[str] = []
    watch = Watch(FileBoard(tmp_path / "board", 0), ended.append)
    watch.start()
    for _ in range(20):
        pulse.beat()
        time.sleep(0.1)
    assert not ended
    assert "did anything for" in wait_for(ended, 20)[0]
    watch.close()
    closed: list[str] = []
    watch = Watch(FileBoard(tmp_path / "board", 0), closed.append)
    watch.start()
    watch.close()
    assert not wait_for(closed, 2.5)


def test_a_signal_that_nobody_answers_is_answered_by_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "REACT", 0.5)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    ended: list[str] = []
    waits = [False]
    watch = Watch(FileBoard(tmp_path / "board", 0), ended.append, waits=lambda: waits[0])
    watch.hear_signals()
    try:
        watch.start()
        os.kill(os.getpid(), signal.SIGTERM)
        assert not wait_for(ended, 1.5)  # the main thread is about to answer
        waits[0] = True
        assert "told to stop" in wait_for(ended, 20)[0]
    finally:
        watch.close()
        signal.signal(signal.SIGTERM, before)


def test_a_process_whose_parent_is_gone_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(FileBoard(tmp_path / "board", 0), lambda reason: None)
    assert watch.look() is None
    monkeypatch.setattr(watchdog.os, "getppid", lambda: 1)
    assert watch.look() == "the process that started this one is gone"
