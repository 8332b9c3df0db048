"""How long a run is going to take, and what it took: the numbers of `estimate.py` for a request on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wanloom.cli.console import time_text
from wanloom.cli.room import Basis, dtype_of, kind_of
from wanloom.cli.several import ALONE, Several
from wanloom.estimate import estimate, learned, works
from wanloom.placement import MemoryPlan
from wanloom.plan import Plan
from wanloom.request import Request
from wanloom.variants import Variant

STAGE_OF = {"text": "encode", "clip": "encode", "audio": "sound", "dit": "denoise", "vae": "decode"}


@dataclass(frozen=True)
class Forecast:
    """raw: stage -> seconds from the rates alone; seconds: the same as earlier runs correct it, of which `runs` count.

    measured: the rates are those of `wanloom doctor --calibrate`.
    """

    raw: Mapping[str, float]
    seconds: Mapping[str, float]
    runs: int
    measured: bool

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def words(self) -> str:
        """'4 m 10 s', and how far that can be believed."""
        if self.runs:
            basis = f"as {self.runs} earlier run{'s' if self.runs > 1 else ''} took"
        else:
            basis = "calibrated" if self.measured else "uncalibrated"
        return f"about {time_text(self.total)} ({basis})"


def forecast(
    request: Request, plan: Plan, variant: Variant, memory: MemoryPlan, basis: Basis, *, on_gpu: bool,
    several: Several = ALONE,
) -> Forecast:  # fmt: skip
    """Seconds of each stage of a run that is placed so; processes are taken to divide the transformer's evenly."""
    work = works(plan, variant, dtype_of(request, on_gpu=on_gpu), num=request.num)
    raw = {stage: estimate(one, basis.rates) for stage, one in work.items()}
    raw["denoise"] /= several.world if on_gpu else 1  # on a CPU they share its cores
    for part, seconds in memory.waits.items():
        raw[STAGE_OF[part]] = raw.get(STAGE_OF[part], 0.0) + seconds
    kind = kind_of(request, variant, on_gpu=on_gpu, several=several)
    found = {stage: learned(basis.seen, stage, kind, seconds) for stage, seconds in raw.items()}
    corrected = {stage: seconds * found[stage][0] for stage, seconds in raw.items()}
    return Forecast(raw, corrected, max(runs for _, runs in found.values()), basis.rates.measured)
