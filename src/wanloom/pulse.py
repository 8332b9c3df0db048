"""That something is being done: a count that goes up with every piece of work of this process.

A tensor read, a denoising step, a piece decoded.  Where several processes make one video, a watchdog
(`runtime/watchdog.py`) ends them when the count stands still for too long; in a run alone nobody looks at it.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from itertools import pairwise

KEPT = 21  # steps whose durations are remembered

_count = 0
_ends: deque[float] = deque(maxlen=KEPT + 1)


def beat() -> None:
    """A piece of work is done."""
    global _count
    _count += 1  # two threads may lose one between them: what counts is that it changes


def step() -> None:
    """A denoising step is done; steps say how long this run may take to do something."""
    _ends.append(time.monotonic())
    beat()


def count() -> int:
    """How much was done so far."""
    return _count


def median_step() -> float:
    """Seconds from one step to the next, the median of the last; 0 before there are two."""
    ends = list(_ends)
    return statistics.median(b - a for a, b in pairwise(ends)) if len(ends) > 1 else 0.0
