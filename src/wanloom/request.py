"""What a person asks for: one frozen `Request`, the same for the command line, Python and HTTP.

Each field says in its metadata how it is written as text: option names (the official spellings are aliases), the
function that reads it, a line of help.  Fields of the group "video" describe the video and go into the Plan; those of
the group "model" say where the weights are, those of the group "run" how and where to compute.  None means: the
model's default.  Nothing here is torch, and nothing here knows a model: `plan.make_plan` decides the numbers.
"""

# ruff: noqa: RUF009 - `_option` returns dataclasses.field(...), which is evaluated once per field, as field() is
from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from wanloom.errors import InputError, did_you_mean
from wanloom.sampling.schedule import SAMPLER_NAMES

MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
MAX_PROMPT = 8192  # characters; the encoder reads at most 512 tokens anyway
MAX_SIDE = 65535  # a larger number is a slip of the pen, not a size
MAX_GUIDANCE = 1000.0
MAX_NUM = 10_000
SUFFIXES = (".mp4", ".mkv", ".webm", ".gif", ".png")
DTYPES = ("float32", "bfloat16")
# Lossy ways to be faster; `runtime.caching.presets` and `sampling.guidance` have what they are.
CACHE_NAMES = ("magcache", "magcache-fast", "teacache", "easycache", "easycache-fast", "taylor", "first-block")
GUIDANCE_MODES = ("plain", "late", "late-once", "late-off", "zero-star")
GUIDANCE_BATCHES = ("off", "auto", "on")  # whether its two passes are made at once; auto: where there is room
# Fields that name a picture, a sound or a video the result is made from.
ROLES = ("image", "last_image", "audio", "pose_video", "face_video", "background_video", "mask_video")

Size = tuple[int, int]
Picture = Any  # a path, or a picture in memory (PIL image); `media.read_image` and the pipeline know which

_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
_SIZE = re.compile(r"([0-9]{1,12})[xX*×]([0-9]{1,12})")
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")


# --- text -> value: every reader raises InputError with the code of its field ------------------------------------


def parse_text(text: str) -> str:
    return text


def parse_path(text: str) -> Path:
    return Path(text)


def parse_switch(text: str) -> bool:
    """yes, true, t, y, 1 / no, false, f, n, 0: the words of the official command."""
    word = text.strip().lower()
    if word in ("yes", "true", "t", "y", "1", "on"):
        return True
    if word in ("no", "false", "f", "n", "0", "off"):
        return False
    raise InputError("E2022", f"got '{text}', expected true or false.")


