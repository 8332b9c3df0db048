"""What small videos of three clips are made from: a picture, a sound and driving videos."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np

import tiny
from wanloom import media

CLIPS = 3
TASKS = ("s2v", "animate")
PASSES = {"s2v": 2, "animate": 1}  # calls of the transformer for a step: animate is not guided


def three_clips(folder: Path) -> dict[str, dict[str, Any]]:
    """Task -> fields of a request for a video of three clips, 64x64, made from files in `folder`."""
    picture = tiny.picture(folder / "picture.png", (64, 64))
    sound(folder / "a.wav", 1.875)
    frames = np.random.default_rng(0).integers(0, 255, (12, 4, 4, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    media.save_video(folder / "pose.mp4", frames, fps=16)
    media.save_video(folder / "face.mp4", frames[::-1], fps=16)
    return {
        "s2v": {"image": picture, "audio": folder / "a.wav", "size": "64x64", "infer_frames": 12},
        "animate": {
            "image": picture, "pose_video": folder / "pose.mp4", "face_video": folder / "face.mp4", "frames": 5,
        },
    }  # fmt: skip


def sound(path: Path, seconds: float) -> Path:
    """A tone that swells and falls, 16 kHz."""
    time = np.arange(round(16_000 * seconds)) / 16_000
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(1400 * time) * np.sin(9 * time)).astype("<i2").tobytes())
    return path
