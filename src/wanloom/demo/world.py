"""The demo world: captioned clips of plain shapes that move, drawn by formula.

The demo models are trained on this world and on nothing else, so what they can be asked for is what stands here: one
or two things, each with a shape, a colour and a motion, on a plain background.  `sample_clip` draws a scene,
`caption` says it in words of a closed vocabulary, `render` draws its pixels, `parse` reads a prompt back.

Lengths are in pixels of a 64 x 64 picture ("world units") whatever size is rendered; y points down.  Motion is measured
over 17 frames: frame k shows time k / 16.  Every thing stays inside the picture, two things stay apart, and all motions
follow from the caption and the first frame, so that image-to-video has one right answer.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]

WORLD = 64.0  # world units across the picture
SPAN = 16  # steps of a whole clip: 17 frames

# Object colours and backgrounds share no word, so a prompt never has to be parsed to know which is meant.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 20, 40),
    "green": (20, 150, 50),
    "blue": (30, 60, 230),
    "yellow": (255, 225, 20),
    "purple": (150, 30, 190),
    "orange": (255, 130, 0),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "sky": (150, 210, 255),
    "sand": (225, 200, 160),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "heart")
MOTIONS: tuple[str, ...] = ("left", "right", "up", "down", "grow", "shrink", "bounce", "orbit", "still")

_DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

# How each motion is said.  The first phrase is the plain one.
PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("moves left", "slides left", "goes left", "moving left"),
    "right": ("moves right", "slides right", "goes right", "moving right"),
    "up": ("moves up", "slides up", "goes up", "moving up"),
    "down": ("moves down", "slides down", "goes down", "moving down"),
    "grow": ("grows", "gets bigger", "growing"),
    "shrink": ("shrinks", "gets smaller", "shrinking"),
    "bounce": ("bounces", "hops", "bouncing"),
    "orbit": ("circles around", "goes around", "circling around"),
    "still": ("stays still", "does not move", "standing still"),
}
SIZES: dict[str, tuple[str, ...]] = {"small": ("small", "little"), "big": ("big", "large")}
SMALL_BELOW, BIG_FROM = 10.5, 12.0  # radii at which "small" and "big" may be said

_ONE = (
    "a {thing} {motion} on a {background} background",
    "a {thing} {motion} on {background}",
    "{thing} {motion}, {background} background",
    "on {background}, a {thing} {motion}",
)
_TWO = (
    "a {thing} {motion} and a {thing2} {motion2} on a {background} background",
    "a {thing} {motion}, a {thing2} {motion2}, on {background}",
    "on {background}, a {thing} {motion} and a {thing2} {motion2}",
)
_SPELLINGS = {"gray": ("gray", "grey")}
_SPLIT = re.compile(r"[a-z]+|[^\sa-z]")


# --------------------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Thing:
    """One object: what a caption says of it, and where it starts.

    `x`, `y`: centre of mass in frame 0; `radius`: size in frame 0; `speed`: world units a frame, of the centre for
    motions of place (on bounce and orbit along the path), of the radius for grow and shrink, 0 for still.
    """

    shape: str
    colour: str
    motion: str
    x: float = 32.0
    y: float = 32.0
    radius: float = 12.0
    speed: float = 0.0

    @property
    def size(self) -> str:
        """ "small", "big" or "" when neither word fits (medium things, and things that change size)."""
        if self.motion in ("grow", "shrink"):
            return ""
        return "small" if self.radius < SMALL_BELOW else "big" if self.radius >= BIG_FROM else ""

    def path(self, time: Floats) -> tuple[Floats, Floats, Floats]:
        """Centre x, centre y and radius at each `time` in 0..1 of the clip."""
        flat = np.zeros_like(time)
        travel = self.speed * SPAN
        if self.motion in _DIRECTIONS:
            dx, dy = _DIRECTIONS[self.motion]
            return self.x + dx * travel * time, self.y + dy * travel * time, self.radius + flat
        if self.motion == "bounce":  # falls for half the clip, comes back in the other half
            fall = travel * 0.5 * (1 - np.abs(2 * time - 1))
            return self.x + flat, self.y + fall, self.radius + flat
        if self.motion == "orbit":  # once around, clockwise on the screen, starting at the top of the ring
            ring, angle = travel / (2 * math.pi), 2 * math.pi * time
            return self.x + ring * np.sin(angle), self.y + ring * (1 - np.cos(angle)), self.radius + flat
        change = {"grow": travel, "shrink": -travel}.get(self.motion, 0.0)
        return self.x + flat, self.y + flat, self.radius + change * time


@dataclass(frozen=True)
class Clip:
    """A whole scene; `render` turns it into pixels, `caption` into words."""

    background: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Ask:
    """What a prompt asks of one thing; None where it does not say."""

    shape: str | None = None
    colour: str | None = None
    motion: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for: `parse` makes it, the judge compares it with pixels."""

    background: str | None
    things: tuple[Ask, ...]


