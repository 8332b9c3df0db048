"""Peak memory of a long video beside a short one: s2v, clip by clip, each in a process of its own.

    python benchmarks/clip_memory.py [--clips 2 60] [--size 128x128] [--steps 1] [--ckpt-dir DIR]

Clips of 12 frames, and a sound as long as each video.  Frames are written when their clip is finished and everything
else of a clip is let go, so the ratio is near 1; printed is also what all frames of the longest video take in float32,
which is what it would grow by.  Without --ckpt-dir the model is demo-s2v.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path
from typing import Any

FRAMES, FPS, RATE = 12, 16, 16_000  # of a clip, a second; samples a second


def peak() -> int:
    """The most bytes this process has had in memory (VmHWM; ru_maxrss would count the parent's before exec, too)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure(clips: int, size: str, steps: int, model: str) -> dict[str, int]:
    """Make a video of so many clips in this process: its frames and the peak."""
    import numpy as np
    from PIL import Image

    from wanloom.pipeline import load
    from wanloom.request import Request

    width, height = (int(side) for side in size.split("x"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        moment = np.arange(int((clips - 0.5) * FRAMES / FPS * RATE)) / RATE
        with wave.open(str(folder / "a.wav"), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes((8000 * np.sin(1400 * moment) * np.sin(9 * moment)).astype("<i2").tobytes())
        noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(folder / "a.png")
        request = Request(
            prompt="a person speaks", image=folder / "a.png", audio=folder / "a.wav", size=size, infer_frames=FRAMES,
            steps=steps, seed=1,
        )  # fmt: skip
        pipe = load(model, task="s2v-14B" if Path(model).is_dir() else None, device="cpu")
        plan = pipe.run(request, out=folder / "a.mp4").plan
        assert len(plan.segments) == clips, f"{len(plan.segments)} clips"
    return {"frames": plan.frames, "pixels": plan.size[0] * plan.size[1], "peak": peak()}


def in_child(clips: int, args: argparse.Namespace) -> dict[str, int]:
    words = ["--measure", str(clips), "--size", args.size, "--steps", str(args.steps), "--ckpt-dir", args.ckpt_dir]
    out = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, int] = json.loads(out.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, nargs=2, default=(2, 60), metavar=("FEW", "MANY"))
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--ckpt-dir", default="demo-s2v")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.size, args.steps, args.ckpt_dir)))
        return
    about: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "date": time.strftime("%Y-%m-%d"),
        "model": Path(args.ckpt_dir).name, "size": args.size,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = {clips: in_child(clips, args) for clips in args.clips}
    for clips, row in rows.items():
        print(f"{clips:4} clips, {row['frames']:5} frames: peak {row['peak'] / 1e6:7.1f} MB")
    few, many = (rows[clips] for clips in args.clips)
    ratio, all_frames = many["peak"] / few["peak"], 12 * many["frames"] * many["pixels"]
    print(f"ratio {ratio:.3f}, grown by {(many['peak'] - few['peak']) / 1e6:.1f} MB", end="; ")
    print(f"all frames would be {all_frames / 1e6:.1f} MB")
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "rows": rows, "ratio": ratio, "all_frames": all_frames}, indent=1))


if __name__ == "__main__":
    main()
