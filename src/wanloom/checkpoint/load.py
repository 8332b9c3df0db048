"""Checkpoints into modules: first the survey, which reads headers only, then the loading, which streams tensors.

    variant = survey(variant, files)              # < 2 s, no torch: everything that can be wrong is said now
    with torch.device("meta"):
        dit = DiT(variant.dit)
    load_into(dit, files.experts["high_noise_model"], dtype=torch.bfloat16)

A file is never half loaded: every tensor of the file must have its place in the module and every place its tensor.
Tensors are read a few at a time with plain file reads (a memory map of a file that someone truncates would end the
process), turned into `dtype`, checked to be finite, and become the module's parameters without another copy.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from wanloom import pulse
from wanloom.checkpoint import manifest
from wanloom.checkpoint.detect import (
    check_audio,
    check_clip,
    check_dit,
    check_text,
    check_vae,
    config_of,
    expert_hint,
    same_size,
    warn,
)
from wanloom.checkpoint.find import Files
from wanloom.checkpoint.header import Entry, unchanged
from wanloom.checkpoint.names import OPERATIONS, OPTIONAL, format_of
from wanloom.checkpoint.weights import EXPERT, Source, Weights, few, open_weights
from wanloom.errors import InputError
from wanloom.models.config import AudioConfig, ClipConfig, DiTConfig, TextConfig, VaeConfig
from wanloom.variants import Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")

LARGEST_TOKENIZER = 64 * 2**20  # bytes; the published one has 17 MB
READERS = 3  # threads that read tensors ahead; the largest tensor has 0.3 GB (2.1 GB: the text encoder's embedding)
SPARE_ROWS = 512  # an embedding may have this many rows more than there are tokens (UMT5: 84)

TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "I64": "int64", "I32": "int32", "I16": "int16",
    "BOOL": "bool",
}  # fmt: skip


# ---------------------------------------------------------------- survey


def survey(variant: Variant, files: Files) -> Variant:
    """The variant with the sizes that the files have, after everything that headers can show has been checked.

    Errors (exit 4): all of `weights.py` and `detect.py`, and E4018 experts swapped, E4020 a tokenizer of another
    encoder, E4030 a damaged tokenizer.  Warning: W4018 when nothing recorded tells which expert is which.
    """
    dit = survey_experts(variant, files.experts)
    vae_weights, vae = survey_vae(files.vae)
    check_vae(vae_weights.where, vae, variant)
    text_weights, text = survey_text(files.text)
    check_text(text_weights.where, text, dit)
    check_tokenizer(files.tokenizer, files.text, text)
    checked = [vae_weights, text_weights]
    clip = variant.clip
    if files.clip is not None:
        clip_weights, clip = survey_clip(files.clip)
        check_clip(clip_weights.where, clip, dit)
        checked.append(clip_weights)
    audio = variant.audio
    if files.audio is not None:
        audio_weights, audio = survey_audio(files.audio)
        check_audio(audio_weights.where, audio, dit)
        checked.append(audio_weights)
    for weights in checked:
        manifest.check_sizes(header.path for header in weights.headers)
    return replace(variant, dit=dit, vae=vae, text=text, clip=clip, audio=audio)


def survey_dit(path: Path) -> tuple[Weights, DiTConfig]:
    """A transformer's table and sizes."""
    weights = open_weights(path, kind="dit")
    config = config_of(weights)
    assert isinstance(config, DiTConfig)
    return weights, config


def survey_vae(path: Path) -> tuple[Weights, VaeConfig]:
    """A VAE's table and sizes."""
    weights = open_weights(path, kind="vae")
    config = config_of(weights)
    assert isinstance(config, VaeConfig)
    return weights, config


def survey_text(path: Path) -> tuple[Weights, TextConfig]:
    """A UMT5 encoder's table and sizes."""
    weights = open_weights(path, kind="text")
    config = config_of(weights)
    assert isinstance(config, TextConfig)
    return weights, config


def survey_clip(path: Path) -> tuple[Weights, ClipConfig]:
    """A CLIP tower's table and sizes."""
    weights = open_weights(path, kind="clip")
    config = config_of(weights)
    assert isinstance(config, ClipConfig)
    return weights, config


def survey_audio(path: Path) -> tuple[Weights, AudioConfig]:
    """A wav2vec2 encoder's table and sizes."""
    weights = open_weights(path, kind="audio")
    config = config_of(weights)
    assert isinstance(config, AudioConfig)
    return weights, config


def survey_experts(variant: Variant, experts: Mapping[str, Path]) -> DiTConfig:
    """The sizes of the transformer, the same for all experts.  Errors: E4016, E4018; warning W4018."""
    configs: dict[str, DiTConfig] = {}
    recorded: dict[str, str | None] = {}
    for name, path in experts.items():
        weights, configs[name] = survey_dit(path)
        check_dit(weights.where, configs[name], variant)
        manifest.check_sizes(header.path for header in weights.headers)
        recorded[name] = weights.metadata.get(EXPERT)
    first, *others = configs.values()
    for config in others:
        if not same_size(config, first):
            raise InputError("E4016", f"{next(iter(experts.values())).parent}: the two experts have different sizes.")
    if len(experts) == 2:
        _check_order(experts, recorded)
    return first


