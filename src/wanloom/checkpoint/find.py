"""Where the parts of a model lie: the published directories, diffusers', ComfyUI's, or one path for each part.

    files = resolve(variant, ckpt_dir="Wan2.2-T2V-A14B")
    files = resolve(variant, dit_high=..., dit_low=..., vae=..., text_encoder=..., tokenizer=...)

A single path wins over the directory, so one part can be replaced.  A `.safetensors` is taken before a `.pth` of the
same stem, everywhere.  Nothing is read here but names (and, where a ComfyUI folder holds several models, headers).

Errors (InputError): E4001 a part that is nowhere, with its name, size and repository; E4019 one of two experts; E4016 a
checkpoint with another number of experts; E2022 an option that this model has no use for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wanloom.checkpoint.detect import candidates, check_dit, check_vae, config_of, expert_hint
from wanloom.checkpoint.documents import read_json
from wanloom.checkpoint.header import PICKLES
from wanloom.checkpoint.weights import INDEX, STEMS, few, open_weights, plain_name, prefer_safetensors
from wanloom.errors import InputError
from wanloom.models.config import DiTConfig, VaeConfig
from wanloom.variants import Variant

PathLike = str | os.PathLike[str]

# Stems in a published directory; the first is the name a missing file is called by.
OFFICIAL = {
    "vae": ("Wan2.1_VAE", "Wan2.2_VAE"),
    "text": ("models_t5_umt5-xxl-enc-bf16",),
    "clip": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14",),
}
AUDIO = "wav2vec2-large-xlsr-53-english"  # the directory of s2v's audio encoder
DIFFUSERS = {"vae": "vae", "text": "text_encoder", "clip": "image_encoder"}
DIFFUSERS_EXPERTS = ("transformer", "transformer_2")  # high noise first, as in our rows
COMFY = {"dit": "diffusion_models", "vae": "vae", "text": "text_encoders", "clip": "clip_vision",
         "audio": "audio_encoders"}  # fmt: skip
TOKENIZERS = ("google/umt5-xxl", "tokenizer", "split_files/tokenizer", "text_encoder", ".")

EXPERTS = ("high_noise_model", "low_noise_model")  # as the releases with two experts name them
OPTIONS = {
    "vae": "--vae", "text": "--text-encoder", "clip": "--clip", "audio": "--audio-encoder", "tokenizer": "--tokenizer",
}  # fmt: skip
WORDS = {
    "vae": "the VAE", "text": "the text encoder", "clip": "the CLIP image encoder", "audio": "the audio encoder",
    "tokenizer": "the tokenizer",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Files:
    """The path of every part: a file, or a directory with one model in it."""

    experts: dict[str, Path]  # in the order of the variant: high noise first
    vae: Path
    text: Path
    tokenizer: Path  # a directory with tokenizer.json, or the file
    clip: Path | None = None
    audio: Path | None = None
    root: Path | None = None  # the directory they were found in, when one was given


def resolve(
    variant: Variant,
    *,
    ckpt_dir: PathLike | None = None,
    dit_high: PathLike | None = None,
    dit_low: PathLike | None = None,
    dit: PathLike | None = None,
    vae: PathLike | None = None,
    text_encoder: PathLike | None = None,
    tokenizer: PathLike | None = None,
    clip: PathLike | None = None,
    audio_encoder: PathLike | None = None,
) -> Files:
    """Find every part of `variant`.  Errors: see the module."""
    root = _directory(ckpt_dir) if ckpt_dir is not None else None
    experts = _experts(variant, root, _given(dit_high), _given(dit_low), _given(dit))
    text = _part("text", variant, root, text_encoder)
    return Files(
        experts=experts,
        vae=_part("vae", variant, root, vae),
        text=text,
        tokenizer=_tokenizer(variant, root, text, tokenizer),
        clip=_extra("clip", variant, root, clip, experts),
        audio=_extra("audio", variant, root, audio_encoder, experts),
        root=root,
    )


def _directory(path: PathLike) -> Path:
    root = Path(path)
    if not root.exists():
        raise InputError("E4001", f"{root}: there is no such directory.")
    if not root.is_dir():
        raise InputError(
            "E4001", f"{root}: is a file; --ckpt-dir takes a directory, single files go to --dit and so on."
        )
    return root


def _given(path: PathLike | None) -> Path | None:
    """A path a person named: it must be there, as itself or as the safetensors beside it."""
    if path is None:
        return None
    found = prefer_safetensors(Path(path))
    if not found.exists():
        raise InputError("E4001", f"{path}: there is no such file.")
    return found


# ---------------------------------------------------------------- experts


def _experts(
    variant: Variant, root: Path | None, high: Path | None, low: Path | None, single: Path | None
) -> dict[str, Path]:
    names = variant.expert_names
    given = dict(zip(names, (high, low) if len(names) == 2 else (single,), strict=True))
    if len(names) == 2 and single is not None:
        raise InputError("E2022", f"dit: {variant.name} has two experts. Give --dit-high and --dit-low.")
    if len(names) == 1 and (high or low) is not None:
        raise InputError("E2022", f"dit: {variant.name} has one transformer. Give it as --dit.")
    found = {
        name: path or (_expert_in(root, variant, i) if root else None) for i, (name, path) in enumerate(given.items())
    }
    there = {name: path for name, path in found.items() if path is not None}
    if len(there) == len(names):
        return there
    if root is not None:
        _explain_other(variant, root)
    missing = next(name for name in names if name not in there)
    option = "--dit" if len(names) == 1 else "--dit-high" if missing == names[0] else "--dit-low"
    code = "E4019" if there else "E4001"
    what = f"the expert {missing}" if len(names) == 2 else "the transformer"
    raise InputError(code, f"{what} is missing{_in(root)}. {_where(variant, 'dit', missing)}Or name it with {option}.")


def _expert_in(root: Path, variant: Variant, index: int) -> Path | None:
    """The place of an expert in a directory of any layout, or None."""
    names = variant.expert_names
    if len(names) == 1 and has_transformer(root):
        return root
    if len(names) == 1 and _has_two(root):
        return None  # a directory with two experts: the caller says what that is
    places = [root / names[index]] if len(names) == 2 else []
    for place in (*places, root / DIFFUSERS_EXPERTS[index]):
        if place.is_dir():
            return place
    return _in_comfy(root, "dit", variant, names[index] if len(names) == 2 else None)


def _has_two(root: Path) -> bool:
    """Whether a diffusers directory is that of a model with two experts, even where the second one is not there."""
    if (root / DIFFUSERS_EXPERTS[1]).is_dir():
        return True
    index = root / "model_index.json"
    about = read_json(index) if index.is_file() else None
    second = about.get(DIFFUSERS_EXPERTS[1]) if isinstance(about, dict) else None
    return isinstance(second, list) and any(second)


def has_transformer(folder: Path) -> bool:
    """Whether a directory itself holds a transformer under the published name."""
    suffixes = (".safetensors", *PICKLES, INDEX)
    return any(file.name.endswith(suffixes) for file in folder.glob(STEMS[0] + "*"))


def _explain_other(variant: Variant, root: Path) -> None:
    """The directory has transformers, but not those of this variant: say what it is, where that is another model."""
    experts = contents(root).experts
    if not experts:
        return
    path = next(iter(experts.values()))
    weights = open_weights(path, kind="dit")
    config = config_of(weights)
    assert isinstance(config, DiTConfig)
    check_dit(weights.where, config, variant)
    count = 1 if "model" in experts else 2
    names = " or ".join(candidates(config, experts=count)) or "another model"
    if not set(experts) & set(variant.expert_names):
        words = {1: "one transformer", 2: "two experts"}
        mine, theirs = words[count], words[len(variant.experts)]
        raise InputError("E4016", f"{root}: this is {names} ({mine}), expected {variant.name} ({theirs}).")


# ---------------------------------------------------------------- the other parts


def _part(part: str, variant: Variant, root: Path | None, given: PathLike | None) -> Path:
    found = _given(given)
    if found is None and root is not None:
        found = _part_in(root, part, variant)
    if found is None:
        raise InputError(
            "E4001", f"{WORDS[part]} is missing{_in(root)}. {_where(variant, part)}Or name it with {OPTIONS[part]}."
        )
    return found


def _extra(
    part: str, variant: Variant, root: Path | None, given: PathLike | None, experts: Mapping[str, Path]
) -> Path | None:
    """A part that not every model has, or None.  Errors: E2022 when one is named for a model without.

    Where it is missing because the directory is another model's, that is said instead (E4016).
    """
    if getattr(variant, part) is not None:
        whole = root is not None and all(path.is_relative_to(root) for path in experts.values())
        if given is None and root is not None and whole and _part_in(root, part, variant) is None:
            _explain_other(variant, root)
        return _part(part, variant, root, given)
    if given is not None:
        option = OPTIONS[part]
        raise InputError("E2022", f"{option[2:]}: {variant.name} has no use for {WORDS[part]}. Leave {option} out.")
    return None


def _part_in(root: Path, part: str, variant: Variant | None) -> Path | None:
    """A part in a directory of any layout: published, diffusers, ComfyUI."""
    if part == "audio":
        names = (file.name for file in (root / AUDIO).glob("*"))
        return root / AUDIO if any(plain_name(name) for name in names) else _in_comfy(root, part, variant)
    stems = OFFICIAL[part]
    if part == "vae" and variant is not None and variant.vae.residual:
        stems = stems[::-1]
    for stem in stems:
        for suffix in (".safetensors", ".pth"):
            if (root / (stem + suffix)).is_file():
                return root / (stem + suffix)
    folder = root / DIFFUSERS[part]
    if any(plain_name(file.name) for file in folder.glob("*.safetensors*")):
        return folder
    return _in_comfy(root, part, variant)


def _in_comfy(root: Path, part: str, variant: Variant | None, expert: str | None = None) -> Path | None:
    """The one file of a ComfyUI folder that this variant (or any) can use; other models may lie beside it."""
    for folder in (root / "split_files" / COMFY[part], root / COMFY[part]):
        files = sorted((*folder.glob("*.safetensors"), *folder.glob("*.gguf")))
        if expert is not None:
            files = [file for file in files if expert_hint(Path(file.name), EXPERTS) == expert]
        fitting = [file for file in files if _fits(file, part, variant)]
        if len(fitting) > 1:
            option = OPTIONS.get(part) or (f"--dit-{expert.partition('_')[0]}" if expert else "--dit")
            raise InputError(
                "E4001", f"{folder}: {few(file.name for file in fitting)} would all do. Choose one with {option}."
            )
        if fitting:
            return fitting[0]
        if len(files) == 1:
            return files[0]  # the survey says what it is instead
    return None


def _fits(file: Path, part: str, variant: Variant | None) -> bool:
    try:
        config = config_of(open_weights(file, kind=part))
        if isinstance(config, DiTConfig) and variant is not None:
            check_dit(file, config, variant)
        if isinstance(config, VaeConfig) and variant is not None:
            check_vae(file, config, variant)
    except InputError:
        return False
    return True


def _tokenizer(variant: Variant, root: Path | None, text: Path, given: PathLike | None) -> Path:
    """The tokenizer: named, or in the directory, or near the text encoder."""
    if given is not None:
        path = Path(given)
        if path.is_file() or (path / "tokenizer.json").is_file():
            return path
        raise InputError("E4001", f"{path}: no tokenizer.json there.")
    near = text if text.is_dir() else text.parent
    for home in [root] if root is not None else [near, near.parent]:
        found = _tokenizer_in(home)
        if found is not None:
            return found
    raise InputError(
        "E4001", f"the tokenizer (tokenizer.json) is missing{_in(root)}. {_where(variant, 'tokenizer')}"
        "Or name it with --tokenizer.",
    )  # fmt: skip


def _tokenizer_in(home: Path) -> Path | None:
    return next((home / name for name in TOKENIZERS if (home / name / "tokenizer.json").is_file()), None)


# ---------------------------------------------------------------- whatever is there


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The parts in a directory of any layout, whatever model it is."""

    experts: dict[str, Path]  # "model", or the two names of `EXPERTS`; empty without a transformer
    vae: Path | None
    text: Path | None
    clip: Path | None
    audio: Path | None
    tokenizer: Path | None

    @property
    def single(self) -> bool:
        """Whether there is no more than one transformer: an expert's own directory, say."""
        return not (self.vae or self.text or self.clip or self.audio) and list(self.experts) in ([], ["model"])


