"""Drawn people for the demo VAE: talking heads, stick figures and dressed figures.

They are no part of the captioned world.  The VAE is trained on them beside it, so that one VAE also serves models that
make a face speak or a figure follow a pose.  A figure is its joints over time: the stick figure (thin coloured bones on
black, as pose drawings are) and the dressed figure are two drawings of the same joints.

Lengths are pixels of a 64 x 64 picture, y points down, time runs as in `world.clock`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .world import WORLD, Floats, Pixels, clock

Colour = tuple[int, int, int]
Along = Floats | float  # a value for each frame [F], or one for all

SKINS: tuple[Colour, ...] = ((255, 220, 190), (240, 195, 150), (205, 150, 105), (150, 100, 65), (95, 60, 40))
HAIRS: tuple[Colour, ...] = (
    (30, 25, 25),
    (95, 55, 30),
    (165, 105, 50),
    (235, 200, 100),
    (190, 70, 30),
    (170, 170, 175),
)
CLOTHES: tuple[Colour, ...] = (
    (220, 20, 40), (20, 150, 50), (30, 60, 230), (255, 225, 20), (150, 30, 190), (255, 130, 0),
    (245, 245, 245), (40, 40, 50), (60, 170, 180), (240, 140, 180), (110, 75, 50),
)  # fmt: skip
GROUNDS: tuple[Colour, ...] = (
    (255, 255, 255), (0, 0, 0), (128, 128, 128), (150, 210, 255), (225, 200, 160), (190, 225, 190), (60, 70, 95),
    (250, 220, 225),
)  # fmt: skip

# The joints of a figure in order, and the bones between them with the colours of the stick drawing.
JOINTS: tuple[str, ...] = (
    "head", "neck", "hip",
    "elbow_l", "wrist_l", "elbow_r", "wrist_r", "knee_l", "ankle_l", "knee_r", "ankle_r",
    "shoulder_l", "shoulder_r", "hip_l", "hip_r",
)  # fmt: skip
BONES: tuple[tuple[str, str, Colour], ...] = (
    ("neck", "head", (255, 0, 85)),
    ("neck", "shoulder_l", (255, 85, 0)),
    ("shoulder_l", "elbow_l", (255, 170, 0)),
    ("elbow_l", "wrist_l", (255, 255, 0)),
    ("neck", "shoulder_r", (170, 255, 0)),
    ("shoulder_r", "elbow_r", (85, 255, 0)),
    ("elbow_r", "wrist_r", (0, 255, 0)),
    ("neck", "hip_l", (0, 255, 85)),
    ("hip_l", "knee_l", (0, 255, 170)),
    ("knee_l", "ankle_l", (0, 255, 255)),
    ("neck", "hip_r", (0, 170, 255)),
    ("hip_r", "knee_r", (0, 85, 255)),
    ("knee_r", "ankle_r", (85, 0, 255)),
)


# ------------------------------------------------------------------------------------------------------------- painting


class Painter:
    """Paints anti-aliased ellipses, limbs and quads over a float canvas [F, S, S, 3], in world units."""

    def __init__(self, size: int, frames: int, ground: Colour) -> None:
        self.scale = size / WORLD
        self.canvas = np.empty((frames, size, size, 3), np.float32)
        self.canvas[:] = ground

    def frames(self) -> Pixels:
        """The picture as uint8 [F, S, S, 3]."""
        return (self.canvas + 0.5).astype(np.uint8)

    def _box(self, xs: list[Along], ys: list[Along], reach: float) -> tuple[slice, slice, Floats, Floats]:
        """The part of the canvas around some points, and the world coordinates of its pixels."""
        size, low_high = self.canvas.shape[1], []
        for values in (xs, ys):
            low = min(float(np.min(v)) for v in values) - reach
            high = max(float(np.max(v)) for v in values) + reach
            low_high.append((max(math.floor(low * self.scale) - 1, 0), min(math.ceil(high * self.scale) + 1, size)))
        (x0, x1), (y0, y1) = low_high
        x = (np.arange(x0, max(x1, x0), dtype=np.float32) + 0.5) / self.scale
        y = (np.arange(y0, max(y1, y0), dtype=np.float32) + 0.5) / self.scale
        return slice(y0, y1), slice(x0, x1), x[None, None, :], y[None, :, None]

    def _fill(self, rows: slice, columns: slice, distance: Floats, colour: Colour) -> None:
        cover = np.clip(0.5 - distance * self.scale, 0, 1)[..., None]
        patch = self.canvas[:, rows, columns]
        patch += cover * (np.array(colour, np.float32) - patch)

    def ellipse(self, x: Along, y: Along, rx: Along, ry: Along, colour: Colour, above: Along | None = None) -> None:
        """An ellipse; with `above` only the part of it over that line."""
        rows, columns, px, py = self._box([x], [y], max(float(np.max(rx)), float(np.max(ry))))
        dx, dy = px - _column(x), py - _column(y)
        rx, ry = np.maximum(_column(rx), 0.05), np.maximum(_column(ry), 0.05)
        inner = np.sqrt((dx / rx) ** 2 + (dy / ry) ** 2)
        slope = np.sqrt((dx / rx**2) ** 2 + (dy / ry**2) ** 2)
        distance = inner * (inner - 1) / np.maximum(slope, 1e-3)
        distance = np.where(inner < 0.1, -np.minimum(rx, ry), distance)
        if above is not None:
            distance = np.maximum(distance, py - _column(above))
        self._fill(rows, columns, distance, colour)

    def limb(self, x0: Along, y0: Along, x1: Along, y1: Along, radius: float, colour: Colour) -> None:
        """A line with round ends."""
        rows, columns, px, py = self._box([x0, x1], [y0, y1], radius)
        ax, ay = _column(x0), _column(y0)
        bx, by = _column(x1) - ax, _column(y1) - ay
        dx, dy = px - ax, py - ay
        part = np.clip((dx * bx + dy * by) / np.maximum(bx * bx + by * by, 1e-3), 0, 1)
        distance = np.sqrt((dx - part * bx) ** 2 + (dy - part * by) ** 2) - radius
        self._fill(rows, columns, distance, colour)

    def quad(self, corners: list[tuple[Along, Along]], colour: Colour, rounding: float = 0.0) -> None:
        """A convex polygon, corners clockwise on the screen, grown by `rounding`."""
        rows, columns, px, py = self._box([c[0] for c in corners], [c[1] for c in corners], rounding)
        distance: Floats | None = None
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            ex, ey = _column(x1) - _column(x0), _column(y1) - _column(y0)
            length = np.maximum(np.sqrt(ex * ex + ey * ey), 1e-3)
            edge = ((px - _column(x0)) * ey - (py - _column(y0)) * ex) / length
            distance = edge if distance is None else np.maximum(distance, edge)
        if distance is not None:
            self._fill(rows, columns, distance - rounding, colour)


def _column(value: Along) -> Floats:
    """A value per frame as [F, 1, 1], or one for all as [1, 1, 1]."""
    return np.atleast_1d(np.asarray(value, np.float32))[:, None, None]


def wander(rng: np.random.Generator, frames: int, low: float, high: float, speed: float = 1.5) -> Floats:
    """A smooth random signal [frames] between `low` and `high`; `speed` is about its number of swings in 17 frames."""
    time = clock(frames)
    parts = sum(
        rng.uniform(0.4, 1.0) * np.sin(2 * math.pi * (rng.uniform(0.4, 1.4) * speed * time + rng.random()))
        for _ in range(3)
    )
    return np.asarray(low + (high - low) * (0.5 + 0.5 * np.tanh(1.2 * parts)), np.float32)


def _pick(rng: np.random.Generator, options: tuple[Colour, ...]) -> Colour:
    return options[rng.integers(len(options))]


def _other(rng: np.random.Generator, options: tuple[Colour, ...], *taken: Colour) -> Colour:
    """An option that stands out against all of `taken`."""
    free = tuple(o for o in options if all(sum(abs(a - b) for a, b in zip(o, t, strict=True)) > 120 for t in taken))
    return _pick(rng, free or options)


def _shade(colour: Colour, by: float) -> Colour:
    return (int(colour[0] * by), int(colour[1] * by), int(colour[2] * by))


# ---------------------------------------------------------------------------------------------------------------- heads


@dataclass(frozen=True)
class Face:
    """How a talking head looks: colours, hair cut ("bald", "short", "long", "bun") and proportions in world units."""

    ground: Colour
    skin: Colour
    hair: Colour
    cut: str
    eyes: Colour
    clothes: Colour
    width: float
    height: float
    gap: float


def sample_face(rng: np.random.Generator) -> Face:
    """Draw a face."""
    ground = _pick(rng, GROUNDS)
    skin = _other(rng, SKINS, ground)
    hair = _other(rng, HAIRS, ground, skin)
    return Face(
        ground=ground,
        skin=skin,
        hair=hair,
        cut=("bald", "short", "long", "bun")[rng.choice(4, p=(0.1, 0.35, 0.35, 0.2))],
        eyes=((50, 30, 20), (30, 90, 160), (40, 110, 60), (20, 20, 20))[rng.integers(4)],
        clothes=_other(rng, CLOTHES, ground, skin),
        width=rng.uniform(13.5, 16.5),
        height=rng.uniform(17.0, 19.5),
        gap=rng.uniform(5.6, 7.0),
    )


def talking_head(
    face: Face, mouth: Floats, x: Along = 32.0, y: Along = 30.0, blink: Along = 0.0, *, size: int = 64
) -> Pixels:
    """Draw `face` speaking: uint8 [F, size, size, 3].

    mouth [F]: opening, 0 shut to 1 wide; x, y: centre of the head; blink: 0 open to 1 shut.
    """
    paint = Painter(size, len(mouth), face.ground)
    w, h = face.width, face.height
    dark = _shade(face.skin, 0.82)
    if face.cut == "long":
        paint.ellipse(x, y + 3.0, w + 4.5, h + 5.0, face.hair)
        paint.quad(
            [(x - w - 4.3, y + 3.0), (x + w + 4.3, y + 3.0), (x + w + 3.0, y + 24), (x - w - 3.0, y + 24)], face.hair
        )
    elif face.cut == "bun":
        paint.ellipse(x, y - h - 3.5, 6.0, 5.5, face.hair)
    paint.ellipse(32.0, 72.0, 25.0, 20.0, face.clothes)
    paint.limb(x, y + h - 4.0, 32.0, 54.0, 5.0, dark)
    if face.cut in ("bald", "short", "bun"):
        for side in (-1, 1):
            paint.ellipse(x + side * (w - 0.2), y + 2.0, 2.6, 3.8, dark)
    if face.cut != "bald":
        paint.ellipse(x, y - 2.5, w + 1.8, h + 0.8, face.hair, above=y + 1.0)
    paint.ellipse(x, y, w, h, face.skin)
    if face.cut != "bald":
        paint.ellipse(x, y - 1.5, w + 1.0, h, face.hair, above=y - 0.52 * h)
    _features(paint, face, np.asarray(mouth, np.float32), x, y, blink)
    return paint.frames()


def _features(paint: Painter, face: Face, mouth: Floats, x: Along, y: Along, blink: Along) -> None:
    """Eyes, brows, nose and mouth."""
    opening = 1 - np.clip(blink, 0, 1)
    for side in (-1, 1):
        ex, ey = x + side * face.gap, y - 2.5
        paint.ellipse(ex, ey, 3.1, 0.25 + 2.2 * opening, (250, 250, 250))
        paint.ellipse(ex, ey, 1.5, 0.25 + 1.4 * opening, face.eyes)
        paint.limb(ex - 2.4, ey - 4.2, ex + 2.4, ey - 4.2, 0.6, _shade(face.hair, 0.8))
    paint.limb(x, y, x - 0.8, y + 3.0, 0.6, _shade(face.skin, 0.75))
    my = y + 9.0
    paint.ellipse(x, my, 5.6 - 1.4 * mouth, 1.1 + 4.2 * mouth, (190, 60, 70))
    paint.ellipse(x, my, 4.5 - 1.2 * mouth, 3.7 * mouth - 0.1, (70, 15, 25))


# -------------------------------------------------------------------------------------------------------------- figures


def _limb_ends(x: Along, y: Along, first: Along, second: Along, upper: float, lower: float) -> tuple[Along, ...]:
    """Middle and end joint of a two-part limb hanging from (x, y); angles from straight down, positive to the right."""
    mx, my = x + upper * np.sin(first), y + upper * np.cos(first)
    return mx, my, mx + lower * np.sin(second), my + lower * np.cos(second)


def _angles(rng: np.random.Generator, kind: str, frames: int, pace: float) -> dict[str, Along]:
    """Angles of the upper and lower limbs, and how far the body is lifted, for one kind of movement."""
    beat = 2 * math.pi * (rng.uniform(0.8, 1.6) * pace * clock(frames) + rng.random())
    swing = np.sin(beat)
    if kind == "walk":
        stride, facing = rng.uniform(0.4, 0.6), (1.0 if rng.random() < 0.5 else -1.0)
        angles: dict[str, Along] = {"facing": facing, "lift": 0.8 * np.abs(swing)}
        for name, sign, phase in (("l", 1.0, 0.0), ("r", -1.0, math.pi)):
            bend = 0.75 * np.maximum(np.cos(beat + phase), 0)
            angles[f"leg_{name}"], angles[f"shin_{name}"] = sign * stride * swing, sign * stride * swing - facing * bend
            angles[f"arm_{name}"] = -0.8 * sign * stride * swing
            angles[f"hand_{name}"] = -0.8 * sign * stride * swing + facing * 0.35
        return angles
    angles = {"facing": 0.0, "lift": 0.0}
    for name, side in (("l", -1.0), ("r", 1.0)):
        angles[f"leg_{name}"] = angles[f"shin_{name}"] = side * 0.14
        angles[f"arm_{name}"], angles[f"hand_{name}"] = side * 0.25, side * 0.15
        if kind == "jack":
            angles[f"arm_{name}"] = angles[f"hand_{name}"] = side * (1.5 + 1.1 * swing)
            angles[f"leg_{name}"] = angles[f"shin_{name}"] = side * (0.28 + 0.2 * swing)
        elif kind == "dance":
            angles[f"arm_{name}"] = side * wander(rng, frames, 0.3, 2.2, 1.5 * pace)
            angles[f"hand_{name}"] = angles[f"arm_{name}"] + side * wander(rng, frames, -0.2, 1.2, 1.5 * pace)
            angles[f"leg_{name}"] = side * wander(rng, frames, 0.05, 0.45, 1.5 * pace)
            angles[f"shin_{name}"] = angles[f"leg_{name}"] - side * wander(rng, frames, 0.0, 0.4, 1.5 * pace)
    if kind == "wave":
        name, side = ("l", -1.0) if rng.random() < 0.5 else ("r", 1.0)
        angles[f"arm_{name}"] = side * rng.uniform(1.7, 2.1)
        angles[f"hand_{name}"] = side * (2.8 + 0.5 * swing)
    elif kind == "jack":
        angles["lift"] = 1.5 + 1.5 * swing
    return angles


def sample_pose(rng: np.random.Generator, frames: int = 17, pace: float = 1.0) -> dict[str, tuple[Floats, Floats]]:
    """A moving figure: for each name of `JOINTS` its x and y [frames] in world units; pace 1 is about a beat a second
    at 17 frames a second."""
    kind = ("walk", "wave", "jack", "dance")[rng.integers(4)]
    tall = rng.uniform(0.86, 1.05)
    angles = _angles(rng, kind, frames, pace)
    drift = pace * rng.uniform(5, 12) * float(angles["facing"]) if kind == "walk" else 0.0
    x = rng.uniform(27, 37) - drift / 2 + drift * clock(frames) + wander(rng, frames, -1, 1, 1.5 * pace)
    y = 34.0 - angles["lift"] + (1.05 - tall) * 18 + np.zeros(frames)
    wide = 0.35 if kind == "walk" else 1.0
    neck_y = y - 15 * tall
    points: dict[str, tuple[Along, Along]] = {
        "hip": (x, y),
        "neck": (x + 0.6 * angles["facing"], neck_y),
        "head": (x + 1.2 * angles["facing"], neck_y - 7.0 * tall),
    }
    for name, side in (("l", -1.0), ("r", 1.0)):
        sx, hx = x + side * 5.6 * tall * wide, x + side * 3.0 * tall * wide
        points[f"shoulder_{name}"], points[f"hip_{name}"] = (sx, neck_y + 1.2), (hx, y)
        ends = _limb_ends(sx, neck_y + 1.2, angles[f"arm_{name}"], angles[f"hand_{name}"], 7.8 * tall, 7.2 * tall)
        points[f"elbow_{name}"], points[f"wrist_{name}"] = (ends[0], ends[1]), (ends[2], ends[3])
        ends = _limb_ends(hx, y, angles[f"leg_{name}"], angles[f"shin_{name}"], 11 * tall, 10.5 * tall)
        points[f"knee_{name}"], points[f"ankle_{name}"] = (ends[0], ends[1]), (ends[2], ends[3])
    return {name: (np.asarray(points[name][0], np.float32), np.asarray(points[name][1], np.float32)) for name in JOINTS}


def stick_figure(
    pose: dict[str, tuple[Floats, Floats]], *, size: int = 64, ground: Colour = (0, 0, 0), width: float = 1.7
) -> Pixels:
    """Draw a pose as thin coloured bones, `width` world units wide: uint8 [F, size, size, 3]."""
    paint = Painter(size, len(pose["hip"][0]), ground)
    for start, end, colour in BONES:
        paint.limb(*pose[start], *pose[end], width / 2, colour)
    for name in JOINTS:
        if name != "hip":
            paint.ellipse(*pose[name], 1.15, 1.15, (255, 255, 255) if name == "head" else (235, 235, 235))
    return paint.frames()


@dataclass(frozen=True)
class Outfit:
    """How a dressed figure looks; `floor` None means one plain background, `skirt` a skirt in place of trousers."""

    ground: Colour
    floor: Colour | None
    skin: Colour
    hair: Colour
    top: Colour
    bottom: Colour
    shoes: Colour
    skirt: bool
    long_hair: bool


def sample_outfit(rng: np.random.Generator) -> Outfit:
    """Draw clothes, hair and background."""
    ground = _pick(rng, GROUNDS)
    skin = _other(rng, SKINS, ground)
    top = _other(rng, CLOTHES, ground, skin)
    return Outfit(
        ground=ground,
        floor=_shade(ground, 0.8) if rng.random() < 0.3 and ground != (0, 0, 0) else None,
        skin=skin,
        hair=_other(rng, HAIRS, ground, skin),
        top=top,
        bottom=_other(rng, CLOTHES, ground, top),
        shoes=_other(rng, CLOTHES, ground, skin),
        skirt=bool(rng.random() < 0.35),
        long_hair=bool(rng.random() < 0.5),
    )


def dressed_figure(
    outfit: Outfit, pose: dict[str, tuple[Floats, Floats]], *, size: int = 64, behind: Pixels | None = None
) -> Pixels:
    """Draw a pose as a person in clothes, over the outfit's own ground or over pictures: uint8 [F, size, size, 3]."""
    paint = Painter(size, len(pose["hip"][0]), outfit.ground)
    if behind is not None:
        paint.canvas[:] = behind
    elif outfit.floor is not None:
        paint.quad([(-1.0, 54.0), (65.0, 54.0), (65.0, 65.0), (-1.0, 65.0)], outfit.floor)
    (hx, hy), (nx, ny), (x, y) = pose["hip"], pose["neck"], pose["head"]
    if outfit.long_hair:
        paint.limb(x, y, x, y + 6.0, 5.4, outfit.hair)
    for side in ("r", "l"):
        legs = outfit.skin if outfit.skirt else outfit.bottom
        paint.limb(*pose[f"hip_{side}"], *pose[f"knee_{side}"], 2.5, legs)
        paint.limb(*pose[f"knee_{side}"], *pose[f"ankle_{side}"], 2.1, legs)
        ax, ay = pose[f"ankle_{side}"]
        toe = np.clip(ax - hx, -1.2, 1.2)
        paint.limb(ax, ay + 1.0, ax + toe, ay + 1.0, 2.2, outfit.shoes)
    _arm(paint, outfit, pose, "r")
    (lx, ly), (rx, ry) = pose["shoulder_l"], pose["shoulder_r"]
    (bl, _), (br, _) = pose["hip_l"], pose["hip_r"]
    if outfit.skirt:
        paint.quad(
            [(bl - 1.5, hy - 3.0), (br + 1.5, hy - 3.0), (br + 5.0, hy + 8.5), (bl - 5.0, hy + 8.5)], outfit.bottom, 0.6
        )
    else:
        paint.limb(bl, hy, br, hy, 2.7, outfit.bottom)
    paint.quad([(lx, ly), (rx, ry), (br + 0.8, hy - 1.0), (bl - 0.8, hy - 1.0)], outfit.top, 1.8)
    paint.limb(nx, ny + 1.0, x, y, 1.7, _shade(outfit.skin, 0.85))
    _arm(paint, outfit, pose, "l")
    paint.ellipse(x, y - 0.4, 5.2, 5.9, outfit.hair, above=y + 0.5)
    paint.ellipse(x, y, 4.5, 5.2, outfit.skin)
    paint.ellipse(x, y - 0.4, 4.9, 5.4, outfit.hair, above=y - 2.6)
    for shift in (-1.8, 1.8):
        paint.ellipse(x + shift, y - 0.4, 0.75, 0.9, (25, 20, 25))
    paint.limb(x - 1.2, y + 2.6, x + 1.2, y + 2.6, 0.45, (180, 60, 70))
    return paint.frames()


