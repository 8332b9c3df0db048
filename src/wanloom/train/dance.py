"""Training a transformer to dance: a figure in a picture that does what a stick figure does, as animate has it.

Two clips of five put the figure into another room (replacement); of the clips with a past, some know its last frame and
some its last five.  The picture's own latent is part of what is made, as in the published model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanloom.conditioning.animate import with_mask
from wanloom.demo import dance, dance_judge
from wanloom.demo.cases import FACE, faces
from wanloom.demo.figures import dressed_figure
from wanloom.encoders import build_clip, encode_image
from wanloom.models.adapters.animate import Animate
from wanloom.train.data import CLIPS, HELD_OUT, LatentCache, cached, stream, to_video
from wanloom.train.flow import load_part
from wanloom.train.looks import clip_file
from wanloom.train.objective import FlowBatch
from wanloom.train.people import DANCES, PeopleTask, stack
from wanloom.train.vae import psnr, to_frames

HEAD = 7.0  # how far from its middle a place is taken to show a head, in world units


class DanceTask(PeopleTask):
    """Figures that dance."""

    sentences = DANCES
    seen = ("psnr", "distance", "colours")

    def _cache(self, digest: str, purpose: int, count: int) -> LatentCache:
        assert self.recipe.image is not None
        self.clip, seen_by = load_part(clip_file(Path(self.recipe.image)), "clip", build_clip, torch.float32)
        about = {"vae": digest, "clip": seen_by, "size": self.size, "frames": self.frames}
        found = cached(
            about, self.recipe, self.ranks, self.folder / "latents", purpose, count,
            lambda mine: stack([self._sample_tensors(purpose, i) for i in mine]),
        )  # fmt: skip
        return LatentCache(found.pop("latents"), (), found)

    def scene(self, purpose: int, i: int) -> tuple[dance.Dance, dance.Room | None, int]:
        """Sample i: the dance, the other room it is put into (or None), how many frames are known before."""
        rng = stream(self.recipe.seed, purpose, i)
        what = dance.sample_dance(rng, self.frames, split="held_out" if purpose == HELD_OUT else "train")
        room = dance.sample_room(rng, what.outfit) if rng.random() < 0.4 else None
        return what, room, 0 if i % 2 == 0 else (1 if rng.random() < 0.5 else 5)

    def shown(self, i: int) -> np.ndarray:
        return dance.perform(self._wanted(HELD_OUT, i), size=self.size)

    def _wanted(self, purpose: int, i: int) -> dance.Dance:
        """Sample i, the person in the room where it is to dance."""
        what, room, _ = self.scene(purpose, i)
        return what if room is None else replace(what, room=room)

    @cached_property
    def nothing(self) -> Tensor:
        """Latents of a clip of which nothing is known, [1, C, T, h, w]."""
        return self.vae.encode(torch.zeros(1, 3, self.frames, self.size, self.size))[0].float()

    @torch.no_grad()
    def _sample_tensors(self, purpose: int, i: int) -> dict[str, Tensor]:
        what, room, known = self.scene(purpose, i)
        here = self._wanted(purpose, i)
        video = to_video(dance.perform(here, size=self.size))
        picture = to_video(dance.portrait(what, size=self.size)[None])
        side = self.size // self.vae.config.stride[1]
        free = torch.ones(1, 1, self.frames, side, side)
        given = torch.zeros_like(video)
        if room is not None:
            where = torch.from_numpy(dance.cover(here, size=self.size))[None, None]
            free = F.interpolate(where, free.shape[2:], mode="nearest")
            empty = to_video(dance.draw_room(room, size=self.size)[None])
            given = torch.where(where[0] > 0, torch.tensor(-1.0), empty)
        given[:, :known] = video[:, :known]
        mask = 1 - free
        mask[:, :, :known] = 1
        some = room is not None or known > 0
        clips = [video, to_video(dance.drive(what, size=self.size)), *([given] if some else [])]
        latents, pose, *more = self.vae.encode(torch.stack(clips))[0].float().chunk(len(clips))
        reference, behind = self.vae.encode(picture[None])[0].float(), more[0] if some else self.nothing
        y = torch.cat((with_mask(reference, torch.ones_like(mask[:, :, :1])), with_mask(behind, mask)), 2)
        driver = dance.sample_person(stream(self.recipe.seed, purpose, i, 1))
        face = faces(dressed_figure(driver, what.pose, size=self.size), what.pose)
        return {
            "latents": torch.cat((reference, latents), 2)[0].bfloat16(),
            "y": y[0].bfloat16(),
            "pose": pose[0].bfloat16(),
            "image": encode_image(self.clip, picture[:, 0][None])[0].bfloat16(),
            "face": torch.from_numpy(face).permute(3, 0, 1, 2).contiguous(),
            "past": torch.tensor(known > 0),
        }

    def encoders(self) -> dict[str, nn.Module]:
        return {"clip": self.clip}

    def _build(self) -> None:
        super()._build()
        (self.animate,) = (part for part in self.dit.prepare if isinstance(part, Animate))
        self._see_faces()

    def start(self, expert: str) -> None:
        super().start(expert)
        self._see_faces()

    def _see_faces(self) -> None:
        """Faces of this world look ahead and do not move: the motion encoder stays as it begins, and is asked once."""
        self.nobody = self._motion(torch.full((1, 3, 1, FACE, FACE), -1.0))[0, 0]
        for cache in (self.clips, self.held_out):
            faces = torch.split(cache.inputs["face"], 64)
            cache.inputs["motion"] = torch.cat([self._motion(some.float() / 127.5 - 1) for some in faces])

    @torch.no_grad()
    def _motion(self, faces: Tensor) -> Tensor:
        """What the motion encoder makes of cut-out faces [B, 3, T, 16, 16] in [-1, 1]: [B, T, motion_dim]."""
        assert self.variant.dit.animate is not None
        grow = self.variant.dit.animate.face_size // FACE
        large = faces.repeat_interleave(grow, 3).repeat_interleave(grow, 4)
        return self.animate.motion(large.to(self.device, self.dit.dtype)).float().cpu()

    def batch(self, cache: LatentCache, indices: list[int], context: Tensor) -> FlowBatch:
        batch = super().batch(cache, indices, context)
        return replace(batch, inputs={k: v for k, v in batch.inputs.items() if k not in ("past", "face")})

    def picture(self, batch: FlowBatch, place: int) -> FlowBatch:
        """The given picture, and one latent frame of each clip with its pose and one of its faces."""
        self.at_frame.places = (0, place + 1)
        both = torch.tensor(self.at_frame.places)
        inputs, face = dict(batch.inputs), max(0, 4 * place - 1)
        inputs["y"] = inputs["y"][:, :, both]
        inputs["pose"] = inputs["pose"][:, :, place : place + 1]
        inputs["motion"] = inputs["motion"][:, face : face + 1]
        return replace(batch, x0=batch.x0[:, :, both], inputs=inputs)

    def heads(self, indices: list[int]) -> Tensor:
        return self._heads[indices, None]

    @cached_property
    def _heads(self) -> Tensor:
        """Of all clips, [N, T, h, w]; the picture's own latent has none: it is given."""
        side = self.size // self.vae.config.stride[1]
        cells = (np.arange(side) + 0.5) * 64 / side
        shown = np.zeros((len(self.clips.latents), 1 + self.latent_frames, side, side), np.float32)
        for i, clip in enumerate(shown):
            x, y = self.scene(CLIPS, i)[0].pose["head"]
            for frame in range(self.frames):
                far = np.maximum(abs(cells[:, None] - y[frame]), abs(cells[None] - x[frame]))
                clip[1 + (frame + 3) // 4][far < HEAD] = 1
        return torch.from_numpy(shown)

    def without(self, inputs: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
        motion = torch.where(dropped[:, None, None], self.nobody.to(self.device), inputs["motion"])
        return {**inputs, "motion": motion}

    def roughen(self, inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        y = inputs["y"].clone()
        size = 0.15 * torch.rand(len(y), 1, 1, 1, 1, generator=generator)
        noise = size * torch.randn(y[:, 4:, 1:].shape, generator=generator)
        y[:, 4:, 1:] += noise.to(y)
        return {**inputs, "y": y}

    def _generate(self, mine: list[int], captions: list[str], *, given: bool) -> list[np.ndarray]:
        """The clips, without the picture they begin with."""
        context, empty = self.encode(captions), self.encode([""] * len(mine))
        batch = self.batch(self.held_out, mine, context)
        x = torch.stack([self._noise(batch, i) for i in mine])
        latents = self.denoise(x.to(self.device), batch, context, empty, given=False)
        videos = self.vae.decode(latents[:, :, 1:].to(self.vae.conv1.weight.dtype).cpu())[0]
        return [to_frames(video.float()) for video in videos]

    def judge(self, i: int, video: np.ndarray) -> list[float]:
        verdict = dance_judge.judge(video, self._wanted(HELD_OUT, i))
        return [psnr(self.shown(i), video), verdict.distance, float(verdict.colours)]
