"""Training a small CLIP tower to tell what a person wears, on drawn people.

The published tower was trained on pictures and captions; what matters here is that its features say how the person in a
picture looks, wherever the person stands.  A linear probe reads from the feature of the whole picture (the class token,
as it enters the last block) which colour of its palette each part has; the probe is thrown away.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanloom.checkpoint.convert import save_official
from wanloom.demo import dance
from wanloom.demo.figures import CLOTHES, GROUNDS, HAIRS, SKINS, Outfit
from wanloom.encoders import build_clip, image_features
from wanloom.errors import InputError
from wanloom.train.data import BATCH, CLIPS, HELD_OUT, stream, to_video
from wanloom.train.ranks import Ranks
from wanloom.train.recipe import Phase, Recipe, Stage
from wanloom.variants import VARIANTS

# What the probe tells, and how many answers there are.
PALETTES = {"skin": SKINS, "hair": HAIRS, "top": CLOTHES, "bottom": CLOTHES, "shoes": CLOTHES}
SHAPES = ("skirt", "long_hair")
ANSWERS = (*(len(palette) for palette in PALETTES.values()), *(2 for _ in SHAPES), len(GROUNDS))


def looks(outfit: Outfit, wall: tuple[int, int, int]) -> list[int]:
    """The right answer to each question: the colour of each part, whether skirt and long hair are worn, the wall."""
    colours = [palette.index(getattr(outfit, part)) for part, palette in PALETTES.items()]
    return [*colours, *(int(getattr(outfit, shape)) for shape in SHAPES), GROUNDS.index(wall)]


class LooksTask:
    """What a run of the picture encoder needs to know of its subject; the loop does the rest."""

    def __init__(self, recipe: Recipe, ranks: Ranks, folder: Path) -> None:
        config = VARIANTS[recipe.variant].clip
        if config is None:
            raise InputError("E4032", f"{recipe.variant} has no picture encoder to train")
        self.recipe, self.ranks, self.folder, self.config = recipe, ranks, folder, config
        self.device = torch.device(recipe.device)
        self.tower = build_clip(config).to(self.device, getattr(torch, recipe.dtype))
        self.probe = nn.Linear(config.dim, sum(ANSWERS)).to(self.device)
        self.modules: dict[str, nn.Module] = {"image": self.tower, "probe": self.probe}

    def start(self, expert: str) -> None:
        raise InputError("E4032", f"an image recipe cannot begin from '{expert}' of a checkpoint")

    def only(self, phase: Phase) -> tuple[str, ...] | None:
        return None

    @cached_property
    def people(self) -> tuple[Tensor, Tensor]:
        """This process's share of the people to learn from, drawn once: drawing takes longer than learning."""
        return self._draw(CLIPS, self.recipe.data.clips // self.ranks.size)

    @cached_property
    def strangers(self) -> tuple[Tensor, Tensor]:
        """This process's share of people of the other side of the split."""
        return self._draw(HELD_OUT, self.recipe.data.held_out // self.ranks.size)

    def _draw(self, purpose: int, count: int) -> tuple[Tensor, Tensor]:
        """Pictures [count, 3, size, size] of people as the tower gets them, bfloat16 in [-1, 1], and how they look."""
        rng = stream(self.recipe.seed, purpose, self.ranks.rank)
        split = "held_out" if purpose == HELD_OUT else "train"
        size, pictures, answers = VARIANTS[self.recipe.variant].defaults.size[0], [], []
        for _ in range(count):
            scene = dance.sample_dance(rng, 1, split=split)
            picture = to_video(dance.portrait(scene, size=size)[None]).transpose(0, 1)
            small = F.interpolate(picture, (self.config.image,) * 2, mode="bicubic", align_corners=False)
            pictures.append(small.bfloat16())
            answers.append(looks(scene.outfit, scene.room.wall))
        return torch.cat(pictures).to(self.device), torch.tensor(answers, device=self.device)

    def _asked(self, pictures: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy, and which of the questions are answered rightly [B, questions]."""
        said = self.probe(image_features(self.tower, pictures)[:, 0].float()).split(ANSWERS, 1)
        losses = [F.cross_entropy(logits, right) for logits, right in zip(said, answers.T, strict=True)]
        return torch.stack(losses).mean(), torch.stack([logits.argmax(1) for logits in said], 1) == answers

    def loss(self, phase: Phase, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
        pictures, answers = self.people
        rng = stream(self.recipe.seed, BATCH, step, self.ranks.rank)
        some = torch.from_numpy(rng.integers(len(pictures), size=stage.batch)).to(self.device)
        return self._asked(pictures[some].float(), answers[some])[0], {}

    @torch.no_grad()
    def look(self, phase: Phase, step: int, *, picture: bool) -> dict[str, Any]:
        """Held-out loss, the share of right answers, and of people of whom all colours are told rightly."""
        totals = torch.zeros(4)
        for pictures, answers in zip(*(torch.split(part, 64) for part in self.strangers), strict=True):
            loss, right = self._asked(pictures.float(), answers)
            worn = right[:, : len(PALETTES)].all(1).float().mean()
            totals += len(right) * torch.tensor([1.0, float(loss), float(right.float().mean()), float(worn)])
        self.ranks.sum_(totals)
        loss, right, worn = (totals[1:] / totals[0]).tolist()
        return {"held_out": loss, "right": round(right, 4), "worn": round(worn, 4)}

    def finish(self) -> None:
        """Write `checkpoint/` with the tower's published file (rank 0)."""
        if self.ranks.first:
            save_official(
                self.folder / "checkpoint",
                dits={},
                clip=(self.tower.float().state_dict(), self.config),
                dtype=torch.float32,
            )


def clip_file(folder: Path) -> Path:
    """The file of a picture encoder in a checkpoint in the published layout."""
    usual = folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"
    return next(iter(sorted(folder.glob("models_clip_*.safetensors"))), usual)
