"""What goes wrong, in one line a person can act on.

Every error has a code. Its first digit is the exit code of the process: 2 usage, 3 input media, 4 model or config file,
5 resources, 6 numerical, 7 interrupted but resumable, 8 environment.  Anything else that escapes is a bug (exit 70).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import takewhile


class WanloomError(Exception):
    """An error with a stable code: `error[E2005]: frames: got 82, expected 4n+1. Use 81 or 85.`"""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def exit_code(self) -> int:
        return int(self.code[1])

    def __str__(self) -> str:
        return f"error[{self.code}]: {self.message}"


class InputError(WanloomError):
    """Something a person gave and can mend: an option, a picture, a model file."""


class NumericalError(WanloomError):
    """Non-finite values appeared; the message names step, expert, sigma and tensor (exit 6)."""


class Interrupted(WanloomError):
    """The run was stopped and its state is on disk; the message holds the resume command (exit 7)."""


class WanloomWarning(UserWarning):
    """Said once on stderr: `warning[W4018]: ...`"""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a sentence: "Did you mean 'unipc'? There are: dpm++, euler, unipc."."""
    names = sorted(known)

    def likeness(name: str) -> tuple[float, int]:
        # Of equally near names the one that begins alike: "t2v-15B" was to be t2v-14B, not ti2v-5B.
        ratio = difflib.SequenceMatcher(None, given, name).ratio()
        return ratio, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(given, name, strict=False)))

    near = max(names, key=likeness, default="")
    guess = f"Did you mean '{near}'? " if near and likeness(near)[0] >= 0.5 else ""
    return f"{guess}There are: {', '.join(names)}."
