"""Training a decoder on what a transformer makes: its latents of clips that it never saw, and the clips they stand for.

A transformer's latents are not quite those that the encoder gives: details that it is not sure of run into each other.
Where the clip is all but told by what it was given, the decoder can learn what these mean in pixels.  The latents stay
what they are, so nothing else has to learn anew; some of the batch are the encoder's own, and stay sharp.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from wanloom.checkpoint.convert import save_official
from wanloom.demo import dance, dance_judge
from wanloom.durable import sha256_file
from wanloom.errors import InputError
from wanloom.media.sheets import contact_sheet
from wanloom.train.dance import DanceTask
from wanloom.train.data import BATCH, CLIPS, HELD_OUT, cached, stream, to_video
from wanloom.train.objective import pixel_loss
from wanloom.train.ranks import Ranks
from wanloom.train.recipe import Phase, Recipe, Stage
from wanloom.train.vae import psnr, to_frames
from wanloom.variants import VARIANTS

OWN = 0.25  # the share of a batch that are the encoder's latents
LOOKED_AT = 0.5  # the share of crops around the head
AT_ONCE = 8  # clips that the transformer makes in one go


class DecoderTask:
    """The decoder of figures that dance, behind the transformer of the recipe's `start`."""

    def __init__(self, recipe: Recipe, ranks: Ranks, folder: Path) -> None:
        variant, start = VARIANTS[recipe.variant], Path(str(recipe.start))
        if variant.conditioner != "animate":
            raise InputError(
                "E4032", f"kind = decoder: for demo-animate, whose clips are all but given; not {variant.name}"
            )
        self.recipe, self.ranks, self.folder, self.variant = recipe, ranks, folder, variant
        whole = recipe.model_copy(update={"vae": str(start), "image": str(start)})
        self.world = DanceTask(whole, ranks, folder)
        self.world.start("dit")
        self.size, self.stride = self.world.size, self.world.vae.config.stride[1]
        by = sha256_file(start / "diffusion_pytorch_model.safetensors")
        self.clips = self._made(CLIPS, recipe.data.clips, by)
        self.held_out = self._made(HELD_OUT, recipe.data.held_out, by)
        self.vae = self.world.vae.to(getattr(torch, recipe.dtype))
        self.modules: dict[str, nn.Module] = {"vae": self.vae}

    def _made(self, purpose: int, count: int, by: str) -> dict[str, Tensor]:
        """What the transformer `by` makes of so many clips (`made`), their own latents (`own`), pixels, head's place.

        made, own: [N, C, T, h, w] bfloat16; video: uint8 [N, F, H, W, 3]; head: [N, 2], x and y in pixels.
        """
        cache = self.world.held_out if purpose == HELD_OUT else self.world.clips

        def make(mine: range) -> dict[str, Tensor]:
            made = [
                self.world.made(purpose, some, [self.world.sentences[0]] * len(some)).bfloat16()
                for some in (list(mine[k : k + AT_ONCE]) for k in range(0, len(mine), AT_ONCE))
            ]
            what = [self.world.wanted(purpose, i) for i in mine]
            heads = np.array([[float(v.mean()) * self.size / 64 for v in one.pose["head"]] for one in what])
            video = np.stack([dance.perform(one, size=self.size) for one in what])
            return {"made": torch.cat(made), "video": torch.from_numpy(video), "head": torch.from_numpy(heads)}

        about = {"transformer": by, "steps": self.recipe.watch.sampler_steps, "guidance": self.recipe.watch.guidance}
        with torch.no_grad():
            found = cached(about, self.recipe, self.ranks, self.folder / "made", purpose, count, make)
        return {**found, "own": cache.latents[:, :, 1:]}

    def start(self, expert: str) -> None:
        raise InputError("E4032", f"init = start:{expert}: a decoder recipe begins as `start` is, without `init`")

    def only(self, phase: Phase) -> tuple[str, ...] | None:
        return ("vae.decoder.", "vae.conv2.")

    def loss(self, phase: Phase, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = stream(self.recipe.seed, BATCH, step, self.ranks.rank)
        crop = (stage.crop or self.size) // self.stride
        latents: list[Tensor] = []
        videos: list[Tensor] = []
        while len(latents) < stage.batch:
            i, kind = int(rng.integers(len(self.clips["made"]))), "own" if rng.random() < OWN else "made"
            for _ in range(min(stage.crops, stage.batch - len(latents))):
                y, x = self._corner(rng, self.clips["head"][i], crop)
                latents.append(self.clips[kind][i, :, :, y : y + crop, x : x + crop])
                part = self.clips["video"][i].numpy()
                top, left, side = y * self.stride, x * self.stride, crop * self.stride
                videos.append(to_video(np.ascontiguousarray(part[:, top : top + side, left : left + side])))
        return pixel_loss(self._pixels(torch.stack(latents)), torch.stack(videos), phase.loss)

    def _corner(self, rng: np.random.Generator, head: Tensor, crop: int) -> tuple[int, int]:
        """The first row and column of a square of latents, often one that shows the head."""
        most = self.size // self.stride - crop
        y, x = (int(v) for v in rng.integers(0, most + 1, 2))
        if rng.random() < LOOKED_AT:
            y, x = (
                min(max(int(v / self.stride) - crop // 2 + int(rng.integers(-1, 2)), 0), most)
                for v in (head[1], head[0])
            )
        return y, x

    def _pixels(self, z: Tensor) -> Tensor:
        """Normalised latents to pixels, with a gradient, not clamped."""
        return self.vae.render(self.vae.denormalise(z.float()).to(self.vae.conv2.weight.dtype)).float()

    @torch.no_grad()
    def look(self, phase: Phase, step: int, *, picture: bool) -> dict[str, float]:
        """What a judge sees in held-out clips that the transformer made, and in the encoder's own; a sheet of both."""
        names = ("psnr", "distance", "colours", "psnr_own", "distance_own")
        sums, rows = torch.zeros(1 + len(names)), []
        for i in self.ranks.mine(min(self.recipe.watch.prompts, self.recipe.data.held_out)):
            true = self.held_out["video"][i].numpy()
            made, own = (to_frames(self._pixels(self.held_out[kind][i][None])[0]) for kind in ("made", "own"))
            wanted = self.world.wanted(HELD_OUT, i)
            verdict, of_own = dance_judge.judge(made, wanted), dance_judge.judge(own, wanted)
            seen = (psnr(true, made), verdict.distance, float(verdict.colours), psnr(true, own), of_own.distance)
            sums += torch.tensor([1.0, *seen])
            rows.append((f"clip {i}", [true, made, own]))
        self.ranks.sum_(sums)
        if picture and rows and self.ranks.first:
            contact_sheet(rows[:12], self.folder / "sheets" / f"{phase.name}-{step:06d}.png", scale=1)
        return {name: round(float(v), 4) for name, v in zip(names, sums[1:] / sums[0], strict=True)}

    def finish(self) -> None:
        """Write `checkpoint/`: `start` with another decoder."""
        if not self.ranks.first:
            return
        world, variant, clip = self.world, self.variant, self.variant.clip
        save_official(
            self.folder / "checkpoint",
            dits={variant.experts[0][0]: (world.dit.state_dict(), variant.dit)},
            vae=self.vae.state_dict(),
            vae_config=self.vae.config,
            text=world.text.state_dict(),
            clip=None if clip is None else (world.clip.state_dict(), clip),
            tokenizer_dir=self.folder / "checkpoint" / "google" / "umt5-xxl",
            dtype=torch.bfloat16,
        )
