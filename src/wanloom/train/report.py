"""What a run says while it goes: a line on the screen, a line of JSON, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Log:
    """`log.jsonl` of a run; one object a line, appended and flushed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def __call__(self, **entry: Any) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        parts = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()]
        print("  ".join(parts), flush=True)


def clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def plot(log: Path, picture: Path) -> None:
    """Training and held-out loss over steps, from `log.jsonl`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(9, 5))
    for phase in dict.fromkeys(e["phase"] for e in entries if "loss" in e):
        mine = [e for e in entries if e.get("phase") == phase]
        train = [(e["step"], e["loss"]) for e in mine if "loss" in e]
        held = [(e["step"], e["held_out"]) for e in mine if "held_out" in e]
        axes.plot(*zip(*train, strict=True), linewidth=0.8, alpha=0.7, label=f"{phase}: training")
        if held:
            axes.plot(*zip(*held, strict=True), "o-", markersize=3, label=f"{phase}: held out")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
