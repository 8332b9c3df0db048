"""Measure what MagCache and TeaCache have to know of a model, in runs without a cache.

    dit.trunk = recorder = Recorder(dit.trunk, clock, points)     # then the run; one `points` for all experts
    fit = fit_caches(points, clock.spans, about="...")

Each pass of the trunk leaves a `Point`, against the step before of the same video, branch and expert.  Give each prompt
a video number of its own: figures of several are averaged.  It remembers what the trunk added, one tensor of the size
of x for each branch, and waits for the device in every pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanloom.errors import InputError
from wanloom.models.layers import Scene
from wanloom.runtime.caching.base import Entry, StepCache, total
from wanloom.runtime.caching.clock import COND, StepClock
from wanloom.runtime.caching.fit import CacheFit, Spans

DEGREE = 4  # of TeaCache's polynomials, as published
DIGITS = 5  # of the ratios, as published


@dataclass(frozen=True)
class Point:
    """One pass of the trunk against the step before.

    ratio: of the lengths of what the trunk adds, averaged over tokens; moved: relative change of the timestep's
    modulation; changed: relative change of what the trunk adds (both L1).
    """

    video: int
    branch: str
    expert: int
    step: int
    ratio: float
    moved: float
    changed: float


class Recorder(StepCache):
    """A trunk that always runs and is measured; `points` is a list that it fills."""

    def __init__(
        self,
        trunk: nn.Module,
        clock: StepClock,
        points: list[Point],
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(trunk, clock, reduce=reduce)
        self.points = points

    def small(self, entry: Entry, seen: Tensor) -> bool:
        """Never: nothing is skipped."""
        return False

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        """x [B, L, C] -> what the trunk makes of it."""
        out: Tensor = self.trunk(x, scene)
        with torch.no_grad():
            self._measure(out - x, scene.mod[:, 0])
        return out

    def _measure(self, added: Tensor, mod: Tensor) -> None:
        clock, entry = self.clock, self._entry()
        before = entry.tensors
        if before:
            lengths = added.norm(dim=-1) / before["added"].norm(dim=-1)
            sums = total(lengths, lengths.new_ones(lengths.shape), mod - before["mod"], before["mod"])
            sums = torch.cat((sums, total(added - before["added"], before["added"])))
            ratios, count, moved, base, changed, size = self.agree(sums)
            self.points.append(
                Point(clock.video, clock.branch, clock.expert, clock.step, ratios / count, moved / base, changed / size)
            )
        entry.tensors, entry.step = {"added": added, "mod": mod}, clock.step
        if clock.step + 1 == clock.span[1]:
            del self._entries[clock.video, clock.branch]


def fit_caches(points: Sequence[Point], spans: Spans, *, about: str = "") -> CacheFit:
    """The figures of a model from all that was recorded.

    Ratios are averaged over the videos, for each branch and step; 1 where nothing stands before, the first step of each
    expert.  The polynomial of an expert is the least-squares fit of change over movement, of degree 4 or as many as its
    points determine; an expert of fewer than two steps has the line "change = movement".
    Error: InputError E2047 when a step of a branch was not recorded.
    """
    branches = sorted({point.branch for point in points} | {COND})
    ratios = {branch: _ratios([point for point in points if point.branch == branch], spans) for branch in branches}
    polynomials = tuple(
        fit_polynomial([(point.moved, point.changed) for point in points if point.expert == number])
        for number in range(len(spans))
    )
    return CacheFit(spans=spans, ratios=ratios, polynomials=polynomials, about=about)


def _ratios(points: Sequence[Point], spans: Spans) -> tuple[float, ...]:
    """The ratios of one branch, averaged over the videos; 1 for the first step of each expert."""
    firsts, steps = {start for start, _ in spans}, spans[-1][1]
    seen: dict[int, list[float]] = {step: [] for step in range(steps)}
    for point in points:
        seen[point.step].append(point.ratio)
    missing = [step + 1 for step in seen if not seen[step] and step not in firsts]
    if missing:
        raise InputError(
            "E2047",
            f"calibrate: step {missing[0]} of {steps} was not measured. Let the run come to its end, without a cache.",
        )
    return tuple(round(sum(row) / len(row), DIGITS) if row else 1.0 for row in seen.values())


def fit_polynomial(pairs: Sequence[tuple[float, float]], degree: int = DEGREE) -> tuple[float, ...]:
    """The polynomial through (x, y) by least squares, highest power first; x -> x when there are fewer than two x.

    The degree is at most the number of different x less one.
    """
    places = {x for x, _ in pairs}
    if len(places) < 2:
        return (1.0, 0.0)
    degree = min(degree, len(places) - 1)
    x, y = torch.tensor(list(pairs), dtype=torch.float64).unbind(1)
    scale = x.abs().max()
    powers = torch.arange(degree, -1, -1, dtype=torch.float64)
    found = torch.linalg.lstsq((x / scale)[:, None] ** powers, y[:, None], driver="gelsd").solution[:, 0]
    return tuple((found / scale**powers).tolist())