def _arm(paint: Painter, outfit: Outfit, pose: dict[str, tuple[Floats, Floats]], side: str) -> None:
    """Sleeve, a shade darker than the body so that it shows in front of it, forearm and hand."""
    paint.limb(*pose[f"elbow_{side}"], *pose[f"wrist_{side}"], 1.6, outfit.skin)
    paint.limb(*pose[f"shoulder_{side}"], *pose[f"elbow_{side}"], 2.1, _shade(outfit.top, 0.85))
    paint.ellipse(*pose[f"wrist_{side}"], 2.0, 2.0, outfit.skin)


def figure_clip(rng: np.random.Generator, size: int = 64, frames: int = 17) -> Pixels:
    """A talking head, a stick figure or a dressed figure, each in one clip of three: uint8 [frames, size, size, 3]."""
    kind = rng.integers(3)
    if kind == 0:
        face = sample_face(rng)
        blink = 1.6 * np.exp(-(((clock(frames) - rng.uniform(-0.5, 1.5)) / 0.09) ** 2))
        x, y = wander(rng, frames, 30.0, 34.0, 0.8), wander(rng, frames, 29.0, 32.0, 0.8)
        return talking_head(face, wander(rng, frames, 0.0, 1.0, 2.0), x, y, np.clip(blink, 0, 1), size=size)
    pose = sample_pose(rng, frames)
    return stick_figure(pose, size=size) if kind == 1 else dressed_figure(sample_outfit(rng), pose, size=size)
