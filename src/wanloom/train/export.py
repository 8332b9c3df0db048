"""A finished run as a checkpoint in the published layout, with its card.

Everything a person should know of a demo model stands in `card.json`, and the same in words in `README.md` beside it:
data, recipe, seconds of training, the judge's table.  A model that misses a floor is a smoke-test model and says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from wanloom.checkpoint.convert import save_official
from wanloom.models.adapters import build_dit
from wanloom.models.config import DiTConfig
from wanloom.models.vae import CausalVae
from wanloom.train.recipe import Recipe
from wanloom.variants import Variant


def averages_of(folder: Path, phase: str, module: str) -> dict[str, torch.Tensor]:
    """What a phase left of one module, by the module's own names; empty when the phase did not train it."""
    values = load_file(folder / phase / "average.safetensors")
    return {n.removeprefix(f"{module}."): v for n, v in values.items() if n.startswith(f"{module}.")}


def published(values: Mapping[str, torch.Tensor], config: DiTConfig) -> dict[str, torch.Tensor]:
    """A transformer's tensors under their published names, from those of its own parameters."""
    dit = build_dit(config)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            parameter.copy_(values[name])
    return {name: value.detach() for name, value in dit.state_dict().items()}


def write_checkpoint(
    recipe: Recipe, folder: Path, variant: Variant, text: Mapping[str, torch.Tensor], vae: CausalVae,
    *, clip: nn.Module | None = None, audio: nn.Module | None = None,
) -> None:  # fmt: skip
    """`folder`/checkpoint: a DiT per expert (its own phase, else the last one), text encoder, VAE, tokenizer; bf16.

    clip, audio: the frozen encoders of pictures and sound, where the model has them.
    """
    phases = [phase.name for phase in recipe.phases]
    dits = {
        name: (published(averages_of(folder, name if name in phases else phases[-1], "dit"), variant.dit), variant.dit)
        for name, _ in variant.experts
    }
    save_official(
        folder / "checkpoint",
        dits=dits,
        vae=vae.state_dict(),
        vae_config=vae.config,
        text=text,
        clip=None if clip is None or variant.clip is None else (clip.state_dict(), variant.clip),
        audio=None if audio is None or variant.audio is None else (audio.state_dict(), variant.audio),
        tokenizer_dir=folder / "checkpoint" / "google" / "umt5-xxl",
        dtype=torch.bfloat16,
    )


def seconds_trained(folder: Path) -> float:
    """Wall-clock seconds of all phases, from the log."""
    best: dict[str, float] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "seconds" in entry:
            best[entry["phase"]] = max(best.get(entry["phase"], 0.0), entry["seconds"])
    return sum(best.values())