def _check_order(experts: Mapping[str, Path], recorded: Mapping[str, str | None]) -> None:
    """Two experts have the same tensors; only a record tells them apart.

    What `convert` and the trainer write into the files decides (E4018).  Without it the order is what the names say, or
    what the caller said, and cannot be checked: that is a warning, because a swapped pair makes a plausible bad video.
    """
    for name, said in recorded.items():
        if said in experts and said != name:
            raise InputError(
                "E4018", f"{experts[name]}: this is the expert {said}, used as {name}. Swap --dit-high and --dit-low."
            )
    if all(said == name for name, said in recorded.items()):
        return
    hints = {name: expert_hint(path, experts) for name, path in experts.items()}
    wrong = next((name for name, hint in hints.items() if hint is not None and hint != name), None)
    if wrong is not None:
        warn("W4018", f"{experts[wrong]}: used as {wrong}, but its name says {hints[wrong]}. Are the experts swapped?")
        return
    believed = "their names are believed" if all(hints.values()) else "the order given is believed"
    warn("W4018", f"nothing in the files records which expert is which; {believed}. `wanloom convert` records it.")


def check_tokenizer(path: Path, encoder: Path, config: TextConfig) -> None:
    """The tokenizer must be whole (E4030) and number its tokens as the encoder does (E4020)."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        size = file.stat().st_size
        if size > LARGEST_TOKENIZER:
            raise InputError("E4030", f"{file}: {size} bytes, expected at most {LARGEST_TOKENIZER}.")
        table = json.loads(file.read_bytes())
        vocabulary = table["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        last = max(ids + [token["id"] for token in table.get("added_tokens") or ()])
        rows = int(last) + 1
    except OSError as error:
        raise InputError("E4001", f"{file}: cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError("E4030", f"{file}: damaged, or not a tokenizer.") from error
    if not rows <= config.vocab <= rows + SPARE_ROWS:
        raise InputError(
            "E4020",
            f"{file}: {rows} tokens, but {encoder.name} has {config.vocab}: they do not belong together.",
        )


# ---------------------------------------------------------------- loading


def load_into(
    module: nn.Module,
    weights: Weights | Path,
    *,
    dtype: torch.dtype | Callable[[str], torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    keep: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Fill a module (built on the meta device) with the tensors of a checkpoint, in place.

    The module's tensor names may be official (ours) or transformers'; the file's those of any format.  `dtype` is one
    for all, or a function of the module's tensor name; None keeps what is stored (quantised weights become bfloat16).
    keep: (name, whole tensor) -> the part of it that the module holds (`runtime.sharding.share_of`).
    Errors: E4010 values that are not finite, E4011 SHA-256 mismatch or a file that changed, E4013 / E4007 tensors that
    do not fit the module.  After an error the module is as it was.
    """
    import torch

    if not isinstance(weights, Weights):
        weights = open_weights(Path(weights))
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    plan = match_names(weights, wanted)
    loaded: dict[str, Tensor] = {}
    with verified(weights):
        # In the order they lie on disk, so that the disk reads forwards.
        ordered = sorted(plan, key=lambda official: place_on_disk(weights.tensors[official]))
        for official, whole in read_ahead({official: weights.tensors[official] for official in ordered}):
            names, operation = plan[official]
            for name, value in zip(names, OPERATIONS[operation].out(whole), strict=True):
                target = dtype(name) if callable(dtype) else dtype or natural_dtype(value.dtype)
                value = value.to(device=device, dtype=target).contiguous()
                if value.nbytes != value.untyped_storage().nbytes():
                    value = value.clone()  # a part of a larger tensor would keep all of it alive
                require_finite(weights.tensors[official], value)
                loaded[name] = value if keep is None else keep(name, value)
    with torch.no_grad():
        module.load_state_dict(loaded, strict=True, assign=True)


@contextmanager
def verified(weights: Weights) -> Iterator[None]:
    """While their tensors are read the files are hashed against their manifest, if any; at the end they are unchanged.

    Error: E4011.
    """
    check = manifest.Verification(header.path for header in weights.headers)
    try:
        yield
        for header in weights.headers:
            unchanged(header.path, header.stamp)
        check.finish()
    finally:
        check.stop()


def place_on_disk(source: Source) -> tuple[str, int]:
    """File and offset: tensors in this order are read forwards."""
    return str(source.entries[0].file), source.entries[0].offset


