"""From noise to latents: the loops that follow a velocity along a schedule.

A path between noise e and a clean latent x0 is x = (1 - sigma) * x0 + sigma * e; the model predicts v = e - x0, so
x0 = x - sigma * v.  Each sampler is a generator that yields a `Step` after each model call.  A Step holds all the
solver knows, so that a run can stop after any of them and go on later with the same bits:

    for step in SAMPLERS["unipc"](velocity, noise, schedule): ...
    for step in SAMPLERS["unipc"](velocity, step.x, schedule, start=step.index + 1, state=step.state): ...

Coefficients are Python floats, computed in double precision from the schedule before the model is called: a step
waits for nothing on its way.  Sources: official wan/utils/fm_solvers_unipc.py (UniPC, arXiv 2302.04867, order 2, bh2,
with corrector) and fm_solvers.py (DPM-Solver++ 2M, arXiv 2211.01095, midpoint).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from wanloom.sampling.schedule import Schedule

Velocity = Callable[[Tensor, float], Tensor]  # (x [B, C, F, H, W], t in [0, 1000]) -> v, of the shape of x


@dataclass(frozen=True)
class Step:
    """What happened in one step of a run."""

    index: int  # 0 .. n-1
    t: float  # the timestep the model was given
    sigma: float  # the noise level of the latents it was given
    x: Tensor  # the latents after the step
    x0: Tensor  # the clean latents that the model predicted in this step
    state: dict[str, Tensor] = field(default_factory=dict)  # what the solver needs besides x to go on


class Sampler(Protocol):
    """The form of every sampler; `start` and `state` continue an interrupted run (see the module)."""

    def __call__(
        self,
        velocity: Velocity,
        x: Tensor,
        schedule: Schedule,
        *,
        start: int = 0,
        state: Mapping[str, Tensor] | None = None,
    ) -> Iterator[Step]: ...


def euler(
    velocity: Velocity, x: Tensor, schedule: Schedule, *, start: int = 0, state: Mapping[str, Tensor] | None = None
) -> Iterator[Step]:
    """Straight lines from level to level."""
    sigmas = schedule.sigmas
    for i in range(start, len(schedule.timesteps)):
        t, sigma = schedule.timesteps[i], sigmas[i]
        v = velocity(x, t)
        x0 = x - sigma * v
        x = x + (sigmas[i + 1] - sigma) * v
        yield Step(i, t, sigma, x, x0)


def dpmpp(
    velocity: Velocity, x: Tensor, schedule: Schedule, *, start: int = 0, state: Mapping[str, Tensor] | None = None
) -> Iterator[Step]:
    """DPM-Solver++ 2M: the previous x0 bends the line; first and last step are of first order."""
    n, sigmas, lambdas = len(schedule.timesteps), schedule.sigmas, _lambdas(schedule)
    before = None if state is None else state.get("x0")
    for i in range(start, n):
        t, sigma, sigma_next = schedule.timesteps[i], sigmas[i], sigmas[i + 1]
        x0 = x - sigma * velocity(x, t)
        h = lambdas[i + 1] - lambdas[i]
        gain = -(1 - sigma_next) * math.expm1(-h)
        target = x0
        if before is not None and 0 < i < n - 1:
            # h / (length of the last step); from pure noise that length is infinite, and the step of first order.
            target = x0 + (0.5 * h / (lambdas[i] - lambdas[i - 1])) * (x0 - before)
        x = (sigma_next / sigma) * x + gain * target
        before = x0
        yield Step(i, t, sigma, x, x0, {"x0": x0})


def unipc(
    velocity: Velocity, x: Tensor, schedule: Schedule, *, start: int = 0, state: Mapping[str, Tensor] | None = None
) -> Iterator[Step]:
    """UniPC of order 2: each model call first corrects the step that led to it, then predicts the next one.

    The prediction x0 is not made anew from the corrected latents, and the last step returns it as it is.
    """
    n, sigmas, lambdas = len(schedule.timesteps), schedule.sigmas, _lambdas(schedule)
    kept = dict(state or {})  # anchor: what the last step started from; x0, x0_before: the last two predictions
    for i in range(start, n):
        t, sigma, sigma_next = schedule.timesteps[i], sigmas[i], sigmas[i + 1]
        x0 = x - sigma * velocity(x, t)
        if i > 0:
            x = _unipc_correct(x0, kept, schedule, lambdas, i)
        kept = {"anchor": x, "x0": x0} | ({"x0_before": kept["x0"]} if i > 0 else {})
        if sigma_next == 0:
            x = x0
        else:
            h = lambdas[i + 1] - lambdas[i]
            gain = -(1 - sigma_next) * math.expm1(-h)
            target = x0
            if _order(i, n) == 2:
                target = x0 + (0.5 * h / (lambdas[i] - lambdas[i - 1])) * (x0 - kept["x0_before"])
            x = (sigma_next / sigma) * x + gain * target
        yield Step(i, t, sigma, x, x0, dict(kept))


def _unipc_correct(x0: Tensor, kept: Mapping[str, Tensor], schedule: Schedule, lambdas: list[float], i: int) -> Tensor:
    """The latents at level i, made again from level i-1 now that the model has spoken at level i."""
    sigma, sigma_before = schedule.sigmas[i], schedule.sigmas[i - 1]
    h = lambdas[i] - lambdas[i - 1]
    b = math.expm1(-h)
    here, last = x0, kept["x0"]
    if _order(i - 1, len(schedule.timesteps)) == 1:
        bend = 0.5 * (here - last)
    else:
        # Two conditions on the weights of the two differences: they must reproduce lines and parabolas (bh2).
        r = (lambdas[i - 2] - lambdas[i - 1]) / h  # negative; -inf when the run began at pure noise
        one = (b / -h - 1) / b
        two = 2 * ((b / -h - 1) / -h - 0.5) / b
        weight = (one - two) / (1 - r)
        bend = (weight / r) * (kept["x0_before"] - last) + (one - weight) * (here - last)
    return (sigma / sigma_before) * kept["anchor"] - ((1 - sigma) * b) * (last + bend)


def _order(i: int, n: int) -> int:
    """UniPC's order in step i of n: one point of history in the first step, and a cautious last step."""
    return min(2, i + 1, n - i)


