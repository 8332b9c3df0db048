"""The 133 points of a person (COCO-WholeBody), the file they come in, and the parts of them that are drawn.

    {"size": [1280, 720], "frames": [[[x, y, score], ... 133 of them], null, ...]}

One entry for each frame of the video file, null where nobody is there; x and y are pixels of a frame of `size`, and a
score is from 0 to 1.  A picture's file is the same with one frame.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wanloom.errors import InputError
from wanloom.media import read_regular

Points = NDArray[np.float32]  # [..., n, 3]: x, y in pixels, score

COUNT = 133
MAX_BYTES = 512 * 2**20  # of the file
FACE = slice(23, 91)  # 68 points
LEFT_HAND, RIGHT_HAND = slice(91, 112), slice(112, 133)  # 21 points each, the wrist first

# The 20 points of the body that are drawn, each the mean of two of the 133: the neck lies between the shoulders, a toe
# between the big and the small one.
BODY = (
    "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
    "right_eye", "left_eye", "right_ear", "left_ear", "left_toe", "right_toe",
)  # fmt: skip
_FIRST = (0, 5, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 17, 20)
_SECOND = (0, 6, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 18, 21)


@dataclass(frozen=True)
class Person:
    """What is drawn of a person in one frame: body [20, 3] in the order of `BODY`, hands [21, 3], wrists first."""

    body: Points
    left_hand: Points
    right_hand: Points


@dataclass(frozen=True)
class Recorded:
    """Points from a file: [F, 133, 3], in pixels of a frame of `size` (width, height)."""

    points: Points
    size: tuple[int, int]

    def in_pixels_of(self, size: tuple[int, int]) -> Points:
        """The same points in pixels of a frame of another size."""
        scale = (size[0] / self.size[0], size[1] / self.size[1], 1.0)
        return self.points * np.array(scale, np.float32)


def person_of(points: Points) -> Person:
    """The drawn parts of the points [133, 3] of one frame."""
    body: Points = np.float32(0.5) * (points[list(_FIRST)] + points[list(_SECOND)])
    return Person(body, points[LEFT_HAND].copy(), points[RIGHT_HAND].copy())


def read_keypoints(path: Path, role: str) -> Recorded:
    """The points in a JSON file.  Errors: E3001 to E3003 and E3006 for the file, E3028 for what is in it."""
    data = read_regular(path, role, MAX_BYTES)
    name = f"{role}: {path.name}"
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError("E3028", f"{name}: no JSON ({str(error)[:80]}).") from None
    if not isinstance(document, dict) or not isinstance(document.get("frames"), list) or not document["frames"]:
        raise InputError(
            "E3028", f'{name}: expected {{"size": [width, height], "frames": [...]}}, see docs/animate.md.'
        )
    size = document.get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise InputError("E3028", f"{name}: size: got {str(size)[:40]}, expected [width, height] in pixels.")
    frames = [_points(frame, f"{name}: frame {index}") for index, frame in enumerate(document["frames"])]
    return Recorded(np.stack(frames), (size[0], size[1]))


def _points(frame: object, where: str) -> Points:
    if frame is None:
        return np.zeros((COUNT, 3), np.float32)
    try:
        points = np.asarray(frame, np.float32)
    except (ValueError, TypeError, OverflowError):
        points = np.zeros(0, np.float32)
    if points.shape != (COUNT, 3):
        raise InputError("E3028", f"{where}: expected {COUNT} points [x, y, score], or null.")
    if not np.isfinite(points).all() or np.abs(points[:, :2]).max() > 1e5:
        raise InputError("E3028", f"{where}: coordinates that are no finite pixels.")
    if points[:, 2].min() < 0 or points[:, 2].max() > 1.5:  # heat maps overshoot 1 a little
        raise InputError(
            "E3028", f"{where}: scores from {points[:, 2].min():g} to {points[:, 2].max():g}, expected 0..1."
        )
    return points
