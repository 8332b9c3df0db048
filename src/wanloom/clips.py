"""How a long video is cut into clips that a model makes one after another, and the frames that follow.  No torch.

s2v      clips of `infer_frames`; the first one may be three frames shorter; the sound says how many there are
animate  clips of 77 frames that share 1 or 5 with the clip before; the driving video says how many there are

Sources: official wan/speech2video.py and wan/animate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from wanloom.errors import InputError, did_you_mean
from wanloom.models.config import AudioConfig
from wanloom.request import Request, check_prompt
from wanloom.variants import Variant

Size = tuple[int, int]

AUDIO_RATE = 16_000  # samples a second that wav2vec2 hears
STATES_RATE = 50  # hidden states of wav2vec2 a second, as the reference counts them (16000 / 320)
FEATURE_RATE = 30  # to which they are interpolated
DROPPED = 3  # frames of a first clip without a past that are not shown: they come out blurred
REFERENCE_AT = 30  # latent position of the reference picture, behind any clip
WHOLE = 60  # seconds of sound that are encoded at once
WINDOW = 30  # seconds of a longer one that are encoded at a time
GRAIN = AUDIO_RATE // 1000  # of a frame of which no more samples are heard, nothing is
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


def in_windows(samples: int, window: int) -> bool:
    """Whether a sound is encoded window by window: above a minute, and longer than one window; 0 forbids it."""
    return window > 0 and samples > max(WHOLE, window) * AUDIO_RATE


def window_notes(speech: Speech | None, samples: int | None) -> tuple[str, ...]:
    """What is worth a warning about a long sound."""
    if speech is None or samples is None or not in_windows(samples, speech.window):
        return ()
    said = f"{samples / AUDIO_RATE:.0f} s of sound are heard in windows of {speech.window} s"
    return (f"W2036: audio: {said}, which is not quite the same as at once (--audio-window 0; takes much memory).",)


def audible(frames: int, fps: int, speech: Speech | None, samples: int | None) -> int:
    """How many of the first `frames` frames begin before the sound ends: a file has no others.

    The reference leaves that to its muxer, which cannot take single frames out of a compressed video; and it makes
    whole clips, which are kept whole where tensors are asked for.

    Error: E3017 when nothing is left of the sound behind what is trimmed.
    """
    if speech is None or samples is None:
        return frames
    left = samples - round(speech.trim * AUDIO_RATE) - GRAIN
    if left <= 0:
        needed = speech.trim + 1 / fps
        raise InputError(
            "E3017", f"audio: {samples / AUDIO_RATE:.2f} s of sound, at least {needed:.2f} s are needed here."
        )
    return min(frames, -(-left * fps // AUDIO_RATE))


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


# ---------------------------------------------------------------- animate


def ping_pong(index: int, count: int) -> int:
    """The frame that stands at `index` when a video of `count` frames runs forward, backward, forward, ..."""
    if count == 1:
        return 0
    index %= 2 * (count - 1)
    return min(index, 2 * (count - 1) - index)


def animation_of(request: Request, variant: Variant, source: tuple[int, int] | None) -> Animation | None:
    """What animate decides; None for another task.  source: frames a second of the driving video (0 of a picture)."""
    if variant.conditioner != "animate":
        return None
    own = source if source and source[0] else (variant.defaults.fps, 1)
    rate = own if request.fps is None else (request.fps, 1)
    return Animation(
        shared=request.refert_num or 1, replace=replaces(request), relight=request.use_relighting_lora, rate=rate
    )


def replaces(request: Request) -> bool:
    """Whether the character is put into the driving video, and not animated where it stands."""
    return request.replace_flag or request.background_video is not None


def animate_cuts(count: int, frames: int, shared: int) -> tuple[Clip, ...]:
    """The clips of animate for a driving video of `count` frames.

    frames: of a clip (4n+1); shared: how many a clip has in common with the one before.  The last clip shows what is
    left; frames behind the end are those of `ping_pong`.  Error: E2005 for clips that would show nothing new.
    """
    if count > frames <= shared:
        more = (shared + 3) // 4 * 4 + 1
        raise InputError("E2005", f"frames: got {frames}, clips that share {shared} need more. Use {more} or 77.")
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
    "tts_text", "tts_command", "tts_url", "tts_voice", "tts_model",
)  # fmt: skip
FOR_ANIMATE = ("refert_num", "replace_flag", "use_relighting_lora", "relighting_lora")


def check_clips(request: Request, variant: Variant, *, draft: bool = False) -> None:
    """Everything about clips that can be wrong in a request: E2016 for options of another task, others for their
    values.
    """
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
    _check_tts(request)
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


def _check_tts(request: Request) -> None:
    """A text to be spoken has a speaker, and a speaker a text: E2012 to E2014, E2023, E2024."""
    speakers = {name: getattr(request, name) for name in ("tts_command", "tts_url", "tts_voice", "tts_model")}
    named = [name.replace("_", "-") for name, value in speakers.items() if value is not None]
    if request.tts_text is None:
        if named:
            raise InputError("E2023", f"{named[0]}: there is nothing to say. Give --tts-text TEXT, or leave it out.")
        return
    if request.audio is not None:
        raise InputError("E2023", "tts-text: conflicts with --audio, which is spoken already. Leave one out.")
    check_prompt(request.tts_text, "tts-text")
    if not request.tts_text.strip():
        raise InputError("E2012", "tts-text: is empty. Write what is to be said.")
    if request.tts_url is None and request.tts_command is None:
        example = "espeak-ng -w {out} {text}"
        raise InputError("E2024", f'tts-text: nobody speaks it. Give --tts-command "{example}", or --tts-url URL.')
    if request.tts_url is None and named != ["tts-command"]:
        raise InputError("E2023", f"{named[-1]}: is for a server. Give --tts-url URL, or leave it out.")


def _check_animate(request: Request, draft: bool) -> None:
    if request.relighting_lora is not None and not request.use_relighting_lora:
        raise InputError("E2016", "relighting-lora: not used without --use-relighting-lora. Add it, or leave it out.")
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
