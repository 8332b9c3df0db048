"""What runs took, kept in the user's cache directory, so that the next estimate is better.

    meter = Meter()
    for event in stream: meter.hear(event)
    keep(Record(kind=..., estimated={...}, seconds=meter.seconds, ...), key)

    seen = read(key, rates)                    # for `estimate.learned`

A run has a file of its own, which appears whole or not at all: runs side by side cannot damage each other's.  Files of
another machine or of other rates have other names and are not looked at; what is damaged is left out and said (W5007).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from wanloom import store
from wanloom.durable import write_atomic
from wanloom.errors import InputError, WanloomWarning
from wanloom.estimate import NEWEST, STAGES, Seen
from wanloom.rates import Rates
from wanloom.store import Store

FORMAT = 1
RUNS = Store("runs", limit=2**18, suffix=".json")
LARGEST = 2**14  # bytes of a record; one of ours has some hundreds


class Heard(Protocol):
    """Of `results.Event`: which stage, and seconds since the last one."""

    @property
    def stage(self) -> str: ...
    @property
    def seconds(self) -> float: ...


class Meter:
    """Adds up the seconds of a run's stages from its events."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage = STAGES[0]

    def hear(self, event: Heard) -> None:
        """The event that begins a stage ends the one before; what is before denoising is encoding (a clip's past)."""
        stage = event.stage if event.stage in STAGES else self._stage
        ended = "encode" if stage == "denoise" != self._stage else self._stage
        self.seconds[ended] = self.seconds.get(ended, 0.0) + event.seconds
        self._stage = stage


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run: its kind, seconds of each stage as estimated from the plain rates and as measured, bytes likewise."""

    kind: str
    estimated: Mapping[str, float]
    seconds: Mapping[str, float]
    need: int
    peak: int
    need_gpu: int = 0
    peak_gpu: int = 0

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "at": int(time.time()), **asdict(self)})


def name_of(key: str, rates: Rates) -> str:
    """What the names of the records of a device begin with: it, and the rates that its estimates are made from."""
    return f"{key}-{hashlib.sha256(rates.to_json().encode()).hexdigest()[:8]}"


def keep(record: Record, key: str, rates: Rates) -> None:
    """Into the cache.  A cache that cannot be written is said (W5006); the video is there all the same."""
    name = f"{name_of(key, rates)}-{time.time_ns():020d}-{os.getpid()}"
    try:
        RUNS.open()
        write_atomic(RUNS.path(name), record.to_json().encode())
        RUNS.trim()
    except (OSError, InputError) as error:
        text = f"W5006: what this run took could not be kept ({error}). WANLOOM_CACHE names another directory."
        warnings.warn(WanloomWarning(text), stacklevel=2)


def read(key: str, rates: Rates) -> tuple[Seen, ...]:
    """The newest records of a device, the newest last.  Warning: W5007, one for all files that are damaged."""
    folder = store.home() / RUNS.kind
    files = sorted(folder.glob(f"{name_of(key, rates)}-*{RUNS.suffix}"))[-NEWEST:]
    found: list[Seen] = []
    damaged: list[Path] = []
    for file in files:
        try:
            found.append(parse(_bytes(file)))
        except FileNotFoundError:  # another run trimmed it
            continue
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            damaged.append(file)
    if damaged:
        text = f"W5007: {damaged[0]}: not readable ({len(damaged)} such); left out."
        text += " `wanloom doctor --cache clear` mends it."
        warnings.warn(WanloomWarning(text), stacklevel=2)
    return tuple(found)


def parse(data: bytes) -> Seen:
    """A record as what is learned from.  Raises ValueError, LookupError or TypeError for anything else."""
    row: dict[str, Any] = json.loads(data)
    if row["format"] != FORMAT:
        raise ValueError(f"format {row['format']}")
    estimated, seconds = (
        {stage: _number(value) for stage, value in row[name].items()} for name in ("estimated", "seconds")
    )
    stages = {stage: (raw, seconds[stage]) for stage, raw in estimated.items() if stage in seconds}
    return Seen(kind=str(row["kind"]), stages=stages, memory=(_number(row["need"]), _number(row["peak"])))


def _bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        data = opened.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError("too long")
    return data


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, float | int) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no number of seconds or bytes")
    return float(value)
