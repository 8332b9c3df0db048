"""What a clip of s2v or animate saves by computing once what is the same in all its steps (`DiT.once`).

    python benchmarks/once.py [--pairs 9] [--quick] [--json FILE]

One step of the transformer with random weights, float32: with what `once` made before the first step, and with `once`
called again in the step.  Both run in turn, first the one and then the other, so a machine that slows down slows both.
Printed are medians in seconds and the median of the pairwise ratios again / once (above 1: it saves).  The demo rows
are this package's small models; the wide ones have four blocks of 512 channels, audio and face as wide as published
(faces of 128 pixels instead of 512), and 17 frames of 416x240.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from wanloom.models.adapters import build_dit
from wanloom.models.config import AnimateConfig, DiTConfig, SpeechConfig
from wanloom.models.dit import DiT
from wanloom.variants import VARIANTS

WIDE = DiTConfig(dim=512, ffn_dim=1536, heads=4, layers=4)
WIDE_ANIMATE = AnimateConfig(layers=(0,), widths=(32, 64, 128, 256, 512, 512))


@dataclass(frozen=True)
class Shape:
    """A transformer and the clip it works on: latent (C, T, h, w), tokens of CLIP's picture."""

    config: DiTConfig
    latent: tuple[int, int, int, int]
    seen: int = 257


SHAPES = {
    "demo-s2v": Shape(VARIANTS["demo-s2v"].dit, (16, 5, 8, 8)),
    "demo-animate": Shape(VARIANTS["demo-animate"].dit, (16, 6, 16, 16), seen=17),
    "s2v, wide": Shape(replace(WIDE, speech=SpeechConfig(layers=(0, 2))), (16, 5, 30, 52)),
    "animate, wide": Shape(replace(WIDE, in_channels=36, image_dim=1280, animate=WIDE_ANIMATE), (16, 6, 30, 52)),
}
QUICK = ("demo-s2v", "demo-animate")


def inputs(shape: Shape) -> dict[str, Tensor]:
    """What a conditioner gives for a clip that has one before it."""
    config, (channels, frames, height, width) = shape.config, shape.latent
    given = {"context": torch.randn(1, config.text_len, config.text_dim)}
    if (speech := config.speech) is not None:
        given |= {
            "audio": torch.randn(1, speech.audio_states, speech.audio_dim, 4 * frames),
            "reference": torch.randn(1, channels, 1, height, width),
            "motion": torch.randn(1, channels, (speech.history + 3) // 4, height, width),
            "group": torch.zeros(frames, dtype=torch.long),
        }
    if (animate := config.animate) is not None:
        moving, side = frames - 1, animate.face_size
        given |= {
            "y": torch.randn(1, config.in_channels - channels, frames, height, width),
            "image": torch.randn(1, shape.seen, config.image_dim or 0),
            "pose": torch.randn(1, animate.channels, moving, height, width),
            "face": torch.rand(1, 3, 4 * moving - 3, side, side) * 2 - 1,
        }
    return given


def steps(shape: Shape) -> dict[str, Callable[[], Tensor]]:
    """A step with what was made once, and one that makes it again."""
    torch.manual_seed(0)
    model: DiT = build_dit(shape.config).eval()
    given, x = inputs(shape), torch.randn(1, *shape.latent)
    t = torch.tensor([[437.0, 0.0]]) if shape.config.speech is not None else torch.tensor([[437.0]])
    made = model.once(given)
    return {"once": lambda: model(x, t, **made), "again": lambda: model(x, t, **model.once(given))}


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(shape: Shape, pairs: int) -> dict[str, float]:
    runs = steps(shape)
    assert torch.equal(runs["once"](), runs["again"]())  # and both are warm
    times: dict[str, list[float]] = {"once": [], "again": []}
    for i in range(pairs):
        for side in ("once", "again") if i % 2 == 0 else ("again", "once"):
            times[side].append(seconds(runs[side]))
    ratios = [again / once for once, again in zip(times["once"], times["again"], strict=True)]
    return {
        "once": statistics.median(times["once"]), "again": statistics.median(times["again"]),
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the demo models only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "pairs": args.pairs,
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"{'a step':16}{'once (s)':>10}{'again (s)':>11}{'again/once':>12}{'(min to max)':>18}")
    rows = {}
    with torch.no_grad():
        for name in QUICK if args.quick else SHAPES:
            rows[name] = row = compare(SHAPES[name], args.pairs)
            span = f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
            print(f"{name:16}{row['once']:10.4f}{row['again']:11.4f}{row['ratio']:12.2f}{span:>18}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