def match_names(weights: Weights, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[str, ...], str]]:
    """Official name -> (the module's names, operation), every tensor on both sides used once."""
    found = format_of(wanted)
    if found is None or found[0].kind != weights.kind:
        raise InputError("E4016", f"{weights.where}: a {weights.kind} checkpoint for a module that is none.")
    target = found[0]
    plan: dict[str, tuple[tuple[str, ...], str]] = {}
    left = dict(wanted)
    for official, source in weights.tensors.items():
        names = target.foreign(official)
        if names is None or any(name not in left for name in names[0]):
            if official in OPTIONAL:
                continue
            raise InputError("E4013", f"{weights.where}: tensor {official} has no place in the model.")
        for name, shape in zip(names[0], OPERATIONS[names[1]].out_shapes(source.shape), strict=True):
            if left.pop(name) != shape:
                raise InputError(
                    "E4007", f"{weights.where}: tensor {official}: shape {list(source.shape)} does not fit the model."
                )
        plan[official] = names
    if left:
        raise InputError("E4013", f"{weights.where}: {len(left)} tensors of the model are missing: {few(left)}.")
    return plan


def read_ahead(sources: Mapping[str, Source]) -> Generator[tuple[str, Tensor]]:
    """Each tensor in its turn, while the next few are being read."""
    return ahead(sources, lambda name: read_source(sources[name]))


def ahead(names: Iterable[str], read: Callable[[str], T]) -> Generator[tuple[str, T]]:
    """Each name with what `read` gives for it, in turn, while the next few are being read: one thread does not keep a
    fast disk busy.
    """
    waiting: deque[tuple[str, Future[T]]] = deque()
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
    try:
        for name in names:
            waiting.append((name, pool.submit(read, name)))
            if len(waiting) > READERS:
                first, job = waiting.popleft()
                yield first, job.result()
        while waiting:
            first, job = waiting.popleft()
            yield first, job.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_source(source: Source) -> Tensor:
    """The values of one official tensor: parts read, dequantised where they have a scale, joined."""
    parts = []
    for entry, scale in zip(source.entries, source.scales, strict=True):
        value = read_entry(entry)
        parts.append(value if scale is None else dequantise(value, read_entry(scale)))
    return OPERATIONS[source.operation].into(parts)


def dequantise(value: Tensor, scale: Tensor) -> Tensor:
    """Stored values times their scale (one, or one a row), in float32."""
    factor = scale.float()
    if factor.dim() == 1 and factor.numel() > 1:
        factor = factor.view(-1, *(1,) * (value.dim() - 1))
    return value.float() * factor.reshape(()) if factor.numel() == 1 else value.float() * factor


def read_entry(entry: Entry) -> Tensor:
    """A stored tensor in its own dtype (of GGUF's blocks: float32), by plain reads.  Errors: E4001, E4006, E4011."""
    import torch

    if entry.dtype not in TORCH_DTYPES:  # GGUF's blocks
        from wanloom.checkpoint.gguf import read_blocks

        return read_blocks(entry)
    dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
    raw = torch.empty(entry.size, dtype=torch.uint8)
    view = memoryview(raw.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers; its stubs do not say so here
    try:
        with entry.file.open("rb", buffering=0) as file:
            read_bytes(file, entry, 0, view)
    except OSError as error:
        raise InputError("E4001", f"{entry.file}: cannot be read ({error.strerror}).") from error
    require_digest(entry, view)
    flat = raw.view(dtype)
    if entry.stride is not None:
        return flat.as_strided(entry.shape, entry.stride).contiguous()
    return flat.view(entry.shape)


def read_bytes(file: FileIO, entry: Entry, at: int, room: memoryview) -> None:
    """Fill `room` with the bytes of a stored tensor from byte `at` on.  Error: E4006; OSError as it comes."""
    done = 0
    file.seek(entry.offset + at)
    while done < len(room):
        count = file.readinto(room[done:])
        if not count:
            raise InputError("E4006", f"{entry.file}: ends inside tensor {entry.name}; it changed while it was read.")
        done += count
    pulse.beat()


def require_digest(entry: Entry, data: memoryview) -> None:
    """E4011 when these bytes of a stored tensor are not what was recorded of it."""
    if entry.sha256 is not None and hashlib.sha256(data).hexdigest() != entry.sha256:
        raise InputError("E4011", f"{entry.file}: tensor {entry.name}: SHA-256 mismatch: the file is damaged.")


def natural_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in when none is asked for: the stored one, bfloat16 for quantised values."""
    import torch

    return dtype if dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16


def require_finite(source: Source, value: Tensor) -> None:
    """E4010 naming the tensor when it holds NaN or infinity (also when a narrower dtype made them)."""
    import torch

    # One pass at the speed of memory: whatever is not finite stays so in a sum. A sum may also overflow by itself.
    if torch.isfinite(value.sum(dtype=torch.promote_types(value.dtype, torch.float32))):
        return
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        entry = source.entries[0]
        raise InputError(
            "E4010",
            f"{entry.file}: tensor {entry.name}: {bad} of {value.numel()} values not finite ({str(value.dtype)[6:]}).",
        )
