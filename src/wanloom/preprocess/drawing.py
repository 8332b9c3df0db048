"""A person as the coloured lines on black that the animate model was trained with.

Bones are filled ellipses at 60 % of their colour, joints discs in full colour, fingers lines with blue joints; no
smoothing, and no point of the face.  Widths grow with the shorter side of the picture.  Style: human_visualization.py
of the official preprocessing ("v2" widths); bones and joints agree with its OpenCV drawing but
for single pixels of outlines.
"""

from __future__ import annotations

import colorsys
import math
from typing import Any

import numpy as np

from wanloom.media import Frames
from wanloom.preprocess.keypoints import BODY, Person, Points

SHOWN = 0.5  # the score from which a point is drawn
Colour = tuple[int, int, int]

COLOURS: tuple[Colour, ...] = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85), (200, 200, 0), (100, 100, 0),
)  # fmt: skip

# The i-th bone has the i-th colour.  A bone starts at a joint that is the end of an earlier one, or at the neck.
BONES: tuple[tuple[int, int], ...] = tuple(
    (BODY.index(start), BODY.index(end))
    for start, end in (
        ("neck", "right_shoulder"), ("neck", "left_shoulder"),
        ("right_shoulder", "right_elbow"), ("right_elbow", "right_wrist"),
        ("left_shoulder", "left_elbow"), ("left_elbow", "left_wrist"),
        ("neck", "right_hip"), ("right_hip", "right_knee"), ("right_knee", "right_ankle"),
        ("neck", "left_hip"), ("left_hip", "left_knee"), ("left_knee", "left_ankle"),
        ("neck", "nose"), ("nose", "right_eye"), ("right_eye", "right_ear"), ("nose", "left_eye"),
        ("left_eye", "left_ear"), ("left_ankle", "left_toe"), ("right_ankle", "right_toe"),
    )
)  # fmt: skip
FINGERS = tuple((0 if i % 4 == 0 else i, i + 1) for i in range(20))


def stroke(size: tuple[int, int]) -> int:
    """Half the width of a bone and the radius of a joint, in pixels, for a picture of this size."""
    return max(min(size) // 200 - 1, 1)


def draw_pose(person: Person, size: tuple[int, int]) -> Frames:
    """The drawing [height, width, 3] uint8 of a person whose points are in pixels of this `size` (width, height)."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", size)
    paint = ImageDraw.Draw(picture)
    radius = stroke(size)
    for (start, end), colour in zip(BONES, COLOURS, strict=False):
        one, other = person.body[start], person.body[end]
        if min(one[2], other[2]) >= SHOWN:
            red, green, blue = (int(0.6 * value) for value in colour)
            paint.polygon(_ellipse(one, other, radius), fill=(red, green, blue))
    for point, colour in zip(person.body, COLOURS, strict=True):
        if point[2] >= SHOWN:
            _disc(paint, point, radius, colour)
    for hand in (person.left_hand, person.right_hand):
        _draw_hand(paint, hand, max(radius // 2, 1))
    return np.array(picture)


def _draw_hand(paint: Any, hand: Points, width: int) -> None:
    for index, (start, end) in enumerate(FINGERS):
        one, other = hand[start], hand[end]
        if min(one[2], other[2]) >= SHOWN:
            red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(index / len(FINGERS), 1, 1))
            ends = [(int(one[0]), int(one[1])), (int(other[0]), int(other[1]))]
            # OpenCV's lines of two pixels and more are one wider than Pillow's
            paint.line(ends, fill=(red, green, blue), width=width if width == 1 else width + 1)
    for point in hand:
        if point[2] >= SHOWN:
            _disc(paint, point, width, (0, 0, 255))


def _ellipse(one: Points, other: Points, radius: int) -> list[tuple[int, int]]:
    """The outline of a bone, a corner for each degree, all in whole pixels and degrees as the trained drawings."""
    dx, dy = float(one[0] - other[0]), float(one[1] - other[1])
    x, y = int((one[0] + other[0]) / 2), int((one[1] + other[1]) / 2)
    half, turn = int(math.hypot(dx, dy) / 2), math.radians(int(math.degrees(math.atan2(dy, dx))))
    cosine, sine = math.cos(turn), math.sin(turn)
    corners = []
    for degree in range(360):
        along, across = half * math.cos(math.radians(degree)), radius * math.sin(math.radians(degree))
        corners.append((round(x + along * cosine - across * sine), round(y + along * sine + across * cosine)))
    return corners


def _disc(paint: Any, point: Points, radius: int, colour: Colour) -> None:
    x, y = int(point[0]), int(point[1])
    for dy in range(-radius, radius + 1):
        reach = math.isqrt(radius * radius - dy * dy)
        paint.line([(x - reach, y + dy), (x + reach, y + dy)], fill=colour)
