"""The judge of demo videos: reads pixels, says what they show, compares that with what was wanted.

It knows nothing of how a video was made.  `observe` finds the background, the coloured things on it and, frame by
frame, their place, size and likeness to each shape; `compare` holds that against a prompt; `judge` does both.  Any
picture size is first brought to 64 x 64 by area averaging, so lengths are pixels of a 64 x 64 picture.

Slight blur and noise, as a VAE leaves them, cost nothing but IoU.  A thing that vanishes in a frame, changes its shape
on the way, moves by fits and starts or not at all, is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from . import world
from .world import Ask, Clip, Floats, Pixels, Wanted

Rows = NDArray[np.uint64]  # a 64 x 64 mask as one 64-bit word a row

SIZE = 64
FAR = 60.0  # a pixel this far (RGB) from the background belongs to something
NEAR_BACKGROUND = 45.0  # a background colour may be off by this much
NEAR_COLOUR = 75.0  # an object's mean colour may be off by this much
SMALLEST = 40  # pixels: anything smaller is dirt, not a thing
LIKE = 0.72  # least mean IoU with the ideal shape
ASTRAY = 1.3  # most root-mean-square distance (pixels) of the centre from the ideal path


@dataclass(frozen=True)
class Seen:
    """One thing as the pixels show it.

    colour: nearest palette name, or None when it is near none; `shape_iou`: per shape name the IoU with the ideal shape
    of the same area and centre in each frame [F]; `x`, `y`, `area`: per frame [F]; `present`: in how many frames.
    """

    colour: str | None
    shape: str | None
    motion: str | None
    shape_iou: dict[str, Floats] = field(repr=False)
    x: Floats = field(repr=False)
    y: Floats = field(repr=False)
    area: Floats = field(repr=False)
    present: int = 0


@dataclass(frozen=True)
class View:
    """What a video shows: background (None when it is no plain one of ours), things (largest first), their count."""

    background: str | None
    things: tuple[Seen, ...]
    count: int


@dataclass(frozen=True)
class Verdict:
    """Which parts of the prompt the video meets.  What a prompt does not name counts as met.

    iou: mean over things and frames of the IoU with the wanted shape (the seen one where none was asked for) at the
    found place and size; 0 when a wanted thing is missing.
    """

    colour: bool
    shape: bool
    motion: bool
    background: bool
    count: bool
    iou: float

    @property
    def all_right(self) -> bool:
        """Colour, shape, motion and background are all as asked."""
        return self.colour and self.shape and self.motion and self.background


# ------------------------------------------------------------------------------------------------------------- pixels


@cache
def _averaging(length: int) -> Floats:
    """Matrix [64, length] that averages `length` pixels into 64 by area."""
    edges = np.arange(SIZE + 1) * (length / SIZE)
    low, high = edges[:-1, None], edges[1:, None]
    left = np.arange(length)[None, :]
    overlap = np.clip(np.minimum(high, left + 1) - np.maximum(low, left), 0, None)
    matrix: Floats = (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)
    return matrix


def _at_64(video: Pixels) -> Floats:
    """[F, H, W, 3] uint8 to [F, 64, 64, 3] float32 in 0..255."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise ValueError(f"a video is uint8 [frames, height, width, 3], got {video.dtype} {list(video.shape)}")
    pixels = video.astype(np.float32)
    if video.shape[1] != SIZE:
        pixels = np.einsum("ih,fhwc->fiwc", _averaging(video.shape[1]), pixels, optimize=True)
    if video.shape[2] != SIZE:
        pixels = np.einsum("jw,fiwc->fijc", _averaging(video.shape[2]), pixels, optimize=True)
    return pixels


def _pack(mask: NDArray[np.bool_]) -> Rows:
    """[F, 64, 64] bool to [F, 64] words."""
    rows: Rows = np.packbits(mask, axis=2, bitorder="little").view("<u8")[..., 0]
    return rows


def _unpack(rows: Rows) -> NDArray[np.bool_]:
    flat = np.ascontiguousarray(rows).view(np.uint8).reshape(*rows.shape, 8)
    return np.unpackbits(flat, axis=2, bitorder="little").astype(bool)


_ONE = np.uint64(1)


