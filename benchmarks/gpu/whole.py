"""A whole video from text features to pixels on the host: two experts, guidance, sampler, VAE; time by stage, memory.

    PYTHONPATH=src python benchmarks/gpu/whole.py --shape 480p [--steps 40] [--compile]
    PYTHONPATH=src python benchmarks/gpu/whole.py --shape 720p --stream [--resident 0]     # experts wait on the host
    PYTHONPATH=src python benchmarks/gpu/whole.py --shape 5b --stream                      # 1280x704, 121 frames

Random bfloat16 weights of the published sizes and random text features: time and memory, no picture.  Not in it are
reading weights, the text encoder (once a prompt) and writing the file, which a run does beside decoding.  Both branches
of guidance run one after the other; the solver is UniPC.  The official command takes 326.9 s on one H100 for 480p, 81
frames, 40 steps of T2V-A14B, text encoder and VAE included (its README).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import common
import torch
from common import SHAPES, Shape
from memory import build
from torch import Tensor

from wanloom.models.config import VAE_21, VAE_22, VaeConfig
from wanloom.models.dit import DiT
from wanloom.models.vae import CausalVae
from wanloom.runtime.compile import compile_blocks
from wanloom.sampling.samplers import SAMPLERS
from wanloom.sampling.schedule import make_schedule
from wanloom.variants import VARIANTS

# The variant whose experts, schedule and guidance are run, and the VAE that decodes.
RUNS: dict[str, tuple[str, VaeConfig]] = {
    "480p": ("t2v-A14B", VAE_21), "720p": ("t2v-A14B", VAE_21), "5b": ("ti2v-5B", VAE_22),
    "small": ("t2v-A14B", VaeConfig(dim=8, decoder_dim=8)),
}  # fmt: skip


class Clock:
    """Seconds of each stage, and the peaks of memory since the beginning."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        common.wait()
        start = time.perf_counter()
        yield
        common.wait()
        row = {"seconds": time.perf_counter() - start}
        if torch.cuda.is_available():
            row["allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
            row["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
            torch.cuda.reset_peak_memory_stats()
        self.rows[name] = row


def experts(shape: Shape, name: str, args: argparse.Namespace) -> dict[str, DiT]:
    """The experts of a variant, of one seed: as good as two for what is measured, but each with memory of its own."""
    found = {}
    for expert, _ in VARIANTS[name].experts:
        found[expert] = build("streamed" if args.stream else "resident", shape, args.resident)
        found[expert].keeps = not args.stream
        if args.compile:
            compile_blocks(found[expert].blocks, dynamic=False)
    return found


def denoise(models: dict[str, DiT], shape: Shape, name: str, steps: int, clock: Clock) -> Tensor:
    """One video's latents; each expert's steps are a stage."""
    variant = VARIANTS[name]
    given = common.inputs(shape)
    schedule = make_schedule("unipc", steps, variant.defaults.shift)
    empty = torch.zeros_like(given["context"])
    names = [next(e for e, level in variant.experts if t >= 1000 * level) for t in schedule.timesteps]
    once = {e: [models[e].once({"context": c}) for c in (given["context"], empty)] for e in dict.fromkeys(names)}
    order = iter(names)

    def velocity(x: Tensor, t: float) -> Tensor:
        expert = next(order)
        time_ = x.new_tensor([[t]])
        v, v0 = (models[expert](x, time_, **some) for some in once[expert])
        return v0 + variant.guidance_of(expert, variant.defaults.guidance) * (v - v0)

    states = iter(SAMPLERS["unipc"](velocity, given["x"], schedule))
    x = given["x"]
    for expert in dict.fromkeys(names):
        with clock.stage(f"denoise, {expert}, {names.count(expert)} steps"):
            for _ in range(names.count(expert)):
                x = next(states).x
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=RUNS, default="480p" if torch.cuda.is_available() else "small")
    parser.add_argument("--layers", type=int, help="blocks (default: all)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--compile", action="store_true", help="compiled blocks; a run that does not count comes first")
    parser.add_argument("--stream", action="store_true", help="blocks come from the host and go")
    parser.add_argument("--resident", type=int, default=0, help="with --stream: blocks that stay")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    shape, (name, vae_config) = SHAPES[args.shape], RUNS[args.shape]
    shape = replace(shape, config=replace(shape.config, layers=args.layers or shape.config.layers))
    asked = {key: getattr(args, key) for key in ("shape", "steps", "compile", "stream", "resident")}
    facts = common.about(**asked, layers=shape.config.layers)
    models = experts(shape, name, args)
    with torch.device("meta"):
        vae = CausalVae(vae_config)
    vae = cast(CausalVae, common.random_weights(vae, torch.bfloat16))
    denoise(models, shape, name, 2, Clock())  # compiles, chooses kernels
    clock = Clock()
    with clock.stage("all"):
        inner = Clock()
        z = denoise(models, shape, name, args.steps, inner)
        with inner.stage("decode"):
            frames = sum(int(((piece + 1) * 127.5).to(torch.uint8).cpu().shape[2]) for piece in vae.decode_chunks(z))
    print(f"{frames} frames of {shape.latent[2]} x {shape.latent[3]} latents")
    rows = {**inner.rows, **clock.rows}
    common.table(rows)
    common.save(args.json, facts, rows=rows)


if __name__ == "__main__":
    main()
