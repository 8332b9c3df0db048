"""Peak memory of the VAE for short and long videos: it must not grow with the number of frames.

    python benchmarks/vae_memory.py [--frames 9 33 81] [--size 160x96] [--dtype float32] [--quick] [--json FILE]

The published Wan2.1 VAE with random weights decodes, and encodes, piece by piece; each case is a process of its own.
Printed is by how much the process grows beyond the loaded model (`benchmarks/cpu.py` says how it is measured), and the
longest video beside the shortest.  The frames themselves are let go as they come, the latents are there from the start.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from cpu import RETURN_MEMORY, VAE, VAE_QUICK, growth_of
from torch import Tensor

from wanloom.models.vae import CausalVae

WAYS = ("decode", "encode")


def pieces(frames: int, height: int, width: int) -> Iterator[Tensor]:
    """A video as it is read: one frame, then four at a time."""
    yield torch.zeros(1, 3, 1, height, width)
    for _ in range((frames - 1) // 4):
        yield torch.zeros(1, 3, 4, height, width)


def measure(way: str, frames: int, size: str, dtype: torch.dtype, quick: bool) -> int:
    """In this process: bytes by which it grows."""
    width, height = (int(side) for side in size.split("x"))
    torch.manual_seed(0)
    vae = CausalVae(VAE_QUICK if quick else VAE).to(dtype).eval()
    z = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)

    def run() -> None:
        stream = vae.decode_chunks(z) if way == "decode" else vae.encode_chunks(pieces(frames, height, width))
        for _ in stream:
            pass

    return growth_of(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=(9, 33, 81))
    parser.add_argument("--size", default="160x96")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quick", action="store_true", help="a narrow VAE: whether it runs, not how large it is")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        way, frames = args.measure
        with torch.no_grad():
            print(measure(way, int(frames), args.size, getattr(torch, args.dtype), args.quick))
        return
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "size": args.size, "dtype": args.dtype,
        "quick": args.quick,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    rows: dict[str, dict[int, int]] = {}
    for way in WAYS:
        rows[way] = {}
        for frames in args.frames:
            words = ["--measure", way, str(frames), "--size", args.size, "--dtype", args.dtype]
            command = [sys.executable, __file__, *words, *(["--quick"] if args.quick else [])]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | RETURN_MEMORY)
            rows[way][frames] = grown = int(out.stdout.split()[-1])
            print(f"{way}, {frames:4} frames: {grown / 1e6:8.1f} MB", flush=True)
        print(f"{way}, longest / shortest: {rows[way][args.frames[-1]] / rows[way][args.frames[0]]:.3f}")
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
