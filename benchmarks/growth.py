"""Does the time of a transformer grow as its operations do?  Four checks of one block of the width of Wan2.1 t2v-1.3B.

    python benchmarks/growth.py [--rounds 3] [--layers 1] [--dtype float32] [--quick] [--json FILE]

predicted   a * L + b * L * L is fitted to 520, 1170, 2340 and 4680 tokens and predicts 7020.
no attention   without the attention (its kernel gives back the queries) time(4680) / time(1170), which would be 4.
steps       ten steps of a sampler beside one, which would be 10.

Each round times all lengths once, and the least of the rounds counts.  Random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from wanloom.models.config import DiTConfig
from wanloom.models.dit import DiT
from wanloom.runtime.attention import use_kernel
from wanloom.sampling.samplers import SAMPLERS
from wanloom.sampling.schedule import make_schedule
from wanloom.sampling.velocity import conditioned

CONFIG = DiTConfig(dim=1536, ffn_dim=8960, heads=12, layers=1)
QUICK = DiTConfig(dim=96, ffn_dim=192, heads=3, layers=1, text_dim=32, text_len=16)
GRIDS = {520: (1, 20, 26), 1170: (3, 15, 26), 2340: (6, 15, 26), 4680: (12, 15, 26), 7020: (18, 15, 26)}
FITTED, PREDICTED = (520, 1170, 2340, 4680), 7020
FEW, MANY = 1170, 4680  # for the ratio without attention
STEPS = 10


def latent(tokens: int, config: DiTConfig) -> Tensor:
    frames, rows, columns = GRIDS[tokens]
    return torch.randn(1, config.in_channels, frames, 2 * rows, 2 * columns)


def no_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return q


def fit(times: Mapping[int, float]) -> tuple[float, float]:
    """a, b of a * L + b * L * L with the least sum of squared relative errors."""
    lengths = torch.tensor(list(times), dtype=torch.float64)
    seconds = torch.tensor(list(times.values()), dtype=torch.float64)
    columns = torch.stack((lengths, lengths.square()), 1) / seconds[:, None]
    a, b = torch.linalg.lstsq(columns, torch.ones(len(lengths), 1, dtype=torch.float64)).solution[:, 0].tolist()
    return a, b


def least(runs: Mapping[int, Callable[[], object]], rounds: int) -> dict[int, float]:
    """Seconds of each run: the least of so many, all in turn, after one that does not count."""
    best = dict.fromkeys(runs, float("inf"))
    for number in range(rounds + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                best[key] = min(best[key], time.perf_counter() - start)
    return best


def measure(config: DiTConfig, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    dit = DiT(config).to(dtype).eval()
    context, t = torch.randn(1, config.text_len, config.text_dim), torch.tensor([[437.0]])
    inputs = {tokens: latent(tokens, config) for tokens in GRIDS}
    passes = {tokens: (lambda x=x: dit(x, t, context)) for tokens, x in inputs.items()}
    times = least(passes, rounds)
    a, b = fit({tokens: times[tokens] for tokens in FITTED})
    predicted = a * PREDICTED + b * PREDICTED**2

    sampler, x = SAMPLERS["euler"], inputs[FITTED[0]]
    velocity = conditioned(dit, {"context": context})
    loops = {n: (lambda n=n: list(sampler(velocity, x, make_schedule("euler", n, 5.0)))) for n in (1, STEPS)}
    steps = least(loops, rounds)

    use_kernel(dit, no_attention)
    bare = least({tokens: passes[tokens] for tokens in (FEW, MANY)}, rounds)
    return {
        "seconds": times, "a": a, "b": b, "predicted": predicted, "measured": times[PREDICTED],
        "measured_over_predicted": times[PREDICTED] / predicted, "without_attention": bare[MANY] / bare[FEW],
        "steps": steps[STEPS] / steps[1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quick", action="store_true", help="a narrow model: whether it runs, not how it grows")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "rounds": args.rounds, "layers": args.layers,
        "dtype": args.dtype, "quick": args.quick,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    config = replace(QUICK if args.quick else CONFIG, layers=args.layers)
    with torch.no_grad():
        found = measure(config, getattr(torch, args.dtype), args.rounds)
    for tokens, seconds in found["seconds"].items():  # type: ignore[attr-defined]
        print(f"{tokens:6} tokens {seconds:9.3f} s")
    print(f"{PREDICTED} tokens predicted {found['predicted']:.3f} s; measured / predicted", end=" ")
    print(f"{found['measured_over_predicted']:.3f} (a {found['a']:.3g}, b {found['b']:.3g})")
    print(f"without attention, {MANY} / {FEW} tokens: {found['without_attention']:.2f} (4 where it is linear)")
    print(f"{STEPS} steps / 1 step: {found['steps']:.2f} ({STEPS} where it is linear)")
    if args.json is not None:
        args.json.write_text(json.dumps({**about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
