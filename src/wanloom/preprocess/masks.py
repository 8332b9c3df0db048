"""The person's mask: grown, coarsened, and kept small in memory until it is written.

The model was trained with masks that do not show the person's outline: the mask is made larger, and the box around it
is divided into cells of which every touched one is filled (one cell: the box itself).
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from wanloom.errors import InputError, WanloomWarning
from wanloom.media import Frames
from wanloom.preprocess.crops import Mask, Size


def grow(mask: Mask, pixels: int) -> Mask:
    """A mask [H, W] with every pixel within `pixels` of it, across and down; 9 is the official 3 times 7 x 7."""
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (pixels + 1, pixels)
        total = np.cumsum(np.pad(mask, pad), axis=axis, dtype=np.int32)
        width, size = 2 * pixels + 1, mask.shape[axis]
        mask = np.take(total, range(width, width + size), axis) > np.take(total, range(size), axis)
    return mask


def fill_cells(mask: Mask, cells: tuple[int, int]) -> Mask:
    """The box of a mask divided into (across, down) cells, every touched cell filled; an empty mask stays empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    filled = np.zeros_like(mask)
    if not len(rows):
        return filled
    xs, ys = (
        _edges(int(line[0]), int(line[-1]) + 1, count) for line, count in zip((columns, rows), cells, strict=True)
    )
    for left, right in pairwise(xs):
        for top, bottom in pairwise(ys):
            filled[top:bottom, left:right] = mask[top:bottom, left:right].any()
    return filled


def _edges(first: int, last: int, count: int) -> list[int]:
    """The edges of `count` cells from first to last; fewer where they would be narrower than a pixel."""
    count = min(count, last - first)
    return [first + round(i * (last - first) / count) for i in range(count + 1)]


def coarse(mask: Mask, *, dilation: int, cells: tuple[int, int] | None) -> Mask:
    """The mask that the model is given."""
    grown = grow(mask, dilation) if dilation else mask
    return fill_cells(grown, cells) if cells else grown


def without(frame: Frames, mask: Mask) -> Frames:
    """The background: a frame [H, W, 3] that is black where the mask is."""
    return np.where(mask[..., None], np.uint8(0), frame)


class MaskReel:
    """The masks of a clip [H, W] in order, packed (about 1 kB each).

    `filled()` gives each of them back; an empty one is replaced by the one before it (at first, by the next), because
    the model would otherwise see the person it is to replace.
    """

    def __init__(self, size: Size) -> None:
        self._shape = (size[1], size[0])
        self._packed: list[bytes | None] = []

    def add(self, mask: Mask) -> None:
        """Append a mask."""
        self._packed.append(zlib.compress(np.packbits(mask).tobytes(), 1) if mask.any() else None)

    def check(self) -> None:
        """Error: E3020 when all masks are empty.  Warning: W3020 when some are."""
        empty = [index for index, packed in enumerate(self._packed) if packed is None]
        if len(empty) == len(self._packed):
            raise InputError(
                "E3020", "mask: nobody was found in any frame. Give --mask-video, or a video that shows a person."
            )
        if empty:
            named = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            text = (
                f"W3020: mask: empty in {len(empty)} of {len(self._packed)} frames ({named}); the one before is used."
            )
            warnings.warn(WanloomWarning(text), stacklevel=2)

    def filled(self) -> Iterator[Mask]:
        """Every mask, without empty ones."""
        last = next(packed for packed in self._packed if packed is not None)
        for packed in self._packed:
            last = packed or last
            bits = np.frombuffer(zlib.decompress(last), np.uint8)
            yield np.unpackbits(bits, count=self._shape[0] * self._shape[1]).reshape(self._shape).astype(np.bool_)
