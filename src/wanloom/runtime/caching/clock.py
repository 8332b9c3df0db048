"""Where a run is: which step, of which video, with or without the prompt.  Said by whoever calls the model.

A model cannot know this from its tensors, and a step cache must.  The loop over the steps says `at`, and the velocities
of guidance are wrapped by `within`:

    clock = StepClock(((0, 26), (26, 40)))
    cond = clock.within(COND, conditioned(dit, ...))
    clock.at(step=3, video=0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

COND, UNCOND = "cond", "uncond"  # the branches of guidance; a pass of both in one batch may have a name of its own


@dataclass
class StepClock:
    """The place in a run, of which the step caches of a model hold the same object.

    spans: for each expert in turn the steps start..stop-1 that it makes; they follow one another from 0.  video counts
    those that take turns within a step.  Raises ValueError for spans that do not follow one another.
    """

    spans: tuple[tuple[int, int], ...]
    step: int = 0
    video: int = 0
    branch: str = COND

    def __post_init__(self) -> None:
        edges = [0, *(stop for _, stop in self.spans)]
        if not self.spans or any(
            not start == edge < stop for edge, (start, stop) in zip(edges[:-1], self.spans, strict=True)
        ):
            raise ValueError(f"spans {self.spans} are not steps 0, 1 ... one expert after the other")

    @property
    def steps(self) -> int:
        """How many steps the run has."""
        return self.spans[-1][1]

    @property
    def expert(self) -> int:
        """The number of the expert that makes this step.  Raises ValueError outside of the run."""
        for number, (start, stop) in enumerate(self.spans):
            if start <= self.step < stop:
                return number
        raise ValueError(f"step {self.step} of a run of {self.steps}")

    @property
    def span(self) -> tuple[int, int]:
        """The steps of that expert: start, and stop behind the last."""
        return self.spans[self.expert]

    def at(self, step: int, video: int = 0) -> None:
        """From now on the model is called for this step of this video."""
        self.step, self.video = step, video

    def within(self, branch: str, call: Callable[P, R]) -> Callable[P, R]:
        """The same function (a velocity, say), with `branch` said while it runs."""

        def named(*args: P.args, **kwargs: P.kwargs) -> R:
            before, self.branch = self.branch, branch
            try:
                return call(*args, **kwargs)
            finally:
                self.branch = before

        return named
