"""What a run gives back: events on the way, and videos or files at the end.

Everything here saves itself: whoever asked for a video needs to know nothing about tensors.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanloom import media
from wanloom.durable import write_atomic
from wanloom.plan import Plan
from wanloom.preview import Film


@dataclass(frozen=True)
class Event:
    """Something happened.  A stage begins with step 0 and ends with step == steps.

    stage: "encode", "sound" (s2v: what each clip hears), "denoise", "decode", "done".  step of steps: over all videos
    of the run.  seconds: since the last event.  sigma, t, expert: of a denoising step; clip: which one of the video.
    message: a sentence worth showing ("resuming at step 5 of 20").
    peak_host, peak_gpu: bytes so far.  film(): the latents as small pictures (denoise, when the request has preview).
    """

    stage: str
    step: int
    steps: int
    seconds: float = 0.0
    sigma: float | None = None
    t: float | None = None
    expert: str | None = None
    seed: int | None = None
    clip: int | None = None
    message: str = ""
    peak_host: int = 0
    peak_gpu: int | None = None
    film: Callable[[], Film] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Video:
    """A finished video in memory."""

    tensor: Tensor  # [3, F, H, W] float32 in [-1, 1]
    latents: Tensor  # [C, T, h, w] float32, as given to the decoder: of the first clip
    plan: Plan
    clips: tuple[Tensor, ...] = ()  # the same of every clip

    @property
    def frames(self) -> NDArray[np.uint8]:
        """[F, H, W, 3] uint8: what is shown, and a file has; the tensor may have more, behind the end of the sound."""
        return quantise(self.tensor[:, : self.plan.frames])

    def save_tensors(self, path: str | Path) -> Path:
        """Write `latents` and `video` as float32 safetensors, the Plan in their metadata.

        Of a video made clip by clip `decode_latents_0`, `decode_latents_1`, ... [1, C, T, h, w], what was put before a
        clip's own included.
        """
        from safetensors.torch import save

        tensors = {"latents": self.latents.float().contiguous(), "video": self.tensor.float().contiguous()}
        if self.plan.in_clips:
            del tensors["latents"]
            tensors |= {f"decode_latents_{i}": z[None].float().contiguous() for i, z in enumerate(self.clips)}
        write_atomic(path, save(tensors, metadata={"plan": self.plan.to_json()}))
        return Path(path)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the video (.mp4, .mkv, .webm, .gif, .png) with its Plan inside.  Errors: those of `media`."""
        path = Path(path)
        media.check_output(path, overwrite=overwrite)
        plan = self.plan
        media.save_video(
            path, self.frames[: plan.frames], fps=plan.rate, quality=plan.quality, comment=plan.to_json(),
            overwrite=overwrite,
        )  # fmt: skip
        return path


@dataclass(frozen=True)
class Result:
    """What a run made, in the order of the seeds: files, or videos when no file was asked for."""

    plan: Plan
    seeds: tuple[int, ...]
    files: tuple[Path, ...]
    videos: tuple[Video, ...]
    seconds: float
    peak_host_bytes: int
    peak_gpu_bytes: int | None
    began_at: int  # steps that were done before this process: 0 for a new run
    lowered: tuple[str, ...] = ()  # what was done because memory ran out, in words (`ladder.py`)

    @property
    def path(self) -> Path:
        """The (first) file."""
        return self.files[0]

    @property
    def seed(self) -> int:
        return self.seeds[0]


def quantise(video: Tensor) -> NDArray[np.uint8]:
    """[3, F, H, W] in [-1, 1] -> [F, H, W, 3] uint8, cut off and not rounded, as the reference saves it."""
    pixels = ((video + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 3, 0)
    return cast(NDArray[np.uint8], pixels.contiguous().cpu().numpy())


def peak_memory(device: str) -> tuple[int, int | None]:
    """The most memory this process has had: host bytes, and bytes on the GPU (None on a CPU)."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host, None if device == "cpu" else torch.cuda.max_memory_reserved(device)
