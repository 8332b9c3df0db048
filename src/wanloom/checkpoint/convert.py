"""One project's checkpoint into another's: a whole directory or one file, streamed, durable, with a SHA-256 manifest.

    convert("Wan2.2-T2V-A14B", "out", to="diffusers", dtype="bf16")
    convert("transformer.pth", "out", to="official")        # pickles are read as data, never executed

Memory stays below a few tensors, whatever the size of the model.  Values do not change unless `dtype` asks for it
(quantised weights become bfloat16), so official -> diffusers -> official gives the same bits.  What shapes do not tell
(heads, text length, which expert, which revision) is written into the files' own metadata and survives every layout.

`save_official` writes what a trainer holds in memory in the same form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanloom.checkpoint import layouts, manifest
from wanloom.checkpoint.detect import candidates, config_from, config_of
from wanloom.checkpoint.find import PathLike, contents
from wanloom.checkpoint.header import Entry
from wanloom.checkpoint.load import TORCH_DTYPES, natural_dtype, read_entry, read_source
from wanloom.checkpoint.names import OPERATIONS, Format, by_official_name, format_of, get_format
from wanloom.checkpoint.weights import CONFIG, EXPERT, KINDS, REVISION, Source, Weights, open_weights
from wanloom.checkpoint.write import NAMES, SHARD, Item, dtype_named, write_model
from wanloom.durable import write_atomic
from wanloom.errors import InputError, did_you_mean
from wanloom.models.config import AudioConfig, ClipConfig, DiTConfig, TextConfig, VaeConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Config = DiTConfig | VaeConfig | TextConfig | ClipConfig | AudioConfig
# Files of a tokenizer's directory that belong to it; nothing else is copied out of a model directory.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
SPIECE = "spiece_model"  # the sentencepiece file inside ComfyUI's text encoder
# Before the names of these models stand these words, as in all published files.
PREFIXES = {("clip", "transformers"): "vision_model.", ("audio", "official"): "wav2vec2."}
SAMPLE = 4096  # bytes of every tensor that the revision mark looks at


@dataclass(frozen=True)
class Written:
    """What a conversion made: the directory and every file in it, the manifest last."""

    path: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Origin:
    """An official tensor before it is written: shape, stored dtype, first bytes, and how to get the values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sample: bytes
    read: Callable[[], Tensor]


def convert(
    src: PathLike,
    dst: PathLike,
    to: str = "official",
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    shard: int = SHARD,
) -> Written:
    """Write the checkpoint `src` (a model directory, or one model's file or directory) into the directory `dst` in the
    layout `to` (official, diffusers, comfy), in the number format `dtype` (bf16, fp16, fp32; None: as stored).

    Errors: E2022 an unknown layout, E5002 `dst` is not empty, and all that reading a checkpoint can say (E4...).
    """
    src, dst = Path(src), Path(dst)
    if to not in layouts.LAYOUTS:
        raise InputError("E2022", f"--to: '{to}' is not known. {did_you_mean(to, layouts.LAYOUTS)}")
    wanted = dtype_named(dtype) if dtype is not None else None
    if not src.exists():
        raise InputError("E4001", f"{src}: there is no such file or directory.")
    if dst.exists() and not dst.is_dir():
        raise InputError("E5001", f"{dst}: is a file, expected a directory to write into.")
    if dst.is_dir() and any(dst.iterdir()) and not overwrite:
        raise InputError("E5002", f"{dst}: is not empty. Choose another directory or give --overwrite.")
    job = _Job(dst, to, wanted, shard)
    found = contents(src) if src.is_dir() else None
    if found is not None and not found.single:
        job.directory(src)
    else:
        job.part(open_weights(src, pickles=True), name=src.stem)
    return job.finish()


def save_official(
    folder: PathLike,
    *,
    dits: Mapping[str, tuple[Mapping[str, Tensor], DiTConfig]],
    vae: Mapping[str, Tensor] | None = None,
    vae_config: VaeConfig | None = None,
    text: Mapping[str, Tensor] | None = None,
    text_config: TextConfig | None = None,
    clip: tuple[Mapping[str, Tensor], ClipConfig] | None = None,
    audio: tuple[Mapping[str, Tensor], AudioConfig] | None = None,
    tokenizer_dir: Path | None = None,
    dtype: torch.dtype | None = None,
) -> Written:
    """Write state dicts as a directory in the published layout, which `resolve`, `survey` and `load_into` read back.

    dits: expert name ("model" for the only one) -> state dict and config; clip and audio likewise.  Text and CLIP may
    have transformers' names.  `vae_config` and `text_config` are told from the tensors when absent.  Existing files are
    replaced one by one.
    Errors: E4010 values that are not finite, E4013 and others when tensors and config do not fit.
    """
    job = _Job(Path(folder), "official", dtype, SHARD)
    for expert, (state, config) in dits.items():
        job.state(state, config, expert=expert)
    for part, config_or_none in ((vae, vae_config), (text, text_config), clip or (None, None), audio or (None, None)):
        if part is not None:
            job.state(part, config_or_none)
    if tokenizer_dir is not None:
        job.tokenizer(tokenizer_dir)
    return job.finish()


