"""Small random checkpoints in the published directory layout, for tests that need a model and not a good one.

    folder = tiny.checkpoint(tmp_path, "t2v-A14B")       # about 1 MB, written in some tenths of a second

Names, shapes and files are those of the releases, with our own modules as the authority; values are random with unit
gain, so that every layer matters to the result.  A row of `TINY` is the variant with small sizes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from wanloom.checkpoint.names import get_format
from wanloom.encoders import build_clip, build_umt5, build_wav2vec2
from wanloom.models.adapters import build_dit
from wanloom.models.config import AnimateConfig, AudioConfig, ClipConfig, SpeechConfig, TextConfig
from wanloom.models.vae import CausalVae
from wanloom.variants import VARIANTS, Variant

WORDS = [
    "a", "an", "the", "red", "green", "blue", "yellow", "white", "black", "cat", "dog", "square", "circle",
    "snow", "street", "moves", "runs", "walks", "jumps", "up", "down", "left", "right", "slowly", "quickly",
    "on", "in", "over", "and",
]  # fmt: skip

TEXT = TextConfig(dim=24, ffn_dim=32, heads=2, head_dim=8, layers=2, vocab=3 + len(WORDS))
CLIP = ClipConfig(dim=160, ffn_dim=64, heads=2, layers=2, projection=16)  # heads of 80, as the published one
AUDIO = AudioConfig(dim=32, ffn_dim=48, heads=2, layers=2, conv_dim=(16,) * 7, positions=8, groups=4)
SPEECH = SpeechConfig(audio_dim=AUDIO.dim, audio_states=AUDIO.layers + 1, layers=(0, 1))
ANIMATE = AnimateConfig(layers=(1,), face_dim=16, motion_dim=24, directions=4, widths=(4, 8, 8))


def _shrink(row: Variant) -> Variant:
    dit = replace(row.dit, dim=64, ffn_dim=96, heads=2, layers=2, text_dim=TEXT.dim)
    if row.clip is not None:
        dit = replace(dit, image_dim=CLIP.dim)
    if row.dit.speech is not None:
        dit = replace(dit, speech=SPEECH)
    if row.dit.animate is not None:
        dit = replace(dit, animate=ANIMATE)
    vae = replace(row.vae, dim=8, decoder_dim=8, multipliers=(1, 1, 2, 2), blocks=1)
    return replace(
        row, dit=dit, vae=vae, text=TEXT, clip=CLIP if row.clip else None, audio=AUDIO if row.audio else None
    )


TINY: dict[str, Variant] = {name: _shrink(row) for name, row in VARIANTS.items() if not row.demo}


def checkpoint(
    folder: Path, name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, pickles: bool = True
) -> Path:
    """Write the small checkpoint of variant `name` into `folder`/`name` and return that directory.

    pickles=False writes VAE and encoders as safetensors of the same stem, as the demo models have them.
    """
    row = TINY[name]
    root = folder / name
    generator = torch.Generator().manual_seed(seed)
    for expert in row.expert_names:
        place = root if len(row.experts) == 1 else root / expert
        _write_dit(place, row, generator, dtype)
    parts: dict[str, dict[str, torch.Tensor]] = {
        row.files[_part(row, "vae")].name: _values(CausalVae(row.vae), generator, dtype),
        row.files[_part(row, "text")].name: _official("text", _values(build_umt5(row.text), generator, dtype)),
    }
    if row.clip is not None:
        values = _official("clip", _values(build_clip(row.clip), generator, dtype))
        values["visual.head"] = torch.zeros(row.clip.dim, row.clip.projection, dtype=dtype)
        parts[row.files[_part(row, "clip")].name] = values
    for file, tensors in parts.items():
        if pickles:
            torch.save(tensors, root / file)
        else:
            save_file(tensors, (root / file).with_suffix(".safetensors"), metadata={"format": "pt"})
    if row.audio is not None:
        _write_audio(root / row.files[_part(row, "audio")].name, row.audio, generator, dtype)
    write_tokenizer(root / "google" / "umt5-xxl")
    return root


def picture(path: Path, size: tuple[int, int] = (80, 64), seed: int = 0) -> Path:
    """A picture file with some structure in it."""
    import numpy as np
    from PIL import Image

    width, height = size
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 40, (height, width, 3))
    ground = np.stack([x * 255 // width, y * 255 // height, (x + y) * 127 // (width + height)], -1)
    Image.fromarray(np.clip(ground + noise, 0, 255).astype(np.uint8)).save(path)
    return path


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of `WORDS`: 0 padding, 1 </s>, 2 unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def _part(row: Variant, part: str) -> int:
    return next(i for i, file in enumerate(row.files) if file.part == part)


def _write_dit(place: Path, row: Variant, generator: torch.Generator, dtype: torch.dtype) -> None:
    place.mkdir(parents=True, exist_ok=True)
    save_file(
        _values(build_dit(row.dit), generator, dtype),
        place / "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    config: dict[str, Any] = {
        "_class_name": "WanModel",
        "model_type": row.task.partition("-")[0],
        "dim": row.dit.dim,
        "ffn_dim": row.dit.ffn_dim,
        "freq_dim": row.dit.freq_dim,
        "num_heads": row.dit.heads,
        "num_layers": row.dit.layers,
        "in_dim": row.dit.in_channels,
        "out_dim": row.dit.out_channels,
        "text_len": row.dit.text_len,
        "eps": row.dit.eps,
    }
    if row.dit.speech is not None:
        config |= {"audio_inject_layers": row.dit.speech.layers, "audio_dim": row.dit.speech.audio_dim}
    if row.dit.animate is not None:
        config |= {"face_adapter_layers": row.dit.animate.layers, "motion_encoder_dim": row.dit.animate.motion_dim}
    (place / "config.json").write_text(json.dumps(config))


def _write_audio(file: Path, config: AudioConfig, generator: torch.Generator, dtype: torch.dtype) -> None:
    """wav2vec2 with its config.json, under the names of transformers' CTC model."""
    file.parent.mkdir(parents=True, exist_ok=True)
    values = _values(build_wav2vec2(config), generator, dtype)
    save_file({f"wav2vec2.{name}": value for name, value in values.items()}, file, metadata={"format": "pt"})
    said = {"num_attention_heads": config.heads, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    (file.parent / "config.json").write_text(json.dumps(said))


def _values(module: torch.nn.Module, generator: torch.Generator, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random values for every tensor of a module: matrices of unit gain, norms near 1, small biases."""
    values = {}
    for name, tensor in module.state_dict().items():
        if name.endswith(".kernel"):  # no weights: how animate blurs a face
            values[name] = tensor.to(dtype)
            continue
        r = torch.randn(tensor.shape, generator=generator)
        last = name.rpartition(".")[2]
        if last == "gamma" or (last == "weight" and tensor.dim() == 1) or last == "weights":
            r = 1 + 0.1 * r
        elif "modulation" in name:
            r = 0.2 * r
        elif tensor.dim() >= 2:
            r = r / r[0].numel() ** 0.5
        else:
            r = 0.05 * r
        values[name] = r.to(dtype)
    return values


def _official(kind: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a transformers module under the official names."""
    from wanloom.checkpoint.names import OPERATIONS

    named = get_format(kind, "transformers")
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    operations = {}
    for name, value in values.items():
        found = named.official(name)
        assert found is not None, name
        official, part, operation = found
        pieces.setdefault(official, {})[part] = value
        operations[official] = operation
    return {
        name: OPERATIONS[operations[name]].into([parts[i] for i in sorted(parts)]).contiguous()
        for name, parts in pieces.items()
    }
