"""Drawn heads that speak, and the judge of videos of them: the world of the demo model of speech.

A head's mouth is open as `voices.opening` of its sound says.  `observe` reads back from pixels how far the mouth is
open in each frame and which colours head and background have; `compare` holds that against a sound and a face.

A combination of skin, hair, cut and background is never trained on when the crc32 of its words is a multiple of 5.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from .figures import GROUNDS, SKINS, Face, sample_face, talking_head
from .world import Floats, Pixels

SIZE = 64
NEAR = 60.0  # an RGB distance under which two colours count as one
MOUTH = (9.0, 9.0, 4.5)  # half a width, and how far below and above its place a mouth may reach, in pixels of 64


@dataclass(frozen=True)
class Talk:
    """A head and how it moves while it speaks: swings (size, turns a second, phase) of x and y, blinks in seconds."""

    face: Face
    swings: tuple[tuple[float, float, float], ...]
    blinks: tuple[float, ...]


def held_out(face: Face) -> bool:
    """Whether this combination is kept from training."""
    words = f"{face.skin} {face.hair} {face.cut} {face.ground}"
    return zlib.crc32(words.encode()) % 5 == 0


def sample_talk(rng: np.random.Generator, *, split: str = "train", seconds: float = 60.0) -> Talk:
    """A head of one side of the split ("train" or "held_out")."""
    while True:
        face = sample_face(rng)
        if held_out(face) == (split == "held_out"):
            break
    swings = tuple((rng.uniform(0.3, 1.3), rng.uniform(0.1, 0.35), rng.random()) for _ in range(2))
    blinks, at = [], rng.uniform(0.5, 3)
    while at < seconds:
        blinks.append(float(at))
        at += rng.uniform(1.5, 5)
    return Talk(face, swings, tuple(blinks))


def portrait(talk: Talk, *, size: int = SIZE) -> Pixels:
    """The head at rest, mouth shut: uint8 [size, size, 3].  What a model is given."""
    head: Pixels = talking_head(talk.face, np.zeros(1, np.float32), size=size)[0]
    return head


def speak(talk: Talk, mouth: Floats, *, fps: float, start: float = 0.0, size: int = SIZE) -> Pixels:
    """The head with its mouth open as `mouth` [F] says, from `start` seconds on: uint8 [F, size, size, 3]."""
    time = start + np.arange(len(mouth)) / fps
    x, y = (
        size_ * np.sin(2 * math.pi * (rate * time + phase)).astype(np.float32) for size_, rate, phase in talk.swings
    )
    blink = sum((np.exp(-(((time - at) / 0.09) ** 2)) for at in talk.blinks), np.zeros(len(mouth)))
    shut = np.clip(1.6 * blink, 0, 1).astype(np.float32)
    return talking_head(talk.face, np.asarray(mouth, np.float32), 32 + x, 30.5 + y, shut, size=size)


# ---------------------------------------------------------------------------------------------------------------- judge


@dataclass(frozen=True)
class Seen:
    """What a video shows: `mouth` [F], an opening in pixels of a 64 x 64 picture (no scale of its own), and colours."""

    mouth: Floats
    skin: Floats  # [3], mean over frames
    ground: Floats  # [3]


@dataclass(frozen=True)
class Verdict:
    """How a video answers to a sound: correlation of mouth and loudness at no lag, the lag (frames) where it is best.

    A positive lag: the mouth is late.
    """

    correlation: float
    lag: int
    skin: bool
    ground: bool

    @property
    def colours(self) -> bool:
        return self.skin and self.ground


def observe(video: Pixels) -> Seen:
    """Read a video uint8 [F, 64, 64, 3] of a head."""
    if video.ndim != 4 or video.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"a video of a head is uint8 [frames, {SIZE}, {SIZE}, 3], got {list(video.shape)}")
    pixels = video.astype(np.float32)
    ground = np.concatenate((pixels[:, :4, :4], pixels[:, :4, -4:]), 2).mean((0, 1, 2))
    cheeks = np.concatenate((pixels[:, 29:37, 21:25], pixels[:, 29:37, 39:43]), 2)
    return Seen(_mouth(pixels), np.median(cheeks.reshape(-1, 3), 0), ground)


def _mouth(pixels: Floats) -> Floats:
    """The opening in each frame: how much of the mouth's place is red of lips or dark of what is behind them."""
    half, below, above = (round(v) for v in MOUTH)
    rows, columns = slice(39 - above, 39 + below + 1), slice(32 - half, 32 + half + 1)
    place = pixels[:, rows, columns]
    red, green = place[..., 0], place[..., 1]
    lips = np.clip((0.52 - green / np.maximum(red, 1)) / 0.12, 0, 1) * (red > 35)
    return np.asarray(lips.sum((1, 2)), np.float32)


def compare(seen: Seen, mouth: Floats, face: Face, *, reach: int = 6) -> Verdict:
    """Hold what was seen against the openings of a sound, [F] like the video's frames, and the face that was given."""
    lags = range(-reach, reach + 1)
    scores = [correlation(seen.mouth, mouth, lag) for lag in lags]
    return Verdict(
        correlation=scores[reach],
        lag=lags[int(np.argmax(scores))],
        skin=_nearest(seen.skin, SKINS) == face.skin,
        ground=_nearest(seen.ground, GROUNDS) == face.ground,
    )


def correlation(seen: Floats, heard: Floats, lag: int = 0) -> float:
    """Of what is seen `lag` frames after it is heard; 0 where one of them does not change."""
    count = len(seen) - abs(lag)
    a, b = (seen[lag:], heard[:count]) if lag >= 0 else (seen[:count], heard[-lag:])
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / size if a.std() > 0.5 and size > 0 else 0.0


def _nearest(colour: Floats, palette: tuple[tuple[int, int, int], ...]) -> tuple[int, int, int] | None:
    distances = [float(np.linalg.norm(colour - np.array(other))) for other in palette]
    best = int(np.argmin(distances))
    return palette[best] if distances[best] < NEAR else None
