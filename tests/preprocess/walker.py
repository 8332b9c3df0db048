"""A synthetic person who walks: the 133 points of each frame, pictures of it, its outline, as files if wanted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import av
import numpy as np

from wanloom.media import save_video
from wanloom.preprocess.keypoints import BODY, COUNT, person_of

# Where each of the drawn points of the body comes from among the 133 (the neck is made of the shoulders).
PLACE = {
    "nose": (0,), "left_eye": (1,), "right_eye": (2,), "left_ear": (3,), "right_ear": (4,),
    "left_shoulder": (5,), "right_shoulder": (6,), "left_elbow": (7,), "right_elbow": (8,),
    "left_wrist": (9,), "right_wrist": (10,), "left_hip": (11,), "right_hip": (12,),
    "left_knee": (13,), "right_knee": (14,), "left_ankle": (15,), "right_ankle": (16,),
    "left_toe": (17, 18), "right_toe": (20, 21),
}  # fmt: skip


def stand(x: float, y: float, height: float, *, phase: float = 0.0, legs: float = 1.0, arms: float = 1.0):
    """One frame [133, 3] of a person whose nose is at (x, y) and whose nose is `height` above the ankles."""
    unit = height / 6  # nose to neck 1, neck to hip 2, legs 3
    points = np.zeros((COUNT, 3), np.float32)
    points[:, 2] = 0.9

    def put(name: str, px: float, py: float) -> None:
        for index in PLACE[name]:
            points[index, :2] = px, py

    put("nose", x, y)
    for side, sign in (("left", 1), ("right", -1)):  # the person's left is on the right of the picture
        swing = sign * math.sin(phase)
        put(f"{side}_eye", x + sign * 0.22 * unit, y - 0.2 * unit)
        put(f"{side}_ear", x + sign * 0.45 * unit, y - 0.1 * unit)
        shoulder = (x + sign * 0.8 * unit, y + unit)
        put(f"{side}_shoulder", *shoulder)
        elbow = _from(shoulder, 1.0 * unit * arms, 0.25 * sign - 0.5 * swing)
        wrist = _from(elbow, 0.9 * unit * arms, 0.1 * sign - 0.8 * swing)
        put(f"{side}_elbow", *elbow)
        put(f"{side}_wrist", *wrist)
        hand = 91 if side == "left" else 112
        points[hand : hand + 21, :2] = _hand(wrist, 0.12 * unit)
        hip = (x + sign * 0.5 * unit, y + 3 * unit)
        put(f"{side}_hip", *hip)
        knee = _from(hip, 1.5 * unit * legs, 0.5 * swing)
        ankle = _from(knee, 1.5 * unit * legs, 0.5 * swing - 0.2 * abs(swing))
        put(f"{side}_knee", *knee)
        put(f"{side}_ankle", *ankle)
        put(f"{side}_toe", ankle[0] + sign * 0.35 * unit, ankle[1] + 0.2 * unit)
        points[19 if side == "left" else 22, :2] = ankle
    turns = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    points[23:91, 0] = x + 0.4 * unit * np.cos(turns)
    points[23:91, 1] = y + 0.5 * unit * np.sin(turns)
    return points


def walk(frames: int, size: tuple[int, int], **looks: float):
    """Points [F, 133, 3] of a person who walks across a frame of `size` (width, height)."""
    width, height = size
    steps = [i / max(frames - 1, 1) for i in range(frames)]
    return np.stack([stand(width * (0.3 + 0.4 * s), 0.2 * height, 0.6 * height, phase=12 * s, **looks) for s in steps])


def picture(points, size: tuple[int, int], *, shirt=(40, 90, 200)):
    """The person of one frame as a coloured picture [H, W, 3], before a striped wall, and its outline [H, W]."""
    from PIL import Image, ImageDraw

    width, height = size
    wall = np.zeros((height, width, 3), np.uint8)
    wall[...] = 150, 170, 140
    wall[:, :: max(width // 12, 2)] = 120, 140, 110
    image, outline = Image.fromarray(wall), Image.new("L", size)
    body = person_of(points).body
    unit = float(np.hypot(*(body[0, :2] - body[1, :2])))
    for canvas, cover in ((image, None), (outline, 255)):
        _figure(ImageDraw.Draw(canvas), body, unit, shirt, cover)
    return np.array(image), np.array(outline) > 0


def _figure(paint, body, unit: float, shirt, cover) -> None:
    def at(name: str) -> tuple[float, float]:
        x, y = body[BODY.index(name), :2]
        return float(x), float(y)

    def line(names: list[str], width: float, colour) -> None:
        paint.line([at(name) for name in names], fill=cover or colour, width=max(round(width), 1), joint="curve")

    for side in ("right", "left"):
        line([f"{side}_hip", f"{side}_knee", f"{side}_ankle", f"{side}_toe"], 0.55 * unit, (60, 50, 70))
    corners = ("left_shoulder", "right_shoulder", "right_hip", "left_hip")
    paint.polygon([at(name) for name in corners], fill=cover or shirt)
    for side in ("right", "left"):
        line([f"{side}_shoulder", f"{side}_elbow", f"{side}_wrist"], 0.4 * unit, (230, 180, 150))
    x, y = at("nose")
    paint.ellipse((x - 0.55 * unit, y - 0.75 * unit, x + 0.55 * unit, y + 0.6 * unit), fill=cover or (230, 180, 150))
    if cover is None:
        for side in ("right", "left"):
            ex, ey = at(f"{side}_eye")
            paint.ellipse((ex - 0.1 * unit, ey - 0.1 * unit, ex + 0.1 * unit, ey + 0.1 * unit), fill=(20, 20, 30))


def _from(start: tuple[float, float], length: float, angle: float) -> tuple[float, float]:
    """The end of a limb; angle 0 hangs down."""
    return start[0] + length * math.sin(angle), start[1] + length * math.cos(angle)


def _hand(wrist: tuple[float, float], unit: float):
    points = [wrist]
    for finger in range(5):
        points += [_from(wrist, unit * (1 + joint), 0.4 * (finger - 2)) for joint in range(1, 5)]
    return np.array(points)


# ---------------------------------------------------------------- files


def write_points(path: Path, points, size: tuple[int, int]) -> Path:
    path.write_text(json.dumps({"size": list(size), "frames": np.asarray(points).round(2).tolist()}))
    return path


def write_video(path: Path, frames, *, fps: int = 30) -> Path:
    save_video(path, frames, fps=fps, quality=10, overwrite=True)
    return path


def write_with_sound(path: Path, frames, *, fps: int = 30, codec: str = "aac") -> Path:
    """A video with a tone of its length."""
    seconds, rate = len(frames) / fps, 44100
    wave = (8000 * np.sin(np.arange(int(seconds * rate)) / 20)).astype(np.int16)
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=fps)
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        sound = out.add_stream(codec, rate=rate, layout="mono")
        for frame in frames:
            out.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        tone = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        tone.sample_rate = rate
        resampler = av.AudioResampler(
            format=sound.format, layout="mono", rate=rate, frame_size=sound.frame_size or None
        )
        for piece in [*resampler.resample(tone), *resampler.resample(None)]:
            out.mux(sound.encode(piece))
        out.mux(video.encode(None))
        out.mux(sound.encode(None))
    return path


def scene(folder: Path, *, frames: int = 12, size: tuple[int, int] = (256, 192), picture_size=(160, 224)) -> Path:
    """A folder with video.mp4, mask.mp4, video.json, image.png and image.json of two people."""
    from PIL import Image

    points = walk(frames, size)
    drawn = [picture(frame, size) for frame in points]
    write_video(folder / "video.mp4", np.stack([image for image, _ in drawn]))
    masks = np.stack([np.repeat(outline[..., None] * np.uint8(255), 3, 2) for _, outline in drawn])
    write_video(folder / "mask.mp4", masks)
    write_points(folder / "video.json", points, size)
    still = stand(picture_size[0] / 2, 0.2 * picture_size[1], 0.6 * picture_size[1])
    Image.fromarray(picture(still, picture_size, shirt=(200, 60, 60))[0]).save(folder / "image.png")
    write_points(folder / "image.json", still[None], picture_size)
    return folder
