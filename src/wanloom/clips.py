"""How a long video is cut into clips that a model makes one after another, and sizes and frames that follow.  No torch.

s2v      clips of `infer_frames`; the first one may be three frames shorter; the sound says how many there are
animate  clips of 77 frames that share 1 or 5 with the clip before; the driving video says how many there are

Sources: official wan/speech2video.py and wan/animate.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from wanloom.errors import InputError, did_you_mean
from wanloom.models.config import AudioConfig
from wanloom.request import Request
from wanloom.variants import Variant

Size = tuple[int, int]

AUDIO_RATE = 16_000  # samples a second that wav2vec2 hears
STATES_RATE = 50  # hidden states of wav2vec2 a second, as the reference counts them (16000 / 320)
FEATURE_RATE = 30  # to which they are interpolated
DROPPED = 3  # frames of a first clip without a past that are not shown: they come out blurred
REFERENCE_AT = 30  # latent position of the reference picture, behind any clip
SIZE_STEP = 64  # sizes of s2v are multiples of this
SCALES = 100  # tried between the largest and the smallest
WINDOW = 30  # seconds of a long sound that are encoded at a time
RESIZE = ("cover", "reference")
LAST_STATES = ("normed", "raw")
MAX_CLIPS = 10_000
SHARED = (1, 5)  # frames that clips of animate may have in common


class Driver(Protocol):
    """What is asked of an input here (`plan.Input`)."""

    @property
    def role(self) -> str: ...
    @property
    def frames(self) -> int: ...
    @property
    def size(self) -> Size: ...


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip of a video: frames shown, latent frames that are made, decoded frames at the start that are not shown.

    start: the frame of the whole video that its first made frame stands for.
    """

    frames: int
    latents: int
    skip: int
    start: int


@dataclass(frozen=True, kw_only=True)
class Speech:
    """What s2v decides beside the numbers of every task.

    infer_frames: made for each clip; start_from_ref: the first clip, too, has a past, the picture; window: seconds of
    sound encoded at a time, 0 for the whole; trim: seconds cut off the sound so that the mouth is not early; resize:
    "cover" or "reference"; last_state: "normed" or "raw", of the audio encoder.
    """

    infer_frames: int
    start_from_ref: bool
    window: int
    trim: float
    resize: str
    last_state: str


@dataclass(frozen=True, kw_only=True)
class Animation:
    """What animate decides beside the numbers of every task.

    shared: frames a clip has in common with the one before; replace: put the character into the driving video; relight:
    with the relighting LoRA; rate: frames a second of the file (numerator, denominator).
    """

    shared: int
    replace: bool
    relight: bool
    rate: tuple[int, int]


# ---------------------------------------------------------------- s2v


