"""What a run leaves out to be faster: steps skipped by a cache, guidance reused.  Lossy, and only when asked for.

A `Shortcuts` goes with a run from beginning to end.  It knows which step of which video is made, stands in for the
trunk of each expert that comes, and gives what it remembers as data, so that a run can be continued bit for bit.

A cache that needs figures of the model takes them from a fit that was measured (`wanloom calibrate cache`): beside the
checkpoint, else in the user's cache directory; else from what was published for the release.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from wanloom.checkpoint.find import Files
from wanloom.jobs import identity
from wanloom.plan import Plan
from wanloom.runtime.caching.base import StepCache, standing_in
from wanloom.runtime.caching.clock import COND, UNCOND, StepClock
from wanloom.runtime.caching.fit import CacheFit
from wanloom.runtime.caching.presets import figures, make_cache
from wanloom.runtime.caching.published import WITH_PICTURE
from wanloom.sampling.guidance import RECIPES, Guidance, guide
from wanloom.sampling.samplers import Velocity
from wanloom.sampling.velocity import AtOnce
from wanloom.store import Store
from wanloom.variants import Variant

FITS = Store("fits", limit=2**26, suffix=".json")
BESIDE = "cache_fit.json"  # in a checkpoint's directory
CACHE, GUIDANCE = "cache/", "guidance/"  # before the names of what is remembered


def fit_files(files: Files) -> tuple[Path, Path]:
    """Where the fit of a model would be: beside its checkpoint, and in the user's cache directory."""
    paths = list(files.experts.values())
    home = paths[0] if paths[0].is_dir() else paths[0].parent
    home = home.parent if len(paths) > 1 and home.name in files.experts else home
    marks = [identity(file) for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*.s*")))]
    return home / BESIDE, FITS.path(hashlib.sha256(" ".join(marks).encode()).hexdigest())


def read_fit(files: Files) -> CacheFit | None:
    """The fit that was measured for these very weights, or None.  Error: E4036 for one that is damaged."""
    found = next((path for path in fit_files(files) if path.is_file()), None)
    return None if found is None else CacheFit.from_json(found.read_bytes())


def release(variant: Variant, plan: Plan) -> str:
    """The release under whose name figures were published."""
    if not variant.repos:
        return ""
    large = len(variant.repos) > 1 and plan.size[0] * plan.size[1] > 832 * 480
    name = variant.repos[1 if large else 0].rpartition("/")[2]
    return name + WITH_PICTURE if variant.conditioner == "clean_frame" and plan.inputs else name


class Shortcuts:
    """The shortcuts of one run, as its Plan has them; without any, everything passes through unchanged.

    Errors: E2047 a cache needs figures of this model that nobody has, E4036 a damaged fit.
    """

    def __init__(self, plan: Plan, variant: Variant, files: Files) -> None:
        self.clock = StepClock(tuple((span.start, span.stop) for span in plan.spans))
        self._plan, self._model = plan, release(variant, plan)
        self._fit = None if plan.cache is None else read_fit(files)
        if plan.cache is not None:
            figures(plan.cache, self.clock.spans, model=self._model, fit=self._fit)
        self._cache: StepCache | None = None
        self._guidance: Guidance | None = None
        self._saved: dict[int, Mapping[str, Tensor]] = {}

    @property
    def fit(self) -> str | None:
        """A mark of the measured fit that decides about skipping; None without one."""
        if self._fit is None:
            return None
        return hashlib.sha256(self._fit.to_json().encode()).hexdigest()[:16]

    @property
    def counts(self) -> tuple[int, int]:
        """How often the trunk of the expert in use ran, and was skipped."""
        return (0, 0) if self._cache is None else (self._cache.ran, self._cache.skipped)

    def at(self, step: int, video: int) -> None:
        """From now on the model is asked about this step of this video."""
        self.clock.at(step, video)

    @contextmanager
    def around(self, dit: Any) -> Iterator[Any]:
        """The transformer with the cache in place of its trunk, for as long as the block lasts."""
        name = self._plan.cache
        if name is None:
            yield dit
            return

        def make(trunk: Any) -> StepCache:
            return make_cache(
                trunk, self.clock, name, model=self._model, fit=self._fit, threshold=self._plan.cache_threshold
            )

        with standing_in(dit, make) as self._cache:
            for video, saved in self._saved.items():
                self._cache.load(_under(CACHE, saved), video)
            try:
                yield dit
            finally:
                self._cache = None

    def guide(self, cond: Velocity, uncond: Velocity | AtOnce | None, scale: float) -> Velocity:
        """The guided velocity of the two branches; a pass of both at once is of none, and no cache is there."""
        cond = self.clock.within(COND, cond)
        if uncond is not None and not isinstance(uncond, AtOnce):
            uncond = self.clock.within(UNCOND, uncond)
        velocity = guide(cond, uncond, scale, self.clock, RECIPES[self._plan.guidance_mode])
        self._guidance = velocity if isinstance(velocity, Guidance) else None
        if self._guidance is not None:
            for video, saved in self._saved.items():
                mine = _under(GUIDANCE, saved)
                if mine and int(mine["made"]) >= self.clock.span[0]:  # else it is of the expert before
                    self._guidance.load(mine, video)
        self._saved = {}
        return velocity

    def state(self, video: int) -> dict[str, Tensor]:
        """What is remembered of a video after a step, under names that no sampler has."""
        found: dict[str, Tensor] = {}
        if self._cache is not None:
            found |= {CACHE + name: value for name, value in self._cache.state(video).items()}
        if self._guidance is not None:
            found |= {GUIDANCE + name: value for name, value in self._guidance.state(video).items()}
        return found

    def resume(self, video: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take what `state` gave out of a saved state, for the next expert that comes; the rest is the sampler's."""
        mine = {name: value for name, value in state.items() if name.startswith((CACHE, GUIDANCE))}
        self._saved[video] = mine
        return {name: value for name, value in state.items() if name not in mine}


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