def parse_size(text: str) -> Size:
    """(width, height) from `1280x720` or the official `1280*720`.  Error: E2003."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise InputError("E2003", f"size: got '{text}', expected WIDTHxHEIGHT, e.g. 832x480.")
    return int(match[1]), int(match[2])


def parse_frames(text: str) -> int:
    return _integer(text, "frames", "E2005", "a whole number, 4n+1")


def parse_steps(text: str) -> int:
    return _integer(text, "steps", "E2007", f"a whole number, 1..{MAX_STEPS}")


def parse_shift(text: str) -> float:
    return _number(text, "shift", "E2009", "a number above 0")


def parse_scale(text: str) -> float:
    """One guidance scale.  Error: E2008."""
    return _number(text, "guidance", "E2008", "a number such as 5.0")


def parse_guidance(text: str) -> float | tuple[float, float]:
    """One scale for all steps, or `low,high` for the two experts (the official order).  Error: E2008."""
    parts = text.split(",")
    if len(parts) > 2:
        raise InputError("E2008", f"guidance: got '{text}', expected one number, or two: low,high.")
    scales = [parse_scale(part) for part in parts]
    return scales[0] if len(scales) == 1 else (scales[0], scales[1])


def parse_sampler(text: str) -> str:
    return check_sampler(text)


def parse_cache(text: str) -> str:
    return check_cache(text)


def parse_cache_threshold(text: str) -> float:
    return _number(text, "cache-threshold", "E2046", "0 or more")


def parse_guidance_mode(text: str) -> str:
    return check_guidance_mode(text)


def parse_guidance_batch(text: str) -> str:
    return check_guidance_batch(text)


def parse_seed(text: str) -> int:
    return _integer(text, "seed", "E2010", "0..2^63-1, or -1 for a random one")


def parse_sigmas(text: str) -> tuple[float, ...]:
    """Noise levels, falling: `1,0.9,0.6` (a last 0 is added).  Error: E2031."""
    return tuple(_number(part, "sigmas", "E2031", "numbers in (0, 1], falling") for part in text.split(","))


def parse_boundary_step(text: str) -> int:
    return _integer(text, "boundary-step", "E2052", "a whole number of steps")


def parse_fps(text: str) -> int:
    return _integer(text, "fps", "E2032", "a whole number, 1..120")


def parse_num(text: str) -> int:
    return _integer(text, "num", "E2029", f"a whole number, 1..{MAX_NUM}")


def parse_save_every(text: str) -> int:
    return _integer(text, "save-every", "E2030", "a whole number of steps, 1 or more")


def parse_num_clips(text: str) -> int:
    return _integer(text, "num-clips", "E2024", "a whole number, 1 or more")


def parse_infer_frames(text: str) -> int:
    return _integer(text, "infer-frames", "E2005", "a multiple of 4")


def parse_audio_window(text: str) -> int:
    return _integer(text, "audio-window", "E2035", "seconds, or 0 for all at once")


def parse_refert_num(text: str) -> int:
    return _integer(text, "refert-num", "E2035", "1 or 5")


def parse_resident_blocks(text: str) -> int:
    return _integer(text, "resident-blocks", "E2040", "a whole number, 0 or more")


def parse_row_chunks(text: str) -> int:
    return _integer(text, "row-chunks", "E2055", "a whole number, 1 or more")


def parse_vae_rows(text: str) -> int:
    return _integer(text, "vae-rows", "E2055", "a whole number, 1 or more")


def parse_out(text: str) -> Path:
    return check_out(Path(text))


def parse_device(text: str) -> str:
    return check_device(text, "device")


def parse_noise_device(text: str) -> str:
    return check_device(text, "noise-device")


def parse_dtype(text: str) -> str:
    return check_dtype(text)


def parse_vae_dtype(text: str) -> str:
    return check_dtype(text, "vae-dtype")


# --- checks of values, shared by text and Python -----------------------------------------------------------------


def check_sampler(value: str) -> str:
    if value not in SAMPLER_NAMES:
        raise InputError("E2011", f"sampler: '{value}' is not known. {did_you_mean(str(value), SAMPLER_NAMES)}")
    return value


def check_cache(value: str) -> str:
    if value not in CACHE_NAMES:
        raise InputError("E2046", f"cache: '{value}' is not known. {did_you_mean(str(value), CACHE_NAMES)}")
    return value


def check_guidance_mode(value: str) -> str:
    if value not in GUIDANCE_MODES:
        known = did_you_mean(str(value), GUIDANCE_MODES)
        raise InputError("E2048", f"guidance-mode: '{value}' is not known. {known}")
    return value


def check_guidance_batch(value: str) -> str:
    if value not in GUIDANCE_BATCHES:
        known = did_you_mean(str(value), GUIDANCE_BATCHES)
        raise InputError("E2056", f"guidance-batch: '{value}' is not known. {known}")
    return value


def check_device(value: str, name: str) -> str:
    if value == "mps" or value.startswith("mps:"):
        raise InputError("E2027", f"{name}: Apple GPUs (mps) are not available in this version. Use cpu.")
    if not _DEVICE.fullmatch(value):
        raise InputError("E2027", f"{name}: got '{value}', expected cpu, cuda or cuda:N.")
    return value


def check_dtype(value: str, name: str = "dtype") -> str:
    if value not in DTYPES:
        raise InputError("E2028", f"{name}: '{value}' is not known. {did_you_mean(value, DTYPES)}")
    return value


def check_out(path: Path) -> Path:
    """The suffix of the output chooses the format.  Error: E2017."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError("E2017", f"out: got '{path.name}', expected a file name ending in {', '.join(SUFFIXES)}.")
    return path


