"""Which noise levels a sampler visits, and which timesteps the model is told.  Pure Python: a Plan holds both.

Noise levels (sigma, in [0, 1]) go to the solver; timesteps (t, in [0, 1000]) go to the model.  The official pipelines
cut t to a whole number for `unipc` and `dpm++` while the solver keeps the exact sigma; `euler` has t = 1000 * sigma.
The arithmetic follows the official one operation by operation in double precision, then rounds sigma to float32.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from wanloom.errors import InputError, did_you_mean

SAMPLER_NAMES = ("unipc", "dpm++", "euler")

# Where each sampler's grid begins.  UniPC starts at the largest level of the official training grid, which is 0.999
# rounded to float32 (wan/utils/fm_solvers_unipc.py); the others start from pure noise (wan/utils/fm_solvers.py).
SIGMA_MAX = {"unipc": 0.9990000128746033, "dpm++": 1.0, "euler": 1.0}

TRAIN_STEPS = 1000  # t = 1000 * sigma


@dataclass(frozen=True)
class Schedule:
    """n steps: sigmas holds n + 1 falling levels (the last one 0), timesteps the n values of t given to the model."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.timesteps) + 1 or not self.timesteps:
            raise ValueError(f"{len(self.sigmas)} sigmas for {len(self.timesteps)} timesteps; expected one more")

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def make_schedule(sampler: str, steps: int, shift: float) -> Schedule:
    """The official schedule: a linear grid of `steps` levels, bent towards noise by `shift`, then 0.

    Errors: E2011 for an unknown sampler, E2007 for a step count below 1, E2009 when float32 cannot tell two
    neighbouring levels apart (a shift far outside the useful range).
    """
    start = _sigma_max(sampler)
    if steps < 1:
        raise InputError("E2007", f"steps: got {steps}, expected 1..{TRAIN_STEPS}.")
    stride = -start / steps  # as numpy.linspace: index * stride + start, so that every bit agrees
    grid = (index * stride + start for index in range(steps))
    if not 1e-6 < shift < 1e6:  # beyond, the fraction below loses its digits; useful values are 1 to 20
        raise InputError("E2009", f"shift: got {shift}, must be > 0. Use a value near 1 to 20.")
    bent = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in grid]
    schedule = _build(sampler, bent)
    if not _falls(schedule.sigmas):
        raise InputError("E2009", f"shift: {shift} leaves no room for {steps} steps. Use a value near 1 to 20.")
    return schedule


def explicit_schedule(sampler: str, sigmas: Sequence[float]) -> Schedule:
    """A schedule of given noise levels, e.g. (1.0, 0.9, 0.6): falling, in (0, 1]; a final 0 is added when absent.

    Levels are rounded to float32 first, and 0.9 has t = 900 whether it comes as 0.9 or as its float32 neighbour
    0.89999998: a schedule's own sigmas make the same schedule again.

    Errors: E2031 for levels that do not fall from at most 1 to 0, E2011 for an unknown sampler.
    """
    _sigma_max(sampler)
    levels = [float(sigma) for sigma in sigmas]
    if levels and levels[-1] == 0.0:
        levels.pop()
    if not 1 <= len(levels) <= TRAIN_STEPS or not all(math.isfinite(s) and 0.0 < s <= 1.0 for s in levels):
        raise InputError("E2031", f"sigmas: expected 1..{TRAIN_STEPS} numbers in (0, 1], falling, then 0.")
    schedule = _build(sampler, [_shortest(sigma) for sigma in levels])
    if not _falls(schedule.sigmas):
        raise InputError("E2031", "sigmas: every level must be smaller than the one before it.")
    return schedule


def _sigma_max(sampler: str) -> float:
    try:
        return SIGMA_MAX[sampler]
    except KeyError:
        raise InputError("E2011", f"sampler: '{sampler}' is not known. {did_you_mean(sampler, SIGMA_MAX)}") from None


def _build(sampler: str, levels: Sequence[float]) -> Schedule:
    if sampler == "euler":
        timesteps = tuple(TRAIN_STEPS * sigma for sigma in levels)
    else:
        timesteps = tuple(float(math.trunc(TRAIN_STEPS * sigma)) for sigma in levels)
    return Schedule(sigmas=(*(_float32(sigma) for sigma in levels), 0.0), timesteps=timesteps)


def _falls(sigmas: Sequence[float]) -> bool:
    return all(left > right for left, right in itertools.pairwise(sigmas))


def _float32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def _shortest(value: float) -> float:
    """The number of fewest digits that float32 rounds to the same value."""
    rounded = _float32(value)
    candidates = (float(f"{rounded:.{digits}g}") for digits in range(1, 10))  # nine digits always suffice
    return next(number for number in candidates if _float32(number) == rounded)
