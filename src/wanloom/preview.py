"""Latents as small pictures, cheap enough to look at after every step.

A latent of the Wan VAEs is, to a first approximation, a picture of its own: the mean colour of the 8x8 (or 16x16)
pixels under it is nearly a linear function of its channels.  `Previewer.fit` finds that function for any VAE, ours or
a published one, by decoding some random flat latents and solving least squares; it takes a fraction of a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wanloom.media import save_video
from wanloom.models.vae import CausalVae

SIDE = 2  # latents a side of a probe: small, and every pixel still has neighbours
SEEN = 160  # pixels of the longer side of a saved film, at least
PER_CHANNEL = 8  # probes for each unknown of the least squares


@dataclass(frozen=True)
class Film:
    """Small pictures, one for each latent frame: `frames` holds width * height * 3 bytes of RGB each."""

    width: int
    height: int
    frames: tuple[bytes, ...]

    def save(self, path: Path, fps: int) -> None:
        """Write the film as an animation (.gif), in place of an older one, enlarged until it can be seen."""
        pixels = np.stack([np.frombuffer(f, np.uint8).reshape(self.height, self.width, 3) for f in self.frames])
        zoom = -(-SEEN // max(self.width, self.height))
        pixels = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
        save_video(path, pixels, fps=fps, overwrite=True)


@dataclass(frozen=True)
class Previewer:
    """The linear map from a latent's channels to a colour in [-1, 1]: weight [C, 3], bias [3]."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, vae: CausalVae) -> Previewer:
        """The map that explains best how `vae` paints flat latents of unit normal channels."""
        like = vae.conv2.weight
        z = vae.config.z
        generator = torch.Generator().manual_seed(0)
        channels = torch.randn(PER_CHANNEL * z, z, generator=generator)
        flat = channels[:, :, None, None, None].expand(-1, -1, 1, SIDE, SIDE)
        colors = torch.cat(
            [vae.decode(part.to(like))[0].mean((2, 3, 4)).float().cpu() for part in torch.split(flat, 16)]
        )
        columns = torch.cat((channels, torch.ones(len(channels), 1)), 1)
        solution = torch.linalg.lstsq(columns.double(), colors.double()).solution.float()
        return cls(solution[:-1], solution[-1])

    def __call__(self, x0: Tensor) -> Film:
        """The film of latents [C, T, h, w]."""
        rgb = torch.einsum("cthw,cr->thwr", x0.float().cpu(), self.weight) + self.bias
        pixels = ((rgb.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
        return Film(x0.shape[3], x0.shape[2], tuple(frame.numpy().tobytes() for frame in pixels))
