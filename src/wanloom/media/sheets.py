"""A contact sheet: clips as rows of a few frames, with a caption above each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wanloom.media.pictures import Frames

LINE = 14  # pixels of a caption


def contact_sheet(rows: Sequence[tuple[str, Sequence[Frames]]], path: Path, *, scale: int = 2, across: int = 5) -> None:
    """Write a picture of clips: one row each, its caption above, `across` frames of each from first to last.

    rows: caption and clips [F, H, W, 3] uint8, as many in each row; small ones grow to the size of the largest.  A .png
    has 64 colours: a quarter of the bytes, and it looks alike; a .webp, for what is shipped, has a third of that.
    """
    from PIL import Image, ImageDraw

    height = max(clip.shape[1] for _, clips in rows for clip in clips)
    width = max(clip.shape[2] for _, clips in rows for clip in clips)
    cell = width * scale + 2, height * scale + 2
    columns = len(rows[0][1]) * across
    page = Image.new("RGB", (columns * cell[0], len(rows) * (cell[1] + LINE)), "white")
    draw = ImageDraw.Draw(page)
    for r, (text, clips) in enumerate(rows):
        top = r * (cell[1] + LINE)
        draw.text((2, top + 1), text, fill="black")
        for c, clip in enumerate(clips):
            for k, f in enumerate(np.linspace(0, len(clip) - 1, across).round().astype(int)):
                picture = Image.fromarray(clip[f]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
                page.paste(picture, ((c * across + k) * cell[0], top + LINE))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".webp":
        page.save(path, quality=70, method=6)
    else:
        page.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