def _lambdas(schedule: Schedule) -> list[float]:
    """log((1 - sigma) / sigma) per level: -inf for pure noise, +inf for none."""
    return [
        -math.inf if sigma >= 1 else math.inf if sigma <= 0 else math.log1p(-sigma) - math.log(sigma)
        for sigma in schedule.sigmas
    ]


def hold(sampler: Sampler, clean: Tensor) -> Sampler:
    """The same sampler with the first latent frames held at `clean` [B, C, n, H, W] (TI2V with a picture).

    The model sees the held frames, and every latent that leaves the sampler has them; solvers work on each value by
    itself, so the other frames do not notice.  The solver's state is written with the held frames too, which makes a
    continued run equal to an uninterrupted one in every bit of every Step.
    """
    frames = clean.shape[2]

    def put(x: Tensor) -> Tensor:
        return torch.cat((clean.to(x.dtype).expand(x.shape[0], -1, -1, -1, -1), x[:, :, frames:]), 2)

    def held(
        velocity: Velocity, x: Tensor, schedule: Schedule, *, start: int = 0, state: Mapping[str, Tensor] | None = None
    ) -> Iterator[Step]:
        for step in sampler(lambda x, t: velocity(put(x), t), x, schedule, start=start, state=state):
            kept = {name: put(value) for name, value in step.state.items()}
            yield replace(step, x=put(step.x), x0=put(step.x0), state=kept)

    return held


SAMPLERS: dict[str, Sampler] = {"unipc": unipc, "dpm++": dpmpp, "euler": euler}
