"""A run under way: what was ordered, where its progress and its files go, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanloom import pulse
from wanloom.jobs import Job, Memory
from wanloom.ladder import Ladder
from wanloom.plan import Plan, Segment
from wanloom.preview import Film, Previewer
from wanloom.request import Request
from wanloom.results import Event, Result, Video, peak_memory
from wanloom.shortcuts import Shortcuts

PREVIEW_EVERY = 1.0  # seconds between two writings of preview.gif


@dataclass(frozen=True)
class Order:
    """A request with everything decided, its pictures and sounds read, its videos looked through, its LoRA found."""

    request: Request
    plan: Plan
    media: Mapping[str, Any]
    lora: Path | None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """One for each video: the seeds follow one another."""
        return tuple(self.plan.with_seed(self.plan.seed + i) for i in range(self.request.num))


class Work:
    """One run under way: the order, where its progress and its files go, and the clock."""

    def __init__(
        self,
        order: Order,
        outputs: Sequence[Path],
        job: Job | Memory,
        device: str,
        shortcuts: Shortcuts,
        ladder: Ladder,
        *,
        at_once: bool = False,
    ) -> None:
        self.order, self.outputs, self.job = order, tuple(outputs), job
        self.shortcuts, self.ladder = shortcuts, ladder
        self.at_once = at_once  # both passes of guidance
        self.plan, self.plans = order.plan, order.plans
        self.previewer: Previewer | None = None
        self.videos: list[Video] = []
        self.began_at = 0
        self.resumed = False  # whether it was said where a continued run goes on
        self.steps = order.plan.steps * len(order.plan.segments) * len(order.plans)  # of all clips of all videos
        self._device = device
        self._started = self._last = time.monotonic()
        self._drawn = 0.0
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats(device)

    def event(self, stage: str, step: int, steps: int, **more: Any) -> Event:
        """An event now."""
        (pulse.step if stage == "denoise" else pulse.beat)()
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        host, gpu = peak_memory(self._device)
        return Event(stage, step, steps, seconds=seconds, peak_host=host, peak_gpu=gpu, **more)

    def place(self, take: int, segment: Segment) -> int:
        """How many clips of this run come before this one of video `take`."""
        return take * len(self.plan.segments) + segment.index

    def pieces(self, take: int, segment: Segment) -> tuple[int, int]:
        """Latent frames of the clips before this one, and of all."""
        each = segment.latent[1]
        return each * self.place(take, segment), each * len(self.plan.segments) * len(self.plans)

    def draw(self, x0: Tensor, *, last: bool) -> Callable[[], Film] | None:
        """The film of clean latents x0 [1, C, T, h, w], to be made when looked at; now and then also preview.gif."""
        previewer = self.previewer
        if previewer is None:
            return None
        if self.outputs and (last or time.monotonic() - self._drawn > PREVIEW_EVERY):
            fps = max(1, round(self.plan.fps / 4))  # a latent frame stands for four
            previewer(x0[0]).save(self.outputs[0].with_name("preview.gif"), fps)
            self._drawn = time.monotonic()
        return lambda: previewer(x0[0])

    def tensors_file(self, plan: Plan) -> Path | None:
        """Where `save_tensors` puts the tensors of this video: the file named, with the seed when there are several."""
        request = self.order.request
        path = None if request.save_tensors is None else Path(request.save_tensors)
        return path if path is None or request.num == 1 else path.with_name(f"{path.stem}_{plan.seed}{path.suffix}")

    def result(self) -> Result:
        host, gpu = peak_memory(self._device)
        return Result(
            plan=self.plan,
            seeds=tuple(plan.seed for plan in self.plans),
            files=self.outputs,
            videos=tuple(self.videos),
            seconds=time.monotonic() - self._started,
            peak_host_bytes=host,
            peak_gpu_bytes=gpu,
            began_at=self.began_at,
            lowered=tuple(self.ladder.taken),
        )