def contents(root: Path) -> Contents:
    """What is in a model directory, without knowing which model it should be.  Errors: E4001 several of one part."""
    places = [(root / name, root / other) for name, other in zip(EXPERTS, DIFFUSERS_EXPERTS, strict=True)]
    found = [next((place for place in pair if place.is_dir()), None) for pair in places]
    if found == [None, None]:
        found = [_in_comfy(root, "dit", None, name) for name in EXPERTS]
    experts = {name: place for name, place in zip(EXPERTS, found, strict=True) if place is not None}
    single = root if has_transformer(root) else None
    if single is None and list(experts.values()) == [root / DIFFUSERS_EXPERTS[0]] and not _has_two(root):
        single = root / DIFFUSERS_EXPERTS[0]  # diffusers' directory of a model with one transformer
    if single is None and not experts:
        single = _in_comfy(root, "dit", None)
    return Contents(
        experts={"model": single} if single is not None else experts,
        vae=_part_in(root, "vae", None),
        text=_part_in(root, "text", None),
        clip=_part_in(root, "clip", None),
        audio=_part_in(root, "audio", None),
        tokenizer=_tokenizer_in(root),
    )


# ---------------------------------------------------------------- words


def _in(root: Path | None) -> str:
    return f" in {root}" if root is not None else ""


def _where(variant: Variant, part: str, expert: str | None = None) -> str:
    """Which published file it is: name, size, repository."""
    for file in variant.files:
        if file.part == part and file.expert in (None, expert):
            return f"It is {file.name} ({_size(file.bytes)}) of {' or '.join(variant.repos)}. "
    return ""


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
