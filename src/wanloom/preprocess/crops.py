"""Sizes and places: the size of the video, how a frame is fitted into it, and where the face is.

Points, frames and masks go through the same `Fit`, so that they stay on top of each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from wanloom.errors import InputError
from wanloom.media import Frames
from wanloom.preprocess.keypoints import FACE, Person, Points

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two are outside
Mask = NDArray[np.bool_]  # [H, W]

UNIT = 16  # both sides of a video are multiples of it: 8 for the VAE, 2 for the transformer's patches
FACE_SIDE = 512
FACE_AREA = 1.3  # of the crop, against the box of the points


def best_size(source: Size, area: int) -> Size:
    """The largest (width, height) in multiples of 16 within `area` that has about the proportions of `source`.

    For each height the two widths beside the proportional one are tried; the largest area wins, then the proportions.
    Error: E2003 when `area` is too small for any.
    """
    ratio = source[0] / source[1]
    highest = int((area / ratio) ** 0.5) + UNIT
    found: list[tuple[int, float, Size]] = []
    for height in range(UNIT, highest + 1, UNIT):
        down = int(height * ratio) // UNIT * UNIT
        fitting = [width for width in (down, down + UNIT) if width > 0 and width * height <= area]
        found += [(-width * height, abs(width / height - ratio), (width, height)) for width in fitting]
    if not found:
        raise InputError("E2003", f"size: an area of {area} pixels is too small for {source[0]}x{source[1]}.")
    return min(found)[2]


@dataclass(frozen=True)
class Fit:
    """How a frame of one size becomes the middle of a black one of another: scaled to `inner`, placed at `corner`."""

    source: Size
    target: Size
    inner: Size
    corner: tuple[int, int]

    def image(self, frame: Frames) -> Frames:
        """A frame [h, w, 3] of the source's size as one of the target's; averaged when it shrinks."""
        if self.inner[0] * self.inner[1] < self.source[0] * self.source[1]:
            return self._placed(shrink(frame, self.inner))
        from PIL import Image

        return self._placed(np.array(Image.fromarray(frame).resize(self.inner, Image.Resampling.BILINEAR)))

    def mask(self, mask: Mask) -> Mask:
        """A mask [h, w] of the source's size as one of the target's: the nearest pixel, nothing in the border."""
        from PIL import Image

        picture = Image.fromarray(mask.astype(np.uint8)).resize(self.inner, Image.Resampling.NEAREST)
        return self._placed(np.array(picture)).astype(np.bool_)

    def points(self, points: Points) -> Points:
        """Points [..., 3] of the source in pixels of the target."""
        scale = (self.inner[0] / self.source[0], self.inner[1] / self.source[1], 1.0)
        return points * np.array(scale, np.float32) + np.array((*self.corner, 0.0), np.float32)

    def person(self, person: Person) -> Person:
        return replace(
            person,
            body=self.points(person.body),
            left_hand=self.points(person.left_hand),
            right_hand=self.points(person.right_hand),
        )

    def _placed(self, inner: Frames) -> Frames:
        canvas = np.zeros((self.target[1], self.target[0], *inner.shape[2:]), np.uint8)
        left, top = self.corner
        canvas[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
        return canvas


def letterbox(source: Size, target: Size) -> Fit:
    """The fit that keeps the proportions and adds black on two sides."""
    (width, height), (wide, high) = source, target
    if height * wide > high * width:
        inner = (max(high * width // height, 1), high)
    else:
        inner = (wide, max(wide * height // width, 1))
    return Fit(source, target, inner, ((wide - inner[0]) // 2, (high - inner[1]) // 2))


def face_box(points: Points, size: Size) -> Box | None:
    """Where the face of the points [133, 3] is in a frame, for the crop; None when there is none.

    The box of the 68 face points grows to 1.3 times its area with its proportions kept: on both sides alike, and three
    quarters of the height above (the points end at the brows).  It is cut at the edges of the frame.
    """
    face = points[FACE]
    seen = face[face[:, 2] > 0][:, :2]
    if len(seen) < 2:
        return None
    (left, top), (right, bottom) = seen.min(0).tolist(), seen.max(0).tolist()
    more = FACE_AREA**0.5 - 1
    wider, higher = more * (right - left), more * (bottom - top)
    box = (
        int(max(left - wider / 2, 0)),
        int(max(top - 0.75 * higher, 0)),
        int(min(right + wider / 2, size[0])),
        int(min(bottom + 0.25 * higher, size[1])),
    )
    return box if box[2] - box[0] >= 2 and box[3] - box[1] >= 2 else None


def face_boxes(points: Points, size: Size) -> list[Box]:
    """A face box for each frame of [F, 133, 3]: where there is none, that of the frame before (at first, the next).

    A clip without any face has the middle square of the frame throughout.
    """
    found = [face_box(frame, size) for frame in points]
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    last = next((box for box in found if box is not None), (left, top, left + side, top + side))
    boxes = []
    for box in found:
        last = box or last
        boxes.append(last)
    return boxes


def crop_face(frame: Frames, box: Box) -> Frames:
    """The box of a frame as [512, 512, 3], its proportions not kept."""
    from PIL import Image

    left, top, right, bottom = box
    face = Image.fromarray(frame[top:bottom, left:right])
    return np.array(face.resize((FACE_SIDE, FACE_SIDE), Image.Resampling.BILINEAR))


def shrink(frame: Frames, size: Size) -> Frames:
    """A frame [h, w, 3] at a smaller size: each pixel the mean of the area it covers, parts of pixels included."""
    pixels = frame.astype(np.float32)
    for axis, length in ((0, size[1]), (1, size[0])):
        count = pixels.shape[axis]
        places = np.arange(length) * count / length
        before = places.astype(np.intp)
        part = (places - before).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        cut = np.take(pixels, before, axis) * part  # of the pixel on an edge, what belongs to the place before
        after = np.concatenate([np.take(cut, range(1, length), axis), np.zeros_like(np.take(cut, [0], axis))], axis)
        pixels = (np.add.reduceat(pixels, before, axis) - cut + after) * np.float32(length / count)
    return np.rint(pixels).astype(np.uint8)


def sample(frame: Frames, box: tuple[float, float, float, float], size: Size) -> NDArray[np.float32]:
    """A rectangle (left, top, width, height) of a frame as float32 [h, w, 3], linear between pixels, black outside.

    Pixel i of the result is at left + i * width / w: the networks are read back by the same rule.
    """
    left, top, width, height = box
    columns, part_x = _taps(left + np.arange(size[0]) * width / size[0], frame.shape[1])
    rows, part_y = _taps(top + np.arange(size[1]) * height / size[1], frame.shape[0])
    padded = np.pad(frame, ((1, 2), (1, 2), (0, 0)))
    upper, lower = padded[rows].astype(np.float32), padded[rows + 1].astype(np.float32)
    lines = upper + (lower - upper) * part_y[:, None, None]
    result: NDArray[np.float32] = lines[:, columns] + (lines[:, columns + 1] - lines[:, columns]) * part_x[:, None]
    return result


def _taps(places: NDArray[np.float64], count: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """For each place the pixel before it in a row that was padded by 1 and 2 zeros, and the part of the next one."""
    places = np.clip(places, -1, count)
    before = np.floor(places)
    return before.astype(np.intp) + 1, (places - before).astype(np.float32)
