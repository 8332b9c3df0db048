"""A Plan: a Request with every number decided.  Pure functions, no torch, no file is opened.

`--dry-run` prints it, the job folder keeps it, the mp4 carries it, `--like` replays it: whatever decides how a video
looks stands here, and nothing about where or how fast it is computed.  Inputs appear by role, base name and SHA-256,
so that a Plan can be passed around without saying anything about the machine it came from.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from fractions import Fraction
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from wanloom.clips import (
    Animation,
    Clip,
    Speech,
    animate_cuts,
    animation_of,
    audible,
    check_clips,
    check_drivers,
    speech_cuts,
    speech_of,
    window_notes,
)
from wanloom.errors import InputError
from wanloom.request import (
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    ROLES,
    Request,
    Size,
    check_cache,
    check_device,
    check_guidance_batch,
    check_guidance_mode,
    check_out,
    check_prompt,
    check_sampler,
)
from wanloom.sampling.schedule import Schedule, explicit_schedule, make_schedule
from wanloom.sizes import GRID, decide_sizes, latent_shape, listed
from wanloom.variants import Variant

T = TypeVar("T")

FORMAT = 1  # of the JSON; raised when a field changes its meaning
MAX_JSON = 1 << 24  # a Plan of 1000 steps has 60 kB, one of 10 000 clips 1.2 MB


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file the video is made from: its role ("image", "audio", "pose_video", ...), base name and SHA-256.

    size: (w, h) of a picture or a video in pixels; samples: of a sound, at 16 kHz; frames and rate (numerator,
    denominator; a second): of a video.
    """

    role: str
    name: str
    sha256: str
    size: Size = (0, 0)
    samples: int = 0
    frames: int = 0
    rate: tuple[int, int] = (0, 1)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Steps start..stop-1 run on `expert` with this guidance scale (1: the unconditional pass is skipped)."""

    expert: str
    start: int
    stop: int
    guidance: float


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One clip of the video: frames shown, the latent's shape (C, T, h, w), the seed of its noise.

    draw: how many noises of that seed come before it; skip: decoded frames at the start that are not shown; start: the
    frame of the whole that its first one stands for.
    """

    index: int
    frames: int
    latent: tuple[int, int, int, int]
    seed: int
    draw: int = 0
    skip: int = 0
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number of a run.

    asked: the size the request (or the model) named; size: what is made.  frames: of the file; the last clip of s2v may
    make more than the sound is long.
    """

    format: int = FORMAT
    variant: str
    task: str
    demo: bool
    prompt: str
    negative_prompt: str
    asked: Size
    size: Size
    frames: int
    fps: int
    quality: int
    sampler: str
    steps: int
    shift: float | None  # None: the noise levels were given one by one
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    guidance: tuple[float, float]  # (low-noise expert, high-noise expert)
    spans: tuple[Span, ...]
    seed: int
    noise_device: str
    segments: tuple[Segment, ...]
    inputs: tuple[Input, ...] = ()
    cache: str | None = None  # steps are skipped by this preset (lossy)
    cache_threshold: float | None = None  # None: the preset's own
    guidance_mode: str = "plain"
    notes: tuple[str, ...] = ()  # worth one warning line each
    speech: Speech | None = None
    animation: Animation | None = None
    boundary_step: int | None = None  # steps of the high-noise expert, as asked; None: the model's noise level decides

    @property
    def latent(self) -> tuple[int, int, int, int]:
        """Shape (C, T, h, w) of the first segment's latent; a plan of one segment has no other."""
        return self.segments[0].latent

    @property
    def schedule(self) -> Schedule:
        return Schedule(sigmas=self.sigmas, timesteps=self.timesteps)

    @property
    def in_clips(self) -> bool:
        """Whether the task makes its videos clip by clip, be there one clip or more."""
        return self.speech is not None or self.animation is not None

    @property
    def rate(self) -> Fraction:
        """Frames a second of the file."""
        return Fraction(self.fps) if self.animation is None else Fraction(*self.animation.rate)

    def input(self, role: str) -> Input | None:
        """The input with this role, or None."""
        return next((item for item in self.inputs if item.role == role), None)

    def span_at(self, step: int) -> Span:
        """Which expert runs this step, and with which guidance."""
        return next(span for span in self.spans if span.start <= step < span.stop)

    def with_seed(self, seed: int) -> Plan:
        """The same video with other noise (`--num`: seeds s, s+1, ...)."""
        _seed(seed)
        segments = tuple(replace(part, seed=part.seed - self.seed + seed) for part in self.segments)
        return replace(self, seed=seed, segments=segments)

    def to_json(self, *, indent: int | None = None) -> str:
        """The Plan as JSON; `from_json` gives back an equal one, to the last bit."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False, indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read a Plan strictly.  Error: E3022 for anything else than a Plan of this format, naming the field."""
        if len(text) > MAX_JSON:
            raise InputError("E3022", f"plan: {len(text)} bytes, a plan has at most {MAX_JSON}.")
        try:
            data = json.loads(text, object_pairs_hook=_no_twins, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
            raise InputError("E3022", f"plan: not readable ({str(error)[:120]}).") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError("E3022", f"plan: expected a plan of format {FORMAT}.")
        plan: Plan = _decode(cls, data, "plan")
        _check_whole(plan)
        return plan


def make_plan(
    request: Request,
    variant: Variant,
    *,
    image_size: Size | None = None,
    last_image_size: Size | None = None,
    inputs: Sequence[Input] = (),
    draft: bool = False,
    random_seed: Callable[[], int] | None = None,
) -> Plan:
    """Decide every number of a request for one model.

    image_size, last_image_size: pixels (w, h) of the pictures, read from their headers by the caller; `inputs` has
    them too and is recorded.  draft=True is for counting bytes: prompt and pictures may be absent.
    random_seed: what seed -1 becomes (a random number by default).

    Errors: InputError E2002 to E2017, E2023, E2029 to E2032, E2052 and E2056, one per mistake, each naming the field
    and the cure.
    """
    check_request(request, variant, draft=draft)
    given = {item.role: item.size for item in inputs}
    image = image_size or given.get("image")
    if request.image is not None and image is None and not draft:
        raise InputError("E2015", "image: its size is not known; read the picture before planning.")
    asked, size = decide_sizes(request, variant, given.get("pose_video") if variant.conditioner == "animate" else image)
    frames = _frames(request, variant)
    check_drivers(inputs)
    speech = speech_of(request, variant)
    animation = animation_of(request, variant, next((i.rate for i in inputs if i.role == "pose_video"), None))
    if request.last_image is not None and frames == 1:
        raise InputError(
            "E2005", f"frames: got 1, a last picture needs a second frame. Use {variant.vae.stride[0] + 1}."
        )
    shift, schedule = _schedule(request, variant, asked)
    _check_boundary(request.boundary_step, variant, schedule.steps)
    low_high = _guidance(request, variant)
    spans = expert_spans(variant, schedule.timesteps, low_high, request.boundary_step)
    if request.guidance_batch == "on" and all(span.guidance == 1 for span in spans):
        raise InputError(
            "E2023", "guidance-batch: with guidance 1 there is one pass. Leave it out, or raise --guidance."
        )
    seed = _decide_seed(request, random_seed)
    cuts = _cuts(request, variant, frames, inputs, speech, animation)
    segments = tuple(_segment(variant, size, i, cut, seed) for i, cut in enumerate(cuts))
    negative = request.negative_prompt or variant.defaults.negative_prompt
    return Plan(
        variant=variant.name,
        task=variant.task,
        demo=variant.demo,
        prompt=request.prompt if request.prompt.strip() else variant.defaults.prompt,
        negative_prompt=negative,
        asked=asked,
        size=size,
        frames=audible(sum(part.frames for part in segments), variant.defaults.fps, speech, _samples(inputs)),
        fps=round(Fraction(*animation.rate)) if animation else _default(request.fps, variant.defaults.fps),
        quality=variant.defaults.quality,
        sampler=_default(request.sampler, variant.defaults.sampler),
        steps=schedule.steps,
        shift=shift,
        sigmas=schedule.sigmas,
        timesteps=schedule.timesteps,
        guidance=low_high,
        spans=spans,
        seed=seed,
        noise_device=_default(request.noise_device, "cpu"),
        segments=segments,
        inputs=tuple(inputs),
        cache=request.cache,
        cache_threshold=request.cache_threshold,
        guidance_mode=_default(request.guidance_mode, "plain"),
        notes=(*_notes(variant, asked, animation), *window_notes(speech, _samples(inputs))),
        speech=speech,
        animation=animation,
        boundary_step=request.boundary_step,
    )


def request_like(plan: Plan) -> Request:
    """The request that makes this Plan again: every value explicit.  Pictures are not part of it: give them anew."""
    low, high = plan.guidance
    explicit = plan.shift is None
    return Request(
        task=plan.variant if plan.demo else plan.task,
        prompt=plan.prompt,
        negative_prompt=plan.negative_prompt,
        size=plan.asked,
        steps=None if explicit else plan.steps,
        shift=plan.shift,
        sigmas=plan.sigmas if explicit else None,
        boundary_step=plan.boundary_step,
        guidance=low if low == high else (low, high),
        sampler=plan.sampler,
        cache=plan.cache,
        cache_threshold=plan.cache_threshold,
        guidance_mode=plan.guidance_mode,
        seed=plan.seed,
        noise_device=plan.noise_device,
        **({"frames": plan.frames, "fps": plan.fps} if not plan.in_clips else _clips_like(plan)),
    )


def _clips_like(plan: Plan) -> dict[str, Any]:
    """The fields of a request that decided the clips of this Plan."""
    if (speech := plan.speech) is not None:
        return {
            "num_clips": len(plan.segments), "infer_frames": speech.infer_frames, "resize": speech.resize,
            "start_from_ref": speech.start_from_ref, "audio_window": speech.window,
            "reference_timing": speech.trim == 0 and not speech.start_from_ref, "last_audio_state": speech.last_state,
        }  # fmt: skip
    assert plan.animation is not None
    _, time, _, _ = plan.latent
    return {
        "frames": 4 * (time - 2) + 1, "fps": plan.fps if plan.rate.denominator == 1 else None,
        "refert_num": plan.animation.shared, "replace_flag": plan.animation.replace,
        "use_relighting_lora": plan.animation.relight,
    }  # fmt: skip


def differences(plan: Plan, other: Plan) -> tuple[str, ...]:
    """The names of the fields in which two Plans differ (notes do not count); empty: the same video."""
    names = (entry.name for entry in fields(Plan) if entry.name != "notes")
    return tuple(name for name in names if getattr(plan, name) != getattr(other, name))


def check_request(request: Request, variant: Variant, *, draft: bool = False) -> None:
    """Everything about a request that can be wrong without knowing the pictures' sizes."""
    if request.task not in (None, variant.task, variant.name):
        raise InputError("E2002", f"task: got {request.task}, but the model is {variant.name}. Load that task's model.")
    check_prompt(request.prompt)
    if not request.prompt.strip() and not variant.defaults.prompt and not draft:
        raise InputError("E2012", "prompt: is empty. Say what the video shows.")
    if request.negative_prompt is not None:
        check_prompt(request.negative_prompt, "negative-prompt")
    if request.out is not None:
        check_out(request.out)
    _check_inputs(request, variant, draft)
    check_clips(request, variant, draft=draft)
    _whole_between(request.fps, "fps", "E2032", 1, 120)
    _whole_between(request.num, "num", "E2029", 1, 10_000)
    _whole_between(request.save_every, "save-every", "E2030", 1, MAX_STEPS)
    if request.sampler is not None:
        check_sampler(request.sampler)
    _check_shortcuts(request)
    if request.device is not None:
        check_device(request.device, "device")
    if request.noise_device is not None:
        check_device(request.noise_device, "noise-device")
        if request.device == "cpu" and request.noise_device != "cpu":
            raise InputError(
                "E2023", f"noise-device: {request.noise_device} conflicts with --device cpu. Use one of the two."
            )


def _check_shortcuts(request: Request) -> None:
    if request.cache is not None:
        check_cache(request.cache)
    if request.guidance_mode is not None:
        check_guidance_mode(request.guidance_mode)
    if request.guidance_batch is not None:
        check_guidance_batch(request.guidance_batch)
        if request.guidance_batch != "off" and request.cache is not None:
            said = f"guidance-batch: {request.cache} decides about each pass by itself, and they cannot be made at once"
            raise InputError("E2023", f"{said}. Leave --guidance-batch or --cache out.")
    threshold = request.cache_threshold
    if threshold is None:
        return
    if request.cache is None:
        raise InputError("E2046", "cache-threshold: there is no cache. Choose one with --cache NAME.")
    if not _is_number(threshold) or threshold < 0:
        raise InputError("E2046", f"cache-threshold: got {threshold}, expected 0 or more.")


def _check_inputs(request: Request, variant: Variant, draft: bool) -> None:
    """Each picture, sound and video has a use for this task, and none is missing."""
    for role in ROLES:
        option = role.replace("_", "-")
        given = getattr(request, role) is not None
        if given and not variant.takes(role):
            raise InputError("E2016", f"{option}: not used by {variant.name}. Leave it out, or choose a task for it.")
        if given or draft or not variant.needs(role) or (role == "audio" and request.tts_text is not None):
            continue
        if role == "audio":
            raise InputError("E2024", f"audio: {variant.name} needs a sound. Give --audio FILE, or --tts-text TEXT.")
        what = "a picture" if role == "image" else "a video"
        raise InputError("E2015", f"{option}: {variant.name} needs {what}. Give --{option} FILE.")
    if request.last_image is not None and request.image is None:
        raise InputError("E2015", "image: a last image needs a first one. Give --image FILE.")


# --- what is worth a warning ------------------------------------------------------------------------------------------


def _notes(variant: Variant, asked: Size, animation: Animation | None) -> tuple[str, ...]:
    notes = []
    if asked not in variant.sizes:
        width, height = asked
        notes.append(f"W2004: size: {width}x{height} is not one {variant.name} was trained for ({listed(variant)}).")
    if animation is not None and animation.relight and not animation.replace:
        notes.append("W2037: use-relighting-lora: it was made for replacement, and this is none (no --replace-flag).")
    return tuple(notes)


# --- clips ----------------------------------------------------------------------------------------------------------


def _cuts(
    request: Request, variant: Variant, frames: int, inputs: Sequence[Input],
    speech: Speech | None, animation: Animation | None,
) -> tuple[Clip, ...]:  # fmt: skip
    """The clips of the video; a task without clips has one.  A draft without a sound or a driver counts one, too."""
    there = {item.role: item for item in inputs}
    if speech is not None:
        return speech_cuts(request.num_clips, variant, speech, _samples(inputs))
    if animation is not None:
        driver = there.get("pose_video")
        return animate_cuts(driver.frames if driver else frames, frames, animation.shared)
    return (Clip(frames=frames, latents=(frames - 1) // variant.vae.stride[0] + 1, skip=0, start=0),)


def _samples(inputs: Sequence[Input]) -> int | None:
    """Of the sound, when there is one."""
    return next((item.samples for item in inputs if item.role == "audio"), None)


def _segment(variant: Variant, size: Size, index: int, cut: Clip, seed: int) -> Segment:
    """A clip with its latent and noise: each clip of s2v has a seed, each of animate the next noise of one seed."""
    channels, _, height, width = latent_shape(variant, size, 1)
    animate = variant.conditioner == "animate"
    time = cut.latents + animate  # the character's picture is a latent frame of its own
    return Segment(
        index=index, frames=cut.frames, latent=(channels, time, height, width), seed=seed if animate else seed + index,
        draw=index if animate else 0, skip=cut.skip, start=cut.start,
    )  # fmt: skip


# --- frames, schedule, guidance, seed --------------------------------------------------------------------------------


def _frames(request: Request, variant: Variant) -> int:
    """Frames of the video, or of a clip where the task makes several."""
    if variant.conditioner == "speech":
        return variant.defaults.frames
    frames = _default(request.frames, variant.defaults.frames)
    stride = variant.vae.stride[0]
    limit = stride * (GRID // variant.dit.patch[0] - 1) + 1
    if type(frames) is not int or frames < 1:
        raise InputError("E2005", f"frames: got {frames}, this model makes {stride}n+1. Use 1 or {stride + 1}, 81, ...")
    if frames > limit:
        raise InputError("E2006", f"frames: got {frames}, above the limit of {limit}.")
    if (frames - 1) % stride:
        below = (frames - 1) // stride * stride + 1
        above = min(below + stride, limit)
        raise InputError("E2005", f"frames: got {frames}, this model makes {stride}n+1. Use {below} or {above}.")
    return frames


def _schedule(request: Request, variant: Variant, asked: Size) -> tuple[float | None, Schedule]:
    sampler = _default(request.sampler, variant.defaults.sampler)
    if request.sigmas is not None:
        if request.shift is not None:
            raise InputError("E2023", "sigmas: they already say steps and shift. Leave --steps and --shift out.")
        schedule = explicit_schedule(sampler, request.sigmas)
        if request.steps not in (None, schedule.steps):
            what = f"{schedule.steps} noise levels are {schedule.steps} steps, not {request.steps}"
            raise InputError("E2023", f"sigmas: {what}. Leave --steps and --shift out.")
        return None, schedule
    _whole_between(request.steps, "steps", "E2007", 1, MAX_STEPS)
    steps = _default(request.steps, variant.defaults.steps)
    shift = _default(request.shift, variant.defaults.shift_for(asked))
    if not _is_number(shift) or shift <= 0:
        raise InputError("E2009", f"shift: got {shift}, must be a number above 0.")
    return float(shift), make_schedule(sampler, steps, float(shift))


def _guidance(request: Request, variant: Variant) -> tuple[float, float]:
    """(low, high): one number counts for both, the two single options win over it."""
    value = _default(request.guidance, variant.defaults.guidance)
    pair = value if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise InputError("E2008", f"guidance: got {value}, expected one number, or two: low,high.")
    low, high = _default(request.guidance_low, pair[0]), _default(request.guidance_high, pair[1])
    for scale in (low, high):
        if not _is_number(scale) or not 0 <= scale <= MAX_GUIDANCE:
            raise InputError("E2008", f"guidance: got {scale}, expected a number from 0 to {MAX_GUIDANCE:g}.")
    if len(variant.experts) == 1 and low != high:
        raise InputError("E2008", f"guidance: got {low},{high}, but {variant.name} has one expert. Give one number.")
    return float(low), float(high)


def _check_boundary(step: int | None, variant: Variant, steps: int) -> None:
    """Error: E2052 unless both of two experts have a step."""
    if step is None:
        return
    if len(variant.experts) == 1:
        raise InputError("E2052", f"boundary-step: {variant.name} has one expert, which makes all steps. Leave it out.")
    if type(step) is not int or not 1 <= step < steps:
        can = f"1..{steps - 1}" if steps > 1 else "two steps at least"
        raise InputError("E2052", f"boundary-step: got {step}, expected {can}: both experts make a step.")


def expert_spans(
    variant: Variant,
    timesteps: Sequence[float],
    guidance: tuple[float, float],
    boundary_step: int | None = None,
) -> tuple[Span, ...]:
    """Which expert runs which steps: t >= from_t * 1000, compared in double precision, high noise first.

    boundary_step: the first of two experts runs so many steps, whatever their t.
    """
    spans: list[Span] = []
    for step, t in enumerate(timesteps):
        expert = variant.expert_at(t) if boundary_step is None else variant.expert_names[step >= boundary_step]
        if spans and spans[-1].expert == expert:
            spans[-1] = replace(spans[-1], stop=step + 1)
        else:
            scale = variant.guidance_of(expert, guidance)
            spans.append(Span(expert=expert, start=step, stop=step + 1, guidance=scale))
    return tuple(spans)


def _decide_seed(request: Request, random_seed: Callable[[], int] | None) -> int:
    seed = -1 if request.seed is None else request.seed
    if type(seed) is int and seed == -1:
        # 32 bits: short enough to read out, and noise differs between any two of them.
        seed = random_seed() if random_seed else secrets.randbelow(2**32)
    _seed(seed)
    _seed(seed + request.num - 1)
    return seed


def _seed(seed: object) -> None:
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise InputError("E2010", f"seed: got {seed}, expected 0..2^63-1, or -1 for a random one.")


def _whole_between(value: object, name: str, code: str, low: int, high: int) -> None:
    """None (not given) or a whole number in low..high."""
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise InputError(code, f"{name}: got {value}, expected a whole number, {low}..{high}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _default(value: T | None, default: T) -> T:
    return default if value is None else value


# --- JSON ------------------------------------------------------------------------------------------------------------


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key appears twice")
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _decode(kind: Any, value: Any, path: str) -> Any:
    """`value` (from JSON) as the annotated type `kind`; nothing is guessed or converted but int to float."""
    origin = get_origin(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        return _decode_object(kind, value, path)
    if origin in (Union, UnionType):
        choices = [choice for choice in get_args(kind) if choice is not NoneType]
        return None if value is None else _decode(choices[0], value, path)
    if origin is tuple:
        parts = get_args(kind)
        if isinstance(value, list) and (parts[-1] is Ellipsis or len(parts) == len(value)):
            kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
            return tuple(
                _decode(each, item, f"{path}[{i}]") for i, (each, item) in enumerate(zip(kinds, value, strict=True))
            )
        raise _wrong(path, kind, value)
    if kind is float and type(value) is int and abs(value) <= 2**53:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise _wrong(path, kind, value)
    return value


def _decode_object(kind: Any, value: Any, path: str) -> Any:
    hints = get_type_hints(kind)
    needed = {entry.name for entry in fields(kind) if entry.default is MISSING}
    found = set(value) if isinstance(value, dict) else set()
    if not isinstance(value, dict) or not needed <= found <= set(hints):
        odd = ", ".join(sorted((needed - found) | (found - set(hints)))[:5])
        raise InputError("E3022", f"{path}: keys missing or unknown: {odd}.")
    return kind(**{name: _decode(hints[name], item, f"{path}.{name}") for name, item in value.items()})


def _wrong(path: str, kind: Any, value: Any) -> InputError:
    name = getattr(kind, "__name__", str(kind))
    return InputError("E3022", f"{path}: got {str(value)[:60]!r}, expected {name}.")


def _check_whole(plan: Plan) -> None:
    """A Plan read from a file must hold together: it is going to decide how much is computed and kept."""
    whole = (
        1 <= plan.steps <= MAX_STEPS
        and len(plan.timesteps) == plan.steps == len(plan.sigmas) - 1
        and _cover(plan.spans, plan.steps)
        and len(plan.segments) >= 1
        and all(0 <= part.seed <= MAX_SEED and _is_latent(part.latent) for part in plan.segments)
        and all(1 <= side <= MAX_SIDE for side in (*plan.size, *plan.asked))
        and 0 <= plan.seed <= MAX_SEED
        and 1 <= plan.frames <= MAX_SIDE
    )
    if not whole:
        raise InputError("E3022", "plan: its numbers do not fit together.")


def _cover(spans: Sequence[Span], steps: int) -> bool:
    """Whether the spans are steps 0..steps-1, one after the other."""
    edges = [0, *(span.stop for span in spans)]
    return edges[-1] == steps and all(
        span.start == edge < span.stop for edge, span in zip(edges[:-1], spans, strict=True)
    )


def _is_latent(shape: Sequence[int]) -> bool:
    return all(1 <= side <= MAX_SIDE for side in shape) and shape[1] <= GRID
