"""The card of a demo model: what it was trained on and how, and what the judge says of what it makes.

    python -m wanloom.train.card CHECKPOINT VARIANT [RUN ...] [--real=SPEECH.wav]

Figures are over 200 held-out one-object prompts (`world.examples`), seed = index, default steps, through the pipeline
that everybody uses; the sheet shows the first 24 prompts, not chosen ones.  Proportions have Wilson's 95 % interval.  A
model below a floor is a smoke-test model: `status` in card.json says so, and the command line repeats it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import wanloom
from wanloom.demo.judge import judge
from wanloom.demo.world import Clip, examples, first_frame, render
from wanloom.durable import sha256_file, write_atomic
from wanloom.media.sheets import contact_sheet
from wanloom.train import people_card
from wanloom.train.data import to_video
from wanloom.train.export import seconds_trained
from wanloom.train.flow import load_vae
from wanloom.train.vae import to_frames
from wanloom.variants import VARIANTS

# What a demo model must reach to be called one: figure -> (at least, aim).
FLOORS_TEXT = {
    "colour": (0.97, 0.995), "shape": (0.93, 0.98), "motion": (0.93, 0.98), "background": (0.97, 0.995),
    "all_right": (0.85, 0.96), "iou": (0.88, 0.94),
}  # fmt: skip
FLOORS_IMAGE = {"first_frame_db": (28.0, 32.0), "image_motion": (0.90, 0.97)}
FLOORS_ALL = {"vae_db": (32.0, 36.0)}
MOST_SECONDS, MOST_BYTES = 3.0, 15_000_000
SHOWN = 24  # cases on a sheet
CEILINGS = {
    "demo-s2v": {"seconds": 30.0, **people_card.CEILINGS_SPEECH},
    "demo-animate": {"seconds": 30.0, **people_card.CEILINGS_DANCE},
}
DATA = {
    "demo-s2v": "drawn heads and synthetic voices (wanloom.demo.talk, .voices); held-out heads never trained on",
    "demo-animate": "drawn figures that dance (wanloom.demo.dance); held-out clothes never trained on",
}


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a proportion."""
    z, p = 1.96, right / of
    middle = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise in dB of uint8 pictures."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 10 * math.log10(255**2 / max(error, 1e-6))


@dataclass
class Table:
    """Figures as they come in: means of numbers, proportions of marks."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **figures: float) -> None:
        for name, value in figures.items():
            self.values.setdefault(name, []).append(float(value))

    def summary(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, values in self.values.items():
            mean = sum(values) / len(values)
            if set(values) <= {0.0, 1.0}:
                low, high = wilson(round(sum(values)), len(values))
            else:
                spread = 1.96 * float(np.std(values)) / math.sqrt(len(values))
                low, high = mean - spread, mean + spread
            out[name] = {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4), "of": len(values)}
        return out


def reconstruction(checkpoint: Path, size: int, frames: int, count: int) -> Table:
    """The VAE alone: PSNR and judgement of held-out clips after a round trip, plain and with noise on the latents."""
    vae, _ = load_vae(checkpoint)
    table = Table()
    for i, (clip, _) in enumerate(examples(count)):
        pixels = render(clip, size, frames)
        z, _ = vae.encode(to_video(pixels)[None])
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(i))
        out = to_frames(vae.decode(z)[0][0])
        noisy = to_frames(vae.decode(z + 0.3 * z.std((0, 2, 3, 4), keepdim=True) * noise)[0][0])
        verdict, rough = judge(out, clip), judge(noisy, clip)
        table.add(
            vae_db=psnr(out, pixels), vae_iou=verdict.iou, vae_shape=verdict.shape, vae_all_right=verdict.all_right,
            vae_noisy_all_right=rough.all_right,
        )  # fmt: skip
    return table


def generated(
    pipe: wanloom.Pipeline, count: int, folder: Path, *, image: bool, objects: int = 1
) -> tuple[Table, list[tuple[str, list[np.ndarray]]]]:
    """Judge what the pipeline makes of held-out prompts, from text alone or from a first frame as well."""
    size = pipe.variant.defaults.size[0]
    table, rows = Table(), []
    for i, (clip, prompt) in enumerate(examples(count, objects=objects)):
        given: dict[str, Any] = {}
        if image:
            path = folder / "first.png"
            Image.fromarray(first_frame(clip, size)).save(path)
            given["image"] = path
        start = time.perf_counter()
        video = pipe(prompt=prompt, seed=i, **given)
        seconds = time.perf_counter() - start
        frames = video.frames
        prefix = ("two_" if objects == 2 else "") + ("image_" if image else "")
        table.add(**marks(frames, clip, prefix), seconds=seconds)
        if image and objects == 1:
            table.add(first_frame_db=psnr(frames[0], first_frame(clip, size)))
        rows.append((prompt, [frames]))
    return table, rows


def marks(frames: np.ndarray, clip: Clip, prefix: str) -> dict[str, float]:
    verdict = judge(frames, clip)
    found = {
        "colour": verdict.colour, "shape": verdict.shape, "motion": verdict.motion, "background": verdict.background,
        "all_right": verdict.all_right, "count": verdict.count, "iou": verdict.iou,
    }  # fmt: skip
    return {prefix + name: float(value) for name, value in found.items()}


def shortfalls(
    figures: dict[str, Any],
    bytes_: int,
    floors: dict[str, tuple[float, float]],
    ceilings: dict[str, float] | None = None,
) -> list[str]:
    """Which floors are missed, and what is above its ceiling, in words."""
    missed = [
        f"{name} {figures[name]['mean']:g} (at least {least:g})"
        for name, (least, _) in floors.items()
        if figures[name]["mean"] < least
    ]
    for name, most in {"seconds": MOST_SECONDS, **(ceilings or {})}.items():
        if figures[name]["mean"] > most:
            missed.append(f"{name} {figures[name]['mean']:g} (at most {most:g})")
    if bytes_ > MOST_BYTES:
        missed.append(f"size {bytes_} bytes (at most {MOST_BYTES})")
    return missed


def judged_people(checkpoint: Path, name: str, count: int, real: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and floors of demo-s2v or demo-animate, over so many held-out cases; the sheet is written."""
    speech = VARIANTS[name].conditioner == "speech"
    pipe = wanloom.load(checkpoint, task=name)
    with tempfile.TemporaryDirectory() as folder:
        if speech:
            found, rows = people_card.speech_figures(pipe, count, Path(folder), real)
        else:
            found, rows = people_card.dance_figures(pipe, count, Path(folder))
    table = Table()
    for figures in found:
        table.add(**figures)
    contact_sheet(rows[:SHOWN], checkpoint / "sheets" / ("speech.webp" if speech else "dance.webp"), scale=1)
    return table.summary(), people_card.FLOORS_SPEECH if speech else people_card.FLOORS_DANCE


