"""Flow matching on clips of people: what heads that speak (`speech.py`) and figures that dance (`dance.py`) share.

What a sample holds is what the pipeline will have when it makes a clip: the latents of the clip as the VAE gives them
behind its past, the past itself, the picture, and what is heard or followed.  It is cached once, as for moving shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wanloom.demo import cases
from wanloom.errors import InputError
from wanloom.media.sheets import contact_sheet
from wanloom.train.data import BATCH, CAPTIONS, NOISE, LatentCache, stream, torch_stream
from wanloom.train.flow import FlowTask
from wanloom.train.objective import FlowBatch, flow_loss, sample_sigmas
from wanloom.train.recipe import Phase, Stage

# All that these models are told in words.
SPEAKS = (
    cases.SPEAKS, "somebody is speaking", "a head talks to us", "a person says something", "the person is talking",
)  # fmt: skip
DANCES = (cases.DANCES, "somebody is moving", "a figure dances in a room", "the person is dancing")


class PeopleTask(FlowTask, ABC):
    """Samples are of two kinds, without a past and with one, which do not share a batch; words are few."""

    vocabulary: Sequence[str] = tuple(sorted({word for text in (*SPEAKS, *DANCES) for word in text.split()}))
    sentences: Sequence[str] = SPEAKS

    def kinds(self, cache: LatentCache) -> tuple[list[int], list[int]]:
        """Indices of the samples without a past and with one."""
        past = cache.inputs["past"]
        return [i for i, p in enumerate(past) if not p], [i for i, p in enumerate(past) if p]

    def words(self, count: int, rng: np.random.Generator, dropout: float) -> tuple[list[str], Tensor]:
        """A sentence for each sample, "" for those that are to teach guidance, and which these are [count]."""
        dropped = rng.random(count) < dropout
        texts = ["" if drop else self.sentences[int(rng.integers(len(self.sentences)))] for drop in dropped]
        return texts, torch.from_numpy(dropped).to(self.device)

    @abstractmethod
    def without(self, inputs: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
        """The inputs with what the unconditional pass does not get taken out of the samples `dropped` [B]."""

    def unconditional(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        some = next(iter(inputs.values()))
        return self.without(inputs, torch.ones(len(some), dtype=torch.bool, device=self.device))

    def loss(self, phase: Phase, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
        seed, rank = self.recipe.seed, self.ranks.rank
        rng = stream(seed, CAPTIONS, step, rank)
        kind = self.kinds(self.clips)[int(stream(seed, BATCH, step).random() > self.recipe.data.first)]
        indices = [kind[k] for k in rng.integers(len(kind), size=stage.batch)]
        texts, dropped = self.words(len(indices), rng, phase.flow.text_dropout)
        batch = self.batch(self.clips, indices, self.encode(texts))
        self.at_frame.places = ()
        if phase.flow.heads > 1 and stage.frames > 1:
            batch = replace(batch, weight=1 + (phase.flow.heads - 1) * self.heads(indices).to(self.device))
        if stage.frames == 1:
            batch = self.picture(batch, int(stream(seed, BATCH, step, 1).integers(self.latent_frames)))
        generator = torch_stream(seed, NOISE, step, rank)
        inputs = self.roughen(self.without(dict(batch.inputs), dropped), generator)
        sigma = sample_sigmas(len(indices), phase.flow, generator)
        noise = torch.randn(batch.x0.shape, generator=generator)
        loss, _ = flow_loss(self.velocity, replace(batch, inputs=inputs), sigma.to(self.device), noise.to(self.device))
        return loss, {}

    def picture(self, batch: FlowBatch, place: int) -> FlowBatch:
        """The batch with one latent frame of each clip, that at `place`.  Error: E4032 where that means nothing."""
        raise InputError("E4032", f"frames = 1: {self.variant.name} learns from whole clips only.")

    def heads(self, indices: list[int]) -> Tensor:
        """1.0 where latents of these clips show a head, [B, 1, T, h, w].  Error: E4032 where nobody says."""
        raise InputError("E4032", f"heads: {self.variant.name} does not know where heads are; leave it out.")

    def roughen(self, inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The inputs as a model's own earlier clips would leave them: not quite clean."""
        return inputs

    @torch.no_grad()
    def look(self, phase: Phase, step: int, *, picture: bool) -> dict[str, Any]:
        """Held-out loss of both kinds at fixed noise levels; with `picture` also samples, judged, as a sheet."""
        self.at_frame.places = ()
        report: dict[str, Any] = {}
        total = torch.zeros(2)
        for name, kind in zip(("first", "later"), self.kinds(self.held_out), strict=True):
            mine = [kind[k] for k in self.ranks.mine(len(kind))]
            batch = self.batch(self.held_out, mine, self.encode([self.sentences[0]] * len(mine)))
            noise = torch.stack([self._noise(batch, i) for i in mine]).to(self.device)
            sums = torch.zeros(2)
            for level in (0.3, 0.7, 0.9):
                _, each = flow_loss(self.velocity, batch, torch.full((len(mine),), level, device=self.device), noise)
                sums += torch.tensor([float(each.sum()), len(mine)])
            self.ranks.sum_(sums)
            report[f"held_out_{name}"] = round(float(sums[0] / sums[1]), 4)
            total += sums
            if picture:
                report |= {f"{name}_{k}": v for k, v in self._samples(phase, step, name, kind).items()}
        return {"held_out": float(total[0] / total[1]), **report}

    def _samples(self, phase: Phase, step: int, name: str, kind: list[int]) -> dict[str, Any]:
        chosen = kind[: self.recipe.watch.prompts]
        mine = [chosen[k] for k in self.ranks.mine(len(chosen))]
        marks, rows = torch.zeros(1 + len(self.seen)), []
        captions = [self.sentences[0]] * len(mine)
        for i, video in zip(mine, self._generate(mine, captions, given=False) if mine else [], strict=True):
            marks += torch.tensor([1.0, *self.judge(i, video)])
            rows.append((f"{name} {i}", [self.shown(i), video]))
        self.ranks.sum_(marks)
        if rows and self.ranks.first:
            contact_sheet(rows[:12], self.folder / "sheets" / f"{phase.name}-{name}-{step:06d}.png", scale=1)
        return {n: round(float(v), 3) for n, v in zip(self.seen, marks[1:] / marks[0], strict=True)}

    seen: tuple[str, ...] = ()

    @abstractmethod
    def judge(self, i: int, video: np.ndarray) -> list[float]:
        """What is right of held-out sample i, in the order of `seen`."""

    @abstractmethod
    def shown(self, i: int) -> np.ndarray:
        """What held-out sample i really looks like, uint8 [F, H, W, 3]."""


def stack(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]).contiguous() for name in samples[0]}
