"""Training text encoder and transformer from scratch by flow matching, on latents that were encoded once.

The tasks differ only in what a batch holds: T2V text; I2V also the channels of the first frame; TI2V also samples whose
first latent frame is given clean.  Experts are phases that start from a shared phase and answer for a range of sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wanloom.checkpoint.detect import config_of
from wanloom.checkpoint.load import load_into, survey_dit, survey_text, survey_vae
from wanloom.checkpoint.weights import open_weights
from wanloom.demo.judge import judge
from wanloom.demo.world import VOCABULARY, caption
from wanloom.durable import sha256_file
from wanloom.encoders import Tokenizer, build_umt5
from wanloom.media.sheets import contact_sheet
from wanloom.models.adapters import build_dit
from wanloom.models.config import DiTConfig
from wanloom.models.dit import init_for_training, rope_table
from wanloom.models.layers import Scene
from wanloom.models.vae import CausalVae
from wanloom.runtime.attention import KERNELS, use_kernel
from wanloom.runtime.machine import fast_bfloat16
from wanloom.sampling.samplers import SAMPLERS
from wanloom.sampling.schedule import make_schedule
from wanloom.train.data import (
    BATCH,
    CAPTIONS,
    CLIPS,
    HELD_OUT,
    NOISE,
    LatentCache,
    latent_cache,
    pick,
    stream,
    torch_stream,
)  # fmt: skip
from wanloom.train.objective import FlowBatch, flow_loss, sample_sigmas
from wanloom.train.ranks import Ranks
from wanloom.train.recipe import Phase, Recipe, Stage
from wanloom.train.vae import to_frames
from wanloom.train.words import SPECIAL, write_tokenizer
from wanloom.variants import VARIANTS

# Noise levels at which the held-out loss is measured: a few on each side of the usual expert boundary (0.875).
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.82, 0.9, 0.95, 0.99)
DEAD = 0.01  # a latent channel that varies less carries nothing (`Recipe.directions`)


class AtFrame(nn.Module):
    """A part for `dit.prepare`: single latent frames are told that they stand at other places in time (`places`).

    Pictures from all places of a clip teach shapes and colours first, cheaply; then clips teach motion.
    """

    def __init__(self, config: DiTConfig, latent_frames: int) -> None:
        super().__init__()
        self.config, self.latent_frames = config, latent_frames
        self.places: tuple[int, ...] = ()

    def forward(self, x: Tensor, scene: Scene) -> tuple[Tensor, Scene]:
        if self.places:
            per_frame = x.shape[1] // len(self.places)
            side = round(per_frame**0.5)
            table = rope_table((self.latent_frames, side, side), self.config.head_dim, x)
            rows = [table[place * per_frame : (place + 1) * per_frame] for place in self.places]
            scene = replace(scene, rope=torch.cat(rows))
        return x, scene


class FlowTask:
    """What a flow-matching run needs to know of its subject; the loop does the rest.

    This one's subject is moving shapes.  `train/people.py` has others, which say it anew: what is cached, which clips
    make a batch, what is left out for guidance, and how samples are judged.
    """

    vocabulary: Sequence[str] = VOCABULARY

    def __init__(self, recipe: Recipe, ranks: Ranks, folder: Path) -> None:
        assert recipe.vae is not None
        variant = VARIANTS[recipe.variant]
        self.recipe, self.ranks, self.folder, self.variant = recipe, ranks, folder, variant
        self.size, self.frames = variant.defaults.size[0], variant.defaults.frames
        self.image = variant.dit.in_channels > variant.dit.out_channels
        self.vae, digest = load_vae(Path(recipe.vae))
        self.latent_frames = (self.frames - 1) // self.vae.config.stride[0] + 1
        self.clips = self._cache(digest, CLIPS, recipe.data.clips)
        self.held_out = self._cache(digest, HELD_OUT, recipe.data.held_out)
        if ranks.first:
            write_tokenizer(self.vocabulary, folder / "checkpoint" / "google" / "umt5-xxl", variant.dit.text_len)
        ranks.barrier()
        self.tokenizer = Tokenizer(folder / "checkpoint" / "google" / "umt5-xxl")
        self.text_config = replace(variant.text, vocab=len(SPECIAL) + len(self.vocabulary))
        self._build()

    def _cache(self, digest: str, purpose: int, count: int) -> LatentCache:
        return latent_cache(
            self.vae, digest, self.recipe, self.ranks, self.folder / "latents", purpose, count, self.size, self.frames,
            image=self.image,
        )  # fmt: skip

    def _build(self) -> None:
        dtype = getattr(torch, self.recipe.dtype)
        self.device = torch.device(self.recipe.device)
        self.dit = init_for_training(build_dit(self.variant.dit), torch_stream(self.recipe.seed)).to(self.device, dtype)
        self.text = build_umt5(self.text_config).to(self.device, dtype)
        self.at_frame = AtFrame(self.variant.dit, self.clips.latents.shape[2])
        self.dit.prepare.append(self.at_frame)
        live = self.clips.latents.float().std((0, 2, 3, 4)) > DEAD
        self.live = None if bool(live.all()) else live.to(self.device)
        if self.live is not None:  # noise and nothing else comes in through the others
            with torch.no_grad():
                self.dit.patch_embedding.weight[:, : len(live)][:, ~self.live] = 0
        use_kernel(self.dit, KERNELS["plain"])
        for block in self.dit.blocks if self.recipe.compile else ():
            block.compile(dynamic=False)
        for block in self.dit.blocks if self.recipe.checkpointing else ():
            recompute(block)
        self.modules: dict[str, nn.Module] = {"dit": self.dit, "text": self.text}

    @torch.no_grad()
    def start(self, expert: str) -> None:
        """Take text encoder and one expert of the recipe's `start`; new input channels begin at zero.

        Where the other model speaks another VAE's latents, its first and last layer are left out: ours begin anew.
        """
        home = Path(str(self.recipe.start))
        weights, config = survey_dit(home / expert if (home / expert).is_dir() else home)
        with torch.device("meta"):
            other = build_dit(config)
        load_into(other, weights, dtype=torch.float32)
        values = dict(other.named_parameters())
        narrow = values.pop("patch_embedding.weight")
        if config.out_channels == self.variant.dit.out_channels:
            wide = self.dit.patch_embedding.weight
            wide.zero_()[:, : narrow.shape[1]] = narrow.to(wide.dtype)
        else:
            values = {name: v for name, v in values.items() if not name.startswith(("patch_embedding.", "head.head."))}
        for name, p in self.dit.named_parameters():
            if name in values:
                p.copy_(values[name])
        load_into(self.text, survey_text(find_text(home))[0], dtype=self.text.dtype, device=str(self.device))

    def only(self, phase: Phase) -> tuple[str, ...] | None:
        return tuple(f"{name}." for name in phase.trains)

    def encode(self, captions: list[str]) -> Tensor:
        """[B, text_len, text_dim], zero beyond each caption's end; with a gradient where one is wanted.

        All captions at once, padding masked: the same function as `encoders.encode_text`, which runs one at a time.
        """
        ids, mask = (t.to(self.device) for t in self.tokenizer(captions, self.variant.dit.text_len))
        out: Tensor = self.text(input_ids=ids, attention_mask=mask).last_hidden_state
        return out * mask[..., None]

    def batch(self, cache: LatentCache, indices: list[int], context: Tensor) -> FlowBatch:
        x0 = cache.latents[indices].to(self.device, torch.float32)
        inputs = {name: value[indices].to(self.device, torch.float32) for name, value in cache.inputs.items()}
        return FlowBatch(x0, context, inputs, live=self.live)

    def velocity(self, x: Tensor, t: Tensor, context: Tensor, **inputs: Tensor) -> Tensor:
        """The model's answer to what a conditioner would give."""
        out: Tensor = self.dit(x, t, **self.dit.once({"context": context, **inputs}))
        return out

    def loss(self, phase: Phase, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
        seed, rank = self.recipe.seed, self.ranks.rank
        rng = stream(seed, CAPTIONS, step, rank)
        indices = pick(seed, step, rank, self.ranks.size, stage.batch, len(self.clips.clips))
        context = self.encode(self.clips.captions(indices, rng, phase.flow.text_dropout))
        batch = self.batch(self.clips, indices, context)
        if stage.frames == 1:
            place = int(stream(seed, BATCH, step).integers(self.latent_frames))  # alike on all ranks
            self.at_frame.places, cut = (place,), slice(place, place + 1)
            batch = replace(batch, x0=batch.x0[:, :, cut], inputs={k: v[:, :, cut] for k, v in batch.inputs.items()})
        else:
            self.at_frame.places = ()
            if phase.flow.first_frame:
                held = torch.from_numpy(rng.random(len(indices)) < phase.flow.first_frame).to(self.device)
                batch = replace(batch, held=held)
        generator = torch_stream(seed, NOISE, step, rank)
        sigma = sample_sigmas(len(indices), phase.flow, generator)
        noise = torch.randn(batch.x0.shape, generator=generator)
        loss, _ = flow_loss(self.velocity, batch, sigma.to(self.device), noise.to(self.device))
        return loss, {}

    @torch.no_grad()
    def look(self, phase: Phase, step: int, *, picture: bool) -> dict[str, Any]:
        """Held-out loss at fixed noise levels; with `picture` also samples, judged, as a sheet."""
        self.at_frame.places = ()
        count = len(self.held_out.clips)
        mine = list(self.ranks.mine(count))
        rng = stream(self.recipe.seed, CAPTIONS, HELD_OUT)
        captions = self.held_out.captions(list(range(count)), rng, 0.0)
        sums = torch.zeros(len(LEVELS))
        if mine:
            batch = self.batch(self.held_out, mine, self.encode([captions[i] for i in mine]))
            noise = torch.stack([self._noise(batch, i) for i in mine]).to(self.device)
            for k, level in enumerate(LEVELS):
                _, each = flow_loss(self.velocity, batch, torch.full((len(mine),), level, device=self.device), noise)
                sums[k] = each.sum()
        losses = (self.ranks.sum_(sums) / count).tolist()
        inside = [v for v, s in zip(losses, LEVELS, strict=True) if phase.flow.low <= s <= phase.flow.high]
        report: dict[str, Any] = {
            "held_out": sum(inside) / len(inside),
            "levels": {str(s): round(v, 4) for s, v in zip(LEVELS, losses, strict=True)},
        }
        return {**report, **self.sample(phase, step)} if picture else report

    def sample(self, phase: Phase, step: int) -> dict[str, Any]:
        """Judge a few held-out prompts, and draw them; with `first_frame` or channels also from a given frame."""
        given = self.image or phase.flow.first_frame > 0
        report = self._sample(phase, step, given=self.image)
        if given and not self.image:
            report |= {f"image_{k}": v for k, v in self._sample(phase, step, given=True).items()}
        return report

    def _sample(self, phase: Phase, step: int, *, given: bool) -> dict[str, Any]:
        watch, seed = self.recipe.watch, self.recipe.seed
        mine = list(self.ranks.mine(min(watch.prompts, len(self.held_out.clips))))
        totals, rows = torch.zeros(7), []
        captions = [caption(self.held_out.clips[i], stream(seed, CAPTIONS, HELD_OUT, i)) for i in mine]
        frames = self._generate(mine, captions, given=given) if mine else []
        for i, text, video in zip(mine, captions, frames, strict=True):
            verdict = judge(video, self.held_out.clips[i])
            marks = (verdict.background, verdict.colour, verdict.shape, verdict.motion, verdict.all_right)
            totals += torch.tensor([1.0, *map(float, marks), verdict.iou])
            rows.append((text, [video]))
        self.ranks.sum_(totals)
        if rows and self.ranks.first:
            kind = "image-" if given else ""
            contact_sheet(rows[:16], self.folder / "sheets" / f"{phase.name}-{kind}{step:06d}.png", scale=2)
        names = ("background", "colour", "shape", "motion", "all_right", "iou")
        return {n: round(float(v), 3) for n, v in zip(names, totals[1:] / totals[0], strict=True)}

    def _generate(self, mine: list[int], captions: list[str], *, given: bool) -> list[np.ndarray]:
        """The clips that held-out scenes `mine` become, uint8 [F, H, W, 3] each; noise is a function of the scene."""
        context, empty = self.encode(captions), self.encode([""] * len(mine))
        batch = self.batch(self.held_out, mine, context)
        x = torch.stack([self._noise(batch, i) for i in mine])
        latents = self.denoise(x.to(self.device), batch, context, empty, given=given and not self.image)
        return [to_frames(self.vae.decode(z[None].cpu())[0][0]) for z in latents]

    def _noise(self, batch: FlowBatch, i: int) -> Tensor:
        """The noise of held-out scene i, [C, T, h, w]."""
        return torch.randn(batch.x0.shape[1:], generator=torch_stream(self.recipe.seed, NOISE, HELD_OUT, i))

    def denoise(self, x: Tensor, batch: FlowBatch, context: Tensor, empty: Tensor, *, given: bool) -> Tensor:
        """Sample latents like the pipeline does, with the weights as they stand, as one model for all noise levels."""
        guidance = self.recipe.watch.guidance
        options = dict(batch.inputs)
        if given:
            options["group"] = (torch.arange(x.shape[2], device=x.device) == 0).long()
            x = torch.cat([batch.x0[:, :, :1], x[:, :, 1:]], 2)
        without = self.unconditional(options)

        def velocity(x: Tensor, t: float) -> Tensor:
            if given:
                x = torch.cat([batch.x0[:, :, :1], x[:, :, 1:]], 2)
            times = x.new_tensor([[t, 0.0] if "group" in options else [t]]).expand(len(x), -1)
            v = self.velocity(x, times, context, **options)
            if guidance == 1:
                return v
            v0 = self.velocity(x, times, empty, **without)
            return v0 + guidance * (v - v0)

        schedule = make_schedule("unipc", self.recipe.watch.sampler_steps, self.variant.defaults.shift)
        for state in SAMPLERS["unipc"](velocity, x, schedule):
            x = state.x
        return torch.cat([batch.x0[:, :, :1], x[:, :, 1:]], 2) if given else x

    def unconditional(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the unconditional pass of guidance is given beside the empty text."""
        return inputs

    def encoders(self) -> dict[str, nn.Module]:
        """Frozen encoders that the checkpoint has beside the VAE: "clip", "audio"."""
        return {}

    def finish(self) -> None:
        """Write `checkpoint/`: the phases named like experts, else the last phase, in the published layout."""
        if self.ranks.first:
            from wanloom.train.export import write_checkpoint

            write_checkpoint(
                self.recipe, self.folder, self.variant, self.text.state_dict(), self.vae, **self.encoders()
            )


def recompute(block: nn.Module) -> None:
    """Keep only the block's input for the backward pass and compute the rest again there."""
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def find_text(folder: Path) -> Path:
    """The text encoder's file of a checkpoint in the published layout."""
    usual = folder / "models_t5_umt5-xxl-enc-bf16.safetensors"
    return next(iter(sorted(folder.glob("models_t5_*.safetensors"))), usual)


def load_vae(folder: Path) -> tuple[CausalVae, str]:
    """A frozen VAE from a checkpoint directory, in the faster number format here, and its file's SHA-256."""
    file = next(iter(sorted(folder.glob("Wan2.*_VAE.safetensors"))), folder / "Wan2.1_VAE.safetensors")
    weights, config = survey_vae(file)
    with torch.device("meta"):
        vae = CausalVae(config)
    load_into(vae, weights, dtype=torch.bfloat16 if fast_bfloat16() else torch.float32)
    return vae.requires_grad_(False), sha256_file(file)


def load_part(path: Path, kind: str, build: Callable[[Any], Any], dtype: torch.dtype) -> tuple[Any, str]:
    """Another frozen part ("audio", "clip") from its file or directory, and the SHA-256 of its first file."""
    weights = open_weights(path, kind=kind)
    with torch.device("meta"):
        part = build(config_of(weights))
    load_into(part, weights, dtype=dtype)
    return part.eval().requires_grad_(False), sha256_file(weights.headers[0].path)
