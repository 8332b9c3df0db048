"""What a path is: a whole model, one of its parts, another project's file; as data, for `wanloom inspect` and scripts.

Headers are read and nothing else, so a 60 GB directory takes milliseconds.  `manifest(name)` is the other side: every
tensor that our own module of a released model has, under the official names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanloom.checkpoint.detect import PARTS, candidates, config_of
from wanloom.checkpoint.find import EXPERTS, PathLike, contents
from wanloom.checkpoint.names import OPERATIONS, by_official_name, format_of
from wanloom.checkpoint.shapes import clip_shapes
from wanloom.checkpoint.weights import EXPERT, KINDS, Weights, open_weights
from wanloom.errors import InputError, did_you_mean
from wanloom.models.config import VAE_21, VAE_22, ClipConfig, DiTConfig, TextConfig, VaeConfig
from wanloom.variants import VARIANTS

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A released model that a file can belong to, and as which of its experts."""

    variant: str
    expert: str | None = None  # None: the model has one transformer

    def __str__(self) -> str:
        return self.variant if self.expert is None else f"{self.variant} ({self.expert})"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model: where, what, in whose names, in which number formats, how large."""

    part: str  # transformer, VAE, text encoder, CLIP image encoder, wav2vec2 audio encoder
    about: str  # the same with the sizes that tell the releases apart
    path: str
    format: str  # whose tensor names: official, diffusers, transformers
    container: str  # safetensors, gguf or pickle
    files: int
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]  # number format -> values stored in it
    scaled: bool  # weights with scales beside them (fp8_scaled)
    config: dict[str, Any]
    candidates: tuple[Candidate, ...] = ()
    expert: str | None = None  # as recorded in the file, else as its place in a directory says


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is at a path.  `candidates` are the released models the whole can be."""

    path: str
    layout: str  # official, diffusers, comfy, or "file"
    parts: tuple[Part, ...]
    candidates: tuple[Candidate, ...]
    tokenizer: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people: one line for the whole, one for each part."""
        alone = self.parts[0].part if len(self.parts) == 1 else "?"
        named = " or ".join(map(str, self.candidates)) or alone
        out = [f"{self.path}: {named}" + (f", in the {self.layout} layout" if self.layout != "file" else "")]
        for part in self.parts:
            dtype = "+".join(part.dtypes) + (" with scales" if part.scaled else "")
            name = f"{part.about}, {part.expert}" if part.expert else part.about
            files = f"{part.files} {part.container} file" + ("s" if part.files > 1 else "")
            size = f"{part.parameters:,} parameters, {dtype}, {part.bytes:,} bytes in {files}"
            out.append(f"  {name}: {size}, {part.format} names")
        if self.tokenizer is not None:
            out.append(f"  tokenizer: {self.tokenizer}")
        return out


def inspect(path: PathLike) -> Report:
    """Say what a file or a directory is.  Errors (exit 4): E4001 nothing there, and those of damaged files."""
    path = Path(path)
    if not path.exists():
        raise InputError("E4001", f"{path}: there is no such file or directory.")
    found = contents(path) if path.is_dir() else None
    if found is None or found.single:
        part = describe(open_weights(path, pickles=True))
        return Report(path=str(path), layout="file", parts=(part,), candidates=part.candidates)
    parts = [
        describe(open_weights(place, kind="dit", pickles=True), experts=len(found.experts), expert=name)
        for name, place in found.experts.items()
    ]
    whole = tuple(dict.fromkeys(Candidate(variant=c.variant) for part in parts for c in part.candidates))
    others = (found.vae, found.text, found.clip, found.audio)
    parts += [describe(open_weights(place, pickles=True)) for place in others if place is not None]
    return Report(
        path=str(path),
        layout=_layout(path),
        parts=tuple(parts),
        candidates=whole,
        tokenizer=None if found.tokenizer is None else str(found.tokenizer),
    )


def describe(weights: Weights, *, experts: int | None = None, expert: str | None = None) -> Part:
    """One model's table as a Part; `experts` and `expert` are what its place in a directory says."""
    config = config_of(weights)
    said: str | None = None
    found: tuple[Candidate, ...] = ()
    if isinstance(config, DiTConfig):
        said = weights.metadata.get(EXPERT) or (expert if expert in EXPERTS else None)
        found = tuple(
            Candidate(variant=name, expert=which)
            for name in candidates(config, experts=experts)
            for which in _experts_of(name, said)
        )
    return Part(
        part=KINDS[weights.kind],
        about=ABOUT[weights.kind](config),
        path=str(weights.path),
        format=weights.format.name,
        container=CONTAINERS.get(weights.headers[0].path.suffix.lower(), "pickle"),
        files=len(weights.headers),
        tensors=len(weights.tensors),
        parameters=sum(prod(source.shape) for source in weights.tensors.values()),
        bytes=weights.size,
        dtypes=weights.dtypes,
        scaled=weights.scaled,
        config=asdict(config),
        candidates=found,
        expert=said,
    )


