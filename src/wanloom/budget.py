"""What a run costs, before anything is loaded: bytes of each part, memory of each stage, floating-point operations.

Closed formulas over the sizes in `variants.py` and the numbers of a Plan; no torch, so that `wanloom plan` answers at
once.  Parameter counts are exact (a test builds every row on the meta device and compares).  Operations count a
multiplication and an addition as two.  Memory of activations is an estimate of what the plain code holds at its
widest point, with the allocations named; the tests and docs say how it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Protocol

from wanloom.checkpoint.shapes import adapter_shapes, audio_shapes
from wanloom.errors import InputError
from wanloom.models.config import (
    AnimateConfig,
    AudioConfig,
    ClipConfig,
    DiTConfig,
    SpeechConfig,
    TextConfig,
)
from wanloom.vae_cost import decode_flops, encode_flops, remembered, vae_activations, vae_parameters
from wanloom.variants import Variant

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# A process that has imported torch, transformers and PyAV takes 0.41 GB (torch 2.13, CPU build, Linux); the rest is an
# allowance for what libraries keep.  With CUDA the libraries and the context come on top, in both memories.
HOST_BASE = 500 * 2**20
CUDA_HOST = 3 * 2**30
GPU_BASE = 600 * 2**20

SLOTS = 2  # blocks of a streamed transformer that are there beside the resident ones
AUDIO_RATE = 16_000  # samples a second that wav2vec2 reads


class Span(Protocol):
    """Of `plan.Span`: steps start..stop-1 and their guidance scale."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def guidance(self) -> float: ...


class Clip(Protocol):
    """Of `plan.Segment`: frames shown, shape (C, T, h, w) of a clip's latent, decoded frames in front not shown."""

    @property
    def frames(self) -> int: ...
    @property
    def latent(self) -> tuple[int, int, int, int]: ...
    @property
    def skip(self) -> int: ...


class Given(Protocol):
    """Of `plan.Input`: "image", "pose_video" ..."""

    @property
    def role(self) -> str: ...


