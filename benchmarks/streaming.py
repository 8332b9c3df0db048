"""A transformer streamed from disk beside the same one in memory: bits, memory, time (runtime/streaming.py).

    python benchmarks/streaming.py [--gigabytes 3] [--pairs 5] [--resident 0] [--dir DIR] [--json FILE]

Random bf16 blocks of the width of Wan2.1 t2v-1.3B are written into a temporary folder, as many as fill the size; a
forward pass has 1170 tokens.  Time: each pair runs both ways once, in turn, and the ratio is the median of the pairs;
the file is in the page cache.  Cold: one streamed pass after the system was asked to forget the file, where it does
(how much of it is still in memory is looked at and printed).  Memory: what a fresh process has in RAM while it loads
and streams, looked at every 50 ms, beside what it has after its imports.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanloom.checkpoint.blocks import load_streamed
from wanloom.checkpoint.load import load_into
from wanloom.checkpoint.weights import open_weights
from wanloom.checkpoint.write import Item, write_model
from wanloom.models.config import DiTConfig
from wanloom.models.dit import DiT
from wanloom.runtime.streaming import Streamed

WIDTH = DiTConfig(dim=1536, ffn_dim=8960, heads=12, layers=1)
LATENT = (16, 3, 30, 52)  # C, T, h, w: 1170 tokens
EVERY = 0.05  # seconds between two looks at the memory
MUST = {"RssAnon": 1e9, "VmRSS": 1.3e9, "ratio": 1.1}


def sizes(gigabytes: float) -> DiTConfig:
    """As many blocks as make so many bytes of bf16."""
    with torch.device("meta"):
        block = sum(2 * p.numel() for p in DiT(WIDTH).blocks[0].parameters())
    layers = max(2, round(gigabytes * 1e9 / block))
    return DiTConfig(dim=WIDTH.dim, ffn_dim=WIDTH.ffn_dim, heads=WIDTH.heads, layers=layers)


def write(folder: Path, config: DiTConfig) -> Path:
    """A checkpoint of random values, written tensor by tensor."""
    generator = torch.Generator().manual_seed(0)

    def values(shape: tuple[int, ...]) -> Tensor:
        gain = torch.Size(shape[1:]).numel() ** -0.5 if len(shape) > 1 else 1.0
        return torch.randn(shape, generator=generator).mul_(gain).bfloat16()

    with torch.device("meta"):
        state = DiT(config).state_dict()
    items = [
        Item(name, "BF16", tuple(t.shape), lambda t=t: values(tuple(t.shape)))  # type: ignore[misc]
        for name, t in state.items()
    ]
    files = write_model(folder, "diffusion_pytorch_model", items, {})
    (folder / "config.json").write_text(json.dumps({"num_heads": config.heads, "text_len": config.text_len}))
    os.sync()  # what is not on the disk yet cannot be forgotten
    return files[0]


def build(config: DiTConfig) -> DiT:
    with torch.device("meta"):
        return DiT(config).eval().requires_grad_(False)


def in_memory(path: Path, config: DiTConfig) -> DiT:
    dit = build(config)
    load_into(dit, open_weights(path, kind="dit"), dtype=torch.bfloat16)
    return dit


@contextmanager
def from_disk(path: Path, config: DiTConfig, resident: int) -> Iterator[DiT]:
    dit = build(config)
    trunk = Streamed(dit.trunk, load_streamed(dit, path, dtype=torch.bfloat16), resident=resident)
    dit.trunk = trunk
    with trunk:
        yield dit


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(1, *LATENT, generator=generator),
        "t": torch.tensor([[437.0]]),
        "context": torch.randn(1, 512, 4096, generator=generator),
    }


def digest(out: Tensor) -> str:
    return hashlib.sha256(out.numpy().tobytes()).hexdigest()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# ---------------------------------------------------------------- memory


def status() -> dict[str, int]:
    """Bytes of this process in RAM: all, and those that lie in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        k: int(v.split()[0]) * 1024 for k, _, v in (line.partition(":") for line in lines) if k in ("VmRSS", "RssAnon")
    }


class Watch(threading.Thread):
    """Looks at the memory all the time; `peak` is the most of each that was seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.looks, self._stop_it = status(), 0, threading.Event()

    def run(self) -> None:
        while not self._stop_it.wait(EVERY):
            self.peak = {key: max(self.peak[key], value) for key, value in status().items()}
            self.looks += 1

    def end(self) -> dict[str, int]:
        self._stop_it.set()
        self.join()
        return self.peak


def measure(path: Path, config: DiTConfig, resident: int) -> dict[str, Any]:
    """In a process of its own: load, stream two passes, and say what it took."""
    baseline = status()
    watch = Watch()
    watch.start()
    with from_disk(path, config, resident) as dit:
        given = inputs()
        times = [seconds(lambda: dit(**given)) for _ in range(2)]
        out = dit(**given)
    return {"baseline": baseline, "peak": watch.end(), "looks": watch.looks, "seconds": times, "digest": digest(out)}


# ---------------------------------------------------------------- the page cache


def cached(path: Path) -> float:
    """The share of a file that is in the page cache (mincore)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        pages = -(-len(view) // mmap.PAGESIZE)
        here = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view)), here
        )
        del start  # the view cannot be closed while something points into it
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(page & 1 for page in here) / pages