def _about_dit(config: DiTConfig) -> str:
    parts = [name for field, name in PARTS.items() if getattr(config, field) is not None]
    sizes = f"{config.layers} layers, width {config.dim}, {config.in_channels} input channels"
    return ", ".join((f"transformer of {sizes}", *parts))


CONTAINERS = {".safetensors": "safetensors", ".gguf": "gguf"}
ABOUT: dict[str, Callable[[Any], str]] = {
    "dit": _about_dit,
    "vae": lambda config: f"Wan{'2.2' if config.residual else '2.1'} VAE, {config.z} latent channels",
    "text": lambda config: f"UMT5 encoder of {config.layers} layers, width {config.dim}, {config.vocab} tokens",
    "clip": lambda config: f"CLIP image encoder of {config.layers} layers, width {config.dim}",
    "audio": lambda config: f"wav2vec2 audio encoder of {config.layers} layers, width {config.dim}",
}


def _experts_of(name: str, said: str | None) -> tuple[str | None, ...]:
    """The experts of a released model that a file can be: both, when nothing says which."""
    row = VARIANTS[name]
    if len(row.experts) == 1:
        return (None,)
    return (said,) if said in row.expert_names else row.expert_names


def _layout(root: Path) -> str:
    if (root / "split_files").is_dir() or (root / "diffusion_models").is_dir():
        return "comfy"
    return "diffusers" if (root / "model_index.json").is_file() or (root / "transformer").is_dir() else "official"


# ---------------------------------------------------------------- manifests

# File stems of the published manifests -> (kind, released model).
MANIFESTS: dict[str, tuple[str, DiTConfig | VaeConfig | TextConfig | ClipConfig]] = {
    "wan2.2-t2v-a14b-dit": ("dit", VARIANTS["t2v-A14B"].dit),
    "wan2.2-i2v-a14b-dit": ("dit", VARIANTS["i2v-A14B"].dit),
    "wan2.2-ti2v-5b-dit": ("dit", VARIANTS["ti2v-5B"].dit),
    "wan2.1-t2v-1.3b-dit": ("dit", VARIANTS["t2v-1.3B"].dit),
    "wan2.1-t2v-14b-dit": ("dit", VARIANTS["t2v-14B"].dit),
    "wan2.1-i2v-14b-dit": ("dit", VARIANTS["i2v-14B"].dit),
    "wan2.1-flf2v-14b-dit": ("dit", VARIANTS["flf2v-14B"].dit),
    "wan2.2-s2v-14b-dit": ("dit", VARIANTS["s2v-14B"].dit),
    "wan2.2-animate-14b-dit": ("dit", VARIANTS["animate-14B"].dit),
    "wan2.1-vae": ("vae", VAE_21),
    "wan2.2-vae": ("vae", VAE_22),
    "umt5-xxl-encoder": ("text", TextConfig()),
    "clip-xlm-roberta-vit-h14": ("clip", ClipConfig()),
}


def manifest(name: str) -> dict[str, dict[str, list[int]]]:
    """{"tensors": {official name: shape}} of our module, built on the meta device.  Errors: E2022 an unknown name.

    Of CLIP this is the visual tower; `visual.head`, which no module of ours computes, is in it as every file has it.
    """
    if name not in MANIFESTS:
        raise InputError("E2022", f"--manifest: '{name}' is not known. {did_you_mean(name, MANIFESTS)}")
    kind, config = MANIFESTS[name]
    shapes = {key: tuple(value.shape) for key, value in _module(config).state_dict().items()}
    found = format_of(shapes)
    assert found is not None and found[0].kind == kind
    tensors: dict[str, list[int]] = {}
    for official, (names, operation) in by_official_name(found[0], shapes).items():
        shape = OPERATIONS[operation].into_shape([shapes[key] for key in names])
        assert shape is not None
        tensors[official] = list(shape)
    if isinstance(config, ClipConfig):
        tensors["visual.head"] = list(clip_shapes(config)["visual.head"])
    return {"tensors": tensors}


def _module(config: DiTConfig | VaeConfig | TextConfig | ClipConfig) -> nn.Module:
    """Our module of these sizes, without memory."""
    import torch

    from wanloom.encoders import build_clip, build_umt5
    from wanloom.models.adapters import build_dit
    from wanloom.models.vae import CausalVae

    with torch.device("meta"):
        if isinstance(config, DiTConfig):
            return build_dit(config)
        if isinstance(config, VaeConfig):
            return CausalVae(config)
        module: nn.Module = build_umt5(config) if isinstance(config, TextConfig) else build_clip(config)
        return module