def states_of(samples: int, audio: AudioConfig) -> int:
    """How many hidden states wav2vec2 makes of a sound."""
    for kernel, stride in zip(audio.conv_kernel, audio.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    return max(0, samples)


def features_of(states: int) -> int:
    """How many sets of features a second 30 times stand for so many states."""
    return int(states / STATES_RATE * FEATURE_RATE)


def clip_count(states: int, fps: int, frames: int) -> int:
    """How many clips of `frames` the sound fills, the last one perhaps in part.

    A sound that ends with a clip gets one clip more, as in the reference.
    """
    return int(features_of(states) / (frames * FEATURE_RATE / fps)) + 1


def speech_of(request: Request, variant: Variant) -> Speech | None:
    """What s2v decides; None for another task."""
    if variant.conditioner != "speech":
        return None
    cut = 0 if request.start_from_ref or request.reference_timing else DROPPED
    return Speech(
        infer_frames=request.infer_frames or variant.defaults.frames,
        start_from_ref=request.start_from_ref,
        window=WINDOW if request.audio_window is None else request.audio_window,
        trim=cut / variant.defaults.fps,
        resize=request.resize or "cover",
        last_state=request.last_audio_state or "normed",
    )


def speech_cuts(wanted: int | None, variant: Variant, speech: Speech, samples: int | None) -> tuple[Clip, ...]:
    """The clips of s2v: as many as the sound fills, at most as many as are wanted; without a sound one, or those.

    The first clip shows three frames less, unless it has a past (the picture).
    """
    count = wanted or 1
    if samples is not None:
        assert variant.audio is not None
        heard = clip_count(states_of(samples, variant.audio), variant.defaults.fps, speech.infer_frames)
        count = heard if wanted is None else min(heard, wanted)
    history = variant.dit.speech.history if variant.dit.speech else 0
    frames = speech.infer_frames
    clips: list[Clip] = []
    for index in range(count):
        behind = index > 0 or speech.start_from_ref
        skip = history if behind else 1 + DROPPED
        shown = frames if behind else frames - DROPPED
        clips.append(Clip(frames=shown, latents=frames // 4, skip=skip, start=index * frames))
    return tuple(clips)


def speech_size(picture: Size, area: int) -> Size:
    """Width and height of an s2v video: the picture's shape in multiples of 64, at most `area` pixels, never larger.

    The official scan (wan/speech2video.py, get_size_less_than_area): a hundred scales from the largest down, the first
    whose sides, rounded up, fit.  (0, 0) when none does.
    """
    width, height = picture
    largest, smallest = _scales(width, height, area)
    for i in range(SCALES):
        scale = largest - (largest - smallest) * i / (SCALES - 1)
        sides = [-(-int(side * scale) // SIZE_STEP) * SIZE_STEP for side in (width, height)]
        if sides[0] * sides[1] <= area and min(sides) > 0:
            return sides[0], sides[1]
    return 0, 0


def _scales(width: int, height: int, area: int) -> tuple[float, float]:
    """The largest and the smallest scale that are tried."""
    if width * height <= area:
        return 1.0, 0.1
    largest = math.sqrt(area / (width * height))
    # where even sides padded by 63 fit; the reference has b^2 - 2ac under the root, and so have we
    a, b, c = width * height, (SIZE_STEP - 1) * (width + height), (SIZE_STEP - 1) ** 2 - area
    smallest = (-b + math.sqrt(b * b - 2 * a * c)) / (2 * a)
    return largest, smallest


# ---------------------------------------------------------------- animate


def ping_pong(index: int, count: int) -> int:
    """The frame that stands at `index` when a video of `count` frames runs forward, backward, forward, ..."""
    if count == 1:
        return 0
    index %= 2 * (count - 1)
    return min(index, 2 * (count - 1) - index)


def animation_of(request: Request, variant: Variant, source: tuple[int, int] | None) -> Animation | None:
    """What animate decides; None for another task.  source: frames a second of the driving video."""
    if variant.conditioner != "animate":
        return None
    rate = (request.fps, 1) if request.fps is not None else source or (variant.defaults.fps, 1)
    return Animation(
        shared=request.refert_num or 1, replace=replaces(request), relight=request.use_relighting_lora, rate=rate
    )


def replaces(request: Request) -> bool:
    """Whether the character is put into the driving video, and not animated where it stands."""
    return request.replace_flag or request.background_video is not None


def animate_cuts(count: int, frames: int, shared: int) -> tuple[Clip, ...]:
    """The clips of animate for a driving video of `count` frames.

    frames: of a clip (4n+1); shared: how many a clip has in common with the one before.  The last clip shows what is
    left; frames behind the end are those of `ping_pong`.
    """
    step, shown = frames - shared, 0
    clips: list[Clip] = []
    while shown < count:
        start, skip = len(clips) * step, 0 if not clips else shared
        here = min(frames - skip, count - shown)
        clips.append(Clip(frames=here, latents=(frames - 1) // 4 + 1, skip=skip, start=start))
        shown += here
    return tuple(clips)


# ---------------------------------------------------------------- what a person asked for

FOR_SPEECH = (
    "num_clips", "infer_frames", "start_from_ref", "audio_window", "reference_timing", "resize", "last_audio_state",
)  # fmt: skip
FOR_ANIMATE = ("refert_num", "replace_flag", "use_relighting_lora")


def check_clips(request: Request, variant: Variant, *, draft: bool = False) -> None:
    """Everything about clips that can be wrong in a request: E2016 for options of another task, E2005, E2024, E2035."""
    for task, names in (("speech", FOR_SPEECH), ("animate", FOR_ANIMATE)):
        for name in names if variant.conditioner != task else ():
            if getattr(request, name) not in (None, False):
                option = name.replace("_", "-")
                raise InputError("E2016", f"{option}: not used by {variant.name}. Leave it out.")
    if variant.conditioner == "speech":
        _check_speech(request, variant)
    if variant.conditioner == "animate":
        _check_animate(request, draft)


def _check_speech(request: Request, variant: Variant) -> None:
    if request.frames is not None:
        raise InputError("E2005", f"frames: the sound says how long {variant.name}'s video is. Use --num-clips to cut.")
    if request.fps not in (None, variant.defaults.fps):
        raise InputError("E2032", f"fps: got {request.fps}, {variant.name} makes {variant.defaults.fps} a second.")
    if request.num_clips is not None and not 1 <= request.num_clips <= MAX_CLIPS:
        raise InputError("E2024", f"num-clips: got {request.num_clips}, expected 1..{MAX_CLIPS}, or leave it out.")
    frames, limit = request.infer_frames, 4 * REFERENCE_AT
    if frames is not None and (not 4 <= frames <= limit or frames % 4):
        raise InputError("E2005", f"infer-frames: got {frames}, expected a multiple of 4 from 4 to {limit}.")
    if request.audio_window is not None and request.audio_window != 0 and not 10 <= request.audio_window <= 600:
        raise InputError("E2035", f"audio-window: got {request.audio_window}, expected 10..600 seconds, or 0 for all.")
    for name, value, known in (
        ("resize", request.resize, RESIZE),
        ("last-audio-state", request.last_audio_state, LAST_STATES),
    ):
        if value is not None and value not in known:
            raise InputError("E2035", f"{name}: '{value}' is not known. {did_you_mean(value, known)}")


def _check_animate(request: Request, draft: bool) -> None:
    if request.refert_num is not None and request.refert_num not in SHARED:
        raise InputError("E2035", f"refert-num: got {request.refert_num}, the model was trained with 1 and 5.")
    both = request.background_video is not None, request.mask_video is not None
    if not draft and (both[0] != both[1] or (request.replace_flag and not all(both))):
        missing = "mask-video" if both[0] else "background-video"
        raise InputError("E2015", f"{missing}: replacement needs background and mask. Give --{missing} FILE.")


def check_drivers(inputs: Sequence[Driver]) -> None:
    """The videos of animate go together: E3021 other lengths, E3019 another size of scene or mask."""
    videos = {item.role: item for item in inputs if item.frames}
    pose = videos.get("pose_video")
    if pose is None:
        return
    for role, item in videos.items():
        option = role.replace("_", "-")
        if item.frames != pose.frames:
            raise InputError(
                "E3021", f"{option}: {item.frames} frames, the pose video has {pose.frames}. They must be as long."
            )
        if role in ("background_video", "mask_video") and item.size != pose.size:
            (a, b), (c, d) = item.size, pose.size
            raise InputError("E3019", f"{option}: {a}x{b}, the pose video has {c}x{d}. They must have one size.")