def wanted(clip: Clip) -> Wanted:
    """What a full caption of `clip` asks for."""
    return Wanted(clip.background, tuple(Ask(t.shape, t.colour, t.motion, t.size or None) for t in clip.things))


# ----------------------------------------------------------------------------------------------------------- held out


def _crc(words: Iterable[str]) -> int:
    return zlib.crc32(" ".join(sorted(words)).encode())


def held_out_pair(colour: str, shape: str) -> bool:
    """Is this (colour, shape) pair never trained on?  Three of the thirty: one in ten."""
    return _crc((colour, shape)) % 10 == 1


def held_out_combination(colour: str, shape: str, motion: str, background: str) -> bool:
    """Is this combination never trained on?  One in five, and all combinations of a held-out pair."""
    return held_out_pair(colour, shape) or _crc((colour, shape, motion, background)) % 5 == 0


def held_out(clip: Clip) -> bool:
    """True when any thing of `clip` is a combination that training never shows."""
    return any(held_out_combination(t.colour, t.shape, t.motion, clip.background) for t in clip.things)


# ----------------------------------------------------------------------------------------------------------- sampling


def _size_and_speed(rng: np.random.Generator, motion: str, alone: bool) -> tuple[float, float]:
    """Radius in frame 0 and speed of a thing."""
    if motion in ("grow", "shrink"):
        small = rng.uniform(9.0, 10.0) if alone else 9.0
        large = small + (rng.uniform(6.0, 7.5) if alone else 4.5)
        return (small if motion == "grow" else large), (large - small) / SPAN
    radius = rng.uniform(9.0, 14.0) if alone else rng.uniform(9.0, 10.0)
    low, high = {"still": (0.0, 0.0), "orbit": (1.1, 1.5), "bounce": (1.0, 1.5)}.get(motion, (0.8, 1.5))
    return radius, rng.uniform(low, high if alone else low + (high - low) * 0.4)


def _room(thing: Thing) -> tuple[Floats, Floats, Floats, Floats]:
    """Left, top, right and bottom edge of the thing's box in 17 frames, for a start at (0, 0)."""
    x, y, r = Thing(thing.shape, thing.colour, thing.motion, 0.0, 0.0, thing.radius, thing.speed).path(clock(SPAN + 1))
    left, top, right, bottom = EXTENT[thing.shape]
    return x - left * r, y - top * r, x + right * r, y + bottom * r


def _place(rng: np.random.Generator, things: list[Thing]) -> tuple[Thing, ...] | None:
    """Start points that keep every thing inside and two things apart in all frames; None where 200 tries find none."""
    tries, margin, gap = 200, 1.0, 2.0
    boxes = [_room(thing) for thing in things]
    starts = []
    for left, top, right, bottom in boxes:
        low_x, high_x = margin - left.min(), WORLD - margin - right.max()
        low_y, high_y = margin - top.min(), WORLD - margin - bottom.max()
        if high_x < low_x or high_y < low_y:
            return None
        starts.append((rng.uniform(low_x, high_x, tries), rng.uniform(low_y, high_y, tries)))
    good = 0
    if len(things) == 2:
        (ax, ay), (bx, by) = starts
        (al, at, ar, ab), (bl, bt, br, bb) = boxes
        dx, dy = (bx - ax)[:, None], (by - ay)[:, None]
        beside = (dx + bl - ar > gap) | (-dx + al - br > gap) | (dy + bt - ab > gap) | (-dy + at - bb > gap)
        apart = beside.all(1)
        if not apart.any():
            return None
        good = int(apart.argmax())
    return tuple(
        Thing(t.shape, t.colour, t.motion, float(x[good]), float(y[good]), t.radius, t.speed)
        for t, (x, y) in zip(things, starts, strict=True)
    )


