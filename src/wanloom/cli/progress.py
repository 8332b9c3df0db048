"""What a person sees while a video is made: a bar for each stage, or plain lines where no terminal can redraw.

    encode   ━━━━━━━━━━━━━━━━━━━━━━━━  0.2 s
    denoise  ━━━━━━━━━━━━━╸            11/20  0.15 s a step, 1.4 s left, peak 0.4 GB

A view is told of stages and steps and knows nothing of models. `open_view` chooses the kind.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from wanloom.cli.console import bytes_text, is_terminal, say, time_text

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.progress import TaskID
    from rich.text import Text

LINE_EVERY = 5.0  # seconds between two plain lines of one stage
PREVIEW_WIDTH = 64  # characters; wider pictures are thinned out


class View(Protocol):
    """What the commands call: a stage begins with `done` of its `total` steps done, and more are."""

    @property
    def shows_pictures(self) -> bool: ...

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None: ...

    def step(self, done: int, peak: int | None = None) -> None: ...

    def preview(self, width: int, height: int, rgb: bytes) -> None: ...

    def line(self, text: str) -> None: ...


class Pace:
    """Seconds a step from the last few steps, and what is left at that pace."""

    def __init__(self, done: int = 0) -> None:
        self._last = time.monotonic()
        self._done = done
        self._recent: deque[float] = deque(maxlen=5)

    def reached(self, done: int) -> None:
        now = time.monotonic()
        if done > self._done:
            self._recent.append((now - self._last) / (done - self._done))
        self._last, self._done = now, done

    def text(self, total: int, peak: int | None) -> str:
        """'0.15 s a step, 1.4 s left, peak 0.4 GB'."""
        words = []
        if self._recent:
            each = sum(self._recent) / len(self._recent)
            words = [f"{_step_text(each)} a step", f"{time_text(each * (total - self._done))} left"]
        if peak:
            words.append(f"peak {bytes_text(peak)}")
        return ", ".join(words)


class Lines:
    """Plain lines on stdout, for logs: the first and last step of a stage, and one every few seconds between."""

    shows_pictures = False

    def __init__(self) -> None:
        self._name = ""
        self._total: int | None = None
        self._first = 1
        self._started = self._spoke = time.monotonic()
        self._pace = Pace()

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.close()
        self._name, self._total, self._first = name, total, done + 1
        self._started = self._spoke = time.monotonic()
        self._pace = Pace(done)

    def step(self, done: int, peak: int | None = None) -> None:
        self._pace.reached(done)
        now = time.monotonic()
        if self._total and (done in (self._first, self._total) or now - self._spoke >= LINE_EVERY):
            self._spoke = now
            say(f"{self._name} {done}/{self._total}  {self._pace.text(self._total, peak)}")

    def preview(self, width: int, height: int, rgb: bytes) -> None:
        """Pictures are for terminals."""

    def line(self, text: str) -> None:
        say(text)

    def close(self) -> None:
        if self._name:
            say(f"{self._name} done in {time_text(time.monotonic() - self._started)}")
        self._name = ""


class Bars:
    """Bars that redraw in place, with the preview below them."""

    shows_pictures = True

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        from wanloom.cli.console import rich_console

        view = self

        class WithPreview(Progress):
            def get_renderables(self) -> Iterator[RenderableType]:
                yield from super().get_renderables()
                if view._picture is not None:
                    yield view._picture

        self._picture: Text | Group | None = None
        self._progress = WithPreview(
            TextColumn("[bold cyan]{task.description:<8}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]:>7}"),
            TextColumn("{task.fields[remark]}", style="dim"),
            console=rich_console(),
            refresh_per_second=8,
        )
        self._task: TaskID | None = None
        self._total: int | None = None
        self._started = time.monotonic()
        self._pace = Pace()

    def start(self) -> None:
        self._progress.start()

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self._finish()
        self._started, self._pace, self._total = time.monotonic(), Pace(done), total
        count = f"{done}/{total}" if total else ""
        self._task = self._progress.add_task(name, total=total, completed=done, count=count, remark="")

    def step(self, done: int, peak: int | None = None) -> None:
        if self._task is None or not self._total:
            return
        self._pace.reached(done)
        remark = self._pace.text(self._total, peak)
        self._progress.update(self._task, completed=done, count=f"{done}/{self._total}", remark=remark)

    def preview(self, width: int, height: int, rgb: bytes) -> None:
        self._picture = half_blocks(width, height, rgb)

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def close(self) -> None:
        """The last picture of the screen: finished stages stay, the preview goes."""
        self._finish()
        self._picture = None
        self._progress.stop()

    def abandon(self) -> None:
        """Stop in the middle: the stage keeps its unfinished bar."""
        self._picture = None
        self._progress.stop()

    def _finish(self) -> None:
        if self._task is None:
            return
        seconds = time_text(time.monotonic() - self._started)
        total = self._total or 1
        count = f"{total}/{total}" if self._total else ""
        self._progress.update(self._task, total=total, completed=total, count=count, remark=seconds)
        self._task = None


def half_blocks(width: int, height: int, rgb: bytes) -> Text:
    """A small picture as text: each character is two pixels, the upper one its ink and the lower one its paper."""
    from rich.text import Text

    thin = -(-width // PREVIEW_WIDTH)
    picture = Text()
    for row in range(0, height - thin, 2 * thin):
        for column in range(0, width, thin):
            upper, lower = (_color(rgb, width, y, column) for y in (row, row + thin))
            picture.append("▀", style=f"{upper} on {lower}")
        picture.append("\n")
    return picture


@contextmanager
def open_view() -> Iterator[View]:
    """The view that fits stdout. A stage that an error cuts short is not shown as done."""
    if not is_terminal(sys.stdout):
        lines = Lines()
        yield lines
        lines.close()
        return
    bars = Bars()
    bars.start()
    try:
        yield bars
    except BaseException:
        bars.abandon()
        raise
    bars.close()


def _color(rgb: bytes, width: int, row: int, column: int) -> str:
    at = 3 * (row * width + column)
    return "#" + rgb[at : at + 3].hex()


def _step_text(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else time_text(seconds)