class _Job:
    """One conversion: where it goes, in which layout, and what has been written so far."""

    def __init__(self, dst: Path, to: str, dtype: torch.dtype | None, shard: int) -> None:
        self.dst, self.to, self.dtype, self.shard = dst, to, dtype, shard
        self.files: list[Path] = []

    def directory(self, src: Path) -> None:
        """All parts of a model directory."""
        found = contents(src)
        known: list[str] = []
        for expert, path in found.experts.items():
            weights = open_weights(path, kind="dit", pickles=True)
            config = config_of(weights)
            assert isinstance(config, DiTConfig)
            known = candidates(config, experts=len(found.experts))
            self.part(weights, expert=expert, name=known[0] if known else "wan")
        for place in (found.vae, found.text, found.clip, found.audio):
            if place is not None:
                self.part(open_weights(place, pickles=True), tokenizer=found.tokenizer)
        if found.tokenizer is not None:
            self.tokenizer(found.tokenizer)
        if self.to == "diffusers" and found.experts:
            self._diffusers_root(known, len(found.experts), clip=found.clip is not None)

    def _diffusers_root(self, known: list[str], experts: int, *, clip: bool) -> None:
        if clip:
            self._json("image_processor/preprocessor_config.json", layouts.IMAGE_PROCESSOR)
        self._json("scheduler/scheduler_config.json", layouts.scheduler_config(known))
        self._json("model_index.json", layouts.model_index(known, experts, clip=clip))

    def part(
        self, weights: Weights, *, expert: str = "model", name: str = "wan", tokenizer: Path | None = None
    ) -> None:
        """One model of any kind.  Error: E4016 for a model that has no place in this layout."""
        config = config_of(weights)
        if self.to == "diffusers" and not _in_diffusers(config):
            names = candidates(config) if isinstance(config, DiTConfig) else []
            what = " or ".join(names) or f"a {KINDS[weights.kind]}"
            raise InputError(
                "E4016",
                f"{weights.where}: this is {what}, which diffusers' layout has no place for. Use --to official.",
            )
        manifest.verify(header.path for header in weights.headers)
        origins = {official: _origin(source) for official, source in weights.tensors.items()}
        extra = _spiece(tokenizer) if self.to == "comfy" and weights.kind == "text" else []
        recorded = weights.metadata.get(EXPERT)
        self._write(weights.kind, origins, config, expert=expert, recorded=recorded, name=name, extra=extra)

    def state(self, state: Mapping[str, Tensor], config: Config | None, *, expert: str = "model") -> None:
        """One model that is in memory, in official or transformers' names."""
        named = format_of(state)
        if named is None:
            raise InputError("E4016", f"{self.dst}: these tensors are no Wan model's.")
        origins = {}
        for official, (names, operation) in by_official_name(named[0], state, named[1]).items():
            values = [state[name] for name in names]
            whole = OPERATIONS[operation].into(values) if operation != "same" else values[0]
            sample = whole.detach().reshape(-1)[:SAMPLE].float().cpu().numpy().tobytes()
            origins[official] = Origin(tuple(whole.shape), whole.dtype, sample, partial(_itself, whole))
        shapes = {name: origin.shape for name, origin in origins.items()}
        known = config_from(named[0].kind, self.dst, shapes, config)
        self._write(named[0].kind, origins, known, expert=expert)

    def _write(
        self,
        kind: str,
        origins: Mapping[str, Origin],
        config: Config,
        *,
        expert: str = "model",
        recorded: str | None = None,
        name: str = "wan",
        extra: list[Item] | None = None,
    ) -> None:
        folder, stem = layouts.place(self.to, kind, config, expert=expert, name=name)
        target = _target(self.to, kind, config)
        prefix = PREFIXES.get((target.kind, target.name), "")
        items = [item for official, origin in origins.items() for item in self._items(official, origin, target, prefix)]
        metadata = {CONFIG: json.dumps(layouts.hidden_facts(config)), REVISION: _revision(origins)}
        if kind == "dit" and (recorded or expert) != "model":
            metadata[EXPERT] = recorded or expert
        # ComfyUI's loaders know no shards, and in the published directories only transformers have them.
        sharded = self.to == "diffusers" or (self.to == "official" and kind == "dit")
        shard = self.shard if sharded else 1 << 62
        self.files += write_model(self.dst / folder, stem, [*items, *(extra or ())], metadata, shard=shard)
        document = layouts.config_json(self.to, config)
        if document is not None:
            self._json(f"{folder}/config.json" if folder else "config.json", document)

    def _items(self, official: str, origin: Origin, target: Format, prefix: str) -> list[Item]:
        """What an official tensor becomes in the target's names."""
        found = target.foreign(official)
        assert found is not None, f"{official} has no name in {target.name}"
        names, operation = found
        dtype = self.dtype or natural_dtype(origin.dtype)

        def make(part: int) -> Tensor:
            return OPERATIONS[operation].out(origin.read())[part].to(dtype)

        shapes = OPERATIONS[operation].out_shapes(origin.shape)
        return [
            Item(_prefixed(name, prefix), NAMES[str(dtype).removeprefix("torch.")], shape, partial(make, part))
            for part, (name, shape) in enumerate(zip(names, shapes, strict=True))
        ]

    def _json(self, name: str, document: Mapping[str, Any]) -> None:
        path = self.dst / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(document, indent=2) + "\n").encode())
        self.files.append(path)

    def tokenizer(self, src: Path) -> None:
        """Copy a tokenizer's files."""
        home = self.dst / layouts.TOKENIZER_PLACE[self.to]
        home.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            file = (src if src.is_dir() else src.parent) / name
            if file.is_file():
                write_atomic(home / name, file.read_bytes())
                self.files.append(home / name)

    def finish(self) -> Written:
        path = manifest.write(self.dst, self.files)
        return Written(self.dst, (*self.files, path))