def _spread(rows: Rows) -> Rows:
    """The mask grown by one pixel to each of the eight sides."""
    wide: Rows = rows | (rows << _ONE) | (rows >> _ONE)
    grown: Rows = wide.copy()
    grown[:, 1:] |= wide[:, :-1]
    grown[:, :-1] |= wide[:, 1:]
    return grown


def _erode(rows: Rows) -> Rows:
    """The mask without its outermost pixels; the picture's border does not count as an edge."""
    inner: Rows = ~_spread(~rows)
    return inner


def _pieces(rows: Rows, most: int = 4) -> list[Rows]:
    """Split each frame's mask into connected pieces: up to `most` masks [F, 64], in the order of their first rows."""
    rest, found = rows.copy(), []
    frames = np.arange(len(rows))
    for _ in range(most):
        if not rest.any():
            break
        seed = np.zeros_like(rest)
        first = (rest != 0).argmax(1)
        row = rest[frames, first]
        seed[frames, first] = row & (~row + _ONE)  # lowest set bit; zero stays zero
        while True:
            grown = _spread(seed) & rest
            if np.array_equal(grown, seed):
                break
            seed = grown
        found.append(seed)
        rest &= ~seed
    return found


def _gap2(pixels: Floats, colour: Floats) -> Floats:
    """Squared RGB distance of every pixel [..., 3] from `colour`."""
    offset = pixels - colour
    squares: Floats = np.einsum("...c,...c->...", offset, offset)
    return squares


def _plain(pixels: Floats) -> Floats:
    """The colour behind the things: the median along the picture's border."""
    sides = (pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:])
    median: Floats = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0).astype(np.float32)
    return median


def _background(plain: Floats, far: Rows) -> str | None:
    """The name of the background when `plain` is near one of ours and fills a good part of every frame."""
    gaps = {name: float(_gap2(plain, np.array(colour))) for name, colour in world.BACKGROUNDS.items()}
    name = min(gaps, key=lambda name: gaps[name])
    fills = (~_unpack(far)).mean((1, 2)).min() > 0.3
    return name if fills and gaps[name] < NEAR_BACKGROUND**2 else None


# ------------------------------------------------------------------------------------------------------------- things


