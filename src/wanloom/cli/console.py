"""How the commands speak: one line for an error or a warning on stderr, plain numbers in words people read."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from wanloom.errors import WanloomWarning

if TYPE_CHECKING:
    from rich.console import Console

_seen: set[str] = set()


def say(text: str = "") -> None:
    """One line for the person on stdout (progress, results)."""
    print(text, flush=True)


def report_error(line: str) -> None:
    """`error[E2005]: ...` on stderr: red where the terminal can, always one line."""
    _report(line, "31")


def report_warning(line: str) -> None:
    """`warning[W4018]: ...` on stderr, once for each text."""
    if line not in _seen:
        _seen.add(line)
        _report(line, "33")


@contextmanager
def one_line_warnings(*, debug: bool) -> Iterator[None]:
    """Inside, warnings appear as one line each, our own always, and libraries' own remarks only with --debug."""
    _seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("always", WanloomWarning)
        warnings.showwarning = _shower(debug)
        yield


def _shower(debug: bool) -> Callable[..., None]:

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, WanloomWarning):
            report_warning(warning_line(str(message)))
        elif debug:
            report_warning(f"warning: {category.__name__}: {message} ({filename}:{lineno})")

    return show


def warning_line(message: str) -> str:
    """`W4018: text`, `warning[W4018]: text` and plain text as the one line that is printed."""
    if message.startswith("warning"):
        return message
    code = re.match(r"\[?(W\d{4})\]?:\s*(.*)", message, re.DOTALL)
    return f"warning[{code[1]}]: {code[2]}" if code else f"warning: {message}"


def rich_console(*, stderr: bool = False) -> Console:
    """A rich console (imported only when something is drawn)."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person watches this stream: a terminal that can redraw, and not a CI log."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and "CI" not in os.environ


def bytes_text(count: float) -> str:
    """1234567 -> '1.2 MB' (decimal units, as disks and downloads are sold)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def count_text(count: float) -> str:
    """3.2e15 -> '3.2 P': plain multiples for operations."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if abs(count) < 1000 or unit == "E":
            break
        count /= 1000
    return f"{count:.3g} {unit}".strip()


def time_text(seconds: float) -> str:
    """3.14 -> '3.1 s', 75 -> '1 m 15 s', 4000 -> '1 h 06 m'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m"


def one_line(text: str) -> str:
    """Text as one printable line: control characters that a terminal would obey are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _report(line: str, color: str) -> None:
    text = one_line(line)
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        head, colon, rest = text.partition(": ")
        text = f"\033[1;{color}m{head}\033[0m{colon}{rest}"
    print(text, file=sys.stderr, flush=True)
