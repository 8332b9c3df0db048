"""Five step caches from publications, each standing in for the trunk.  When they skip, and what they remember:

| class | skips while | tensors of x's size |
|---|---|---|
| MagCache | the calibrated magnitudes of what is added say the error is small | 1 |
| TeaCache | the timestep's modulation has moved little, by a fitted polynomial | 1 |
| EasyCache | the tokens have moved little, by what the trunk made of the last movement | 2, and 3 while skipping |
| TaylorSeer | always, but for every n-th step; what is added is extrapolated | order + 1 |
| FirstBlockCache | the first block adds almost what it added before; the rest is skipped | 2 |

MagCache and TaylorSeer know their steps beforehand; the others wait for the device once in each call that may skip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from wanloom.errors import InputError
from wanloom.models.layers import Scene, Trunk
from wanloom.models.numerics import recording
from wanloom.runtime.caching.base import Entry, StepCache, total
from wanloom.runtime.caching.clock import COND, StepClock


class MagCache(StepCache):
    """Skips by a table: how the mean length of what the trunk adds changes from step to step (arXiv 2506.09045).

    ratios: for each branch the lengths' ratio of each step to the one before, one number for each step of the run; a
    branch that is not there takes those of `COND`.  The product of the ratios since the trunk ran says how far what is
    remembered is off; |1 - product| is summed over the skipped steps, and the trunk runs when the sum reaches
    `threshold` or `most` steps were skipped.  (Published: magcache_generate.py of MagCache4Wan2.2.)
    """

    START: ClassVar = {"ratio": 1.0, "error": 0.0}

    def __init__(
        self,
        trunk: nn.Module,
        clock: StepClock,
        *,
        ratios: Mapping[str, Sequence[float]],
        threshold: float = 0.06,
        most: int = 2,
        **common: Any,
    ) -> None:
        super().__init__(trunk, clock, most=most, **common)
        if COND not in ratios or any(len(row) != clock.steps for row in ratios.values()):
            raise ValueError(f"ratios must have a row '{COND}', and in each row one number for {clock.steps} steps")
        self.ratios, self.threshold = ratios, threshold

    def small(self, entry: Entry, seen: Tensor) -> bool:
        row, numbers = self.ratios.get(self.clock.branch, self.ratios[COND]), entry.numbers
        numbers["ratio"] *= math.prod(row[entry.step + 1 : self.clock.step + 1])
        numbers["error"] += abs(1 - numbers["ratio"])
        return numbers["error"] < self.threshold


class TeaCache(StepCache):
    """Skips by the timestep alone: how far its modulation has moved, rescaled by a polynomial (arXiv 2411.19108).

    The relative change of the modulation rows (L1, against the step before) goes through the polynomial, which is
    fitted to the change of what the trunk adds; the results are summed, and the trunk runs when the sum reaches
    `threshold`.  coefficients: highest power first; one polynomial, or one for each expert (the last of them for all
    that follow).  Frames that are given clean have a row that never moves; the row of the noisy ones is looked at.
    (Published: teacache_generate.py of TeaCache4Wan2.1, the form with retained steps, which looks at the same rows.)
    """

    START: ClassVar = {"distance": 0.0}

    def __init__(
        self,
        trunk: nn.Module,
        clock: StepClock,
        *,
        coefficients: Sequence[Sequence[float]],
        threshold: float,
        **common: Any,
    ) -> None:
        super().__init__(trunk, clock, **common)
        self.coefficients, self.threshold = coefficients, threshold

    def watch(self, x: Tensor, scene: Scene) -> Tensor:
        return scene.mod[:, 0]

    def small(self, entry: Entry, seen: Tensor) -> bool:
        before = entry.tensors["before"]
        change, size = self.agree(total(seen - before, before))
        polynomial = self.coefficients[min(self.clock.expert, len(self.coefficients) - 1)]
        entry.numbers["distance"] += evaluate(polynomial, change / size if size else 0.0)
        # A polynomial may be negative, and a threshold of 0 must skip nothing.
        return self.threshold > 0 and entry.numbers["distance"] < self.threshold

    def note(self, entry: Entry, seen: Tensor) -> None:
        entry.tensors["before"] = seen


class EasyCache(StepCache):
    """Skips by what the tokens do, with nothing calibrated (arXiv 2507.02860).

    Whenever the trunk runs, the change of its output is set against that of its input since the last run.  This rate
    says what each later movement of the input would have changed; relative to the output's size that is summed, and
    the trunk runs when the sum reaches `threshold`.  The published form does this with latents and velocities around
    the whole model, and lets the branch without the prompt follow the other; here each branch decides by its own
    tokens, so a threshold does not skip exactly the same steps.  (Published: easycache_generate.py, EasyCache4Wan2.2.)
    """

    START: ClassVar = {"error": 0.0}

    def __init__(self, trunk: nn.Module, clock: StepClock, *, threshold: float = 0.05, **common: Any) -> None:
        super().__init__(trunk, clock, **common)
        self.threshold = threshold

    def small(self, entry: Entry, seen: Tensor) -> bool:
        kept = entry.tensors
        if "sums" not in kept:  # the trunk ran once: nothing is known of its rate
            return False
        moved = total(seen - kept.get("before", kept["input"]))
        change, cause, size, moving = self.agree(torch.cat((kept["sums"], moved)))
        if not (cause and size):
            return False
        entry.numbers["error"] += change / cause * moving / size
        return entry.numbers["error"] < self.threshold

    def learn(self, entry: Entry, x: Tensor, out: Tensor) -> None:
        kept = entry.tensors
        if entry.computed >= 0:
            kept["sums"] = total(out - (kept["input"] + kept["added"]), x - kept["input"], out)
        kept["input"], kept["added"] = x, out - x
        kept.pop("before", None)

    def note(self, entry: Entry, seen: Tensor) -> None:
        if entry.idle:  # else it is "input" itself
            entry.tensors["before"] = seen


class TaylorSeer(StepCache):
    """Runs the trunk in every `interval`-th step and extrapolates between (arXiv 2503.06923).

    What the trunk adds is taken as a function of the step's number: differences between the steps in which it ran
    stand for its derivatives, up to `order`, and a Taylor series from the last of them gives the skipped steps.  The
    published form does so for every layer, its "lite" form for the end of the model, as here for the end of the trunk.
    interval 1 skips nothing.
    """

    def __init__(self, trunk: nn.Module, clock: StepClock, *, interval: int = 3, order: int = 1, **common: Any) -> None:
        if interval < 1 or order < 0:
            raise ValueError(f"interval {interval} and order {order}; expected at least 1 and 0")
        super().__init__(trunk, clock, most=interval - 1, **common)
        self.order = order

    def small(self, entry: Entry, seen: Tensor) -> bool:
        return True

    def added(self, entry: Entry) -> Tensor:
        distance = self.clock.step - entry.computed
        out = entry.tensors["0"]
        for power in range(1, self.order + 1):
            if (slope := entry.tensors.get(str(power))) is not None:
                out = out.add(slope, alpha=distance**power / math.factorial(power))
        return out

    def learn(self, entry: Entry, x: Tensor, out: Tensor) -> None:
        before, distance = entry.tensors, self.clock.step - entry.computed
        entry.tensors = {"0": out - x}
        for power in range(1, self.order + 1):
            if str(power - 1) in before:
                entry.tensors[str(power)] = (entry.tensors[str(power - 1)] - before[str(power - 1)]) / distance


class FirstBlockCache(StepCache):
    """Runs the first block always, and the others where it adds something else than when they last ran.

    The change of what the first block adds, relative to its size (both L1), is compared with `threshold`; nothing is
    summed.  What the other blocks add is remembered.  (First-block cache of ParaAttention, in diffusers as
    FirstBlockCache; DBCache of cache-dit with one block in front and none behind.)  It calls the blocks itself, so it
    stands directly around the Trunk.  Error: InputError E2023 around anything else.
    """

    def __init__(
        self, trunk: nn.Module, clock: StepClock, *, threshold: float = 0.05, most: int | None = 3, **common: Any
    ) -> None:
        if not isinstance(trunk, Trunk):
            raise InputError(
                "E2023",
                f"cache: first-block calls the blocks itself and cannot stand around {type(trunk).__name__}. "
                "Use magcache or easycache with it.",
            )
        super().__init__(trunk, clock, most=most, **common)
        self.threshold = threshold

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        """x [B, L, C] -> [B, L, C]."""
        for part in cast(Trunk, self.trunk).enter:
            scene = part(x, scene)
        alone = x if recording(x) else x.clone()  # the blocks write over it
        first: Tensor = self.blocks[0](alone, scene.of_block(0))
        return self._step(first, scene, self._others, first - x)

    def _others(self, x: Tensor, scene: Scene) -> Tensor:
        x = x if recording(x) else x.clone()
        for number, block in enumerate(self.blocks[1:], 1):
            x = block(x, scene.of_block(number))
        return x

    def small(self, entry: Entry, seen: Tensor) -> bool:
        before = entry.tensors["first"]
        change, size = self.agree(total(seen - before, before))
        return change < self.threshold * size

    def note(self, entry: Entry, seen: Tensor) -> None:
        if not entry.idle:
            entry.tensors["first"] = seen


def evaluate(polynomial: Sequence[float], at: float) -> float:
    """A polynomial, highest power first, by Horner's rule."""
    value = 0.0
    for coefficient in polynomial:
        value = value * at + coefficient
    return value
