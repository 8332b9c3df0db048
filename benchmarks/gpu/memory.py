"""Peak GPU memory of a step with all blocks resident and with blocks that come and go, and what the latter costs.

    PYTHONPATH=src python benchmarks/gpu/memory.py --shape 720p [--resident 0] [--limit-gb 12] [--rounds 5]

Random bfloat16 weights; streamed blocks wait in pinned host memory.  Each peak is measured in a process of its own; the
times are of one process with both, in turn.  --limit-gb gives the process only so much memory, as a smaller GPU would:
a way that does not fit is then said to be out of memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from common import SHAPES, Shape

from wanloom.models.dit import DiT
from wanloom.runtime.attention import kernel_for, use_kernel
from wanloom.runtime.streaming import HostBlocks, Streamed

WAYS = ("resident", "streamed")


def build(way: str, shape: Shape, resident: int) -> DiT:
    """A transformer on our device, or one whose blocks wait on the host; built there block by block."""
    whole = shape.config
    if way == "resident":
        dit = common.random_dit(whole, torch.bfloat16)
        use_kernel(dit, kernel_for(None, common.device()))
        return dit
    dit = common.random_dit(replace(whole, layers=0), torch.bfloat16)
    for _ in range(whole.layers):
        one = common.random_dit(replace(whole, layers=1, text_dim=8, freq_dim=8), torch.bfloat16).blocks[0]
        dit.blocks.append(one.cpu())
    pinned = torch.cuda.is_available()
    dit.trunk = Streamed(dit.trunk, HostBlocks(dit.blocks, pinned=pinned), common.device(), resident=resident)
    use_kernel(dit, kernel_for(None, common.device()))
    return dit


def alone(way: str, shape: Shape, resident: int, limit: float | None) -> dict[str, Any]:
    """In a process of its own: the peak of a step after one that does not count."""
    if limit is not None and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 1e9 / torch.cuda.mem_get_info()[1]))
    try:
        run = partial(build(way, shape, resident), **common.inputs(shape))
        run()
        return common.peak(run)
    except torch.OutOfMemoryError:
        return {"out of memory": "yes"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="480p" if torch.cuda.is_available() else "small")
    parser.add_argument("--layers", type=int, help="blocks (default: all)")
    parser.add_argument("--resident", type=int, default=0, help="blocks that stay when the others come and go")
    parser.add_argument("--limit-gb", type=float)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    shape = SHAPES[args.shape]
    shape = replace(shape, config=replace(shape.config, layers=args.layers or shape.config.layers))
    if args.alone:
        print(json.dumps(alone(args.alone, shape, args.resident, args.limit_gb)))
        return
    asked = {"shape": args.shape, "layers": shape.config.layers, "resident": args.resident, "limit_gb": args.limit_gb}
    facts = common.about(**asked)
    rows: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        words = [sys.executable, __file__, *sys.argv[1:], "--alone", way]
        out = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        rows[way] = json.loads(out.stdout.splitlines()[-1])
    given = common.inputs(shape)
    runs: dict[str, Callable[[], object]] = {way: partial(build(way, shape, args.resident), **given) for way in WAYS}
    _, times = common.in_turn(runs, args.rounds)
    against = common.ratios(times, "resident")
    for way in WAYS:
        rows[way] |= {"seconds": statistics.median(times[way]), "/ resident": against[way]}
    common.table(rows)
    common.save(args.json, facts, rows=rows)


if __name__ == "__main__":
    main()
