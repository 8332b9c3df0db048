"""Step caches by name: which method, with which numbers, on whose word.

    cache = make_cache(dit.trunk, clock, "magcache", model="Wan2.2-T2V-A14B")

All presets are lossy.  A method that needs figures of the model takes them from a fit (`wanloom calibrate cache`) or
from those that were published for the release.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from wanloom.errors import InputError, did_you_mean
from wanloom.runtime.caching.base import Reduce, StepCache
from wanloom.runtime.caching.clock import StepClock
from wanloom.runtime.caching.fit import CacheFit, Spans
from wanloom.runtime.caching.methods import EasyCache, FirstBlockCache, MagCache, TaylorSeer, TeaCache
from wanloom.runtime.caching.published import POLYNOMIALS, RATIOS


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named setting of one method.

    parameters: keywords of the method.  fits: release -> what was published for it, where the method needs that;
    `models` has what is set otherwise for a release.  source: who chose these numbers, and for what.
    """

    method: type[StepCache]
    about: str
    source: str
    parameters: Mapping[str, Any]
    fits: Mapping[str, CacheFit] | None = None
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    loss: str = "lossy"


_MAGCACHE = Preset(
    method=MagCache,
    about="skips by calibrated magnitudes, up to two steps in a row",
    source="README of MagCache4Wan2.2: threshold 0.06, two in a row; the share of steps that always run for each model",
    parameters={"threshold": 0.06, "most": 2, "retention": 0.2},
    fits=RATIOS,
    models={
        "Wan2.2-T2V-A14B": {"retention": 0.4},
        "Wan2.2-I2V-A14B": {"retention": (1.0, 0.1)},  # the high-noise expert is never skipped
    },
)

PRESETS: dict[str, Preset] = {
    "magcache": _MAGCACHE,
    "magcache-fast": Preset(
        method=MagCache,
        about="the same, bolder",
        source="Morphic's setting for Wan2.2 A14B: threshold 0.24, two in a row, 0.1 of the steps always run",
        parameters={"threshold": 0.24, "most": 2, "retention": 0.1},
        fits=RATIOS,
    ),
    "teacache": Preset(
        method=TeaCache,
        about="skips while the timestep's modulation has moved little",
        source="TeaCache4Wan2.1 with retained steps (5 of 50 always run): threshold 0.1 is twice as fast for T2V 14B",
        parameters={"threshold": 0.1, "retention": 0.1},
        fits=POLYNOMIALS,
        models={"Wan2.1-T2V-1.3B": {"threshold": 0.05}},
    ),
    "easycache": Preset(
        method=EasyCache,
        about="skips while the tokens have moved little; needs no figures of the model",
        source="EasyCache4Wan2.2: threshold 0.05 (0.06 for T2V A14B), 7 of 40 steps always run, and the last",
        parameters={"threshold": 0.05, "retention": 0.175, "last": 1},
        models={"Wan2.2-T2V-A14B": {"threshold": 0.06}},
    ),
    "easycache-fast": Preset(
        method=EasyCache,
        about="the same, bolder",
        source="ComfyUI's setting of EasyCache: threshold 0.2, from 0.15 to 0.95 of the steps",
        parameters={"threshold": 0.2, "retention": 0.15, "last": 1},
    ),
    "taylor": Preset(
        method=TaylorSeer,
        about="every third step is computed, the others extrapolated; needs no figures of the model",
        source="OpenVINO GenAI's setting of TaylorSeer: interval 3, order 1, the first 6 of 40 and the last 2 computed",
        parameters={"interval": 3, "order": 1, "retention": 0.15, "last": 2},
    ),
    "first-block": Preset(
        method=FirstBlockCache,
        about="skips all blocks but the first while that one does what it did; needs no figures of the model",
        source="threshold 0.06 as measured for Wan2.1 T2V 14B (diffsynth-wan-cache); 3 in a row as in cache-dit",
        parameters={"threshold": 0.06, "most": 3, "retention": 0.1},
    ),
}


def make_cache(
    trunk: nn.Module,
    clock: StepClock,
    name: str,
    *,
    model: str = "",
    fit: CacheFit | None = None,
    threshold: float | None = None,
    reduce: Reduce | None = None,
) -> StepCache:
    """The cache of a preset around `trunk`, for the run of `clock`.

    model: the release ("Wan2.2-T2V-A14B", with `WITH_PICTURE` where it has both ways); fit: figures of this very model,
    before what was published.  threshold: another than the preset's; 0 skips nothing.
    Errors: InputError E2046 for a name or a threshold that cannot be, E2047 where the model has no figures, E2023 where
    first-block cannot stand.
    """
    preset = get_preset(name)
    given = {**preset.parameters, **preset.models.get(model, {}), **figures(name, clock.spans, model=model, fit=fit)}
    if threshold is not None:
        if not (math.isfinite(threshold) and threshold >= 0):
            raise InputError("E2046", f"cache threshold: got {threshold}, expected 0 or more.")
        if "threshold" not in given:
            raise InputError("E2046", f"cache threshold: {name} has none. Leave it out.")
        given["threshold"] = threshold
    return preset.method(trunk, clock, reduce=reduce, **given)


def get_preset(name: str) -> Preset:
    """The preset of that name.  Error: InputError E2046."""
    if name not in PRESETS:
        raise InputError("E2046", f"cache: '{name}' is not known. {did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def figures(name: str, spans: Spans, *, model: str = "", fit: CacheFit | None = None) -> dict[str, Any]:
    """The keywords that a preset's method takes from a fit; {} where it needs none.

    Error: InputError E2047 when neither the fit nor what was published has them.
    """
    fits = get_preset(name).fits
    if fits is None:
        return {}
    method = get_preset(name).method
    for source in (fit, fits.get(model)):
        if source is not None and method is MagCache and source.ratios:
            return {"ratios": source.ratios_for(spans)}
        if source is not None and method is TeaCache and source.polynomials:
            return {"coefficients": source.polynomials}
    raise InputError(
        "E2047",
        f"cache: {name} needs figures that {model or 'this model'} does not have. "
        "Run `wanloom calibrate cache`, or take easycache.",
    )
