"""Ends a process that waits for others in vain.

An exchange between processes returns when all have come.  When one has died the system says so to the others, with
gloo at once; when one hangs nobody does, and all would wait for ever, deep in a library that hears no signal.  So a
thread looks at how much each process has done (`pulse.py`), which they write on a board that all can read: a file on
one machine, the store of the process group on several.  When no number has changed for `patience` seconds, or for 10
steps where steps take longer, the thread ends its process.

    watch = Watch(FileBoard(path, rank), end)       # end(reason) is called in the thread and does not return
    watch.start()
"""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from wanloom import pulse
from wanloom.errors import InputError

PATIENCE = 120.0  # seconds
STEPS = 10  # as long as so many steps take, where that is longer
EVERY = 0.5  # seconds between two looks
REACT = 5.0  # seconds in which the main thread may answer a signal
SIGNALS = (signal.SIGINT, signal.SIGTERM)

Reading = tuple[int, float]  # how much a process has done, and how long it may take to do more


def patience() -> float:
    """Seconds without progress after which several processes end: WANLOOM_PATIENCE, else 120.  Error: E8001."""
    text = os.environ.get("WANLOOM_PATIENCE", "")
    try:
        seconds = float(text or PATIENCE)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError("E8001", f"WANLOOM_PATIENCE: got '{text}', expected a number of seconds above 0.")
    return seconds


# ---------------------------------------------------------------- boards


class Board(Protocol):
    """Where each process writes how much it has done, and all can read it."""

    def write(self, reading: Reading) -> None: ...

    def read(self) -> Sequence[Reading]: ...


class FileBoard:
    """A file of 16 bytes for each process of one machine; with rank None it is only read."""

    ENTRY = struct.Struct("<qd")

    def __init__(self, path: Path, rank: int | None = None) -> None:
        self._rank = rank
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, reading: Reading) -> None:
        assert self._rank is not None, "who only reads has no place"
        os.pwrite(self._file, self.ENTRY.pack(*reading), self._rank * self.ENTRY.size)

    def read(self) -> list[Reading]:
        raw = os.pread(self._file, 1 << 20, 0)
        return [self.ENTRY.unpack(raw[i : i + self.ENTRY.size]) for i in range(0, len(raw), self.ENTRY.size)]


class StoreBoard:
    """Keys of a `torch.distributed` store, which processes on several machines share.

    store: a client of its own (`store.clone()`), as one that waits for a key is closed to other threads meanwhile.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world

    def write(self, reading: Reading) -> None:
        self._store.set(f"wanloom/done/{self._rank}", f"{reading[0]} {reading[1]}")

    def read(self) -> list[Reading]:
        found = []
        for rank in range(self._world):
            done, allowed = self._store.get(f"wanloom/done/{rank}").decode().split()
            found.append((int(done), float(allowed)))
        return found


# ---------------------------------------------------------------- the judge, and the thread that asks it


class Standstill:
    """Whether nothing has been done for too long.

    extra: seconds beyond what the processes allow themselves, for whoever is to speak after them.  Time in which the
    asker itself did not run (a machine put to sleep) does not count.
    """

    def __init__(self, extra: float = 0.0) -> None:
        self.extra = extra
        self._seen: list[int] = []
        self._since = self._asked = time.monotonic()
        self._allowed = patience()

    def look(self, readings: Sequence[Reading] | None) -> float | None:
        """The seconds without progress when they are too many; None when all is well.  None as readings: no news."""
        now = time.monotonic()
        if now - self._asked > 10 * EVERY:
            self._since += now - self._asked
        self._asked = now
        if readings is not None:
            done = [reading[0] for reading in readings]
            self._allowed = max([reading[1] for reading in readings], default=self._allowed)
            if done != self._seen:
                self._seen, self._since = done, now
        still = now - self._since
        return still if still > self._allowed + self.extra else None


class Watch(threading.Thread):
    """Looks every half second whether this process waits in vain, and then calls `end(reason)`.

    In vain is: nobody does anything for too long (`Standstill`); the process that started this one is gone; a signal
    came and the main thread did not answer, which is deep in an exchange when `waits` says so.
    """

    def __init__(
        self, board: Board, end: Callable[[str], None], *, extra: float = 0.0,
        waits: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        super().__init__(name="watchdog", daemon=True)
        self._board, self._end, self._waits = board, end, waits
        self._still, self._parent = Standstill(extra), os.getppid()
        self._over = threading.Event()
        self._told: float | None = None
        self._pipe: tuple[int, int] | None = None  # through which signals come
        self.write()

    def write(self) -> None:
        """This process's own line on the board."""
        self._board.write((pulse.count(), max(patience(), STEPS * pulse.median_step())))

    def hear_signals(self) -> None:
        """From now on signals are known to the thread, too, in the moment they come.  For the main thread."""
        self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)

    def close(self) -> None:
        """The work is over.  For the thread that called `hear_signals`."""
        self._over.set()
        if self.is_alive():
            self.join()
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            for end in self._pipe:
                os.close(end)
            self._pipe = None

    def run(self) -> None:
        while not self._over.wait(EVERY):
            reason = self.look()
            if reason is not None and not self._over.is_set():
                self._end(reason)
                return

    def look(self) -> str | None:
        """Why this process has to end, or None."""
        if os.getppid() != self._parent:
            return "the process that started this one is gone"
        if self._told is None and self._was_told():
            self._told = time.monotonic()
        if self._told is not None and self._waits() and time.monotonic() - self._told > REACT:
            return "it was told to stop and waited for other processes in vain"
        still = self._still.look(self._news())
        return None if still is None else f"no process of this run did anything for {still:.0f} s"

    def _was_told(self) -> bool:
        """Whether a signal has come that asks for the end."""
        if self._pipe is None:
            return False
        with suppress(BlockingIOError):
            return bool(set(os.read(self._pipe[0], 64)) & {int(number) for number in SIGNALS})
        return False

    def _news(self) -> Sequence[Reading] | None:
        """The board after this process's own line was written; None when it cannot be reached."""
        try:
            self.write()
            return self._board.read()
        except (OSError, RuntimeError, ValueError):  # a store whose process is gone, or stands still itself
            return None