def compose(rng: np.random.Generator, background: str, asks: Iterable[tuple[str, str, str]]) -> Clip | None:
    """A clip of the given (shape, colour, motion) triples with size, speed and place drawn; None where none fits."""
    asks = list(asks)
    things = []
    for shape, colour, motion in asks:
        radius, speed = _size_and_speed(rng, motion, alone=len(asks) == 1)
        things.append(Thing(shape, colour, motion, 0.0, 0.0, radius, speed))
    placed = _place(rng, things)
    return None if placed is None else Clip(background, placed)


def sample_clip(rng: np.random.Generator, *, objects: int | None = None, split: str = "train") -> Clip:
    """Draw a scene.

    objects: 1, 2, or None for one thing in three clips of four.  Two things always differ in colour.
    split: "train" (no held-out combination), "held_out" (at least one), "any".
    """
    if split not in ("train", "held_out", "any"):
        raise ValueError(f"split is train, held_out or any, got {split!r}")
    if objects not in (None, 1, 2):
        raise ValueError(f"objects is 1, 2 or None, got {objects!r}")
    count = objects or (1 if rng.random() < 0.75 else 2)
    backgrounds, colours = tuple(BACKGROUNDS), tuple(COLOURS)
    while True:
        background = backgrounds[rng.integers(len(backgrounds))]
        chosen = rng.permutation(len(colours))[:count]
        asks = [
            (SHAPES[rng.integers(len(SHAPES))], colours[colour], MOTIONS[rng.integers(len(MOTIONS))])
            for colour in chosen
        ]
        unseen = any(held_out_combination(colour, shape, motion, background) for shape, colour, motion in asks)
        if split != "any" and unseen != (split == "held_out"):
            continue
        clip = compose(rng, background, asks)
        if clip is not None:
            return clip


# -------------------------------------------------------------------------------------------------------------- words


def caption(clip: Clip, rng: np.random.Generator) -> str:
    """One of the ways to say `clip`: at most 23 tokens of `words`."""

    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    parts: dict[str, str] = {"background": pick(_SPELLINGS.get(clip.background, (clip.background,)))}
    for suffix, thing in zip(("", "2"), clip.things, strict=False):
        name = f"{thing.colour} {thing.shape}"
        if len(clip.things) == 1 and thing.size and rng.random() < 0.5:
            name = f"{pick(SIZES[thing.size])} {name}"
        parts["thing" + suffix], parts["motion" + suffix] = name, pick(PHRASES[thing.motion])
    text = pick(_ONE if len(clip.things) == 1 else _TWO).format(**parts)
    return re.sub(r"\ba (?=orange)", "an ", text)


def words(prompt: str) -> list[str]:
    """The prompt as the demo tokenizer splits it: lower-case words and single marks."""
    return _SPLIT.findall(prompt.lower())


def _all_words() -> tuple[str, ...]:
    found: set[str] = {"a", "an", *COLOURS, *SHAPES}
    for background in BACKGROUNDS:
        found.update(_SPELLINGS.get(background, (background,)))
    for text in (*_ONE, *_TWO, *sum(PHRASES.values(), ()), *sum(SIZES.values(), ())):
        found.update(words(re.sub(r"\{\w+\}", " ", text)))
    return tuple(sorted(found))


VOCABULARY: tuple[str, ...] = _all_words()  # every word (and the comma) that a caption can hold


def unknown_words(prompt: str) -> list[str]:
    """The words of `prompt` that the demo models have never read, in order, each once.  Marks are not words."""
    known = set(VOCABULARY)
    return list(dict.fromkeys(word for word in words(prompt) if word[0].isalpha() and word not in known))


