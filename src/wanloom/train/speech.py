"""Training a transformer to speak: heads, as s2v's clip loop has them.

The first clip stands behind the picture, others behind the 73 frames before them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from wanloom.conditioning.speech import States, features_at
from wanloom.demo import talk
from wanloom.demo.voices import opening, sample_voice
from wanloom.encoders import build_wav2vec2
from wanloom.train.data import HELD_OUT, LatentCache, cached, stream, to_video
from wanloom.train.flow import load_part
from wanloom.train.objective import FlowBatch
from wanloom.train.people import PeopleTask, stack
from wanloom.train.vae import to_frames


class SpeechTask(PeopleTask):
    """Heads that speak."""

    seen = ("mouth", "colours")

    def _cache(self, digest: str, purpose: int, count: int) -> LatentCache:
        assert self.variant.audio is not None and self.recipe.audio is not None
        folder = Path(self.recipe.audio) / "wav2vec2-large-xlsr-53-english"
        self.audio, heard_by = load_part(folder, "audio", build_wav2vec2, torch.float32)
        about = {"vae": digest, "audio": heard_by, "size": self.size, "frames": self.frames}
        found = cached(
            about, self.recipe, self.ranks, self.folder / "latents", purpose, count,
            lambda mine: stack([self._sample_tensors(purpose, i) for i in mine]),
        )  # fmt: skip
        return LatentCache(found.pop("latents"), (), found)

    def _scene(self, purpose: int, i: int) -> tuple[talk.Talk, np.ndarray, np.ndarray, int]:
        """Sample i: who speaks, the sound, the mouth in each frame up to the clip's end, which clip it is."""
        rng = stream(self.recipe.seed, purpose, i)
        clip = 0 if i % 2 == 0 else int(rng.integers(1, 5))
        frames = self.frames * (clip + 1)
        wave = sample_voice(rng, frames / 16 + rng.uniform(0, 1.5))
        who = talk.sample_talk(rng, split="held_out" if purpose == HELD_OUT else "train", seconds=frames / 16)
        return who, wave, opening(wave, frames), clip

    @torch.no_grad()
    def _sample_tensors(self, purpose: int, i: int) -> dict[str, Tensor]:
        who, wave, mouth, clip = self._scene(purpose, i)
        assert self.variant.dit.speech is not None
        history = self.variant.dit.speech.history
        picture = to_video(talk.portrait(who, size=self.size)[None])
        video = to_video(talk.speak(who, mouth, fps=16, size=self.size))
        reference, _ = self.vae.encode(picture[None])
        assert self.variant.audio is not None
        states = States(self.audio, wave, self.variant.audio, 0, normed=True)
        audio = features_at(states, 16, clip * self.frames, self.frames)
        now = video[:, -self.frames :]
        if clip == 0:
            latents, _ = self.vae.encode(torch.cat((picture, now), 1)[None])
            motion, latents = (
                torch.zeros(1, latents.shape[1], (history + 3) // 4, *latents.shape[3:]),
                latents[:, :, 1:],
            )
        else:
            past = torch.cat((torch.zeros_like(picture).expand(-1, history, -1, -1), video[:, 3 : -self.frames]), 1)
            latents, _ = self.vae.encode(torch.cat((past[:, -history:], now), 1)[None])
            motion, latents = latents[:, :, : -(self.frames // 4)], latents[:, :, -(self.frames // 4) :]
        out = {"latents": latents[0], "motion": motion[0], "reference": reference[0], "audio": audio}
        return {**{k: v.bfloat16() for k, v in out.items()}, "past": torch.tensor(clip > 0)}

    def encoders(self) -> dict[str, nn.Module]:
        return {"audio": self.audio}

    def batch(self, cache: LatentCache, indices: list[int], context: Tensor) -> FlowBatch:
        batch = super().batch(cache, indices, context)
        inputs = dict(batch.inputs)
        if not bool(inputs.pop("past").any()):
            inputs.pop("motion")
        inputs["group"] = torch.zeros(batch.x0.shape[2], dtype=torch.long, device=self.device)
        return replace(batch, inputs=inputs)

    def without(self, inputs: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
        return {**inputs, "audio": inputs["audio"] * (~dropped)[:, None, None, None]}

    def unconditional(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**inputs, "audio": torch.zeros_like(inputs["audio"])}

    def roughen(self, inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        if "motion" not in inputs:
            return inputs
        motion = inputs["motion"]
        size = 0.25 * torch.rand(len(motion), 1, 1, 1, 1, generator=generator)
        noise = size * torch.randn(motion.shape, generator=generator)
        return {**inputs, "motion": motion + noise.to(motion)}

    def _generate(self, mine: list[int], captions: list[str], *, given: bool) -> list[np.ndarray]:
        """The clips, decoded behind what was before them."""
        context, empty = self.encode(captions), self.encode([""] * len(mine))
        batch = self.batch(self.held_out, mine, context)
        x = torch.stack([self._noise(batch, i) for i in mine])
        latents = self.denoise(x.to(self.device), batch, context, empty, given=False)
        before = batch.inputs.get("motion", batch.inputs["reference"])
        videos = self.vae.decode(torch.cat((before, latents), 2).to(self.vae.conv1.weight.dtype).cpu())[0]
        return [to_frames(video[:, -self.frames :].float()) for video in videos]

    def shown(self, i: int) -> np.ndarray:
        who, _, mouth, _ = self._scene(HELD_OUT, i)
        return talk.speak(who, mouth, fps=16, size=self.size)[-self.frames :]

    def judge(self, i: int, video: np.ndarray) -> list[float]:
        who, _, mouth, clip = self._scene(HELD_OUT, i)
        skip = 0 if clip else 3
        verdict = talk.compare(talk.observe(video[skip:]), mouth[-self.frames + skip :], who.face)
        return [verdict.correlation, float(verdict.colours)]