def _cores(pixels: Floats, far: Rows) -> Iterator[tuple[str, Floats]]:
    """The colours, named and as measured, that fill the inside of something in at least a quarter of the frames.

    Edges are left out because a half-covered pixel has a mixed colour, which may be near to a third one.
    """
    core = _unpack(_erode(_erode(far)))
    frame = core.nonzero()[0]
    inside = pixels[core]
    names = tuple(world.COLOURS)
    palette = np.array([world.COLOURS[name] for name in names], np.float32)
    nearest = _gap2(inside[:, None], palette).argmin(1)
    for index, name in enumerate(names):
        mine = nearest == index
        if (np.bincount(frame[mine], minlength=len(pixels)) >= SMALLEST // 3).mean() >= 0.25:
            yield name, np.median(inside[mine], axis=0)


def _covers(offset: Floats, plain: Floats, far: Rows, colours: list[Floats]) -> Iterator[tuple[Floats, Rows]]:
    """For each thing: soft coverage [F, 64, 64] and the packed mask of its large pieces.

    A pixel is a mixture of the background and one thing's colour: it goes to the thing whose mixture fits it best.
    offset: the pixels less the background.
    """
    shares, misfits = [], []
    for colour in colours:
        axis = colour - plain
        share = np.clip(offset @ (axis / (axis @ axis)), 0, 1)
        shares.append(share)
        if len(colours) > 1:
            misfits.append(_gap2(offset, share[..., None] * axis))
    owner = np.stack(misfits).argmin(0) if len(colours) > 1 else None
    for index, share in enumerate(shares):
        large = np.zeros_like(far)
        own = ~np.zeros_like(far) if owner is None else _pack(owner == index)
        mine = far & own
        for piece in _pieces(mine & _spread(_erode(mine))):  # without specks and hairs
            big = _unpack(piece).sum((1, 2)) >= SMALLEST
            large[big] |= piece[big]
        yield share * _unpack(_spread(_spread(large)) & own), large


@cache
def _unit_area(shape: str) -> float:
    """Area of the shape of radius 1."""
    one = np.full(1, 24.0, np.float32)
    return float(world.ideal_mask(shape, one * 0 + 32, one * 0 + 32, one, 256).sum()) / (16 * 24.0**2)


def _likeness(cover: Floats, x: Floats, y: Floats, area: Floats) -> dict[str, Floats]:
    """IoU [F] of the coverage with each ideal shape of the same area and centre."""
    half = math.ceil(0.9 * math.sqrt(float(area.max()))) + 2
    left, top = np.floor(x).astype(int) - half, np.floor(y).astype(int) - half
    columns, rows = left[:, None] + np.arange(2 * half + 1), top[:, None] + np.arange(2 * half + 1)
    inside = ((columns >= 0) & (columns < SIZE))[:, None, :] & ((rows >= 0) & (rows < SIZE))[:, :, None]
    frames = np.arange(len(x))[:, None, None]
    cut = cover[frames, rows.clip(0, SIZE - 1)[:, :, None], columns.clip(0, SIZE - 1)[:, None, :]] * inside
    outside = area - cut.sum((1, 2))  # what lies beyond the box belongs to the union
    across = (columns + 0.5 - x[:, None]).astype(np.float32)[:, None, :]
    below = (rows + 0.5 - y[:, None]).astype(np.float32)[:, :, None]
    found = {}
    for shape in world.SHAPES:
        radius = np.sqrt(area / _unit_area(shape))[:, None, None]
        distance = world.DISTANCE[shape](across / radius, below / radius) * radius
        ideal = np.clip(0.5 - distance, 0, 1)
        both = np.minimum(ideal, cut).sum((1, 2))
        found[shape] = both / np.maximum(ideal.sum((1, 2)) + cut.sum((1, 2)) - both + outside, 1e-6)
    return found


def _shape(likeness: dict[str, Floats]) -> str | None:
    """The one shape that the thing has all the time, or None."""
    best = max(likeness, key=lambda name: float(likeness[name].mean()))
    mine = likeness[best]
    rival = np.max([iou for name, iou in likeness.items() if name != best], axis=0)
    steady = (mine > rival - 0.02).mean() >= 0.8
    return best if steady and mine.mean() >= LIKE and mine.min() >= 0.5 else None


# ------------------------------------------------------------------------------------------------------------- motion


def _spreading(*coordinates: Floats) -> float:
    """Root-mean-square distance of a path from its mean place."""
    return math.sqrt(sum(float(np.var(c)) for c in coordinates))


def _along(values: Floats, pattern: Floats) -> tuple[float, Floats]:
    """Least squares of values = amplitude * pattern + constant: the amplitude and what is left over."""
    centred = pattern - pattern.mean()
    amplitude = float(centred @ values / (centred @ centred))
    return amplitude, values - values.mean() - amplitude * centred


def _steady(values: Floats, direction: float) -> bool:
    """Does the value advance in every quarter of the clip, by at least a quarter of the mean quarter?"""
    marks = values[np.linspace(0, len(values) - 1, 5).round().astype(int)] * direction
    return bool(np.diff(marks).min() > 0.25 * (marks[-1] - marks[0]) / 4 > 0)


def _motion(x: Floats, y: Floats, area: Floats) -> str | None:
    """The motion whose ideal path fits best, or None when none fits.  `x`, `y`, `area` [F] of the whole clip."""
    time = world.clock(len(x))
    if len(x) < 5:
        return None
    radius = np.sqrt(area / math.pi)
    growth, uneven = _along(radius, time)
    change = growth / float(radius.mean())
    if abs(change) > 0.25:
        fits = _spreading(uneven) < 0.08 * radius.mean() and _spreading(x, y) < ASTRAY
        return ("grow" if change > 0 else "shrink") if fits and _steady(radius, math.copysign(1, change)) else None
    candidates: list[tuple[float, str]] = []
    if abs(change) < 0.12 and _spreading(x, y) < 0.9:
        candidates.append((_spreading(x, y) + 0.2, "still"))  # every path fits a little better than none
    for values, other, names in ((x, y, ("left", "right")), (y, x, ("up", "down"))):
        travel, rest = _along(values, time)
        if abs(travel) > 7 and _steady(values, math.copysign(1, travel)):
            candidates.append((_spreading(rest, other), names[travel > 0]))
    fall, rest = _along(y, 1 - np.abs(2 * time - 1))
    if fall > 4.5:
        candidates.append((_spreading(rest, x), "bounce"))
    place = x + 1j * y
    for turn in (1, -1):
        circle = np.exp(turn * 2j * math.pi * time[:-1])  # the last frame stands where the first does
        ring = np.mean((place[:-1] - place[:-1].mean()) * circle.conj())
        rest = place[:-1] - place[:-1].mean() - ring * circle
        if abs(ring) > 1.8:
            candidates.append((_spreading(rest.real, rest.imag), "orbit"))
    if not candidates:
        return None
    misfit, name = min(candidates)
    return name if misfit < ASTRAY else None


# ------------------------------------------------------------------------------------------------------------ verdicts


def _see(name: str, colour: Floats, cover: Floats) -> Seen:
    """Measure one thing from its coverage."""
    area = cover.sum((1, 2))
    present = area >= SMALLEST
    safe = np.maximum(area, 1e-3)
    steps = np.arange(SIZE, dtype=np.float32) + 0.5
    x, y = cover.sum(1) @ steps / safe, cover.sum(2) @ steps / safe
    gap = float(np.linalg.norm(colour - np.array(world.COLOURS[name])))
    likeness = {shape: np.zeros(len(area), np.float32) for shape in world.SHAPES}
    if present.any():
        found = _likeness(cover[present], x[present], y[present], area[present])
        for shape, iou in found.items():
            likeness[shape][present] = iou
    whole = bool(present.all())
    return Seen(
        colour=name if gap < NEAR_COLOUR else None,
        shape=_shape(likeness) if whole else None,
        motion=_motion(x, y, area) if whole else None,
        shape_iou=likeness,
        x=x,
        y=y,
        area=area,
        present=int(present.sum()),
    )


def observe(video: Pixels) -> View:
    """Say what `video`, uint8 [F, H, W, 3], shows."""
    pixels = _at_64(video)
    plain = _plain(pixels)
    offset = pixels - plain
    far = _pack(np.einsum("...c,...c->...", offset, offset) > FAR**2)
    cores = list(_cores(pixels, far))
    things, pieces = [], np.zeros(len(pixels), int)
    for (name, colour), (cover, large) in zip(cores, _covers(offset, plain, far, [c for _, c in cores]), strict=True):
        things.append(_see(name, colour, cover))
        pieces += sum(_unpack(piece).any((1, 2)).astype(int) for piece in _pieces(large))
    things.sort(key=lambda thing: -float(thing.area.mean()))
    return View(_background(plain, far), tuple(things), int(np.bincount(pieces).argmax()))


def _matches(ask: Ask, seen: Seen) -> tuple[bool, bool, bool]:
    """Does the thing have the colour, the shape, the motion asked for?"""
    return (
        ask.colour is None or ask.colour == seen.colour,
        ask.shape is None or ask.shape == seen.shape,
        ask.motion is None or ask.motion == seen.motion,
    )


def compare(view: View, wanted: Wanted | Clip) -> Verdict:
    """Hold what was seen against what was wanted.  With two things, each must have its own colour, shape and motion."""
    asks = world.wanted(wanted).things if isinstance(wanted, Clip) else wanted.things
    places: list[Seen | None] = [*view.things, *[None] * max(0, len(asks) - len(view.things))]
    best: tuple[tuple[int, ...], list[tuple[bool, bool, bool]], list[float]] | None = None
    for order in permutations(places, len(asks)):
        marks = [_matches(a, s) if s is not None else (False, False, False) for a, s in zip(asks, order, strict=True)]
        ious = [
            float(s.shape_iou[a.shape or s.shape or "circle"].mean()) if s is not None else 0.0
            for a, s in zip(asks, order, strict=True)
        ]
        score = tuple(sum(m[k] for m in marks) for k in range(3))
        if best is None or score > best[0]:
            best = (score, marks, ious)
    _, marks, ious = best if best is not None else ((), [], [])
    extra = bool(asks) and len(view.things) > len(asks)
    return Verdict(
        colour=all(m[0] for m in marks) and not extra,
        shape=all(m[1] for m in marks),
        motion=all(m[2] for m in marks),
        background=wanted.background is None or wanted.background == view.background,
        count=not asks or view.count == len(asks),
        iou=sum(ious) / len(ious) if ious else 0.0,
    )


def judge(video: Pixels, wanted: Wanted | Clip) -> Verdict:
    """Look at `video`, uint8 [F, H, W, 3], and say whether it is what `wanted` (of `parse`, or a clip) asks for."""
    return compare(observe(video), wanted)