def forget(path: Path) -> float:
    """Ask the system to drop a file from its page cache; the share that stays nevertheless."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached(path)


def disk_rate(path: Path) -> float:
    """Bytes a second of plain reading, from a file that was forgotten."""
    forget(path)
    room = memoryview(bytearray(2**24))

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass

    return path.stat().st_size / seconds(read)


# ---------------------------------------------------------------- the comparison


def compare(path: Path, config: DiTConfig, pairs: int, resident: int) -> dict[str, Any]:
    """Both in this process, in turn."""
    whole, given = in_memory(path, config), inputs()
    with from_disk(path, config, resident) as dit:
        runs: dict[str, Callable[[], Tensor]] = {"resident": lambda: whole(**given), "streamed": lambda: dit(**given)}
        outs = {name: digest(run()) for name, run in runs.items()}  # and both are warm
        times: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(pairs):
            for name in ("resident", "streamed") if i % 2 == 0 else ("streamed", "resident"):
                times[name].append(seconds(runs[name]))
        ratios = [b / a for a, b in zip(times["resident"], times["streamed"], strict=True)]
    return {
        "equal": len(set(outs.values())) == 1, "digest": outs["resident"], "ratio": statistics.median(ratios),
        "ratio_min": min(ratios), "ratio_max": max(ratios),
        "seconds": {name: statistics.median(some) for name, some in times.items()},
    }  # fmt: skip


def cold(path: Path, config: DiTConfig, resident: int) -> dict[str, float]:
    """One pass whose blocks come from the disk, all of them."""
    rate = disk_rate(path)
    left = forget(path)
    begin = time.perf_counter()
    with from_disk(path, config, resident) as dit:
        given = inputs()
        dit(**given)
    return {"seconds": time.perf_counter() - begin, "left_in_cache": left, "disk_rate": rate}


def show(row: dict[str, Any], memory: dict[str, Any], late: dict[str, float]) -> None:
    for key, what in (("RssAnon", "of its own"), ("VmRSS", "in all")):
        peak, begin, most = memory["peak"][key], memory["baseline"][key], MUST[key]
        print(
            f"memory {what + ' (' + key + ')':24}{peak / 1e6:9.0f} MB, of which {begin / 1e6:.0f} MB before loading; "
            f"at most {most / 1e6:.0f}: {'yes' if peak <= most else 'NO'}"
        )
    times = row["seconds"]
    print(f"a pass, in memory               {times['resident']:9.2f} s")
    print(
        f"a pass, streamed, warm          {times['streamed']:9.2f} s, ratio {row['ratio']:.3f} "
        f"({row['ratio_min']:.3f} to {row['ratio_max']:.3f}); at most {MUST['ratio']}: "
        f"{'yes' if row['ratio'] <= MUST['ratio'] else 'NO'}"
    )
    print(
        f"loading and a pass, cold        {late['seconds']:9.2f} s; the disk alone {late['disk_rate'] / 1e6:.0f} MB/s; "
        f"{late['left_in_cache']:.0%} of the file was still in the page cache"
    )
    print(f"bits: {'equal' if row['equal'] else 'NOT EQUAL'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--resident", type=int, default=0, help="blocks that stay in memory")
    parser.add_argument("--dir", type=Path, help="where the file is written (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    config = sizes(args.gigabytes)
    if args.measure:
        print(json.dumps(measure(args.measure, config, args.resident)))
        return
    folder = Path(tempfile.mkdtemp(dir=args.dir))
    try:
        path = write(folder, config)
        about: dict[str, Any] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(),
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "layers": config.layers,
            "file_bytes": path.stat().st_size, "resident": args.resident, "pairs": args.pairs,
        }  # fmt: skip
        print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
        words = ["--measure", str(path), "--gigabytes", str(args.gigabytes), "--resident", str(args.resident)]
        out = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
        memory = json.loads(out.stdout.splitlines()[-1])
        late = cold(path, config, args.resident)
        row = compare(path, config, args.pairs, args.resident)
    finally:
        shutil.rmtree(folder)
    row["equal"] = row["equal"] and memory["digest"] == row["digest"]
    show(row, memory, late)
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "memory": memory, "cold": late, "warm": row}, indent=1) + "\n")
    if not row["equal"]:
        sys.exit("streamed and resident gave different bits")


if __name__ == "__main__":
    main()