class Sized(Protocol):
    """Of `plan.Plan` what costs something (a Protocol: plans are made on the floor above)."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def frames(self) -> int: ...
    @property
    def fps(self) -> int: ...
    @property
    def segments(self) -> Sequence[Clip]: ...
    @property
    def spans(self) -> Sequence[Span]: ...
    @property
    def inputs(self) -> Sequence[Given]: ...
    @property
    def guidance_mode(self) -> str: ...


# --- parameters ----------------------------------------------------------------------------------------------------


def block_parameters(config: DiTConfig) -> int:
    """Parameters of one block, without what adapters put into it."""
    dim, ffn = config.dim, config.ffn_dim
    attention = 4 * (dim * dim + dim) + 2 * dim  # q, k, v, o with biases; the norms of q and k
    block = 6 * dim + 2 * attention + 2 * dim + 2 * dim * ffn + ffn + dim
    return block if config.image_dim is None else block + 2 * (dim * dim + dim) + dim  # k_img, v_img, norm of k_img


def dit_parameters(config: DiTConfig) -> int:
    """Parameters of one transformer (one expert)."""
    dim = config.dim
    patch = config.patch[0] * config.patch[1] * config.patch[2]
    embeddings = (
        config.in_channels * patch * dim + dim
        + config.text_dim * dim + dim + dim * dim + dim
        + config.freq_dim * dim + dim + dim * dim + dim + 6 * dim * dim + 6 * dim
    )  # fmt: skip
    head = 2 * dim + dim * config.out_channels * patch + config.out_channels * patch
    image = 0
    if config.image_dim is not None:
        wide = config.image_dim
        image = 2 * wide + wide * wide + wide + wide * dim + dim + 2 * dim
        image += (config.image_positions or 0) * wide
    blocks = config.layers * block_parameters(config)
    return embeddings + blocks + head + image + _adapter_parameters(config)


def _adapter_parameters(config: DiTConfig) -> int:
    """Of the parts of s2v or animate; the kernels that blur a face are constants."""
    return sum(prod(shape) for name, shape in adapter_shapes(config).items() if not name.endswith(".kernel"))


def audio_parameters(config: AudioConfig) -> int:
    """Parameters of the wav2vec2 encoder."""
    return sum(prod(shape) for shape in audio_shapes(config).values())


def text_parameters(config: TextConfig) -> int:
    """Parameters of the UMT5 encoder; every layer has its own table of relative positions."""
    inner = config.heads * config.head_dim
    layer = 4 * config.dim * inner + 3 * config.dim * config.ffn_dim + 2 * config.dim + config.buckets * config.heads
    return config.vocab * config.dim + config.layers * layer + config.dim


def clip_parameters(config: ClipConfig) -> int:
    """Parameters of CLIP's visual tower as published, its last norm and projection (which Wan never uses) included."""
    dim = config.dim
    positions = (config.image // config.patch) ** 2 + 1
    layer = 4 * dim + 4 * dim * dim + 4 * dim + 2 * dim * config.ffn_dim + config.ffn_dim + dim
    around = 3 * config.patch**2 * dim + dim + positions * dim + 4 * dim + dim * config.projection
    return config.layers * layer + around


def parameters(variant: Variant) -> dict[str, int]:
    """Part -> parameters: dit (one expert), vae, text, and clip and audio where the model has them."""
    counts = {
        "dit": dit_parameters(variant.dit),
        "vae": vae_parameters(variant.vae),
        "text": text_parameters(variant.text),
    }
    if variant.clip is not None:
        counts["clip"] = clip_parameters(variant.clip)
    if variant.audio is not None:
        counts["audio"] = audio_parameters(variant.audio)
    return counts


def part_bytes(
    variant: Variant, dtype: str, *, quantise: str | None = None, resident_blocks: int | None = None
) -> dict[str, int]:
    """Part -> bytes when loaded: dit (one expert), text and clip in `dtype`; VAE and audio encoder in float32.

    quantise: whether the matrices of transformer and text encoder have 8 bits (see `_narrow`).  resident_blocks: how
    many blocks of the transformer stay, beside the two that come and go; None: all.
    """
    counts = parameters(variant)
    sizes = {part: count * (4 if part in ("vae", "audio") else DTYPE_BYTES[dtype]) for part, count in counts.items()}
    block = block_bytes(variant.dit, dtype, quantise)
    if quantise is not None:
        sizes["dit"] -= variant.dit.layers * (block_bytes(variant.dit, dtype) - block)
        text = variant.text
        sizes["text"] -= text.layers * _narrow(3 * text.dim * text.ffn_dim, 2 * text.ffn_dim + text.dim, dtype)
    if resident_blocks is not None:
        sizes["dit"] -= max(0, variant.dit.layers - resident_blocks - SLOTS) * block
    return sizes


def block_bytes(config: DiTConfig, dtype: str, quantise: str | None = None) -> int:
    """Bytes of one block of a transformer, without what adapters put into it."""
    size = block_parameters(config) * DTYPE_BYTES[dtype]
    if quantise is None:
        return size
    squares = 8 if config.image_dim is None else 10
    weights = squares * config.dim**2 + 2 * config.dim * config.ffn_dim
    return size - _narrow(weights, (squares + 1) * config.dim + config.ffn_dim, dtype)


def _narrow(weights: int, rows: int, dtype: str) -> int:
    """Bytes that so many weights save in 8 bits, with a float32 scale for each row."""
    return weights * (DTYPE_BYTES[dtype] - 1) - 4 * rows


# --- operations ----------------------------------------------------------------------------------------------------


def tokens(latent: Sequence[int], patch: Sequence[int]) -> int:
    """How many tokens a latent [C, T, h, w] becomes."""
    return (latent[1] // patch[0]) * (latent[2] // patch[1]) * (latent[3] // patch[2])


def beside_tokens(config: DiTConfig, latent: Sequence[int], *, past: bool) -> int:
    """How many tokens s2v puts behind those of a clip's latent: the reference picture, and the packed past if any."""
    if config.speech is None:
        return 0
    height, width = latent[2:]
    full = tokens((latent[0], 1, height, width), config.patch)
    return full + (full + (height // 4) * (width // 4) + 4 * (height // 8) * (width // 8) if past else 0)


def dit_flops(config: DiTConfig, latent: Sequence[int], *, past: bool = False) -> int:
    """Operations of one forward of one sample (research: 1678 TFLOP at 480p, 6523 at 720p).

    past: whether a clip of s2v remembers the one before it.  What is the same in all steps is in `once_flops`.
    """
    dim, text, patch = config.dim, config.text_len, config.patch[0] * config.patch[1] * config.patch[2]
    own = tokens(latent, config.patch)
    length = own + beside_tokens(config, latent, past=past)
    block = 12 * length * dim * dim + 4 * length * length * dim + 4 * length * dim * config.ffn_dim
    block += 4 * text * dim * dim + 4 * length * text * dim
    rest = 2 * own * patch * dim * (config.in_channels + config.out_channels)
    rest += 2 * text * (config.text_dim * dim + dim * dim)
    timesteps = 1 if config.speech is None else 2  # the reference picture and the past are told that they are clean
    rest += timesteps * 2 * (config.freq_dim * dim + 7 * dim * dim)
    for part in (config.speech, config.animate):
        if part is not None:
            memory = latent[1] * (part.tokens + 1)
            rest += len(part.layers) * (4 * (length + memory) * dim * dim + 4 * length * memory * dim)
    if config.speech is not None:
        rest += len(config.speech.layers) * 4 * latent[1] * dim * dim  # each frame's shift and scale
    if config.image_dim is not None:
        seen = config.image_positions or 257
        block += 4 * seen * dim * dim + 4 * length * seen * dim
        rest += 2 * seen * (config.image_dim**2 + config.image_dim * dim)
    return config.layers * block + rest


def once_flops(config: DiTConfig, latent: Sequence[int], *, past: bool = False) -> int:
    """Operations of `DiT.once` for a clip: what s2v makes of sound and pose, animate of face and pose."""
    if config.speech is not None:
        return _speech_once(config, config.speech, latent, past)
    return 0 if config.animate is None else _animate_once(config, config.animate, latent)


def _speech_once(config: DiTConfig, speech: SpeechConfig, latent: Sequence[int], past: bool) -> int:
    """The sound's tokens, and the embedding of reference, pose and past."""
    dim, quarter = config.dim, config.dim // 4
    heard = speech.history + 4 * latent[1]  # frames, the first one repeated in front
    half, end = -(-heard // 2), -(-heard // 4)
    streams = speech.tokens + 1  # each token's, and the one that sums up
    out = 6 * heard * speech.audio_dim * quarter * streams
    out += 6 * streams * (half * quarter * (dim // 2) + end * (dim // 2) * dim) + 2 * end * dim * dim
    one = tokens((latent[0], 1, *latent[2:]), config.patch) * prod(config.patch) * dim
    out += 2 * one * (config.in_channels + latent[1] * speech.channels)
    if past:
        # 1, 2 and 16 latent frames in patches of 1x2x2, 2x4x4 and 4x8x8: every value is read once.
        out += 2 * (1 + 2 + 16) * latent[2] * latent[3] * speech.channels * dim
    return out


def _animate_once(config: DiTConfig, animate: AnimateConfig, latent: Sequence[int]) -> int:
    """The face of every frame as numbers, their tokens, and the embedding of the pose."""
    moving = latent[1] - 1  # latent frames; the first is the character's picture
    frames = 4 * moving - 3
    motion, face, side = animate.motion_dim, animate.face_dim, animate.face_size
    each = 2 * 3 * animate.widths[0] * side * side
    for inputs, outputs in pairwise(animate.widths):
        small = (side // 2) ** 2
        each += 18 * inputs * inputs * side * side + 32 * inputs * ((side + 1) ** 2 + (side - 1) ** 2)
        each += 18 * inputs * outputs * small + 2 * inputs * outputs * small
        side //= 2
    each += 32 * animate.widths[-1] * motion + 8 * motion * motion + 4 * motion * animate.directions
    half, end = -(-frames // 2), -(-frames // 4)
    tell = 6 * frames * motion * face + 6 * (half + end) * face * face + 2 * end * face * config.dim
    values = moving * latent[2] * latent[3] * animate.channels
    return frames * each + animate.tokens * tell + 2 * values * config.dim


def audio_flops(config: AudioConfig, samples: int) -> int:
    """Operations of wav2vec2 for so many samples."""
    total, inputs, length = 0, 1, samples
    for outputs, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        length = max(0, (length - kernel) // stride + 1)
        total += 2 * kernel * inputs * outputs * length
        inputs = outputs
    total += 2 * length * inputs * config.dim
    places = length + 1 - config.positions % 2  # an even kernel makes one more, which is cut off
    total += 2 * places * config.positions * (config.dim // config.groups) * config.dim
    layer = 2 * length * (4 * config.dim**2 + 2 * config.dim * config.ffn_dim) + 4 * length * length * config.dim
    return total + config.layers * layer


def text_flops(config: TextConfig, length: int) -> int:
    """Operations of the text encoder for one prompt of `length` tokens."""
    inner = config.heads * config.head_dim
    linear = 2 * length * (4 * config.dim * inner + 3 * config.dim * config.ffn_dim)
    return config.layers * (linear + 4 * length * length * inner)


def clip_flops(config: ClipConfig) -> int:
    """Operations of the visual tower for one picture (the last block is not run)."""
    length = (config.image // config.patch) ** 2 + 1
    linear = 2 * length * (4 * config.dim**2 + 2 * config.dim * config.ffn_dim)
    stem = 2 * (length - 1) * 3 * config.patch**2 * config.dim
    return (config.layers - 1) * (linear + 4 * length * length * config.dim) + stem


def flops(plan: Sized, variant: Variant) -> dict[str, int]:
    """Stage -> operations: text, audio and image (inputs to conditioning, 0 without), denoise, decode.

    Clips follow one another; the encoding of one as the past of the next counts as image.
    """
    prompts = 2 if _guided(plan) else 1
    passes = sum((span.stop - span.start) * (1 if span.guidance == 1 else 2) for span in plan.spans)
    denoise = decode = 0
    for clip in plan.segments:
        past = _remembers(clip, variant.dit)
        denoise += passes * dit_flops(variant.dit, clip.latent, past=past)
        denoise += prompts * once_flops(variant.dit, clip.latent, past=past)
        decode += decode_flops(variant.vae, _decoded_frames(clip, variant), plan.size)
    return {
        "text": prompts * text_flops(variant.text, variant.dit.text_len),
        "audio": 0 if variant.audio is None else audio_flops(variant.audio, _samples(plan)),
        "image": _image_flops(plan, variant),
        "denoise": denoise,
        "decode": decode,
    }


def _guided(plan: Sized) -> bool:
    return any(span.guidance != 1 for span in plan.spans)


def _sides(plan: Sized, at_once: bool) -> int:
    """For how many passes parts of adapters keep what is theirs: one, two that are guided; made at once, the one with
    the prompt a second time, where some steps are made by it alone (the late modes of `sampling.guidance`).
    """
    alone = at_once and plan.guidance_mode.startswith("late")
    return (3 if alone else 2) if _guided(plan) else 1


def _samples(plan: Sized) -> int:
    """Of the sound that is as long as the video."""
    return AUDIO_RATE * plan.frames // plan.fps


def _remembers(clip: Clip, config: DiTConfig) -> bool:
    """Whether a clip of s2v is given the frames before it: they are decoded with it and not shown again."""
    return config.speech is not None and clip.skip >= config.speech.history


def _made_frames(clip: Clip, variant: Variant) -> int:
    """Pixel frames that a clip's latents stand for by themselves; animate's first is the character's picture."""
    latents = clip.latent[1] - (0 if variant.dit.animate is None else 1)
    return variant.vae.stride[0] * (latents - 1) + 1


def _decoded_frames(clip: Clip, variant: Variant) -> int:
    """Pixel frames that a clip's decoding makes: s2v puts its past before it, or else the picture."""
    speech, made = variant.dit.speech, _made_frames(clip, variant)
    if speech is None:
        return made
    return made + (speech.history + 3 if _remembers(clip, variant.dit) else 4)


def _image_flops(plan: Sized, variant: Variant) -> int:
    videos = _encoded(plan, variant)
    if not videos:
        return 0
    pictures = 2 if variant.dit.image_positions else 1
    clip = pictures * clip_flops(variant.clip) if variant.clip is not None else 0
    return clip + sum(encode_flops(variant.vae, frames, plan.size) for frames in videos)


def _encoded(plan: Sized, variant: Variant) -> list[int]:
    """Pixel frames of each video that goes through the VAE's encoder.

    All frames for i2v (the picture, then grey), one for ti2v's picture.  For s2v the picture, the past of each clip
    that has one, and each clip of a pose video with a frame before it; for animate the picture, and each clip's pose
    and surroundings.
    """
    if variant.conditioner == "image":
        return [plan.frames]
    if variant.conditioner == "clean_frame":
        return [1] if plan.inputs else []
    if variant.dit.speech is not None:
        posed = any(item.role == "pose_video" for item in plan.inputs)
        pasts = [variant.dit.speech.history for clip in plan.segments if _remembers(clip, variant.dit)]
        return [1, *pasts, *(_made_frames(clip, variant) + 4 for clip in plan.segments if posed)]
    if variant.dit.animate is not None:
        return [1, *(_made_frames(clip, variant) for clip in plan.segments for _ in range(2))]
    return []


# --- memory --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageNeed:
    """One stage: bytes of the weights it uses, bytes of what it computes with, operations."""

    name: str
    weights: int
    activations: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True)
class Need:
    """Bytes a run takes at its peak.  gpu is 0 for a run on the CPU; stages follow one another, parts come and go."""

    disk: int
    host: int
    gpu: int
    stages: tuple[StageNeed, ...]

    @property
    def flops(self) -> int:
        return sum(stage.flops for stage in self.stages)


@dataclass(frozen=True)
class Have:
    """Free bytes of a machine; gpu None: there is none."""

    disk: int
    host: int
    gpu: int | None = None


@dataclass(frozen=True)
class Shortage:
    """A resource that does not suffice: "disk", "host" or "gpu", with both numbers in bytes."""

    what: str
    need: int
    have: int


def need(
    plan: Sized, variant: Variant, dtype: str, *, on_gpu: bool = False, t5_cpu: bool = False,
    quantise: str | None = None, resident_blocks: int | None = None, vae_dtype: str = "float32",
    held: Mapping[str, int] | None = None, row_chunks: int | None = None, vae_rows: int | None = None,
    at_once: bool = False,
) -> Need:  # fmt: skip
    """Bytes and operations of a run whose parts are loaded for their stage and released after it.

    On a GPU the host holds the finished frames and, one at a time, tensors on their way; and the text stage when the
    encoder stays on the CPU (t5_cpu).  Of a video in clips it holds those of a clip and of the past of the next.
    quantise and resident_blocks: see `part_bytes`; what is quantised and streamed waits in the host's memory.
    vae_dtype: in which the VAE decodes.  held: part -> bytes, of parts of which this process holds a share
    (`shares.held_bytes`).  row_chunks: tokens that a block works on at a time; vae_rows: rows of pixels in a stripe of
    the VAE, whose memory of the past then waits in the host's.  at_once: both passes of guidance are one.
    """
    sizes = part_bytes(variant, dtype, quantise=quantise, resident_blocks=resident_blocks)
    stages = _stages(
        plan,
        variant,
        dtype,
        {**sizes, **(held or {})},
        vae_dtype,
        row_chunks=row_chunks,
        vae_rows=vae_rows,
        aside=on_gpu,
        at_once=at_once,
    )
    shown = plan.frames if len(plan.segments) == 1 else 2 * max(part.frames for part in plan.segments)
    frames = 4 * 3 * shown * plan.size[0] * plan.size[1]
    if not on_gpu:
        return Need(disk_bytes(plan), HOST_BASE + frames + max(stage.bytes for stage in stages), 0, stages)
    text, rest = stages[0], stages[1:]
    passing = (4 + DTYPE_BYTES[dtype]) * max(
        variant.text.vocab * variant.text.dim, variant.dit.dim * variant.dit.ffn_dim
    )
    waiting = 0
    if resident_blocks is not None:
        waiting = (SLOTS if quantise is None else variant.dit.layers) * block_bytes(variant.dit, dtype, quantise)
    past = 0 if vae_rows is None else remembered(variant.vae, plan.size, decode=True)
    host = HOST_BASE + CUDA_HOST + frames + max(passing, waiting, past, text.bytes if t5_cpu else 0)
    gpu = GPU_BASE + max(stage.bytes for stage in (rest if t5_cpu else stages))
    return Need(disk_bytes(plan), host, gpu, stages)


def _stages(
    plan: Sized, variant: Variant, dtype: str, part: Mapping[str, int], vae_dtype: str, *, row_chunks: int | None,
    vae_rows: int | None, aside: bool, at_once: bool,
) -> tuple[StageNeed, ...]:  # fmt: skip
    """text, audio and image (when there are such), denoise, decode: in the order they run, parts coming and going."""
    work = flops(plan, variant)
    reading = text_activations(variant.text, variant.dit.text_len, dtype)
    stages = [StageNeed("text", part["text"], reading, work["text"])]
    if variant.audio is not None:
        hearing = audio_activations(variant.audio, _samples(plan))
        stages.append(StageNeed("audio", part["audio"], hearing, work["audio"]))
    if work["image"]:
        weights = max(part["vae"], part.get("clip", 0))  # one after the other
        seeing = vae_activations(variant.vae, plan.size, decode=False, rows=vae_rows, aside=aside)
        stages.append(StageNeed("image", weights, seeing, work["image"]))
    sides = _sides(plan, at_once)
    denoising = max(
        dit_activations(
            variant.dit, clip.latent, dtype, past=_remembers(clip, variant.dit), sides=sides, rows=row_chunks,
            at_once=at_once,
        )
        for clip in plan.segments
    )  # fmt: skip
    stages.append(StageNeed("denoise", part["dit"], denoising, work["denoise"]))
    decoding = vae_activations(
        variant.vae, plan.size, decode=True, width=DTYPE_BYTES[vae_dtype], rows=vae_rows, aside=aside
    )
    stages.append(StageNeed("decode", part["vae"] * DTYPE_BYTES[vae_dtype] // 4, decoding, work["decode"]))
    return tuple(stages)


def check_blocks(count: int | None, *, changed: str | None, on_gpu: bool) -> int | None:
    """The number of resident blocks itself.  Error: E2040 when it is none, or when nothing could come and go.

    changed: "quantise" or "a LoRA", which change blocks after they were read.
    """
    if count is None:
        return None
    if type(count) is not int or count < 0:
        raise InputError("E2040", f"resident-blocks: got {count}, expected a whole number, 0 or more.")
    if changed is not None and not on_gpu:
        text = f"resident-blocks: conflicts with {changed} on a CPU, where changed blocks wait in the same memory"
        raise InputError("E2040", f"{text}. Leave one of them out.")
    return count


def check_rows(name: str, count: int | None) -> int | None:
    """The number of rows itself.  Error: E2055 when it is none."""
    if count is not None and (type(count) is not int or count < 1):
        raise InputError("E2055", f"{name}: got {count}, expected a whole number, 1 or more. Leave it out for all.")
    return count


def fits(needed: Need, have: Have) -> tuple[Shortage, ...]:
    """What does not suffice; empty: the run fits."""
    pairs = [("disk", needed.disk, have.disk), ("host", needed.host, have.host)]
    if needed.gpu:
        pairs.append(("gpu", needed.gpu, have.gpu or 0))
    return tuple(Shortage(what, want, got) for what, want, got in pairs if want > got)


def dit_activations(
    config: DiTConfig, latent: Sequence[int], dtype: str, *, past: bool = False, sides: int = 1,
    rows: int | None = None, at_once: bool = False,
) -> int:  # fmt: skip
    """Bytes at the widest point of a block of the plain code, for one sample (the two passes follow each other).

    Per token and channel: two float32 streams (before the trunk, and in it), then either attention (its input, q, k, v,
    one of them rotated, the output, and the rotation's float32) or the feed-forward (its input, the hidden layer, the
    output).  s2v, whose tokens have two timesteps, also gathers a float32 row of modulation for each.  Beside them the
    rotation table and six latents of the solver in float32, and what the parts of s2v and animate keep for all steps of
    a clip (`_kept`), `sides` times.  With `rows` tokens at a time the streams, k and v are those of all tokens, the
    rest is that of the rows.  With both passes `at_once` there are two of all that a block holds, and of what it reads.
    """
    length, each = tokens(latent, config.patch), DTYPE_BYTES[dtype]
    length += beside_tokens(config, latent, past=past)
    streams = 8 if config.speech is None else 12
    at_work = max(6 * each + 4, each * (2 + config.ffn_dim / config.dim))
    if rows is None or rows >= length:
        block = int(length * config.dim * (streams + at_work))
    else:
        block = int(config.dim * (length * (streams + 2 * each) + rows * at_work))
    table = length * config.head_dim // 2 * 8
    values = latent[0] * latent[1] * latent[2] * latent[3]
    kept = _kept(config, latent, length, each)
    if at_once:
        block = 2 * (block + 4 * config.in_channels * prod(latent[1:]))
    return block + table + 6 * 4 * values + sides * kept


def _kept(config: DiTConfig, latent: Sequence[int], length: int, each: int) -> int:
    """Bytes that adapters keep from step to step.

    s2v: a float32 row for every token (pose and kind of the clip's own; the others themselves).  animate: the pose's
    row of every moving token, and the face of every frame as a picture.
    """
    if config.speech is not None:
        return 4 * length * config.dim
    if config.animate is not None:
        moving, side = latent[1] - 1, config.animate.face_size
        pose = tokens((latent[0], moving, *latent[2:]), config.patch) * config.dim * each
        return pose + 4 * 3 * (4 * moving - 3) * side * side
    return 0


def audio_activations(config: AudioConfig, samples: int) -> int:
    """Bytes of wav2vec2 in float32: three times the output of the first convolution, and all hidden states."""
    first = (samples - config.conv_kernel[0]) // config.conv_stride[0] + 1
    states = samples // prod(config.conv_stride) * config.dim * (config.layers + 1)
    return 4 * (3 * config.conv_dim[0] * first + states)


def text_activations(config: TextConfig, length: int, dtype: str) -> int:
    """Bytes at the widest point of a layer of the text encoder, for one prompt: positions, hidden layer, stream."""
    bytes_each = DTYPE_BYTES[dtype]
    scores = 3 * 4 * config.heads * length * length
    return scores + length * bytes_each * (3 * config.ffn_dim + 4 * config.dim)


def disk_bytes(plan: Sized) -> int:
    """Bytes a run may write: two generations of a clip's state (latent and solver history), final latents of all clips,
    the video.

    The video is taken at one bit a pixel and frame, which H.264 at the default quality stays below but for noise.
    """
    latents = [4 * prod(clip.latent) for clip in plan.segments]
    return 2 * 5 * max(latents) + sum(latents) + plan.size[0] * plan.size[1] * plan.frames // 8 + 2**20
