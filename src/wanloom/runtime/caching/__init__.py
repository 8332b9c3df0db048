"""Step caches: stand-ins for the trunk that are skipped in some steps (`base`), by five methods and by name."""

from __future__ import annotations

from wanloom.runtime.caching.base import StepCache, standing_in
from wanloom.runtime.caching.clock import COND, UNCOND, StepClock
from wanloom.runtime.caching.fit import CacheFit
from wanloom.runtime.caching.methods import EasyCache, FirstBlockCache, MagCache, TaylorSeer, TeaCache
from wanloom.runtime.caching.presets import PRESETS, Preset, figures, get_preset, make_cache
from wanloom.runtime.caching.published import WITH_PICTURE

__all__ = [
    "COND",
    "PRESETS",
    "UNCOND",
    "WITH_PICTURE",
    "CacheFit",
    "EasyCache",
    "FirstBlockCache",
    "MagCache",
    "Preset",
    "StepCache",
    "StepClock",
    "TaylorSeer",
    "TeaCache",
    "figures",
    "get_preset",
    "make_cache",
    "standing_in",
]
