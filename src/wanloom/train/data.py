"""Batches of the procedural world.  A batch is a pure function of (seed, step, rank): nothing to save, nothing to lose.

The VAE trains on clips rendered as they are needed (2 ms each).  Flow matching trains on latents that were encoded once
(`LatentCache`), with captions drawn anew each time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from wanloom.demo.figures import figure_clip
from wanloom.demo.world import Clip, caption, render, sample_clip
from wanloom.durable import atomic_path
from wanloom.models.vae import CausalVae
from wanloom.train.ranks import Ranks
from wanloom.train.recipe import Data, Recipe, Stage, VaeLoss

# What the random streams of a run are for; a stream is named by (seed, purpose, ...).
CLIPS, HELD_OUT, BATCH, NOISE, CAPTIONS = range(5)


def stream(*name: int) -> np.random.Generator:
    """The random numbers of one purpose, e.g. `stream(seed, BATCH, step, rank)`."""
    return np.random.default_rng(np.random.SeedSequence(name))


def torch_stream(*name: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(stream(*name).integers(2**63)))


def to_video(frames: np.ndarray) -> Tensor:
    """uint8 [F, H, W, 3] -> float [3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float().div_(127.5).sub_(1)


def vae_batch(recipe: Recipe, loss: VaeLoss, stage: Stage, size: int, step: int, rank: int) -> Tensor:
    """Clips [B, 3, F, crop, crop] in [-1, 1]: shapes, and figures for the models that come later."""
    rng = stream(recipe.seed, BATCH, step, rank)
    crop = stage.crop or size
    clips = []
    for _ in range(stage.batch):
        if rng.random() < loss.figures:
            frames = figure_clip(rng, size, max(stage.frames, 2))
        else:
            clip = sample_clip(rng, objects=2 if rng.random() < 0.25 else 1, split="train")
            frames = render(clip, size, max(stage.frames, 2) if stage.frames > 1 else 17)
        if stage.frames == 1:
            at = int(rng.integers(len(frames)))
            frames = frames[at : at + 1]
        if crop < size:
            # half of the crops look for an edge: a flat piece of background teaches nothing
            y, x = (int(v) for v in rng.integers(0, size - crop + 1, 2))
            if rng.random() < 0.8:
                for _ in range(8):
                    if frames[:, y : y + crop, x : x + crop].std((0, 1, 2)).max() > 8:
                        break
                    y, x = (int(v) for v in rng.integers(0, size - crop + 1, 2))
            frames = frames[:, y : y + crop, x : x + crop]
        clips.append(to_video(np.ascontiguousarray(frames)))
    return torch.stack(clips)


def sample_training_clip(seed: int, purpose: int, index: int, data: Data) -> Clip:
    """Clip number `index` of a run: what is in it, not its pixels."""
    rng = stream(seed, purpose, index)
    objects = 2 if rng.random() < data.two_objects else 1
    return sample_clip(rng, objects=objects, split="held_out" if purpose == HELD_OUT else "train")


@dataclass(frozen=True)
class LatentCache:
    """Encoded clips: latents [N, C, T, h, w], what each clip shows, and for I2V its conditioning channels."""

    latents: Tensor
    clips: tuple[Clip, ...]
    y: Tensor | None = None

    def captions(self, indices: list[int], rng: np.random.Generator, dropout: float) -> list[str]:
        """A fresh wording for each clip; "" for the share that teaches guidance."""
        return ["" if rng.random() < dropout else caption(self.clips[i], rng) for i in indices]


def image_channels(vae: CausalVae, video: Tensor) -> Tensor:
    """I2V conditioning [B, 4 + z, T, h, w] of the first frame of video [B, 3, F, H, W]: a mask, then a latent.

    The latent is that of the frame followed by grey: the whole padded clip is encoded, as grey is not zero there.
    """
    padded = torch.zeros_like(video)
    padded[:, :, :1] = video[:, :, :1]
    latent, _ = vae.encode(padded)
    mask = torch.zeros(latent.shape[0], vae.config.stride[0], *latent.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, latent], 1)


@torch.no_grad()
def encode_clips(
    vae: CausalVae, recipe: Recipe, purpose: int, indices: range, size: int, frames: int, *, image: bool
) -> tuple[Tensor, Tensor | None]:
    latents, ys = [], []
    for start in range(indices.start, indices.stop, 8):
        batch = torch.stack(
            [
                to_video(render(sample_training_clip(recipe.seed, purpose, i, recipe.data), size, frames))
                for i in range(start, min(start + 8, indices.stop))
            ]
        )
        latents.append(vae.encode(batch)[0].bfloat16())
        if image:
            ys.append(image_channels(vae, batch).bfloat16())
    return torch.cat(latents), torch.cat(ys) if image else None


def latent_cache(
    vae: CausalVae, digest: str, recipe: Recipe, ranks: Ranks, folder: Path, purpose: int, count: int,
    size: int, frames: int, *, image: bool,
) -> LatentCache:  # fmt: skip
    """The encoded clips, made in shares by all ranks the first time and read afterwards.

    The cache says which VAE (`digest`) and which data it came from; another one is never taken for it.
    """
    about = json.dumps(
        {
            "vae": digest,
            "seed": recipe.seed,
            "count": count,
            "size": size,
            "frames": frames,
            "two": recipe.data.two_objects,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    kind = "held_out" if purpose == HELD_OUT else "clips"
    mine = folder / f"{kind}-{ranks.rank}-of-{ranks.size}.safetensors"
    if not _is_cache_of(mine, about):
        latents, y = encode_clips(vae, recipe, purpose, ranks.mine(count), size, frames, image=image)
        with atomic_path(mine) as part:
            save_file({"latents": latents, **({"y": y} if y is not None else {})}, part, metadata={"about": about})
    ranks.barrier()
    parts: list[dict[str, Tensor]] = []
    for rank in range(ranks.size):
        with safe_open(folder / f"{kind}-{rank}-of-{ranks.size}.safetensors", "pt") as file:
            parts.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (not a dict)
    clips = tuple(sample_training_clip(recipe.seed, purpose, i, recipe.data) for i in range(count))
    return LatentCache(
        torch.cat([p["latents"] for p in parts]), clips, torch.cat([p["y"] for p in parts]) if image else None
    )


def _is_cache_of(path: Path, about: str) -> bool:
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        return bool((file.metadata() or {}).get("about") == about)


def pick(seed: int, step: int, rank: int, size: int, batch: int, count: int) -> list[int]:
    """The clips of a batch: epoch by epoch a fresh order of all, cut among ranks."""
    wide = batch * size
    first = step * wide
    chosen = []
    for k in range(first + rank * batch, first + (rank + 1) * batch):
        epoch, place = divmod(k, count)
        chosen.append(_order(seed, epoch, count)[place])
    return chosen


_orders: dict[tuple[int, int, int], list[int]] = {}


def _order(seed: int, epoch: int, count: int) -> list[int]:
    key = (seed, epoch, count)
    if key not in _orders:
        if len(_orders) > 2:
            _orders.clear()
        _orders[key] = stream(seed, BATCH, epoch).permutation(count).tolist()
    return _orders[key]