def judged_shapes(checkpoint: Path, name: str, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and floors of a model of moving shapes, over so many held-out prompts; the sheets are written."""
    variant = VARIANTS[name]
    text = variant.conditioner != "image"
    image = bool(variant.inputs)
    floors = {**FLOORS_ALL, **(FLOORS_TEXT if text else {}), **(FLOORS_IMAGE if image else {})}
    pipe = wanloom.load(checkpoint, task=name)
    figures = reconstruction(checkpoint, variant.defaults.size[0], variant.defaults.frames, count).summary()
    sheets = checkpoint / "sheets"
    for wanted, mode, objects in ((text, "text", 1), (image, "image", 1), (True, "two", 2)):
        if not wanted:
            continue
        from_image = mode == "image" or (mode == "two" and not text)
        wanted_clips = count if objects == 1 else min(count, 100)
        table, rows = generated(pipe, wanted_clips, checkpoint, image=from_image, objects=objects)
        summary = table.summary()
        figures |= {k: v for k, v in summary.items() if k != "seconds" or "seconds" not in figures}
        contact_sheet(rows[:SHOWN], sheets / f"{mode}.webp", scale=1)
    (checkpoint / "first.png").unlink(missing_ok=True)
    return figures, floors


def make_card(
    checkpoint: Path, name: str, runs: list[Path], count: int | None = None, real: Path | None = None
) -> dict[str, Any]:
    """Judge the checkpoint, write card.json, README.md and sheets beside it; returns the card.

    count: of cases (default: 200 prompts; 100 of people).  real: a file of real speech, for demo-s2v.
    """
    people = VARIANTS[name].conditioner in ("speech", "animate")
    figures, floors = (
        judged_people(checkpoint, name, count or 100, real) if people else judged_shapes(checkpoint, name, count or 200)
    )
    files = sorted(checkpoint.rglob("*.safetensors"))
    weights = sum(p.stat().st_size for p in files)
    ceilings = CEILINGS.get(name, {})
    missed = shortfalls(figures, weights, floors, ceilings)
    card = {
        "name": name,
        "status": "smoke-test" if missed else "demo",
        "missed": missed,
        "data": DATA.get(name, "procedural clips of wanloom.demo.world; held-out combinations never trained on"),
        "recipes": [f"recipes/{run.name}.toml" for run in runs],
        "training_seconds": {run.name: round(seconds_trained(run)) for run in runs},
        "weights_bytes": weights,
        "sha256": {p.relative_to(checkpoint).as_posix(): sha256_file(p) for p in files},
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "figures": figures,
        "floors": {k: list(v) for k, v in floors.items()},
        "ceilings": ceilings,
    }
    write_atomic(checkpoint / "card.json", (json.dumps(card, indent=1) + "\n").encode())
    write_atomic(checkpoint / "README.md", words_of(card).encode())
    return card


def words_of(card: dict[str, Any]) -> str:
    """The card as a page."""
    state = (
        "a demo model" if card["status"] == "demo" else "a **smoke-test model**: it misses " + ", ".join(card["missed"])
    )
    lines = [
        f"# {card['name']}", "", f"This is {state}.", "",
        f"Data: {card['data']}. Recipes: {', '.join(card['recipes'])}. Seconds of training: "
        + ", ".join(f"{run} {s}" for run, s in card["training_seconds"].items())
        + f". Weights: {card['weights_bytes'] / 1e6:.1f} MB, bf16.", "",
        "Judged on held-out prompts, seed = index, default steps, by `python -m wanloom.train.card`"
        f" ({card['machine']}, {card['threads']} threads, torch {card['torch']}, {card['date']}).", "",
        "| figure | mean | 95 % interval | of | at least | aim |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, f in card["figures"].items():
        floor = card["floors"].get(name, ["", ""])
        if name in card["ceilings"]:
            floor = [f"(at most {card['ceilings'][name]:g})", ""]
        lines.append(
            f"| {name} | {f['mean']:g} | {f['low']:g} to {f['high']:g} | {f['of']} | {floor[0]} | {floor[1]} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    speech = [Path(a.removeprefix("--real=")) for a in sys.argv[3:] if a.startswith("--real=")]
    folders = [Path(a) for a in sys.argv[3:] if not a.startswith("--")]
    made = make_card(Path(sys.argv[1]), sys.argv[2], folders, real=speech[0] if speech else None)
    print(json.dumps({"status": made["status"], "missed": made["missed"]}, indent=1))
