"""Frames are encoded in a thread of their own while the next are made.

    with VideoWriter(path, fps=16) as writer, BackgroundWriter(writer) as video:
        for frames in decoded:
            video.write(frames)          # [n, H, W, 3] uint8

The file has the bytes it has without this: the same calls in the same order, from one other thread.  Memory stays
bounded, because `write` waits while `WAITING` pieces stand in line.  An error of the encoder is raised by the `write`
that follows it, or when the block ends, and is the error itself.
"""

from __future__ import annotations

from collections import deque
from threading import Condition, Thread
from types import TracebackType
from typing import Protocol

from wanloom.durable import failpoint
from wanloom.media.pictures import Frames

WAITING = 2  # pieces beside the one that is being encoded: one is enough while decoding and encoding take turns


class Writer(Protocol):
    """What takes frames [n, H, W, 3] uint8, as `VideoWriter`."""

    def write(self, frames: Frames) -> None: ...


class BackgroundWriter:
    """Hands frames to `writer` in a thread, in order; see the module.

    When the block ends all are written, and the thread is gone.  When it ends with an error those that wait are
    dropped: the thread finishes the piece it has, so that the writer can then be closed by whoever owns it.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._change = Condition()
        self._waiting: deque[Frames] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._thread = Thread(target=self._encode, name="wanloom encoder", daemon=True)

    def write(self, frames: Frames) -> None:
        """Append frames, which must not be changed afterwards.  Raises what went wrong with earlier ones."""
        with self._change:
            self._change.wait_for(lambda: len(self._waiting) < WAITING or self._error is not None)
            self._complain()
            self._waiting.append(frames)
            self._change.notify_all()

    def _encode(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    return
                frames = self._waiting.popleft()
                self._change.notify_all()
            try:
                self._writer.write(frames)
                failpoint("encode")
            except BaseException as error:  # whatever it is: raised where the frames come from
                with self._change:
                    self._error = error
                    self._change.notify_all()
                return

    def _complain(self) -> None:
        if self._error is not None:
            raise self._error

    def _end(self, *, drop: bool) -> None:
        """No more frames; wait for the thread."""
        with self._change:
            self._ended = True
            if drop:
                self._waiting.clear()
            self._change.notify_all()
        self._thread.join()

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._end(drop=True)
            return
        try:
            self._end(drop=False)
        except BaseException:  # Ctrl-C while waiting for the last frames
            self._end(drop=True)
            raise
        self._complain()
