"""Batches of the procedural world.  A batch is a pure function of (seed, step, rank): nothing to save, nothing to lose.

The VAE trains on clips rendered as they are needed (2 ms each).  Flow matching trains on latents that were encoded once
(`LatentCache`), with captions drawn anew each time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from wanloom.demo import dance, talk
from wanloom.demo.figures import figure_clip
from wanloom.demo.voices import opening, sample_voice
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


# What the clips of a world of people show, and how often.
PEOPLE = {"talk": (("head", 1.0),), "dance": (("figure", 0.75), ("stick", 0.13), ("room", 0.12))}
LOOKED_AT = {"talk": 0.5, "dance": 0.3}  # the share of crops around what is small and matters most
Focus = tuple[float, float] | None  # where that is, x and y in world units


def people_clip(
    rng: np.random.Generator, kind: str, size: int, frames: int, split: str = "train"
) -> tuple[np.ndarray, Focus]:
    """One clip of the world of people, uint8 [frames, size, size, 3], and where its mouth, or its head, is.

    kind: "head" speaks; "figure" dances in a room; "stick" leads it; "room" is the room with the figure's cells black.
    """
    if kind == "head":
        head = talk.sample_talk(rng, split=split, seconds=frames / 16)
        mouth = opening(sample_voice(rng, frames / 16 + 1), frames + 16)[16 * int(rng.integers(2)) :][:frames]
        return talk.speak(head, mouth, fps=16, size=size), (32.0, 39.0)
    scene = dance.sample_dance(rng, frames, split=split)
    if kind == "stick":
        return dance.drive(scene, size=size), None
    if kind == "figure":
        x, y = scene.pose["head"]
        return dance.perform(scene, size=size), (float(x.mean()), float(y.mean()))
    black = dance.cover(scene, size=size)[..., None] > 0
    return np.where(black, np.uint8(0), dance.draw_room(scene.room, size=size)[None]), None


def vae_clip(
    rng: np.random.Generator, recipe: Recipe, loss: VaeLoss, size: int, frames: int
) -> tuple[np.ndarray, Focus]:
    """A clip to train the VAE on, uint8 [frames, size, size, 3], and where to look."""
    if recipe.data.world in PEOPLE:
        kinds, shares = zip(*PEOPLE[recipe.data.world], strict=True)
        clip, focus = people_clip(rng, kinds[rng.choice(len(kinds), p=shares)], size, frames)
        if loss.grey and frames > 1 and rng.random() < loss.grey:
            clip = clip.copy()
            clip[: 1 + 4 * int(rng.integers(1, (frames - 1) // 4))] = 128
        return clip, focus
    if rng.random() < loss.figures:
        return figure_clip(rng, size, frames), None
    return render(sample_clip(rng, objects=2 if rng.random() < 0.25 else 1, split="train"), size, frames), None


def held_out_clip(recipe: Recipe, index: int, size: int, frames: int) -> np.ndarray:
    """Held-out clip number `index` of the recipe's world, uint8 [frames, size, size, 3]."""
    if recipe.data.world in PEOPLE:
        kind = PEOPLE[recipe.data.world][0][0]
        return people_clip(stream(recipe.seed, HELD_OUT, index), kind, size, frames, "held_out")[0]
    return render(sample_training_clip(recipe.seed, HELD_OUT, index, recipe.data), size, frames)


def vae_batch(recipe: Recipe, loss: VaeLoss, stage: Stage, size: int, step: int, rank: int) -> Tensor:
    """Clips [B, 3, F, crop, crop] in [-1, 1]: shapes, and figures for the models that come later."""
    rng = stream(recipe.seed, BATCH, step, rank)
    crop = stage.crop or size
    clips: list[Tensor] = []
    while len(clips) < stage.batch:
        frames, focus = vae_clip(rng, recipe, loss, size, stage.frames if stage.frames > 1 else 17)
        if stage.frames == 1:
            at = int(rng.integers(len(frames)))
            frames = frames[at : at + 1]
        for _ in range(min(stage.crops, stage.batch - len(clips))):
            part = _cut(rng, frames, crop, recipe.data.world, focus) if crop < size else frames
            clips.append(to_video(np.ascontiguousarray(part)))
    return torch.stack(clips)


