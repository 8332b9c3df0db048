"""What a step cache has to know of a model beforehand: measured once, kept as data, read strictly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from wanloom.errors import InputError
from wanloom.runtime.caching.clock import COND, StepClock

FORMAT = 1  # of the JSON; raised when a field changes its meaning
MAX_JSON = 1 << 22  # a fit of 1000 steps has 50 kB

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class CacheFit:
    """Figures of one model, from a run of `steps` steps without a cache.

    spans: the steps of each expert, as in `StepClock`.  ratios: branch -> for each step how long the change is that the
    trunk makes, against the step before; 1 for the first step of the run (MagCache).  polynomials: for each expert the
    map from the change of the timestep's modulation to the change of what the trunk adds, highest power first
    (TeaCache).  Either may be empty.  about: the model and the run, for people.
    """

    spans: Spans
    ratios: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    polynomials: tuple[tuple[float, ...], ...] = ()
    about: str = ""
    format: int = FORMAT

    @property
    def steps(self) -> int:
        return self.spans[-1][1]

    def ratios_for(self, spans: Spans) -> dict[str, tuple[float, ...]]:
        """The ratios of a run with these spans: each of its steps has those of the nearest step of the fit.

        Published is the nearest step of the whole run; here the steps of each expert are stretched by themselves, so
        that the jump where the experts change stays where it is.  With as many steps as in the fit both are the same.
        Runs with another number of experts are stretched as a whole.
        """
        own = self.spans
        if len(own) != len(spans):
            own, spans = ((0, self.steps),), ((0, spans[-1][1]),)
        stretched: dict[str, tuple[float, ...]] = {}
        for branch, row in self.ratios.items():
            out: list[float] = []
            for (start, stop), (begin, end) in zip(own, spans, strict=True):
                # An expert's first step always runs: its number is not read, and not stretched to other steps.
                out += [row[start], *nearest(row[start + 1 : stop] or (1.0,), end - begin - 1)]
            stretched[branch] = tuple(out)
        return stretched

    def to_json(self) -> str:
        """The fit as JSON; `from_json` gives back an equal one."""
        return json.dumps({"format": self.format, **asdict(self)}, allow_nan=False, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> CacheFit:
        """Read a fit strictly.  Error: E4036 for anything else than a fit of this format, saying what is wrong."""
        if len(text) > MAX_JSON:
            raise _damaged(f"{len(text)} bytes")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
            raise _damaged(str(error)[:120]) from None
        names = {entry.name for entry in fields(cls)}
        if not isinstance(data, dict) or set(data) != names or data["format"] != FORMAT:
            raise _damaged(f"its keys are not those of format {FORMAT}")
        spans = _spans(data["spans"])
        if not isinstance(data["ratios"], dict) or not isinstance(data["about"], str):
            raise _damaged("its ratios are no table, or its description no text")
        ratios = {branch: _numbers(row, f"ratios of {branch}") for branch, row in data["ratios"].items()}
        if ratios and (COND not in ratios or any(len(row) != spans[-1][1] or min(row) < 0 for row in ratios.values())):
            raise _damaged(f"ratios are not {spans[-1][1]} positive numbers a branch, '{COND}' among them")
        polynomials = tuple(_numbers(row, "a polynomial") for row in _list(data["polynomials"], "polynomials"))
        if polynomials and (len(polynomials) != len(spans) or not all(polynomials)):
            raise _damaged("it has not one polynomial for each expert")
        return cls(spans=spans, ratios=ratios, polynomials=polynomials, about=data["about"])


def nearest(row: Sequence[float], count: int) -> list[float]:
    """`count` numbers of a row at equal distances from its first to its last, each the nearest there is."""
    if count == 1:
        return [row[-1]]
    return [row[round(i * (len(row) - 1) / (count - 1))] for i in range(count)]


def _damaged(what: str) -> InputError:
    return InputError("E4036", f"cache fit: {what}. Make it again with `wanloom calibrate cache`.")


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _damaged(f"{name} is no list")
    return value


def _spans(value: Any) -> Spans:
    pairs = _list(value, "spans")
    if not all(isinstance(pair, list) and [type(number) for number in pair] == [int, int] for pair in pairs):
        raise _damaged("a span is no pair of whole numbers")
    try:
        return StepClock(tuple((start, stop) for start, stop in pairs)).spans
    except ValueError as error:
        raise _damaged(str(error)[:120]) from None


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    row = _list(value, name)
    if not all(type(number) in (int, float) and math.isfinite(number) for number in row):
        raise _damaged(f"{name}: expected finite numbers")
    return tuple(float(number) for number in row)