def _target(layout: str, kind: str, config: Config) -> Format:
    """The names a layout uses for a kind of model."""
    name = layouts.FORMAT_NAMES[layout][kind]
    if isinstance(config, VaeConfig):
        return get_format(kind, name, blocks=config.blocks, residual=config.residual)
    return get_format(kind, name)


def _in_diffusers(config: Config) -> bool:
    """Whether diffusers' layout has a place for a model: not for the parts of s2v and animate."""
    if isinstance(config, DiTConfig):
        return config.speech is None and config.animate is None
    return not isinstance(config, AudioConfig)


def _prefixed(name: str, prefix: str) -> str:
    """transformers keeps CLIP's projection outside of the tower."""
    return name if name.startswith("visual_projection") else prefix + name


def _origin(source: Source) -> Origin:
    import torch

    scaled = any(scale is not None for scale in source.scales) or source.dtype not in TORCH_DTYPES
    dtype = torch.bfloat16 if scaled else getattr(torch, TORCH_DTYPES[source.dtype])
    sample = b"".join(_first_bytes(entry) for entry in source.entries)
    return Origin(source.shape, dtype, sample, partial(read_source, source))


def _first_bytes(entry: Entry) -> bytes:
    if entry.stride is not None:  # a transposed view in a pickle: its bytes are in another order than its values
        return bytes(read_entry(entry).reshape(-1)[:SAMPLE].float().numpy().tobytes())
    try:
        with entry.file.open("rb") as file:
            file.seek(entry.offset)
            return file.read(min(SAMPLE, entry.size))
    except OSError as error:
        raise InputError("E4001", f"{entry.file}: cannot be read ({error.strerror}).") from error


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _revision(origins: Mapping[str, Origin]) -> str:
    """A mark that the shards of one model share and those of another conversion or training do not."""
    digest = hashlib.sha256()
    for name, origin in sorted(origins.items()):
        digest.update(f"{name} {origin.shape} {origin.dtype}\n".encode())
        digest.update(origin.sample)
    return digest.hexdigest()[:32]


def _spiece(tokenizer: Path | None) -> list[Item]:
    """The sentencepiece file as the uint8 tensor that ComfyUI's loader looks for, where the tokenizer has one."""
    import torch

    file = (tokenizer if tokenizer.is_dir() else tokenizer.parent) / "spiece.model" if tokenizer is not None else None
    if file is None or not file.is_file():
        return []
    raw = file.read_bytes()
    return [Item(SPIECE, "U8", (len(raw),), lambda: torch.frombuffer(bytearray(raw), dtype=torch.uint8))]
