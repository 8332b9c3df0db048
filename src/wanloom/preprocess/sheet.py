"""One picture to look at before a long run is begun: the clip at six times, as the model will be given it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from wanloom.media import Frames
from wanloom.preprocess.crops import Mask, letterbox

TIMES = 6
WIDTH, HIGHEST = 240, 320  # pixels of a cell
GAP, LABEL = 6, 16
PAPER = 32  # grey
RED = np.array((255, 40, 40), np.float32)


@dataclass(frozen=True)
class Column:
    """One time: the driving frame (red where the person is replaced), the drawing and the face, as thumbs."""

    index: int
    cells: tuple[Frames, ...]


def column(index: int, frame: Frames, pose: Frames, face: Frames, mask: Mask | None) -> Column:
    """What the sheet shows of a frame, all [h, w, 3]; the mask is the frame's size."""
    shown = frame if mask is None else tinted(frame, mask)
    return Column(index, (thumb(shown), thumb(_bold(pose)), thumb(face)))


def times(count: int) -> set[int]:
    """The frames that are shown of a clip of `count` frames: the first, the last, and evenly between."""
    return {round(i * (count - 1) / (TIMES - 1)) for i in range(TIMES)}


def thumb(pixels: Frames) -> Frames:
    """A picture fitted into a cell, which has its proportions where that is not too high."""
    height, width = pixels.shape[:2]
    return letterbox((width, height), (WIDTH, min(max(round(WIDTH * height / width), 1), HIGHEST))).image(pixels)


def _bold(pose: Frames) -> Frames:
    """A drawing with lines that are still seen when it is made small."""
    from PIL import Image, ImageFilter

    width = pose.shape[1] // WIDTH // 2 * 2 + 1
    return np.array(Image.fromarray(pose).filter(ImageFilter.MaxFilter(width)))


def tinted(frame: Frames, mask: Mask) -> Frames:
    """A frame [H, W, 3] with half red where the mask is."""
    mixed = np.where(mask[..., None], (frame + RED) / 2, frame)
    return mixed.astype(np.uint8)


def make_sheet(columns: list[Column], fps: Fraction) -> Frames:
    """The sheet [H, W, 3]: a column for each time; driving frame (red: the mask), drawing, face."""
    from PIL import Image, ImageDraw

    heights = [GAP + cell.shape[0] for cell in columns[0].cells]
    wide = GAP + WIDTH
    sheet = Image.new("RGB", (GAP + wide * len(columns), GAP + LABEL + sum(heights)), (PAPER,) * 3)
    paint = ImageDraw.Draw(sheet)
    for number, column in enumerate(columns):
        left = GAP + number * wide
        paint.text((left, GAP // 2), f"frame {column.index}, {float(column.index / fps):.2f} s", fill=(220,) * 3)
        for row, pixels in enumerate(column.cells):
            sheet.paste(Image.fromarray(pixels), (left, GAP + LABEL + sum(heights[:row])))
    return np.array(sheet)