_MOTION_OF_WORD: dict[str, str] = {
    **{direction: direction for direction in _DIRECTIONS},
    **dict.fromkeys(("grows", "growing", "bigger"), "grow"),
    **dict.fromkeys(("shrinks", "shrinking", "smaller"), "shrink"),
    **dict.fromkeys(("bounces", "bouncing", "hops"), "bounce"),
    **dict.fromkeys(("circles", "circling", "around"), "orbit"),
    **dict.fromkeys(("still", "not"), "still"),
}
_SIZE_OF_WORD = {word: size for size, options in SIZES.items() for word in options}
_BACKGROUND_OF_WORD = {word: name for name in BACKGROUNDS for word in _SPELLINGS.get(name, (name,))}


def parse(prompt: str) -> Wanted:
    """What `prompt` asks for.  Colour and size words belong to the next shape, motion words to the shape before."""
    background: str | None = None
    things: list[Ask] = []
    colour: str | None = None
    size: str | None = None
    for word in words(prompt):
        if word in COLOURS:
            colour = word
        elif word in _SIZE_OF_WORD:
            size = _SIZE_OF_WORD[word]
        elif word in SHAPES:
            things.append(Ask(word, colour, None, size))
            colour = size = None
        elif word in _MOTION_OF_WORD and things and things[-1].motion is None:
            last = things[-1]
            things[-1] = Ask(last.shape, last.colour, _MOTION_OF_WORD[word], last.size)
        elif word in _BACKGROUND_OF_WORD:
            background = _BACKGROUND_OF_WORD[word]
    return Wanted(background, tuple(things))


def examples(n: int, held_out: bool = True, seed: int = 0, objects: int = 1) -> list[tuple[Clip, str]]:
    """`n` clips and a caption of each, always the same for the same arguments.

    One-object clips go through the held-out (or trained) combinations in a shuffled order, each once before any
    comes again; two-object clips hold at least one held-out combination (or none).
    """
    rng = np.random.default_rng((seed, objects, int(held_out)))
    chosen: list[tuple[Clip, str]] = []
    if objects == 2:
        for _ in range(n):
            pair = sample_clip(rng, objects=2, split="held_out" if held_out else "train")
            chosen.append((pair, caption(pair, rng)))
        return chosen
    every = [
        c
        for c in product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS)
        if held_out_combination(c[1], c[0], *c[2:]) == held_out
    ]
    order = rng.permutation(len(every))
    while len(chosen) < n:
        shape, colour, motion, background = every[order[len(chosen) % len(every)]]
        clip = compose(rng, background, [(shape, colour, motion)])
        if clip is not None:
            chosen.append((clip, caption(clip, rng)))
    return chosen


def example_prompts(n: int, held_out: bool = True, seed: int = 0, objects: int = 1) -> list[str]:
    """The captions of `examples`: prompts to try a demo model on."""
    return [text for _, text in examples(n, held_out, seed, objects)]


# ------------------------------------------------------------------------------------------------------------ drawing

# A shape is its signed distance (negative inside) at points in units of its radius, with the centre of mass at the
# origin.  Distances need to be right only near the edge.  The areas are close, so no shape is told by its size.

_INNER = 0.66  # triangle: radius of the inscribed circle
_STAR = (1.24, 0.62)  # star: distance of the outer and of the inner corners
_HEART = (1.72, 0.6566)  # heart: its size in unit hearts, and the unit heart's centre of mass above its lower tip


def _circle(x: Floats, y: Floats) -> Floats:
    return np.sqrt(x * x + y * y) - 0.98


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - 0.88


def _triangle(x: Floats, y: Floats) -> Floats:
    return np.maximum(y, np.abs(x) * math.sqrt(0.75) - y * 0.5) - _INNER


def _star(x: Floats, y: Floats) -> Floats:
    c, s = math.cos(math.radians(36)), math.sin(math.radians(36))
    x, y = np.abs(x), -y
    for side in (c, -c):  # two mirrors fold the five points onto the upper one
        over = 2 * np.maximum(side * x - s * y, 0)
        x, y = x - over * side, y + over * s
    outer, inner = _STAR
    nx, ny = outer - inner * c, inner * s  # outward normal of the one edge that is left
    length = math.hypot(nx, ny)
    return np.abs(x) * (nx / length) + (y - outer) * (ny / length)


