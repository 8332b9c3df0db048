"""Measure what step caches have to know of a model, and keep it where later runs find it.

fit = calibrate(pipe, [Request(prompt="...", seed=1), Request(prompt="...", seed=2)])
keep(fit, pipe)                      # in the user's cache directory; beside=True: in the checkpoint's
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from wanloom.checkpoint.find import Files
from wanloom.durable import write_atomic
from wanloom.errors import InputError
from wanloom.pipeline import Pipeline
from wanloom.plan import Plan
from wanloom.request import Request
from wanloom.results import Event
from wanloom.runtime.caching.base import standing_in
from wanloom.runtime.caching.fit import CacheFit
from wanloom.runtime.calibration import Point, Recorder, fit_caches
from wanloom.shortcuts import FITS, Shortcuts, fit_files
from wanloom.variants import Variant


class Measuring(Shortcuts):
    """No shortcut at all: every trunk runs and is measured into `points`, as video number `video`."""

    def __init__(self, plan: Plan, variant: Variant, files: Files, points: list[Point], video: int) -> None:
        super().__init__(plan, variant, files)
        self._points, self._video = points, video

    def at(self, step: int, video: int) -> None:
        super().at(step, self._video)

    @contextmanager
    def around(self, dit: Any) -> Iterator[Any]:
        with standing_in(dit, lambda trunk: Recorder(trunk, self.clock, self._points)):
            yield dit


def calibrate(
    pipe: Pipeline, requests: Sequence[Request], on_event: Callable[[int, Event], None] | None = None
) -> CacheFit:
    """The figures of a model from one video of each request, which are denoised and not decoded.

    on_event is called with the number of the request and each event.  Errors: E2023 a request with a cache, with
    several videos or with both passes of guidance at once, requests of different steps; those of `Pipeline.stream`.
    """
    points: list[Point] = []
    spans: set[tuple[tuple[int, int], ...]] = set()
    for number, request in enumerate(requests):
        if request.cache is not None or request.num != 1:
            raise InputError(
                "E2023", "calibrate: a cache, or several videos at once, cannot be measured. Leave it out."
            )
        if request.guidance_batch not in (None, "off"):
            raise InputError("E2023", "calibrate: passes are measured one by one. Leave --guidance-batch out.")
        plan = pipe.prepare(request).plan
        spans.add(tuple((span.start, span.stop) for span in plan.spans))
        if len(spans) > 1:
            raise InputError("E2023", "calibrate: all videos must have the same steps and shift.")
        pipe.make_shortcuts = partial(Measuring, points=points, video=number)
        try:
            _denoise(pipe, request, number, on_event)
        finally:
            pipe.make_shortcuts = Shortcuts
    (steps,) = spans
    about = f"{pipe.variant.name}, {steps[-1][1]} steps, {len(requests)} videos of {plan.size[0]}x{plan.size[1]}"
    return fit_caches(points, steps, about=about)


def _denoise(pipe: Pipeline, request: Request, number: int, on_event: Callable[[int, Event], None] | None) -> None:
    stream = pipe.stream(request)
    for event in stream:
        if on_event is not None:
            on_event(number, event)
        if event.stage == "decode":
            stream.close()
            return


def keep(fit: CacheFit, pipe: Pipeline, *, beside: bool = False) -> Path:
    """Write a fit where runs of this checkpoint look for it; the file.  Errors: E5001, E5003 where that cannot be."""
    own, kept = fit_files(pipe.parts.files)
    if not beside:
        try:
            FITS.open()
        except OSError as error:
            raise InputError("E5001", f"{kept.parent}: cannot be made ({error.strerror}). Set WANLOOM_CACHE.") from None
    path = own if beside else kept
    write_atomic(path, fit.to_json().encode())
    return path
