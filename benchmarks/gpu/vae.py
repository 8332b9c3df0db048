"""Decoding a whole video: our VAE beside diffusers', in bfloat16 and float32, time and peak memory.

    PYTHONPATH=src python benchmarks/gpu/vae.py --vae 2.1      # 1280x720, 81 frames
    PYTHONPATH=src python benchmarks/gpu/vae.py --vae 2.2      # 1280x704, 121 frames

The published sizes with random weights, the same on both sides, run in turn; both decode latent by latent, as they do
by default.  "ours" lets the frames go as they come, as a run does that writes a file; "ours, kept" keeps them all in
float32, as diffusers does.  Peak memory is of the process, weights of all engines apart.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import common
import torch
from torch import Tensor

from wanloom.budget import decode_flops
from wanloom.models.config import VAE_21, VAE_22, VaeConfig
from wanloom.models.vae import CausalVae

SHAPES: dict[str, tuple[VaeConfig, int, tuple[int, int]]] = {
    "2.1": (VAE_21, 81, (1280, 720)),
    "2.2": (VAE_22, 121, (1280, 704)),
    "small-2.1": (VaeConfig(dim=8, decoder_dim=8), 9, (64, 64)),
    "small-2.2": (
        VaeConfig(z=48, dim=8, decoder_dim=8, patch=2, residual=True, mean=VAE_22.mean, std=VAE_22.std), 9, (64, 64)
    ),
}  # fmt: skip


def ours(weights: CausalVae, z: Tensor, *, dtype: torch.dtype, kept: bool = False) -> Callable[[], object]:
    vae = like(weights, dtype)

    def run() -> None:
        pieces = vae.decode_chunks(z)
        if kept:
            torch.cat(list(pieces), 2)
        else:
            for _ in pieces:
                pass

    return run


def diffusers(weights: CausalVae, z: Tensor, *, dtype: torch.dtype) -> Callable[[], object]:
    from diffusers import AutoencoderKLWan

    config = weights.config
    more: dict[str, Any] = {}
    if config.residual:
        more = {
            "decoder_base_dim": config.decoder_dim, "is_residual": True, "patch_size": config.patch,
            "in_channels": 3 * config.patch**2, "out_channels": 3 * config.patch**2, "scale_factor_spatial": 16,
            "latents_mean": list(config.mean), "latents_std": list(config.std),
        }  # fmt: skip
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=config.dim, z_dim=config.z, **more)
    state = common.their_names("vae", weights.state_dict(), residual=config.residual)
    vae.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    vae.eval().requires_grad_(False)
    return partial(vae.decode, z.to(dtype), return_dict=False)


def like(weights: CausalVae, dtype: torch.dtype) -> CausalVae:
    with torch.device("meta"):
        vae = CausalVae(weights.config)
    vae.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.state_dict().items()}, assign=True)
    return vae.eval().requires_grad_(False)


BF16, F32 = torch.bfloat16, torch.float32
ENGINES: Mapping[str, Callable[[CausalVae, Tensor], Callable[[], object]]] = {
    "ours bfloat16": partial(ours, dtype=BF16),
    "ours bfloat16, kept": partial(ours, dtype=BF16, kept=True),
    "ours float32": partial(ours, dtype=F32),
    "diffusers bfloat16": partial(diffusers, dtype=BF16),
    "diffusers float32": partial(diffusers, dtype=F32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vae", choices=SHAPES, default="2.1" if torch.cuda.is_available() else "small-2.1")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config, frames, size = SHAPES[args.vae]
    facts = common.about(vae=args.vae, size=size, frames=frames, rounds=args.rounds)
    with torch.no_grad():
        with torch.device("meta"):
            empty = CausalVae(config)
        weights = cast(CausalVae, common.random_weights(empty, F32))
        z = torch.randn(1, config.z, (frames - 1) // 4 + 1, size[1] // config.stride[1], size[0] // config.stride[1])
        runs = {name: ENGINES[name](weights, z.to(common.device())) for name in args.engines}
        held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        rate, work = common.gemm_rate(), decode_flops(config, frames, size)
        first, times = common.in_turn(runs, args.rounds)
        base = "diffusers float32" if "diffusers float32" in runs else args.engines[0]
        against = common.ratios(times, base)
        rows: dict[str, dict[str, Any]] = {}
        for name, run in runs.items():
            median = statistics.median(times[name])
            rows[name] = {
                "first": first[name], "seconds": median, f"/ {base}": against[name], "TFLOP/s": work / median / 1e12,
                "of the product": work / median / rate,
                **{key: value - held / 1e9 for key, value in common.peak(run).items()},
            }  # fmt: skip
    side = common.gemm_size()
    print(f"a product of {side} x {side}: {rate / 1e12:.1f} TFLOP/s; the decoding: {work / 1e12:.3f} TFLOP")
    common.table(rows)
    common.save(args.json, facts, rows=rows)


if __name__ == "__main__":
    main()
