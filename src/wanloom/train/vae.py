"""Training the causal VAE: reconstruction, a KL term strong enough for diffusion, and whitened latents at the end.

The KL term keeps latents small and the decoder tolerant of noise (a transformer's errors decode to clean shapes).
When training is done the latents' principal axes are scaled to about unit variance and that map is written into the
two 1x1x1 convolutions (`conv1`, `conv2`), with the published statistics: nothing outside the weights knows of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wanloom.demo import dance, dance_judge
from wanloom.demo.judge import judge
from wanloom.demo.talk import correlation, observe
from wanloom.demo.world import caption
from wanloom.durable import atomic_path
from wanloom.errors import InputError
from wanloom.media.sheets import contact_sheet
from wanloom.models.vae import CausalVae, init_for_training
from wanloom.train.data import (
    HELD_OUT,
    NOISE,
    held_out_clip,
    sample_training_clip,
    stream,
    to_video,
    torch_stream,
    vae_batch,
)  # fmt: skip
from wanloom.train.objective import vae_loss
from wanloom.train.ranks import Ranks
from wanloom.train.recipe import Phase, Recipe, Stage
from wanloom.variants import VARIANTS

# Principal directions weaker than this (variance, un-normalised) stay weak when whitened: they are below the noise that
# the decoder forgives, and blown up they would only be noise to learn.
FLOOR = 0.1

# What `look` reports of each world (mouth: its correlation with that of the clip; distance: of joints, in heights).
SEEN = {
    "shapes": ("psnr", "iou", "shape", "motion", "all_right", "shape_noisy", "all_right_noisy"),
    "talk": ("psnr", "psnr_noisy", "mouth", "mouth_noisy"),
    "dance": ("psnr", "psnr_noisy", "distance", "distance_noisy", "colours"),
}


def to_frames(video: Tensor) -> np.ndarray:
    """float [3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    return ((video.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of two videos of uint8, in dB."""
    return float(10 * np.log10(255**2 / max(np.square(a.astype(np.float32) - b).mean(), 1e-3)))


class VaeTask:
    """What a VAE run needs to know of its subject; the loop does the rest."""

    def __init__(self, recipe: Recipe, ranks: Ranks, folder: Path) -> None:
        variant = VARIANTS[recipe.variant]
        self.recipe, self.ranks, self.folder = recipe, ranks, folder
        self.size, self.frames = variant.defaults.size[0], variant.defaults.frames // 4 * 4 + 1
        self.vae = CausalVae(variant.vae)
        init_for_training(self.vae, torch_stream(recipe.seed))
        with torch.no_grad():  # start with little noise, which would hide the signal
            assert self.vae.conv1.bias is not None
            self.vae.conv1.bias[variant.vae.z :] = -6
        self.device = torch.device(recipe.device)
        self.vae.to(self.device, getattr(torch, recipe.dtype))
        for module in self.vae.modules() if recipe.dtype == "bfloat16" else ():
            if isinstance(module, nn.Conv3d):  # a third faster in bf16 on a CPU, slower in float32
                module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.modules: dict[str, nn.Module] = {"vae": self.vae}
        self.axes: Axes | None = None

    def start(self, expert: str) -> None:
        """Take the VAE of the recipe's `start`."""
        folder = Path(str(self.recipe.start))
        path = folder / published_name(self.vae)
        if expert != "vae" or not path.is_file():
            raise InputError(
                "E4032", f"start:{expert}: a VAE recipe begins from start:vae, the file {path.name} of {folder}"
            )
        self.vae.load_state_dict(load_file(path))

    def only(self, phase: Phase) -> tuple[str, ...] | None:
        return None if "vae" in phase.trains else ("vae.decoder.", "vae.conv2.")

    def loss(self, phase: Phase, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
        video = vae_batch(self.recipe, phase.loss, stage, self.size, step, self.ranks.rank)
        latents = (stage.frames - 1) // 4 + 1
        side = (stage.crop or self.size) // self.vae.config.stride[1]
        noise = torch.randn(
            len(video), self.vae.config.z, latents, side, side,
            generator=torch_stream(self.recipe.seed, NOISE, step, self.ranks.rank),
        )  # fmt: skip
        project = self.principal().project if self.recipe.directions and "vae" not in phase.trains else None
        return vae_loss(self.vae, video.to(self.device), phase.loss, step, noise.to(self.device), project)

    def principal(self) -> Axes:
        """The principal directions that are kept, for phases in which the latents no longer change."""
        if self.axes is None:
            self.axes = principal_axes(self.vae, self.recipe, self.size, self.frames)
        return self.axes

    @torch.no_grad()
    def look(self, phase: Phase, step: int, *, picture: bool) -> dict[str, Any]:
        """PSNR and what a judge sees on held-out clips, plain and with noise on the latents; latent size by frame."""
        names = SEEN[self.recipe.data.world]
        sums = torch.zeros(2, len(names))
        spread = torch.zeros(self.frames // 4 + 1)
        rows: list[tuple[str, list[np.ndarray]]] = []
        for i in self.ranks.mine(self.recipe.watch.prompts):
            pixels = held_out_clip(self.recipe, i, self.size, self.frames)
            video = to_video(pixels)[None].to(self.device)
            mu, _ = self.vae.moments(video)
            if self.axes is not None:
                mu = self.axes.project(mu)
            out = self.vae.render(mu)[0]
            std = mu.std((0, 2, 3, 4), keepdim=True)
            noise = torch.randn(mu.shape, generator=torch_stream(self.recipe.seed, NOISE, i))
            noisy = self.vae.render(mu + 0.3 * std * noise.to(self.device))[0]
            mse = F.mse_loss(out.clamp(-1, 1), video[0]) / 4
            text, seen = self._judge(i, pixels, to_frames(out), to_frames(noisy))
            for name, value in {"psnr": -10 * float(mse.log10()), **seen}.items():
                sums[:, names.index(name)] += torch.tensor([float(value), 1.0])
            spread += mu.std((0, 1, 3, 4)).cpu()
            rows.append((text, [pixels, to_frames(out), to_frames(noisy)]))
        self.ranks.sum_(spread)
        if picture and rows and self.ranks.first:
            contact_sheet(rows[:12], self.folder / "sheets" / f"{phase.name}-{step:06d}.png", scale=1)
        self.ranks.sum_(sums)
        report = {name: round(float(total / max(n, 1)), 4) for name, total, n in zip(names, *sums, strict=True)}
        return {**report, "latent_std": [round(float(v) / self.recipe.watch.prompts, 3) for v in spread]}

    def _judge(self, i: int, pixels: np.ndarray, out: np.ndarray, noisy: np.ndarray) -> tuple[str, dict[str, float]]:
        """What held-out clip i shows, in words, and what is left of that."""
        if self.recipe.data.world == "dance":
            what = dance.sample_dance(stream(self.recipe.seed, HELD_OUT, i), len(pixels), split="held_out")
            dances, shaky = (dance_judge.judge(video, what) for video in (out, noisy))
            return "a figure", {
                "psnr_noisy": psnr(pixels, noisy), "distance": dances.distance, "distance_noisy": shaky.distance,
                "colours": float(dances.colours),
            }  # fmt: skip
        if self.recipe.data.world == "talk":
            mouth = observe(pixels).mouth
            said = [correlation(observe(video).mouth, mouth) for video in (out, noisy)]
            return "a head", {"psnr_noisy": psnr(pixels, noisy), "mouth": said[0], "mouth_noisy": said[1]}
        clip = sample_training_clip(self.recipe.seed, HELD_OUT, i, self.recipe.data)
        clean, rough = judge(out, clip), judge(noisy, clip)
        return caption(clip, stream(i)), {
            "iou": clean.iou, "shape": clean.shape, "motion": clean.motion, "all_right": clean.all_right,
            "shape_noisy": rough.shape, "all_right_noisy": rough.all_right,
        }  # fmt: skip

    def finish(self) -> None:
        """Whiten and write `checkpoint/` (rank 0)."""
        if self.ranks.first:
            self.vae.float().cpu()
            whiten(self.vae, principal_axes(self.vae, self.recipe, self.size, self.frames))
            write_vae(self.vae, self.folder / "checkpoint")


@dataclass(frozen=True)
class Axes:
    """Principal axes of un-normalised latents: their mean [z], variances [z] rising, axes [z, z] as columns, float64.

    keep: how many of the strongest are kept.
    """

    mean: Tensor
    values: Tensor
    axes: Tensor
    keep: int

    def project(self, mu: Tensor) -> Tensor:
        """Latents mu [B, z, T, h, w] without what they have in the weaker directions."""
        strong = self.axes[:, len(self.values) - self.keep :]
        matrix = (strong @ strong.T).to(mu)
        mean = self.mean.to(mu)[:, None, None, None]
        return torch.einsum("cd,bdthw->bcthw", matrix, mu - mean) + mean


@torch.no_grad()
def principal_axes(vae: CausalVae, recipe: Recipe, size: int, frames: int) -> Axes:
    """The axes of the latents of up to 192 held-out clips.  With `recipe.directions` only so many are kept."""
    samples = []
    for i in range(min(192, recipe.data.clips)):
        video = to_video(held_out_clip(recipe, 100_000 + i, size, frames))
        mu, _ = vae.moments(video[None].to(vae.conv1.weight.device))
        samples.append(mu[0].flatten(1).double().cpu())
    x = torch.cat(samples, 1)  # [z, N]
    mean = x.mean(1)
    centred = x - mean[:, None]
    values, axes = torch.linalg.eigh(centred @ centred.T / x.shape[1])
    return Axes(mean, values, axes, recipe.directions or len(values))


@torch.no_grad()
def whiten(vae: CausalVae, found: Axes) -> None:
    """Write the whitening map of the latents into `conv1` and `conv2`; pixels change by what is not kept.

    With principal axes U and variances v of the un-normalised latents, the new latent is (v + FLOOR)^-1/2 U^T (mu - m),
    and the published mean and std are folded in, so that `encode` gives it directly.  Channels of directions that are
    not kept become constant, and the decoder does not look at them.
    """
    m, axes = found.mean[:, None], found.axes
    scale = (found.values + FLOOR).rsqrt()
    kept = torch.arange(len(scale)) >= len(scale) - found.keep
    scale, unscale = torch.where(kept, scale, 0), torch.where(kept, 1 / scale, 0)
    mean = torch.tensor(vae.config.mean, dtype=torch.float64)[:, None]
    std = torch.tensor(vae.config.std, dtype=torch.float64)[:, None]
    # mu' = std * W (mu - m) + mean with W = diag(scale) U^T; the decoder first undoes it.
    forward = std * (scale[:, None] * axes.T)  # [z, z]
    backward = axes @ torch.diag(unscale) @ torch.diag(1 / std[:, 0])
    z = vae.config.z
    weight, bias = vae.conv1.weight, vae.conv1.bias
    assert bias is not None and vae.conv2.bias is not None
    old_weight, old_bias = weight[:z, :, 0, 0, 0].double(), bias[:z].double()[:, None]
    weight[:z, :, 0, 0, 0] = (forward @ old_weight).to(weight.dtype)
    bias[:z] = (forward @ (old_bias - m) + mean)[:, 0].to(bias.dtype)
    out_weight, out_bias = vae.conv2.weight[:, :, 0, 0, 0].double(), vae.conv2.bias.double()[:, None]
    vae.conv2.weight[:, :, 0, 0, 0] = (out_weight @ backward).to(weight.dtype)
    vae.conv2.bias.copy_((out_weight @ (m - backward @ mean) + out_bias)[:, 0])


def published_name(vae: CausalVae) -> str:
    """The file that holds such a VAE in a published checkpoint."""
    return "Wan2.2_VAE.safetensors" if vae.config.residual else "Wan2.1_VAE.safetensors"


def write_vae(vae: CausalVae, folder: Path) -> None:
    """The VAE alone under its published name, bf16; `save_official` adds the rest of a model to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / published_name(vae)) as part:
        save_file({k: v.bfloat16().contiguous() for k, v in vae.state_dict().items()}, part, metadata={"format": "pt"})