def _heart(x: Floats, y: Floats) -> Floats:
    scale, tip = _HEART
    x, y = np.abs(x) / scale, tip - y / scale
    lobe = np.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2) - math.sqrt(0.125)
    along = np.maximum(x + y, 0) / 2
    side = np.sqrt(np.minimum(x * x + (y - 1) ** 2, (x - along) ** 2 + (y - along) ** 2)) * np.sign(x - y)
    return scale * np.where(x + y > 1, lobe, side)


DISTANCE: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
}
# How far each shape reaches from its centre to the left, top, right and bottom, in units of its radius.
EXTENT: dict[str, tuple[float, float, float, float]] = {
    "circle": (0.98, 0.98, 0.98, 0.98),
    "square": (0.88, 0.88, 0.88, 0.88),
    "triangle": (1.143, 1.32, 1.143, 0.66),
    "star": (1.18, 1.24, 1.18, 1.004),
    "heart": (1.039, 0.769, 1.039, 1.13),
}


def clock(frames: int) -> Floats:
    """Time of each frame in 0..1.  Fewer than 17 frames are the start of the clip; more run the same clip slower."""
    return np.arange(frames, dtype=np.float32) / max(frames - 1, SPAN)


def ideal_mask(shape: str, x: Floats, y: Floats, radius: Floats, size: int) -> Floats:
    """Coverage 0..1, float32 [F, size, size], of `shape` at centres `x`, `y` with `radius` (each [F], world units)."""
    scale = size / WORLD
    grid = (np.arange(size, dtype=np.float32) + 0.5) / scale
    across = (grid[None, None, :] - x[:, None, None]) / radius[:, None, None]
    below = (grid[None, :, None] - y[:, None, None]) / radius[:, None, None]
    distance = DISTANCE[shape](across, below) * (radius[:, None, None] * scale)
    return np.clip(0.5 - distance, 0, 1)


def _draw(canvas: Floats, thing: Thing) -> None:
    """Paint a thing over `canvas` [F, S, S, 3], touching only the box around it."""
    frames, size = canvas.shape[:2]
    scale = size / WORLD
    x, y, radius = (value.astype(np.float32) for value in thing.path(clock(frames)))
    half = math.ceil(max(EXTENT[thing.shape]) * float(radius.max() * scale)) + 2
    left, top = np.floor(x * scale).astype(int) - half, np.floor(y * scale).astype(int) - half
    steps = np.arange(2 * half + 1, dtype=np.float32) + 0.5
    pixels = (radius * scale)[:, None, None]
    across = (steps[None, None, :] + (left - x * scale).astype(np.float32)[:, None, None]) / pixels
    below = (steps[None, :, None] + (top - y * scale).astype(np.float32)[:, None, None]) / pixels
    cover = np.clip(0.5 - DISTANCE[thing.shape](across, below) * pixels, 0, 1)[..., None]
    colour = np.array(COLOURS[thing.colour], np.float32)
    for k in range(frames):
        x0, x1 = max(left[k], 0), min(left[k] + len(steps), size)
        y0, y1 = max(top[k], 0), min(top[k] + len(steps), size)
        if x0 < x1 and y0 < y1:
            patch = canvas[k, y0:y1, x0:x1]
            patch += cover[k, y0 - top[k] : y1 - top[k], x0 - left[k] : x1 - left[k]] * (colour - patch)


def render(clip: Clip, size: int = 64, frames: int = 17) -> Pixels:
    """Draw `clip` as uint8 [frames, size, size, 3].  Any size shows the same scene, anti-aliased."""
    canvas = np.empty((frames, size, size, 3), np.float32)
    canvas[:] = BACKGROUNDS[clip.background]
    for thing in clip.things:
        _draw(canvas, thing)
    canvas += 0.5
    pixels: Pixels = canvas.astype(np.uint8)
    return pixels


def first_frame(clip: Clip, size: int = 64) -> Pixels:
    """The picture that image-to-video starts from: uint8 [size, size, 3], equal to `render(clip, size)[0]`."""
    picture: Pixels = render(clip, size, 1)[0]
    return picture
