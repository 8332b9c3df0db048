"""Dressed figures in rooms that follow a stick figure: the world of the demo model of animation.

A dance is a person, a room, a way of moving, and how the person stands in the picture that a model is given.  `perform`
draws it, `drive` draws the stick figure that leads it, `cover` says where a person is to be put into a room.

A combination of hair, top and trousers or skirt is never trained on when the crc32 of its words is a multiple of 5.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from .figures import (
    CLOTHES,
    GROUNDS,
    JOINTS,
    Colour,
    Outfit,
    Painter,
    dressed_figure,
    sample_outfit,
    sample_pose,
    stick_figure,
)
from .world import SPAN, WORLD, Floats, Pixels

SIZE = 64
MARGIN = 3.0  # how far joints stay from the sides of the frame, and the most that a figure stands higher or lower
PACE = 0.4  # of the movements of `figures`: slow enough that four frames, which share a latent, are nearly alike
NEAR = 2.0  # how far from where a dance begins a person stands in the given picture
Pose = dict[str, tuple[Floats, Floats]]


@dataclass(frozen=True)
class Room:
    """What stands behind a person: a wall, a floor from `line` down, pictures on the wall (x, y, half size, round)."""

    wall: Colour
    floor: Colour
    line: float
    things: tuple[tuple[float, float, float, bool, Colour], ...]


@dataclass(frozen=True)
class Dance:
    """A person in a room, how the person moves (pose of each frame) and stands at first (pose of one frame)."""

    outfit: Outfit
    room: Room
    pose: Pose
    stance: Pose


def held_out(outfit: Outfit) -> bool:
    """Whether this combination is kept from training."""
    words = f"{outfit.hair} {outfit.top} {outfit.bottom} {outfit.skirt}"
    return zlib.crc32(words.encode()) % 5 == 0


def sample_person(rng: np.random.Generator, *, split: str = "train") -> Outfit:
    """A person of one side of the split ("train" or "held_out")."""
    while True:
        outfit = sample_outfit(rng)
        if held_out(outfit) == (split == "held_out"):
            return outfit


def sample_room(rng: np.random.Generator, outfit: Outfit) -> Room:
    """A room that the person stands out against."""
    worn = (outfit.skin, outfit.top, outfit.bottom, outfit.hair, outfit.shoes)
    free = [c for c in GROUNDS if all(math.dist(c, w) > 90 for w in worn)] or [outfit.ground]
    wall = free[rng.integers(len(free))]
    floor = tuple(round(0.75 * v + 12) for v in wall)
    things = []
    for side in (-1, 1):
        if rng.random() < 0.6:
            colours = [c for c in CLOTHES if math.dist(c, wall) > 90]
            x, y = 32 + side * rng.uniform(19, 25), rng.uniform(9, 24)
            things.append((x, y, rng.uniform(3, 5), bool(rng.random() < 0.5), colours[rng.integers(len(colours))]))
    return Room(wall, (floor[0], floor[1], floor[2]), rng.uniform(50, 56), tuple(things))


def sample_dance(rng: np.random.Generator, frames: int, *, split: str = "train") -> Dance:
    """A dance of so many frames; the person stands in the given picture as in some other movement.

    The dance begins near where the person stands in the picture, as retargeting puts a pose onto one.  People move as
    fast in a long dance as in a short one.
    """
    pace = PACE * max(frames - 1, SPAN) / SPAN
    outfit = sample_person(rng, split=split)
    room = sample_room(rng, outfit)
    stance = sample_pose(rng, 17, PACE)
    at = rng.integers(17)
    still = {name: (x[at : at + 1], y[at : at + 1]) for name, (x, y) in stance.items()}
    pose = _placed(rng, sample_pose(rng, frames, pace))
    return Dance(outfit, room, pose, _beside(rng, still, pose))


def _placed(rng: np.random.Generator, pose: Pose) -> Pose:
    """The same movement anywhere in the frame, so that who ignores the pose is mostly in a wrong place."""
    (left, right), (high, low) = _room_to_move(pose)
    return _moved(pose, rng.uniform(left, right), rng.uniform(high, low))


def _beside(rng: np.random.Generator, stance: Pose, pose: Pose) -> Pose:
    """The same stance with its hip near that of a pose's first frame, as far as the frame allows."""
    (left, right), (high, low) = _room_to_move(stance)
    aside, down = (float(pose["hip"][axis][0] - stance["hip"][axis][0]) + rng.uniform(-NEAR, NEAR) for axis in (0, 1))
    return _moved(stance, min(max(aside, left), right), min(max(down, high), low))


def _room_to_move(pose: Pose) -> tuple[tuple[float, float], tuple[float, float]]:
    """How far a movement may be put aside and down so that all of it is seen: least and most of both."""
    xs, ys = (np.stack([pose[name][axis] for name in JOINTS]) for axis in (0, 1))
    high = max(-MARGIN, 7.5 - float(pose["head"][1].min()), 2.0 - float(ys.min()))  # hair and hands go beyond joints
    low = min(MARGIN, WORLD - 4.0 - float(ys.max()))  # and so do shoes
    return (MARGIN - float(xs.min()), WORLD - MARGIN - float(xs.max())), (min(high, low), low)


def _moved(pose: Pose, aside: float, down: float) -> Pose:
    return {name: (x + np.float32(aside), y + np.float32(down)) for name, (x, y) in pose.items()}


# -------------------------------------------------------------------------------------------------------------- drawing


def draw_room(room: Room, *, size: int = SIZE) -> Pixels:
    """The empty room, uint8 [size, size, 3]."""
    paint = Painter(size, 1, room.wall)
    edge = WORLD + 1.0
    paint.quad([(-1.0, room.line), (edge, room.line), (edge, edge), (-1.0, edge)], room.floor)
    for x, y, half, round_, colour in room.things:
        if round_:
            paint.ellipse(x, y, half, half, colour)
        else:
            paint.quad([(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)], colour)
    room_: Pixels = paint.frames()[0]
    return room_


def portrait(dance: Dance, *, size: int = SIZE) -> Pixels:
    """The person at first, in the room: uint8 [size, size, 3].  What a model is given."""
    first: Pixels = dressed_figure(dance.outfit, dance.stance, size=size, behind=draw_room(dance.room, size=size))[0]
    return first


def perform(dance: Dance, *, size: int = SIZE) -> Pixels:
    """The person dancing in the room: uint8 [F, size, size, 3].  What a model is to make."""
    return dressed_figure(dance.outfit, dance.pose, size=size, behind=draw_room(dance.room, size=size))


def drive(dance: Dance, *, size: int = SIZE) -> Pixels:
    """The stick figure that leads: uint8 [F, size, size, 3]."""
    return stick_figure(dance.pose, size=size)


def cover(dance: Dance, *, size: int = SIZE, cell: int = 8) -> Floats:
    """Where the person may be drawn, in each frame: 1 in every square cell that the figure comes near; [F, size, size].

    Near: within a quarter of a cell.
    """
    empty = draw_room(dance.room, size=size).astype(np.int16)
    figure = np.abs(perform(dance, size=size).astype(np.int16) - empty).max(-1) > 8
    reach = cell // 4
    wide = np.pad(figure, ((0, 0), (reach, reach), (reach, reach)))
    near = np.zeros_like(figure)
    for y in range(2 * reach + 1):
        for x in range(2 * reach + 1):
            near |= wide[:, y : y + size, x : x + size]
    cells = near.reshape(len(near), size // cell, cell, size // cell, cell).any((2, 4))
    covered: Floats = cells.repeat(cell, 1).repeat(cell, 2).astype(np.float32)
    return covered
