"""Small VAEs of both forms, and what they make of the same noise, for tests of ways to cut them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from wanloom.models.config import VAE_21, VAE_22, VaeConfig
from wanloom.models.vae import CausalVae

SMALL = {name: replace(row, dim=8, decoder_dim=8, blocks=1) for name, row in (("2.1", VAE_21), ("2.2", VAE_22))}


def a_vae(config: VaeConfig, dtype: torch.dtype) -> CausalVae:
    """Matrices of unit gain, biases not zero: what is wrong at a cut would be seen."""
    vae, generator = CausalVae(config).requires_grad_(False), torch.Generator().manual_seed(0)
    for p in vae.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(0.1 * noise if p.dim() == 1 else noise / p[0].numel() ** 0.5)
    return vae.to(dtype)


def pieces(video: Tensor) -> Iterator[Tensor]:
    yield video[:, :, :1]
    yield from video[:, :, 1:].split(4, 2)


@torch.no_grad()
def both_ways(vae: CausalVae, rows: int = 12) -> tuple[Tensor, Tensor]:
    """A stream of three latents as pixels, and nine frames as latents, from the same noise for every VAE."""
    config, dtype = vae.config, vae.conv1.weight.dtype
    generator = torch.Generator().manual_seed(1)
    side = config.stride[1]
    z = torch.randn(1, config.z, 3, rows, 2, generator=generator).to(dtype)
    video = torch.rand(1, 3, 9, rows * side, 2 * side, generator=generator).to(dtype) * 2 - 1
    return torch.cat(list(vae.decode_chunks(z)), 2), torch.cat(list(vae.encode_chunks(pieces(video))), 2)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())
