"""What this GPU reaches with nothing but the main operations: products, copies, convolutions, attention kernels.

    PYTHONPATH=src python benchmarks/gpu/calibration.py [--tokens 27280 32760 75600] [--rounds 3]

Run it first: every other number is a share of these.  Kernels that this machine does not have are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import torch

from wanloom.runtime.attention import KERNELS, capability_of
from wanloom.runtime.kernels import KERNEL_FACTS


def best(run: common.Run, rounds: int) -> float:
    run()
    return min(common.seconds(run) for _ in range(rounds))


def operations(rounds: int) -> dict[str, dict[str, Any]]:
    here, large = common.device(), torch.cuda.is_available()
    rows: dict[str, dict[str, Any]] = {"product, bfloat16": {"TFLOP/s": common.gemm_rate() / 1e12}}
    x = torch.empty(2**30 if large else 2**20, dtype=torch.uint8, device=here)
    y = torch.empty_like(x)
    rows["copy"] = {"GB/s": 2 * x.numel() / best(lambda: y.copy_(x), rounds) / 1e9}
    channels, frames, height, width = (96, 4, 720, 1280) if large else (8, 2, 16, 16)
    for dtype in (torch.bfloat16, torch.float32):
        conv = torch.nn.Conv3d(channels, channels, 3, padding=(0, 1, 1), device=here, dtype=dtype)
        clip = torch.randn(1, channels, frames + 2, height, width, device=here, dtype=dtype)
        clip = clip.to(memory_format=torch.channels_last_3d)
        work = 2 * 27 * channels**2 * frames * height * width
        name = f"convolution, {str(dtype).removeprefix('torch.')}"
        rows[name] = {"TFLOP/s": work / best(lambda conv=conv, clip=clip: conv(clip), rounds) / 1e12}
    return rows


def attention(name: str, tokens: int, rounds: int) -> dict[str, Any]:
    """40 heads of 128, one sample, bfloat16."""
    heads = 40 if torch.cuda.is_available() else 2
    q, k, v = (torch.randn(1, tokens, heads, 128, device=common.device(), dtype=torch.bfloat16) for _ in range(3))
    try:
        taken = best(lambda: KERNELS[name](q, k, v, None), rounds)
    except RuntimeError as error:  # out of memory (the scores), or a form that this kernel does not take
        return {"left out": str(error).split("\n", 1)[0][:40]}
    return {"TFLOP/s": 4 * tokens**2 * heads * 128 / taken / 1e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    lengths = (27280, 32760, 75600) if torch.cuda.is_available() else (256,)
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    facts = common.about(rounds=args.rounds)
    with torch.no_grad():
        rows = operations(args.rounds)
        for name, kernel in KERNEL_FACTS.items():
            if kernel.missing(capability_of(common.device())) is None:
                for tokens in args.tokens:
                    rows[f"{name}, {tokens} tokens"] = attention(name, tokens, args.rounds)
    common.table(rows)
    common.save(args.json, facts, rows=rows)


if __name__ == "__main__":
    main()
