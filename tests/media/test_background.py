"""Frames encoded in a thread: the same file, bounded memory, errors told as they are, nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from wanloom.media import BackgroundWriter, Frames, VideoWriter, save_video
from wanloom.media.background import WAITING

PATIENCE = 20.0  # seconds until a test that hangs fails


class Gate:
    """A writer that notes what it gets and waits, in each call, for a permission."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.done: list[int] = []
        self.threads: set[str] = set()
        self.passes = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def write(self, frames: Frames) -> None:
        number = int(frames.flat[0])
        self.threads.add(threading.current_thread().name)
        self.begun.append(number)
        self.entered.release()
        assert self.passes.acquire(timeout=PATIENCE)
        self.done.append(number)


class Broken:
    """A writer that fails at its `at`-th piece."""

    def __init__(self, error: BaseException, at: int) -> None:
        self.error, self.at, self.calls = error, at, 0

    def write(self, frames: Frames) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error


def piece(number: int) -> Frames:
    return np.full((4, 16, 16, 3), number, np.uint8)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert not left


def test_the_next_frames_are_made_while_the_first_are_encoded() -> None:
    gate = Gate()
    with BackgroundWriter(gate) as video:
        video.write(piece(0))
        assert gate.entered.acquire(timeout=PATIENCE)  # the first is under way, and
        video.write(piece(1))  # the second was made and handed over
        assert gate.done == [] and gate.begun == [0]
        gate.passes.release(2)
    assert gate.done == [0, 1]
    assert gate.threads == {"wanloom encoder"}


def test_only_so_many_pieces_wait() -> None:
    gate, written = Gate(), []

    def produce() -> None:
        with BackgroundWriter(gate) as video:
            for number in range(8):
                video.write(piece(number))
                written.append(number)

    producer = threading.Thread(target=produce)
    producer.start()
    most = 0
    for encoded in range(8):
        assert gate.entered.acquire(timeout=PATIENCE)
        producer.join(0.05)  # time enough to run ahead, if it could
        most = max(most, len(written) - encoded)
        gate.passes.release()
    producer.join(PATIENCE)
    assert not producer.is_alive()
    assert most == WAITING + 1  # and the one that is being encoded
    assert gate.done == list(range(8))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("odd"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2, 6])
def test_an_error_of_the_encoder_is_raised_as_it_is(error: BaseException, at: int) -> None:
    writer, handed = Broken(error, at), 0
    with pytest.raises(type(error)) as raised, BackgroundWriter(writer) as video:
        for number in range(6):
            video.write(piece(number))
            handed += 1
    assert raised.value is error
    assert writer.calls == at  # nothing is written behind a piece that failed
    assert handed <= at + WAITING + 1


def joining(monkeypatch: pytest.MonkeyPatch, gate: Gate, *, interrupts: int = 0) -> list[str]:
    """From now on the gate lets a piece through when its thread is waited for; the first times Ctrl-C strikes there."""
    join, calls = threading.Thread.join, []

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        calls.append(thread.name)
        if len(calls) <= interrupts:
            raise KeyboardInterrupt
        gate.passes.release()
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", joined)
    return calls


def test_an_error_of_the_decoder_drops_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with pytest.raises(RuntimeError, match="not finite"), BackgroundWriter(gate) as video:
        video.write(piece(0))
        assert gate.entered.acquire(timeout=PATIENCE)
        video.write(piece(1))
        joining(monkeypatch, gate)
        raise RuntimeError("not finite")
    assert gate.begun == gate.done == [0]  # what was under way is finished, for the writer is closed next


def test_ctrl_c_while_the_last_frames_are_encoded_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(gate) as video:
        video.write(piece(0))
        assert gate.entered.acquire(timeout=PATIENCE)
        video.write(piece(1))
        calls = joining(monkeypatch, gate, interrupts=1)
    assert calls == ["wanloom encoder"] * 2
    assert gate.begun == gate.done == [0]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".png", ".gif"])
def test_the_file_has_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (13, 48, 64, 3), np.uint8)
    pieces = np.split(frames, [1, 5, 9])
    save_video(tmp_path / f"a{suffix}", pieces, fps=16, comment="{}")
    with VideoWriter(tmp_path / f"b{suffix}", fps=16, comment="{}") as writer, BackgroundWriter(writer) as video:
        for some in pieces:
            video.write(some)
    assert writer.frames == 13
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
