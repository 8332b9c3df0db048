"""Other ways to guide than at full cost in every step: guidance reused or left out late in a run, and CFG-Zero*.

    velocity = guide(cond, uncond, scale, clock, RECIPES["late"])

`clock` says which step of which video this is: anything with `step`, `steps` and `video` (`runtime.caching.StepClock`).
Class of loss: "plain" exact, "zero-star" another guidance at no cost, "late" and "late-off" lossy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wanloom.sampling.samplers import Velocity
from wanloom.sampling.velocity import AtOnce, both_of, guided


class Place(Protocol):
    """Where a run is: the step 0 .. steps - 1, and which of several videos that take turns."""

    @property
    def step(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def video(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a run is guided.

    late: the share of the steps after which the unconditional pass is not made each time; 1 is never.  every: from then
    on it is made in every so-manieth step, and between the guiding direction cond - uncond of the last time is used; 0
    never makes it again.  off: from then on there is no guidance at all.
    optimised: the unconditional velocity is first scaled to be as near as it can to the conditional one.  zero: in so
    many first steps the velocity is 0, and the model is not asked.
    Raises ValueError for values that cannot be.
    """

    late: float = 1.0
    every: int = 2
    off: bool = False
    optimised: bool = False
    zero: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.late <= 1 or self.every < 0 or self.every == 1 or self.zero < 0:
            raise ValueError(f"{self}: late is a share, every 0 or at least 2, zero 0 or more")


# "late": the reuse of Adaptive Guidance's linear form (arXiv 2312.12487) as FastVideo and SGLang have it, from half of
# the steps on, but renewed in every second step, as TensorRT-Model-Connect does for Wan; "late-once" is not renewed.
# "late-off": guidance in an interval (arXiv 2404.07724).  "zero-star": CFG-Zero* (arXiv 2503.18886).
RECIPES: Mapping[str, Recipe] = {
    "plain": Recipe(),
    "late": Recipe(late=0.5),
    "late-once": Recipe(late=0.5, every=0),
    "late-off": Recipe(late=0.75, off=True),
    "zero-star": Recipe(optimised=True, zero=1),
}


def guide(cond: Velocity, uncond: Velocity | AtOnce | None, scale: float, place: Place, recipe: Recipe) -> Velocity:
    """The guided velocity of two, as `velocity.guided`, and exactly that with the plain recipe.

    Without guidance (scale 1, or no `uncond`) only the `zero` steps remain of a recipe.  With both passes at once those
    steps that a recipe makes without the second ask `cond` alone.
    """
    plain = recipe.late == 1 and not recipe.optimised
    if recipe.zero == 0 and (uncond is None or scale == 1 or plain):
        return guided(cond, uncond, scale)
    return Guidance(cond, None if scale == 1 else uncond, scale, place, recipe)


class Guidance:
    """The velocity (x, t) -> v of a recipe, with what it remembers of each video.

    What it remembers is one expert's, so it is made anew for each expert, and for each clip.
    Memory: the guiding direction, one tensor of the latents' size for each video, if the recipe is late and not off.
    """

    def __init__(
        self, cond: Velocity, uncond: Velocity | AtOnce | None, scale: float, place: Place, recipe: Recipe
    ) -> None:
        self.cond, self.scale = cond, scale
        self.both = None if uncond is None else both_of(cond, uncond)
        self.place, self.recipe = place, recipe
        self._kept: dict[int, tuple[int, Tensor]] = {}  # video -> the step it was made in, and cond - uncond

    def __call__(self, x: Tensor, t: float) -> Tensor:
        place, recipe = self.place, self.recipe
        if place.step < recipe.zero:
            return torch.zeros_like(x)
        late = place.step >= recipe.late * place.steps
        if self.both is None or (late and recipe.off):
            return self.cond(x, t)
        direction = self._direction() if late else None
        if direction is not None:
            with_prompt = self.cond(x, t)
            without = with_prompt - direction
        else:
            with_prompt, without = self.both(x, t)
            if recipe.late < 1 and not recipe.off:
                self._kept[place.video] = place.step, with_prompt - without
        if recipe.optimised:
            without = nearest_to(with_prompt, without)
        return without + self.scale * (with_prompt - without)

    def _direction(self) -> Tensor | None:
        """The guiding direction of an earlier step, where this step may take it."""
        made, direction = self._kept.get(self.place.video, (self.place.step, None))
        age = self.place.step - made
        return direction if age > 0 and (self.recipe.every == 0 or age < self.recipe.every) else None

    def state(self, video: int = 0) -> dict[str, Tensor]:
        """What is remembered of a video between two steps; `load` goes on with the same bits."""
        if video not in self._kept:
            return {}
        made, direction = self._kept[video]
        return {"made": torch.tensor(made), "direction": direction}

    def load(self, state: Mapping[str, Tensor], video: int = 0) -> None:
        """Take up what `state` gave, its tensors where they are to be used."""
        self._kept.pop(video, None)
        if state:
            self._kept[video] = int(state["made"]), state["direction"]


def nearest_to(wanted: Tensor, v: Tensor) -> Tensor:
    """v [B, ...] times the number, for each sample, that brings it nearest to `wanted`; zeros stay zeros."""
    a, b = wanted.flatten(1), v.flatten(1)
    square = b.square().sum(1)
    factor = (a * b).sum(1) / square.where(square > 0, square.new_ones(()))
    return v * factor.view(-1, *[1] * (v.dim() - 1))
