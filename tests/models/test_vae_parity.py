"""Our VAE against diffusers' AutoencoderKLWan: same random weights, same numbers, both releases."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wanloom.models.config import VAE_21, VAE_22, VaeConfig
from wanloom.models.vae import CausalVae

diffusers = pytest.importorskip("diffusers")

# ours (the official names) -> diffusers; the first rule that matches the start of a name is applied
RULES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
    (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
)
INNER = (
    (".residual.0.", ".norm1."),
    (".residual.2.", ".conv1."),
    (".residual.3.", ".norm2."),
    (".residual.6.", ".conv2."),
    (".shortcut.", ".conv_shortcut."),
)
CONFIGS = {
    "2.1": replace(VAE_21, dim=16, decoder_dim=16),
    "2.2": replace(VAE_22, dim=16, decoder_dim=24),
    "2.1 one block": replace(VAE_21, dim=8, decoder_dim=8, multipliers=(1, 1, 2, 4), blocks=1),
}
RELATIVE = 1e-5  # ||a - b|| / ||b||; rounding alone gives about 1e-6
WORST = 5e-5  # max|a - b| / max|b|


def diffusers_name(name: str, config: VaeConfig) -> str:
    for pattern, target in RULES:
        name = re.sub(pattern, target, name)
    for old, new in INNER:
        name = name.replace(old, new)
    if config.residual:
        name = re.sub(r"^encoder\.downsamples\.(\d)\.downsamples\.", r"encoder.down_blocks.\1.resnets.", name)
        name = re.sub(r"^decoder\.upsamples\.(\d)\.upsamples\.", r"decoder.up_blocks.\1.resnets.", name)
        name = re.sub(r"^(encoder\.down_blocks\.\d)\.resnets\.\d\.(resample|time_conv)\.", r"\1.downsampler.\2.", name)
        return re.sub(r"^(decoder\.up_blocks\.\d)\.resnets\.\d\.(resample|time_conv)\.", r"\1.upsampler.\2.", name)
    name = name.replace("encoder.downsamples.", "encoder.down_blocks.")
    if not name.startswith("decoder.upsamples."):
        return name
    _, _, index, rest = name.split(".", 3)
    stage, layer = divmod(int(index), config.blocks + 2)
    return f"decoder.up_blocks.{stage}." + (f"resnets.{layer}." if layer <= config.blocks else "upsamplers.0.") + rest


def to_diffusers(weights: dict[str, Tensor], config: VaeConfig) -> dict[str, Tensor]:
    renamed = {diffusers_name(name, config): tensor for name, tensor in weights.items()}
    assert len(renamed) == len(weights)
    return renamed


def random_vae(config: VaeConfig, seed: int = 0) -> CausalVae:
    """Matrices of unit gain, gammas near one, biases not zero: nothing may hide."""
    vae = CausalVae(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in vae.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            fan_in = p[0].numel()
            p.copy_(1 + 0.1 * noise if name.endswith("gamma") else 0.1 * noise if p.dim() == 1 else noise / fan_in**0.5)
    return vae


def peer_of(vae: CausalVae) -> torch.nn.Module:
    config = vae.config
    pixels = 3 * config.patch**2
    peer = diffusers.AutoencoderKLWan(
        base_dim=config.dim,
        decoder_base_dim=config.decoder_dim,
        z_dim=config.z,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.blocks,
        temperal_downsample=list(config.temporal),
        is_residual=config.residual,
        in_channels=pixels,
        out_channels=pixels,
        patch_size=config.patch if config.patch > 1 else None,
        scale_factor_spatial=config.stride[1],
    )
    peer.load_state_dict(to_diffusers(vae.state_dict(), config))
    return peer.eval()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= RELATIVE * theirs.norm()
    assert (ours - theirs).abs().max() <= WORST * theirs.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(1, 9, 64, 48), (2, 5, 32, 64), (1, 1, 32, 32)], ids=str)
@torch.no_grad()
def test_encode_and_decode_equal_diffusers(name: str, shape: tuple[int, int, int, int]) -> None:
    vae = random_vae(CONFIGS[name])
    peer = peer_of(vae)
    batch, frames, height, width = shape
    video = torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1

    mu = peer.encode(video).latent_dist.mean
    z, _ = vae.encode(video)
    assert_close(z, vae.normalise(mu))
    assert_close(vae.moments(video)[0], mu)
    assert_close(vae.decode(z)[0], peer.decode(vae.denormalise(z)).sample)