def _cut(rng: np.random.Generator, frames: np.ndarray, crop: int, world: str, focus: Focus) -> np.ndarray:
    """A square of a clip; most look for an edge: a flat piece of background teaches nothing."""
    size = frames.shape[1]
    y, x = (int(v) for v in rng.integers(0, size - crop + 1, 2))
    if focus is not None and rng.random() < LOOKED_AT[world]:
        around = (int(v * size / 64) - crop // 2 + int(rng.integers(-6, 7)) for v in (focus[1], focus[0]))
        y, x = (min(max(v, 0), size - crop) for v in around)
    elif rng.random() < 0.8:
        moves = world == "dance" and len(frames) > 1  # a room has edges too, and is learned soon
        for _ in range(8):
            part = frames[:, y : y + crop, x : x + crop]
            if (np.ptp(part, 0).mean() if moves else part.std((0, 1, 2)).max()) > 8:
                break
            y, x = (int(v) for v in rng.integers(0, size - crop + 1, 2))
    return frames[:, y : y + crop, x : x + crop]


def sample_training_clip(seed: int, purpose: int, index: int, data: Data) -> Clip:
    """Clip number `index` of a run: what is in it, not its pixels."""
    rng = stream(seed, purpose, index)
    objects = 2 if rng.random() < data.two_objects else 1
    return sample_clip(rng, objects=objects, split="held_out" if purpose == HELD_OUT else "train")


@dataclass(frozen=True)
class LatentCache:
    """Encoded clips: latents [N, C, T, h, w], what each clip shows, and what else the model reads (I2V: y)."""

    latents: Tensor
    clips: tuple[Clip, ...]
    inputs: dict[str, Tensor] = field(default_factory=dict)

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
) -> dict[str, Tensor]:
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
    return {"latents": torch.cat(latents), **({"y": torch.cat(ys)} if image else {})}


def latent_cache(
    vae: CausalVae, digest: str, recipe: Recipe, ranks: Ranks, folder: Path, purpose: int, count: int,
    size: int, frames: int, *, image: bool,
) -> LatentCache:  # fmt: skip
    """The encoded clips of moving shapes, by `cached`."""
    about = {"vae": digest, "size": size, "frames": frames, "two": recipe.data.two_objects}
    found = cached(
        about, recipe, ranks, folder, purpose, count,
        lambda mine: encode_clips(vae, recipe, purpose, mine, size, frames, image=image),
    )  # fmt: skip
    clips = tuple(sample_training_clip(recipe.seed, purpose, i, recipe.data) for i in range(count))
    return LatentCache(found.pop("latents"), clips, found)


def cached(
    about: Mapping[str, object], recipe: Recipe, ranks: Ranks, folder: Path, purpose: int, count: int,
    make: Callable[[range], dict[str, Tensor]],
) -> dict[str, Tensor]:  # fmt: skip
    """Tensors [count, ...], made in shares by all ranks the first time and read afterwards.

    The files say what they came from (`about`, seed, count); others are never taken for them.
    """
    text = json.dumps({**about, "seed": recipe.seed, "count": count})
    folder.mkdir(parents=True, exist_ok=True)
    kind = "held_out" if purpose == HELD_OUT else "clips"
    mine = folder / f"{kind}-{ranks.rank}-of-{ranks.size}.safetensors"
    if not _is_cache_of(mine, text):
        made = make(ranks.mine(count))
        with atomic_path(mine) as part:
            save_file(made, part, metadata={"about": text})
    ranks.barrier()
    parts: list[dict[str, Tensor]] = []
    for rank in range(ranks.size):
        with safe_open(folder / f"{kind}-{rank}-of-{ranks.size}.safetensors", "pt") as file:
            parts.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (not a dict)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


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
