"""The judge of videos of dressed figures: reads the joints of the figure from pixels, holds them against a pose.

It knows the colours that the person should have and the empty room, never the pose while it looks.  A jointed figure is
laid over each frame: a pixel costs its distance from the colour that the figure, or the room, has there, and the place,
size and angles that save most are taken for what the video shows.  First head, torso and hips, found together; then,
limb for limb, the angles of upper and lower part.  Parts cover each other as they do when `figures` draws them.

Lengths are pixels of a 64 x 64 picture, y points down, angles count from straight down, positive to the right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import cast

import numpy as np
from numpy.typing import NDArray

from .dance import SIZE, Dance, Pose, draw_room
from .figures import CLOTHES, HAIRS, SKINS, Colour, Outfit, Painter
from .world import Floats, Pixels

JOINTS: tuple[str, ...] = (
    "head", "neck", "hip",
    "elbow_l", "wrist_l", "elbow_r", "wrist_r", "knee_l", "ankle_l", "knee_r", "ankle_r",
)  # fmt: skip
LIMBS: tuple[str, ...] = ("arm_l", "arm_r", "leg_l", "leg_r")
PARTS: tuple[str, ...] = ("room", "skin", "neck", "hair", "top", "sleeve", "bottom", "shoes")
WORN = {"hair": HAIRS, "top": CLOTHES, "bottom": CLOTHES, "skin": SKINS, "shoes": CLOTHES}
SAME = 60.0  # an RGB distance from which on a pixel has nothing of a colour
LEAST = 0.2  # the share of the skin, and of hair or top, that must have its colour where a figure is found; noise: 0.04
NO_FIGURE = 1.0  # the distance that a frame without a figure counts
SHOWN, LITTLE = 0.2, 12.0  # a limb that shows less than this share of itself, and misses more pixels, is not there
NO_LIMB = 0.25  # the distance that a missing limb's joints count
NEAR = 60.0  # an RGB distance under which two colours count as one
TALL = (0.86, 0.91, 0.955, 1.0, 1.05)
FACING = (-1.0, 0.0, 1.0)

LENGTHS = {"arm": (7.8, 7.2), "leg": (11.0, 10.5)}  # upper and lower part of a figure of height 1
WIDTHS = {"arm": (2.1, 1.6), "leg": (2.5, 2.1)}
ANGLES = {  # of the upper part, and how much farther the lower one is bent, the way that elbows and knees bend
    "arm": (np.linspace(-np.pi, np.pi, 41)[:-1], np.linspace(-0.3, 1.6, 13)),
    "leg": (np.linspace(-0.9, 0.9, 19), np.linspace(-0.15, 1.15, 11)),
}
UNBENT = 0.1  # pixels that a turn by one radian must save: a limb that nothing shows hangs straight
PAD = 24

Point = tuple[Floats, Floats]  # x and y
Limb = tuple[Point, Point, Point]  # begin, middle, end


@dataclass(frozen=True)
class Seen:
    """What a video shows.

    joints: [F, J, 2], x and y in the order of `JOINTS`, guessed where nothing shows them; found: [F], whether there is
    a figure at all; limbs: [F, 4], whether each of `LIMBS` is there, or may be hidden; colours: of each of `WORN` the
    median [3], NaN where none is seen.
    """

    joints: Floats
    found: NDArray[np.bool_]
    limbs: NDArray[np.bool_]
    colours: dict[str, Floats]
    video: Pixels = field(repr=False)


@dataclass(frozen=True)
class Verdict:
    """How a video answers to a pose and an outfit.

    distance: mean distance of the joints in heights of the frame, `NO_FIGURE` for a frame without a figure,
    `NO_LIMB` for the joints of a limb that is not there;
    movement: correlation of the joints' movements about their mean places, 0 where nothing moves;
    parts: whether each of `WORN` has its colour; kept: PSNR (dB) of what was to stay, None where nothing was.
    """

    distance: float
    movement: float
    parts: dict[str, bool]
    kept: float | None = None

    @property
    def colours(self) -> bool:
        """Whether most of the colours are right."""
        return 2 * sum(self.parts.values()) > len(self.parts)


class _Labels(Painter):
    """Paints which part of a figure a pixel shows: the canvas is the share of each of `PARTS`, [F, 64, 64, parts]."""

    def __init__(self, frames: int) -> None:
        super().__init__(SIZE, frames, (0, 0, 0))
        self.canvas = np.zeros((frames, SIZE, SIZE, len(PARTS)), np.float32)
        self.canvas[..., 0] = 1

    def _fill(self, rows: slice, columns: slice, distance: Floats, colour: Colour) -> None:
        if distance.size:  # a limb may be laid wholly beside the frame
            super()._fill(rows, columns, distance, colour)


def _label(name: str) -> Colour:
    return cast(Colour, tuple(int(name == part) for part in PARTS))


@dataclass(frozen=True)
class _Body:
    """Where hip and head are in each frame, [F] each, how tall the figure is and to which side it walks (0: to us)."""

    hip: Point
    head: Point
    tall: float
    facing: float

    @property
    def neck(self) -> Point:
        return self.hip[0] + 0.6 * self.facing, self.hip[1] - 15 * self.tall

    def root(self, limb: str, side: float) -> Point:
        """Where an arm or a leg begins."""
        wide = side * self.tall * (0.35 if self.facing else 1.0)
        return (
            (self.hip[0] + 5.6 * wide, self.neck[1] + 1.2) if limb == "arm" else (self.hip[0] + 3 * wide, self.hip[1])
        )


# --------------------------------------------------------------------------------------------------------------- labels


def _paint_trunk(paint: Painter, body: _Body, outfit: Outfit) -> None:
    """Skirt or hips, torso and neck, as `figures` does."""
    (lx, ly), (rx, ry) = body.root("arm", -1), body.root("arm", 1)
    (bl, hy), (br, _) = body.root("leg", -1), body.root("leg", 1)
    if outfit.skirt:
        corners = [(bl - 1.5, hy - 3.0), (br + 1.5, hy - 3.0), (br + 5.0, hy + 8.5), (bl - 5.0, hy + 8.5)]
        paint.quad(list(corners), _label("bottom"), 0.6)
    else:
        paint.limb(bl, hy, br, hy, 2.7, _label("bottom"))
    paint.quad([(lx, ly), (rx, ry), (br + 0.8, hy - 1.0), (bl - 0.8, hy - 1.0)], _label("top"), 1.8)
    paint.limb(body.neck[0], body.neck[1] + 1.0, *body.head, 1.7, _label("neck"))


def _paint_head(paint: Painter, head: Point) -> None:
    x, y = head
    paint.ellipse(x, y - 0.4, 5.2, 5.9, _label("hair"), above=y + 0.5)
    paint.ellipse(x, y, 4.5, 5.2, _label("skin"))
    paint.ellipse(x, y - 0.4, 4.9, 5.4, _label("hair"), above=y - 2.6)


def _paint_limb(paint: Painter, limb: str, points: Limb, outfit: Outfit) -> None:
    root, middle, end = points
    if limb == "arm":
        paint.limb(*middle, *end, 1.6, _label("skin"))
        paint.limb(*root, *middle, 2.1, _label("sleeve"))
        paint.ellipse(*end, 2.0, 2.0, _label("skin"))
    else:
        cloth = _label("skin" if outfit.skirt else "bottom")
        paint.limb(*root, *middle, 2.5, cloth)
        paint.limb(*middle, *end, 2.1, cloth)
        toe = np.clip(end[0] - root[0], -1.2, 1.2)
        paint.limb(end[0], end[1] + 1.0, end[0] + toe, end[1] + 1.0, 2.2, _label("shoes"))


def _labels(body: _Body, outfit: Outfit, limbs: dict[str, Limb]) -> Floats:
    """The shares [F, 64, 64, parts] of a figure with the limbs ("arm_l", ...) that are known."""
    paint = _Labels(len(body.hip[0]))
    if outfit.long_hair:
        paint.limb(*body.head, body.head[0], body.head[1] + 6.0, 5.4, _label("hair"))
    for name in ("leg_r", "leg_l", "arm_r"):
        if name in limbs:
            _paint_limb(paint, name[:3], limbs[name], outfit)
    _paint_trunk(paint, body, outfit)
    if "arm_l" in limbs:
        _paint_limb(paint, "arm", limbs["arm_l"], outfit)
    _paint_head(paint, body.head)
    return paint.canvas


def _costs(video: Pixels, outfit: Outfit, room: Pixels | None) -> Floats:
    """What each pixel costs as each of `PARTS`, 0 (its colour) to 1 (far from it): [F, 64, 64, parts]."""
    pixels = video.astype(np.float32)
    behind = np.median(pixels, (0, 2))[:, None] if room is None else room.astype(np.float32)
    skin, top = np.array(outfit.skin, np.float32), np.array(outfit.top, np.float32)
    colours = (behind, skin, 0.85 * skin, outfit.hair, top, 0.85 * top, outfit.bottom, outfit.shoes)
    gaps = [pixels - np.asarray(colour, np.float32) for colour in colours]
    return np.stack([np.minimum(np.einsum("...c,...c->...", g, g) / SAME**2, 1) for g in gaps], -1)


# ---------------------------------------------------------------------------------------------------------------- trunk


@cache
def _template(tall: float, facing: float, skirt: bool, long_hair: bool, part: str) -> NDArray[np.complex64]:
    """The spectrum of a figure without limbs whose hip is at (0, 0), or of its head alone: [parts - 1, 64, 33]."""
    middle = np.full(1, 32.0, np.float32)
    shift = 22 * tall if part == "trunk" else 0.0
    body = _Body((middle, middle), (middle + 1.2 * facing, middle - shift), tall, facing)
    grey = (0, 0, 0)
    outfit = Outfit(grey, None, grey, grey, grey, grey, grey, skirt, long_hair)
    if part == "trunk":
        shares = _labels(body, outfit, {})[0]
    else:
        paint = _Labels(1)
        _paint_head(paint, (middle, middle))
        shares = paint.canvas[0]
    centred = np.roll(shares[..., 1:], (-32, -32), (0, 1))
    return np.conj(np.fft.rfft2(centred, axes=(0, 1))).transpose(2, 0, 1).astype(np.complex64)


def _matches(spectrum: NDArray[np.complex64], template: NDArray[np.complex64]) -> Floats:
    """What is saved with the template at each pixel: [F, 64, 64]."""
    together = np.einsum("fkyx,kyx->fyx", spectrum, template)
    return np.fft.irfft2(together, (SIZE, SIZE)).astype(np.float32)


def _peak(scores: Floats) -> Point:
    """The best place in each frame [F, 64, 64], between pixels by a parabola."""
    frames = np.arange(len(scores))
    y, x = np.unravel_index(scores.reshape(len(scores), -1).argmax(1), scores.shape[1:])
    x, y = x.clip(1, SIZE - 2), y.clip(1, SIZE - 2)

    def between(before: Floats, at: Floats, after: Floats) -> Floats:
        bend = np.maximum(2 * at - before - after, 1e-3)
        return np.clip(0.5 * (after - before) / bend, -0.5, 0.5)

    at = scores[frames, y, x]
    fx = between(scores[frames, y, x - 1], at, scores[frames, y, x + 1])
    fy = between(scores[frames, y - 1, x], at, scores[frames, y + 1, x])
    return (x + fx).astype(np.float32), (y + fy).astype(np.float32)


def _find_body(costs: Floats, outfit: Outfit) -> _Body:
    """The place of the trunk in each frame, at the size and facing that serve the whole clip best; then of the head."""
    top, sleeve = PARTS.index("top"), PARTS.index("sleeve")
    eased = costs.copy()
    eased[..., top] = np.minimum(costs[..., top], costs[..., sleeve])  # arms cross it
    # A part must not lie where another one's colour is: without this a trunk too long for its hips costs nothing.
    saved = eased[..., :1] - eased + eased.min(-1, keepdims=True) - eased
    spectrum = np.fft.rfft2(saved[..., 1:].transpose(0, 3, 1, 2)).astype(np.complex64)
    look = (outfit.skirt, outfit.long_hair)
    best, tall, facing = -np.inf, 1.0, 0.0
    for side in FACING:
        for height in TALL:
            some = _matches(spectrum[::3], _template(height, side, *look, "trunk"))  # a third of the frames tells
            value = float(some.max((1, 2)).sum())
            if value > best:
                best, tall, facing = value, height, side
    x, y = _peak(_matches(spectrum, _template(tall, facing, *look, "trunk")))
    steps = np.arange(SIZE, dtype=np.float32)
    aside = np.abs(steps - (x + 1.2 * facing)[:, None])[:, None, :]
    above = np.abs(steps - (y - 22 * tall)[:, None])[:, :, None]
    head = _matches(spectrum, _template(tall, facing, *look, "head"))
    return _Body((x, y), _peak(np.where(np.maximum(aside, above) < 3, head, -1e3)), tall, facing)


# ---------------------------------------------------------------------------------------------------------------- limbs


def _disc(radius: float, down: float) -> Point:
    """Points all over a disc `down` below (0, 0), [P] each."""
    steps = np.arange(-2, 3, dtype=np.float32) * np.float32(radius / 2.5)
    x, y = (grid.reshape(-1) for grid in np.meshgrid(steps, steps))
    near = x**2 + y**2 < radius**2
    return x[near], y[near] + np.float32(down)


END = {"arm": _disc(2.0, 0.0), "leg": _disc(2.2, 1.0)}  # hand and shoe


def _bar(length: float, width: float, angles: Floats) -> Point:
    """Points all over a part [..., P] that begins at (0, 0) and goes `length` in the direction of each angle [...]."""
    along = np.linspace(0.1, 1, max(round(length / 1.3), 3)) * length
    across = np.array([-0.6, 0.0, 0.6]) * width
    u, v = (grid.reshape(-1) for grid in np.meshgrid(along, across))
    sin, cos = np.sin(angles)[..., None], np.cos(angles)[..., None]
    return (u * sin + v * cos).astype(np.float32), (u * cos - v * sin).astype(np.float32)


def _saved(gain: Floats, start: Point, points: Point) -> Floats:
    """The sum of a padded gain over points [..., P] about `start` [F, ...]: [F, ...]."""
    width = SIZE + 2 * PAD
    x = (start[0][..., None] + points[0] + PAD).astype(np.int32)
    y = (start[1][..., None] + points[1] + PAD).astype(np.int32)
    frames = np.arange(len(gain)).reshape(-1, *[1] * (x.ndim - 1))
    total: Floats = gain[frames, y * width + x].sum(-1)
    return total


def _padded(gain: Floats) -> Floats:
    """A gain [F, 64, 64] with nothing to win outside the frame, as [F, (64 + 2 * PAD) ** 2]."""
    return np.pad(gain, ((0, 0), (PAD, PAD), (PAD, PAD))).reshape(len(gain), -1)


def _bend(limb: str, tall: float, gains: tuple[Floats, Floats, Floats], root: Point, way: float) -> Limb:
    """The limb that saves most, by its padded gains as upper part, lower part and end; `way`: to which side it bends.

    All angles first, then finer ones about the best.
    """
    upper, lower = (length * tall for length in LENGTHS[limb])
    first, turn = ANGLES[limb][0], ANGLES[limb][1] * way
    rows, (x, y) = np.arange(len(root[0])), (v[:, None] for v in root)
    a, d = (np.broadcast_to(grid, (len(rows), len(grid))) for grid in (first, turn))
    step = np.linspace(-0.75, 0.75, 7)
    for again in (True, False):
        mx, my = x + upper * np.sin(a), y + upper * np.cos(a)
        b = a[:, :, None] + d[:, None, :]
        ex, ey = mx[..., None] + lower * np.sin(b), my[..., None] + lower * np.cos(b)
        total = _saved(gains[0], (x, y), _bar(upper, WIDTHS[limb][0], a))[..., None]
        total = total + _saved(gains[1], (mx[..., None], my[..., None]), _bar(lower, WIDTHS[limb][1], b))
        total = total + _saved(gains[2], (ex, ey), END[limb])
        total = total - UNBENT * (np.abs(d)[:, None, :] + np.abs(a)[:, :, None])
        i, j = np.unravel_index(total.reshape(len(rows), -1).argmax(1), total.shape[1:])
        if again:
            a = a[rows, i][:, None] + step * (first[1] - first[0])
            d = d[rows, j][:, None] + step * (turn[1] - turn[0])
    return root, (mx[rows, i], my[rows, i]), (ex[rows, i, j], ey[rows, i, j])


def _find_limbs(costs: Floats, body: _Body, outfit: Outfit) -> dict[str, Limb]:
    """Legs, then arms; of each pair one, then the other beside it, then the first again beside the second."""
    found: dict[str, Limb] = {}
    head, trunk = _Labels(len(costs)), _Labels(len(costs))
    _paint_head(head, body.head)
    _paint_trunk(trunk, body, outfit)
    _paint_head(trunk, body.head)
    cloth = "skin" if outfit.skirt else "bottom"
    for name in ("leg_l", "leg_r", "leg_l", "arm_l", "arm_r", "arm_l"):
        found.pop(name, None)
        limb, side = name[:3], -1.0 if name[-1] == "l" else 1.0
        base = np.einsum("fyxk,fyxk->fyx", _labels(body, outfit, found), costs)
        uncovered = (head if name == "arm_l" else trunk).canvas[..., 0]
        parts = ("sleeve", "skin", "skin") if limb == "arm" else (cloth, cloth, "shoes")
        one, two, end = (_padded(uncovered * (base - costs[..., PARTS.index(part)])) for part in parts)
        way = (body.facing or side) * (1 if limb == "arm" else -1)
        found[name] = _bend(limb, body.tall, (one, two, end), body.root(limb, side), way)
    return found


# -------------------------------------------------------------------------------------------------------------- verdict


def shrunk(video: Pixels) -> Pixels:
    """A video of larger squares at 64x64, for the judge: the mean of what each pixel covers."""
    from PIL import Image

    small = [Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BOX) for frame in video]
    return np.stack([np.asarray(frame) for frame in small])


def judge(video: Pixels, what: Dance) -> Verdict:
    """What a video uint8 [F, S, S, 3] keeps of a dance."""
    return compare(observe(shrunk(video), what.outfit, draw_room(what.room)), what.pose, what.outfit)


def observe(video: Pixels, outfit: Outfit, room: Pixels | None = None) -> Seen:
    """Read a video uint8 [F, 64, 64, 3] of a person in an outfit before an empty room, uint8 [64, 64, 3].

    Without a room each row's median stands for it: enough for walls and floors, not for what hangs there.
    """
    if video.ndim != 4 or video.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"a video of a figure is uint8 [frames, {SIZE}, {SIZE}, 3], got {list(video.shape)}")
    costs = _costs(video, outfit, room)
    body = _find_body(costs, outfit)
    limbs = _find_limbs(costs, body, outfit)
    points = {"head": body.head, "neck": body.neck, "hip": body.hip}
    for name, (_, middle, end) in limbs.items():
        inner, outer = ("elbow", "wrist") if name.startswith("arm") else ("knee", "ankle")
        points[inner + name[3:]], points[outer + name[3:]] = middle, end
    labels = _labels(body, outfit, limbs)
    found = _found(costs, labels)
    return Seen(places(points), found, _shown(costs, body, limbs, outfit), _colours(video[found], labels[found]), video)


def places(pose: Pose) -> Floats:
    """The joints of a pose that are judged, [F, J, 2]."""
    joints: Floats = np.stack([np.stack(pose[name], -1) for name in JOINTS], 1)
    return joints


def _found(costs: Floats, labels: Floats) -> NDArray[np.bool_]:
    """Whether skin, and hair or a top, is where it was laid, and is not the room: [F]."""
    fits = (costs < 0.5) & (costs < costs[..., :1])
    whole = labels > 0.9
    share = (whole & fits).sum((1, 2)) / np.maximum(whole.sum((1, 2)), 1)
    skin, hair, top = (share[:, PARTS.index(part)] >= LEAST for part in ("skin", "hair", "top"))
    seen: NDArray[np.bool_] = skin & (hair | top)
    return seen


def _shown(costs: Floats, body: _Body, limbs: dict[str, Limb], outfit: Outfit) -> NDArray[np.bool_]:
    """Whether what trunk and head leave free of each of `LIMBS` has its colours, or is little: [F, 4]."""
    trunk = _Labels(len(costs))
    _paint_trunk(trunk, body, outfit)
    _paint_head(trunk, body.head)
    shown = []
    for name in LIMBS:
        paint = _Labels(len(costs))
        _paint_limb(paint, name[:3], limbs[name], outfit)
        free = paint.canvas[..., 1:] * trunk.canvas[..., :1]
        fits, area = (free * (costs[..., 1:] < costs[..., :1])).sum((1, 2, 3)), free.sum((1, 2, 3))
        shown.append((fits >= SHOWN * area) | (area - fits <= LITTLE))
    return np.stack(shown, 1)


def _colours(video: Pixels, labels: Floats) -> dict[str, Floats]:
    """The median colour [3] of what each part covers wholly, NaN where there is nothing."""
    inside = {part: video[labels[..., PARTS.index(part)] > 0.9] for part in WORN}
    nothing = np.full(3, np.nan, np.float32)
    return {part: np.median(pixels, 0) if len(pixels) else nothing for part, pixels in inside.items()}


def compare(
    seen: Seen, pose: Pose, outfit: Outfit, *, background: Pixels | None = None, cover: Floats | None = None
) -> Verdict:
    """Hold what was seen against the pose and outfit that were given.

    background: uint8 [F, 64, 64, 3], what was to stay where `cover` [F, 64, 64] is 0.
    """
    wanted = places(pose)
    if len(wanted) != len(seen.joints):
        raise ValueError(f"a pose of {len(wanted)} frames does not tell about a video of {len(seen.joints)}")
    gaps = np.where(seen.found, _gaps(seen, wanted) / SIZE, NO_FIGURE)
    kept = None
    if background is not None and cover is not None:
        kept = _psnr(seen.video[cover == 0], background[cover == 0])
    parts = {part: _is(seen.colours[part], getattr(outfit, part), palette) for part, palette in WORN.items()}
    return Verdict(float(gaps.mean()), _together(seen, wanted), parts, kept)


def _gaps(seen: Seen, wanted: Floats) -> Floats:
    """The mean distance of the joints in each frame, [F]; both arms or both legs may have changed places."""
    total = np.linalg.norm(seen.joints[:, :3] - wanted[:, :3], axis=-1).sum(1)
    for pair, first in ((0, 3), (2, 7)):
        here = seen.joints[:, first : first + 4].reshape(-1, 2, 2, 2)  # [F, side, joint, x and y]
        there = wanted[:, first : first + 4].reshape(-1, 2, 2, 2)
        ways = []
        for order in (slice(None), slice(None, None, -1)):
            gaps = np.linalg.norm(here - there[:, order], axis=-1).sum(2)
            ways.append(np.where(seen.limbs[:, pair : pair + 2], gaps, 2 * NO_LIMB * SIZE).sum(1))
        total = total + np.minimum(*ways)
    mean: Floats = total / len(JOINTS)
    return mean


def _together(seen: Seen, wanted: Floats) -> float:
    """The correlation of the movements, of pairs by their middle and their spread, which know no left and right."""
    if not seen.found.any():
        return 0.0
    paths = []
    for joints in (seen.joints[seen.found], wanted[seen.found]):
        left, right = joints[:, [3, 4, 7, 8]], joints[:, [5, 6, 9, 10]]
        path = np.concatenate((joints[:, :3], (left + right) / 2, np.abs(left - right) / 2), 1)
        paths.append(path - path.mean(0))
    size = float(np.sqrt((paths[0] ** 2).sum() * (paths[1] ** 2).sum()))
    return float((paths[0] * paths[1]).sum()) / size if size > 1e-3 else 0.0


def _is(colour: Floats, wanted: Colour, palette: tuple[Colour, ...]) -> bool:
    """Whether `wanted` is the nearest of the palette, and near."""
    gaps = {other: float(np.linalg.norm(colour - np.array(other, np.float32))) for other in palette}
    return gaps[wanted] < NEAR and gaps[wanted] <= min(gaps.values())


def _psnr(one: Pixels, other: Pixels) -> float:
    """In dB; infinite where nothing differs."""
    error = float(np.mean((one.astype(np.float32) - other.astype(np.float32)) ** 2)) if len(one) else 0.0
    return 10 * math.log10(255.0**2 / error) if error > 0 else math.inf
