"""Memory against time of a step of the transformer, for each way to need less: a table and a plot.

    python benchmarks/trade.py [--layers 8] [--rounds 2] [--ways NAME ...] [--plot docs/memory-time.png] [--json FILE]

Random weights of the width of Wan2.1 t2v-1.3B in a bf16 file, 1170 tokens, computed in the format that is fast here.
Each way runs in fresh processes, --rounds times, in turn and then the other way round: memory is the most that the
process had in RAM (looked at every 50 ms) above what it had after its imports, the larger of the rounds; time is the
least of the passes after the first.  The file is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from streaming import WIDTH, Watch, build, inputs, seconds, status, write

from wanloom.checkpoint.blocks import load_streamed
from wanloom.checkpoint.load import load_into
from wanloom.checkpoint.weights import open_weights
from wanloom.models.config import DiTConfig
from wanloom.models.dit import DiT
from wanloom.runtime.machine import fast_bfloat16
from wanloom.runtime.quant import quantise
from wanloom.runtime.rows import use_rows
from wanloom.runtime.streaming import Streamed

PASSES = 3  # of a process


@dataclass(frozen=True)
class Way:
    """How a step is run; kind: exact or near."""

    resident: float | None = None  # the share of blocks that stay when the others come and go; None: all are loaded
    quantise: str | None = None
    rows: int | None = None

    @property
    def kind(self) -> str:
        return "exact" if self.quantise is None else "near"


WAYS = {
    "all in memory": Way(),
    "row chunks of 256": Way(rows=256),
    "3/4 of the blocks stay": Way(resident=0.75),
    "half of the blocks stay": Way(resident=0.5),
    "a quarter stays": Way(resident=0.25),
    "no block stays": Way(resident=0.0),
    "no block stays, row chunks": Way(resident=0.0, rows=256),
    "int8 weights": Way(quantise="int8"),
    "int8 products": Way(quantise="int8-compute"),
}


@contextmanager
def made(path: Path, config: DiTConfig, way: Way) -> Iterator[DiT]:
    dtype = torch.bfloat16 if fast_bfloat16() else torch.float32
    dit = build(config)
    if way.rows is not None:
        use_rows(dit, way.rows)
    if way.resident is None:
        load_into(dit, open_weights(path, kind="dit"), dtype=dtype)
        if way.quantise is not None:
            quantise(dit, way.quantise)
        yield dit
        return
    blocks = load_streamed(dit, path, dtype=dtype)
    with Streamed(dit.trunk, blocks, resident=round(way.resident * config.layers)) as trunk:
        dit.trunk = trunk
        yield dit


def alone(path: Path, config: DiTConfig, way: Way) -> dict[str, float]:
    """In a process of its own: bytes and seconds.

    Weights that become int8 are loaded whole before: what is counted is from the first pass on.
    """
    before = status()["VmRSS"]
    watch = None if way.quantise else Watch()
    if watch is not None:
        watch.start()
    with made(path, config, way) as dit:
        if watch is None:
            watch = Watch()
            watch.start()
        given = inputs()
        times = [seconds(lambda: dit(**given)) for _ in range(PASSES)]
    return {"bytes": watch.end()["VmRSS"] - before, "seconds": min(times[1:])}


def plot(rows: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for kind, colour in (("exact", "tab:blue"), ("near", "tab:orange")):
        some = {name: row for name, row in rows.items() if row["kind"] == kind}
        axes.scatter(
            [row["seconds"] for row in some.values()], [row["bytes"] / 1e9 for row in some.values()],
            color=colour, label=kind, zorder=2,
        )  # fmt: skip
    for name, row in rows.items():
        axes.annotate(name, (row["seconds"], row["bytes"] / 1e9), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="seconds a step", ylabel="GB of memory", ylim=(0, None), title=title)
    axes.margins(x=0.25, y=0.1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", nargs=2, metavar=("FILE", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    config = replace(WIDTH, layers=args.layers)
    if args.alone:
        print(json.dumps(alone(Path(args.alone[0]), config, WAYS[args.alone[1]])))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), config)
        for number in range(args.rounds):
            for name in args.ways[:: 1 if number % 2 == 0 else -1]:
                words = [sys.executable, __file__, "--layers", str(args.layers), "--alone", str(path), name]
                out = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                found[name].append(json.loads(out.stdout.splitlines()[-1]))
                print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
    rows = {
        name: {
            "kind": WAYS[name].kind, "bytes": max(one["bytes"] for one in some),
            "seconds": min(one["seconds"] for one in some),
        }
        for name, some in found.items()
    }  # fmt: skip
    facts = {
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "layers": args.layers,
        "dtype": "bfloat16" if fast_bfloat16() else "float32",
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    base = next(iter(rows.values()))
    for name, row in rows.items():
        print(
            f"{name:26}{row['kind']:8}{row['bytes'] / 1e6:8.0f} MB {row['seconds']:8.2f} s "
            f"{row['bytes'] / base['bytes']:6.2f} {row['seconds'] / base['seconds']:6.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    if args.plot:
        words = f"{args.layers} blocks of width {WIDTH.dim}, 1170 tokens, {facts['dtype']}, {facts['threads']} threads"
        plot(rows, args.plot, words)


if __name__ == "__main__":
    main()