def check_prompt(text: str, name: str = "prompt") -> str:
    """A prompt that can be encoded and stored.  Errors: E2014 for surrogates and NUL, E2013 when too long."""
    if not isinstance(text, str):
        raise InputError("E2014", f"{name}: got {type(text).__name__}, expected text.")
    if len(text) > MAX_PROMPT:
        raise InputError("E2013", f"{name}: {len(text)} characters, the limit is {MAX_PROMPT}. Shorten it.")
    if "\0" in text or any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        raise InputError("E2014", f"{name}: holds bytes that are not text (invalid UTF-8, or a NUL character).")
    return text


def _integer(text: str, name: str, code: str, expected: str) -> int:
    if not _INTEGER.fullmatch(text.strip()):
        raise InputError(code, f"{name}: got '{text}', expected {expected}.")
    return int(text)


def _number(text: str, name: str, code: str, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(code, f"{name}: got '{text}', expected {expected}.")
    return value


# --- the request ---------------------------------------------------------------------------------------------------


def _option(
    group: str,
    parse: Callable[[str], Any],
    help: str,
    *aliases: str,
    metavar: str = "TEXT",
    default: Any = None,
    switch: bool = False,
) -> Any:
    """A field with what the command line needs; `aliases` are further names, without the leading dashes."""
    metadata = {
        "group": group,
        "parse": parse,
        "help": help,
        "aliases": aliases,
        "metavar": metavar,
        "switch": switch,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A video somebody wants.  Only `prompt` is needed; None leaves the decision to the model's defaults."""

    task: str | None = _option("video", parse_text, "what to make, e.g. t2v-A14B, i2v-A14B, ti2v-5B", metavar="NAME")
    prompt: str = _option("video", parse_text, "what the video shows", default="")
    negative_prompt: str | None = _option("video", parse_text, "what it should not show (default: the model's own)")
    size: Size | str | None = _option(
        "video", parse_size, "width and height in pixels; with a picture its area counts", metavar="WxH"
    )
    frames: int | None = _option("video", parse_frames, "number of frames, 4n+1", "frame-num", metavar="N")
    steps: int | None = _option("video", parse_steps, "denoising steps, 1..1000", "sample-steps", metavar="N")
    shift: float | None = _option(
        "video", parse_shift, "how long to stay at high noise, e.g. 5", "sample-shift", metavar="X"
    )
    guidance: float | tuple[float, float] | None = _option(
        "video",
        parse_guidance,
        "weight of the prompt: one number, or low,high for the two experts",
        "sample-guide-scale",
        metavar="X[,X]",
    )
    guidance_high: float | None = _option("video", parse_scale, "guidance of the high-noise expert", metavar="X")
    guidance_low: float | None = _option("video", parse_scale, "guidance of the low-noise expert", metavar="X")
    sampler: str | None = _option("video", parse_sampler, "unipc, dpm++ or euler", "sample-solver", metavar="NAME")
    sigmas: tuple[float, ...] | None = _option(
        "video", parse_sigmas, "explicit noise levels instead of steps and shift, e.g. 1,0.9,0.6", metavar="X,X,.."
    )
    boundary_step: int | None = _option(
        "video",
        parse_boundary_step,
        "how many steps the high-noise expert makes (default: by the model's noise level)",
        metavar="N",
    )
    cache: str | None = _option(
        "video", parse_cache, f"skip steps that change little (lossy): {', '.join(CACHE_NAMES)}", metavar="NAME"
    )
    cache_threshold: float | None = _option(
        "video", parse_cache_threshold, "how boldly (default: the cache's own; 0 skips nothing)", metavar="X"
    )
    guidance_mode: str | None = _option(
        "video", parse_guidance_mode, f"how guidance is made: {', '.join(GUIDANCE_MODES)}", metavar="NAME"
    )
    seed: int | None = _option("video", parse_seed, "0..2^63-1; -1 or absent: random", "base-seed", metavar="N")
    fps: int | None = _option("video", parse_fps, "frames per second of the file (default: the model's)", metavar="N")
    image: Picture | None = _option("video", parse_path, "the picture to start from", "first-frame", metavar="FILE")
    last_image: Picture | None = _option("video", parse_path, "the picture to end on", "last-frame", metavar="FILE")
    audio: Path | None = _option("video", parse_path, "the sound that a picture speaks (s2v)", metavar="FILE")
    num_clips: int | None = _option(
        "video",
        parse_num_clips,
        "how many clips at most (s2v; default: to the end of the sound)",
        "num-clip",
        metavar="N",
    )
    infer_frames: int | None = _option(
        "video", parse_infer_frames, "frames of a clip, a multiple of 4 (s2v)", metavar="N"
    )
    start_from_ref: bool = _option(
        "video", parse_switch, "the picture itself is the past of the first clip (s2v)", default=False, switch=True
    )
    audio_window: int | None = _option(
        "video", parse_audio_window, "seconds of a sound above a minute encoded at a time; 0: all (s2v)", metavar="N"
    )
    reference_timing: bool = _option(
        "video", parse_switch, "do not trim the sound by the frames dropped first (s2v)", default=False, switch=True
    )
    resize: str | None = _option(
        "video", parse_text, "how the picture is fitted: cover, or reference, which may leave black (s2v)"
    )
    last_audio_state: str | None = _option(
        "video", parse_text, "last state of the audio encoder: normed, or raw as transformers 5 gives it (s2v)"
    )
    tts_text: str | None = _option("video", parse_text, "what is to be said; a program or a server speaks it (s2v)")
    src_root_path: Path | None = _option(
        "video", parse_path, "folder of `wanloom preprocess animate`: picture and videos at once", metavar="DIR"
    )
    pose_video: Path | None = _option("video", parse_path, "drawn pose to follow (s2v, animate)", metavar="FILE")
    face_video: Path | None = _option("video", parse_path, "the driver's face (animate)", metavar="FILE")
    background_video: Path | None = _option(
        "video", parse_path, "what the character is put into (animate)", metavar="FILE"
    )
    mask_video: Path | None = _option("video", parse_path, "where the character is put (animate)", metavar="FILE")
    refert_num: int | None = _option(
        "video", parse_refert_num, "frames a clip shares with the one before: 1 or 5 (animate)", metavar="N"
    )
    replace_flag: bool = _option(
        "video", parse_switch, "put the character into the background video (animate)", default=False, switch=True
    )
    use_relighting_lora: bool = _option(
        "video", parse_switch, "fit the character to the light of the scene (animate)", default=False, switch=True
    )
    noise_device: str | None = _option(
        "video", parse_noise_device, "where noise is drawn: cpu (default: a seed means the same everywhere) or cuda"
    )  # fmt: skip

    ckpt_dir: Path | None = _option("model", parse_path, "directory of a published checkpoint", metavar="DIR")
    dit: Path | None = _option("model", parse_path, "transformer file of a one-expert model", metavar="FILE")
    dit_high: Path | None = _option("model", parse_path, "transformer file of the high-noise expert", metavar="FILE")
    dit_low: Path | None = _option("model", parse_path, "transformer file of the low-noise expert", metavar="FILE")
    vae: Path | None = _option("model", parse_path, "VAE file", metavar="FILE")
    text_encoder: Path | None = _option("model", parse_path, "UMT5 encoder file", metavar="FILE")
    tokenizer: Path | None = _option("model", parse_path, "tokenizer directory or tokenizer.json", metavar="PATH")
    clip: Path | None = _option("model", parse_path, "CLIP image encoder file (Wan2.1 image tasks)", metavar="FILE")

    audio_encoder: Path | None = _option("model", parse_path, "wav2vec2 directory or file (s2v)", metavar="PATH")
    relighting_lora: Path | None = _option(
        "model", parse_path, "relighting LoRA file, when it is not in the checkpoint (animate)", metavar="FILE"
    )

    tts_command: str | None = _option(
        "run", parse_text, "program that speaks: its arguments, with {text} and {out}", metavar="CMD"
    )
    tts_url: str | None = _option("run", parse_text, "OpenAI-compatible server that speaks", metavar="URL")
    tts_voice: str | None = _option("run", parse_text, "voice of that server", metavar="NAME")
    tts_model: str | None = _option("run", parse_text, "model of that server", metavar="NAME")
    out: Path | None = _option(
        "run", parse_out, f"output file ({' '.join(SUFFIXES)})", "save-file", metavar="FILE"
    )  # fmt: skip
    overwrite: bool = _option("run", parse_switch, "replace an existing output file", default=False, switch=True)
    num: int = _option("run", parse_num, "how many videos, with seeds s, s+1, ...", default=1, metavar="N")
    device: str | None = _option("run", parse_device, "cpu, cuda or cuda:N", metavar="NAME")
    dtype: str | None = _option("run", parse_dtype, "float32 or bfloat16", metavar="NAME")
    vae_dtype: str | None = _option(
        "run", parse_vae_dtype, "number format of the VAE's decoder: float32, or bfloat16 (near)", metavar="NAME"
    )
    attention: str | None = _option(
        "run", parse_text, "attention kernel; `wanloom doctor` names those that are here", metavar="NAME"
    )
    compile: bool = _option(
        "run", parse_switch, "compile the transformer's blocks first: faster steps", default=False, switch=True
    )
    fused: bool = _option(
        "run", parse_switch, "norms, gates and rotation as fused kernels (NVIDIA GPU with Triton)", default=False,
        switch=True,
    )  # fmt: skip
    quantise: str | None = _option(
        "run", parse_text, "weights in 8 bits: int8, fp8, int8-compute or fp8-compute", "quantize", metavar="NAME"
    )
    guidance_batch: str | None = _option(
        "run", parse_guidance_batch,
        "make both passes of guidance at once, in twice the memory: on, off, or auto: where there is room",
        metavar="NAME",
    )  # fmt: skip
    resident_blocks: int | None = _option(
        "run", parse_resident_blocks,
        "keep N blocks of the transformer in memory and read the others when they are needed (0: least memory)",
        metavar="N",
    )  # fmt: skip
    offload_model: bool | None = _option(
        "run", parse_switch, "true: parts leave after their use; false: all stay (default: what is fastest and fits)",
        metavar="BOOL",
    )  # fmt: skip
    row_chunks: int | None = _option(
        "run", parse_row_chunks, "let a block of the transformer work on N tokens at a time: less memory", metavar="N"
    )
    vae_rows: int | None = _option(
        "run", parse_vae_rows, "let the VAE work in stripes of N rows of pixels: less memory", metavar="N"
    )
    t5_cpu: bool = _option("run", parse_switch, "run the text encoder on the CPU", default=False, switch=True)
    convert_model_dtype: bool = _option(
        "run", parse_switch, "transformer weights in bfloat16", default=False, switch=True
    )
    save_every: int | None = _option(
        "run", parse_save_every, "save the state every N steps (default: every minute at most)", metavar="N"
    )
    save_tensors: Path | None = _option(
        "run", parse_path, "also write latents and video as float32 safetensors", metavar="FILE"
    )
    preview: bool = _option("run", parse_switch, "show the video while it forms", default=False, switch=True)


@dataclass(frozen=True)
class Option:
    """A field of Request as an option of the command line; `flags[0]` is its one documented name."""

    name: str
    flags: tuple[str, ...]
    parse: Callable[[str], Any]
    help: str
    metavar: str
    group: str
    switch: bool
    default: Any


def _flags(entry: Field[Any]) -> tuple[str, ...]:
    names = [entry.name.replace("_", "-"), *entry.metadata["aliases"]]
    spelled = [spelling for name in names for spelling in (name, name.replace("-", "_"))]
    return tuple(dict.fromkeys(f"--{spelling}" for spelling in spelled))


OPTIONS: tuple[Option, ...] = tuple(
    Option(
        name=entry.name,
        flags=_flags(entry),
        parse=entry.metadata["parse"],
        help=entry.metadata["help"],
        metavar=entry.metadata["metavar"],
        group=entry.metadata["group"],
        switch=entry.metadata["switch"],
        default=entry.default,
    )
    for entry in fields(Request)
)


@dataclass(frozen=True)
class Unavailable:
    """An official option that is not to be had here; a value that asks for what happens anyway is accepted."""

    flags: tuple[str, ...]
    code: str
    harmless: tuple[str, ...] | None  # values (lower case) that change nothing; None: every value
    switch: bool = False  # also valid without a value, which then means true
    cure: str = "Leave it out."

    @property
    def where(self) -> str:
        return "in this command" if self.cure == SEVERAL else "in this version"


SPEAK = "Any program can speak: use --tts-text with --tts-command."
SEVERAL = "Several processes are for `wanloom generate`."
_OFF = ("false", "f", "no", "n", "0")

UNAVAILABLE: tuple[Unavailable, ...] = (
    Unavailable(("--ulysses_size", "--ulysses-size"), "E2018", ("1",), cure=SEVERAL),
    Unavailable(("--ring_size", "--ring-size"), "E2018", ("1",), cure=SEVERAL),
    Unavailable(("--t5_fsdp", "--t5-fsdp"), "E2019", _OFF, switch=True, cure=SEVERAL),
    Unavailable(("--dit_fsdp", "--dit-fsdp"), "E2019", _OFF, switch=True, cure=SEVERAL),
    Unavailable(("--use_prompt_extend", "--use-prompt-extend"), "E2026", _OFF, switch=True),
    Unavailable(("--prompt_extend_method", "--prompt-extend-method"), "E2026", None),
    Unavailable(("--prompt_extend_model", "--prompt-extend-model"), "E2026", None),
    Unavailable(("--prompt_extend_target_lang", "--prompt-extend-target-lang"), "E2026", None),
    Unavailable(("--enable_tts", "--enable-tts"), "E2026", _OFF, switch=True, cure=SPEAK),
    Unavailable(("--tts_prompt_audio", "--tts-prompt-audio"), "E2026", (), cure=SPEAK),
    Unavailable(("--tts_prompt_text", "--tts-prompt-text"), "E2026", (), cure=SPEAK),
)


def check_unavailable(option: Unavailable, value: str) -> None:
    """Nothing, or the refusal (exit 2) when `value` asks for something this version does not do."""
    if option.harmless is not None and value.strip().lower() not in option.harmless:
        raise InputError(option.code, f"{option.flags[0]} {value}: not available {option.where}. {option.cure}")


def request_from_text(values: Mapping[str, str | bool]) -> Request:
    """A Request from texts, field name -> what was typed (switches may be bool).  Errors: those of the fields."""
    known = {option.name: option for option in OPTIONS}
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise InputError("E2022", f"'{name}' is not known. {did_you_mean(name, known)}")
        parsed[name] = value if isinstance(value, bool) and known[name].switch else known[name].parse(str(value))
    return Request(**parsed)
