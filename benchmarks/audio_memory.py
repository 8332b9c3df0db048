"""Memory of s2v's hearing by the length of the sound: wav2vec2 at its published size, random weights, float32.

    python benchmarks/audio_memory.py [--seconds 60 600] [--layers 24] [--window 30] [--json FILE]

Each length runs in a process of its own: the features of every clip are made as a run makes them, one after another,
and dropped, as a run writes them to the job folder.  Printed are the peak of the whole process, its growth above the
loaded model, and seconds; and whether the longest sound takes at most 200 MB more than the shortest.  Random weights
show memory and speed, nothing about sound.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from wanloom.clips import clip_count, in_windows, states_of
from wanloom.conditioning.speech import States, features_at
from wanloom.encoders import build_wav2vec2
from wanloom.models.config import AudioConfig

RATE, FPS, FRAMES = 16_000, 16, 80
ALLOWED = 200 * 10**6  # bytes that ten minutes may take more than one
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # larger blocks go back at once: the peak is what is in use


def status(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(seconds: float, layers: int, window: int) -> dict[str, float]:
    """Hear `seconds` of noise clip by clip, in this process."""
    config = replace(AudioConfig(), layers=layers)
    torch.manual_seed(0)
    model = build_wav2vec2(config).requires_grad_(False)
    loaded = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    wave = np.random.default_rng(0).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
    start = time.perf_counter()
    states = States(model, wave, config, window, normed=True)
    clips = clip_count(states_of(len(wave), config), FPS, FRAMES)
    for clip in range(clips):
        features = features_at(states, FPS, clip * FRAMES, FRAMES)
        assert features.shape == (layers + 1, config.dim, FRAMES)
    peak = status("VmHWM")
    return {
        "seconds_of_sound": seconds, "clips": clips, "in_windows": in_windows(len(wave), window), "peak": peak,
        "growth": peak - loaded, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0, 600.0])
    parser.add_argument("--layers", type=int, default=AudioConfig().layers)
    parser.add_argument("--window", type=int, default=30, help="0: every length at once")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.layers, args.window)))
        return 0
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "layers": args.layers, "window": args.window,
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"{'sound':>8}{'clips':>7}{'windows':>9}{'peak':>10}{'growth':>10}{'seconds':>9}")
    rows = []
    for seconds in args.seconds:
        command = [
            sys.executable, __file__, "--measure", str(seconds), "--layers", str(args.layers),
            "--window", str(args.window),
        ]  # fmt: skip
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | RETURN_MEMORY)
        row = json.loads(out.stdout.splitlines()[-1])
        rows.append(row)
        yes = "yes" if row["in_windows"] else "no"
        sizes = "".join(f"{row[name] / 10**6:7.0f} MB" for name in ("peak", "growth"))
        print(f"{seconds:6.0f} s{row['clips']:7}{yes:>9}{sizes}{row['seconds']:9.1f}", flush=True)
    shortest, longest = (pick(rows, key=lambda row: row["seconds_of_sound"]) for pick in (min, max))
    more = longest["peak"] - shortest["peak"]
    good = more <= ALLOWED
    print(f"the longest takes {more / 10**6:+.0f} MB: {'at most' if good else 'MORE THAN'} {ALLOWED // 10**6} MB")
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "rows": rows, "more": more, "good": good}, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
