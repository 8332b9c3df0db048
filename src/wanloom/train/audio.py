"""Training a small wav2vec2 to hear how loud speech is, on synthetic voices.

The published audio encoder was trained to recognise letters; what matters here is that its hidden states say when a
mouth is open.  A linear probe reads from the last hidden state, 50 times a second, the opening of the mouth and the
energy of a few bands; the probe is thrown away.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wanloom.demo.voices import RATE, opening, sample_voice
from wanloom.encoders import build_wav2vec2, hidden_states, normalise
from wanloom.errors import InputError
from wanloom.train.data import BATCH, HELD_OUT, stream
from wanloom.train.ranks import Ranks
from wanloom.train.recipe import Phase, Recipe, Stage
from wanloom.variants import VARIANTS

BANDS = (0, 300, 1000, 3000, 8000)  # Hz: edges of the bands whose energy is read
HOP = 320  # samples of a hidden state


def heard(wave: np.ndarray, count: int) -> Tensor:
    """What the probe is to say at each of `count` hidden states: opening, log energy of each band; [count, 5]."""
    mouth = opening(wave, count, fps=RATE / HOP)
    size = 2 * HOP
    padded = np.pad(wave, (0, size))
    starts = np.arange(count) * HOP
    pieces = padded[starts[:, None] + np.arange(size)] * np.hanning(size)
    power = np.abs(np.fft.rfft(pieces)) ** 2 / wave.var()
    frequency = np.fft.rfftfreq(size, 1 / RATE)
    bands = [power[:, (low <= frequency) & (frequency < high)].mean(1) for low, high in pairwise(BANDS)]
    energy = np.log10(np.stack(bands, 1) + 1e-3) / 2
    return torch.from_numpy(np.concatenate((mouth[:, None], energy), 1)).float()


class AudioTask:
    """What a run of the audio encoder needs to know of its subject; the loop does the rest."""

    def __init__(self, recipe: Recipe, ranks: Ranks, folder: Path) -> None:
        config = VARIANTS[recipe.variant].audio
        if config is None:
            raise InputError("E4032", f"{recipe.variant} has no audio encoder to train")
        self.recipe, self.ranks, self.folder, self.config = recipe, ranks, folder, config
        self.device = torch.device(recipe.device)
        self.encoder = build_wav2vec2(config).to(self.device, getattr(torch, recipe.dtype))
        self.probe = nn.Linear(config.dim, len(BANDS)).to(self.device)
        self.modules: dict[str, nn.Module] = {"audio": self.encoder, "probe": self.probe}

    def start(self, expert: str) -> None:
        raise InputError("E4032", f"an audio recipe cannot begin from '{expert}' of a checkpoint")

    def only(self, phase: Phase) -> tuple[str, ...] | None:
        return None

    def _error(self, waves: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squared error, and for each wave what was said and what is right of the mouth, [B, T]."""
        states = torch.cat(
            [hidden_states(self.encoder, normalise(torch.from_numpy(wave)).to(self.device))[-1:] for wave in waves]
        )
        said = self.probe(states.float())
        right = torch.stack([heard(wave, said.shape[1]) for wave in waves]).to(self.device)
        weight = right.new_tensor([4.0] + [1.0] * (len(BANDS) - 1))
        return ((said - right).square() * weight).mean(), said[..., 0], right[..., 0]

    def loss(self, phase: Phase, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = stream(self.recipe.seed, BATCH, step, self.ranks.rank)
        seconds = stage.frames / 16
        waves = [sample_voice(rng, seconds) for _ in range(stage.batch)]
        return self._error(waves)[0], {}

    @torch.no_grad()
    def look(self, phase: Phase, step: int, *, picture: bool) -> dict[str, Any]:
        """Held-out error, and the correlation of the mouth that is heard with the right one, on longer voices."""
        totals = torch.zeros(3)
        for i in self.ranks.mine(self.recipe.watch.prompts):
            wave = sample_voice(stream(self.recipe.seed, HELD_OUT, i), 6.0)
            error, said, right = self._error([wave])
            both = torch.corrcoef(torch.cat((said, right)))
            totals += torch.tensor([1.0, float(error), float(both[0, 1])])
        self.ranks.sum_(totals)
        return {"held_out": float(totals[1] / totals[0]), "mouth": round(float(totals[2] / totals[0]), 4)}

    def finish(self) -> None:
        """Write `checkpoint/wav2vec2-large-xlsr-53-english/` (rank 0)."""
        if self.ranks.first:
            write_audio(self.encoder, self.folder / "checkpoint")


def write_audio(encoder: nn.Module, folder: Path) -> None:
    """The encoder in transformers' layout under its published directory name, float32."""
    home = folder / "wav2vec2-large-xlsr-53-english"
    home.mkdir(parents=True, exist_ok=True)
    encoder.float().save_pretrained(home)  # type: ignore[operator]  # transformers' PreTrainedModel
