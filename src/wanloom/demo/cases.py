"""What the demo models of people are given, as files: held-out case i, for the judge, the demo command and tests.

A head that speaks has a picture and four seconds of a synthetic voice.  A figure that dances has a picture, a stick
figure that leads it and the face of somebody else who dances so; put into another room, that room and a mask.
"""

from __future__ import annotations

import wave
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import dance, talk
from .figures import dressed_figure
from .voices import RATE, sample_voice
from .world import Floats, Pixels

SECONDS = 4.0  # of a voice
FRAMES = 33  # of a dance: two clips
FPS = 16  # of a dance
DANCE_SIZE = 96  # pixels a side
FACE = 16  # pixels a side of a cut-out face; shown larger
SPEAKS, DANCES = "a person speaks", "a person dances"  # the prompts


@dataclass(frozen=True)
class SpeechCase:
    """A head, its sound (16 kHz), and the fields of the request."""

    who: talk.Talk
    sound: Floats
    given: dict[str, Any]


@dataclass(frozen=True)
class DanceCase:
    """A dance as it is to be performed, the scene it is put into (None: where it stands), the fields of the request."""

    dance: dance.Dance
    scene: Pixels | None
    given: dict[str, Any]


def speech_case(i: int, folder: Path) -> SpeechCase:
    """Write `face.png` and `voice.wav` of case i."""
    from PIL import Image

    rng = np.random.default_rng([2026, i])
    who, sound = talk.sample_talk(rng, split="held_out"), sample_voice(rng, SECONDS)
    picture, audio = folder / "face.png", folder / "voice.wav"
    Image.fromarray(talk.portrait(who)).save(picture)
    write_wave(audio, sound)
    return SpeechCase(who, sound, {"image": picture, "audio": audio})


def write_wave(path: Path, sound: Floats) -> None:
    """A mono 16-bit file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())


def dance_case(i: int, folder: Path) -> DanceCase:
    """Write `figure.png`, `pose.mp4` and `face.mp4` of case i; of an odd one also `bg.mp4` and `mask.mp4`."""
    from PIL import Image

    from wanloom import media

    rng = np.random.default_rng([2027, i])
    what = dance.sample_dance(rng, FRAMES, split="held_out")
    given: dict[str, Any] = {
        "image": folder / "figure.png", "pose_video": folder / "pose.mp4", "face_video": folder / "face.mp4",
    }  # fmt: skip
    Image.fromarray(dance.portrait(what, size=DANCE_SIZE)).save(given["image"])
    driver = dressed_figure(dance.sample_person(rng), what.pose, size=DANCE_SIZE)
    videos = {
        "pose_video": dance.drive(what, size=DANCE_SIZE),
        "face_video": faces(driver, what.pose).repeat(4, 1).repeat(4, 2),
    }
    scene: Pixels | None = None
    if i % 2:
        what = replace(what, room=dance.sample_room(rng, what.outfit))
        free = dance.cover(what, size=DANCE_SIZE)[..., None] > 0
        scene = np.where(free, np.uint8(0), dance.draw_room(what.room, size=DANCE_SIZE)[None])
        given |= {"background_video": folder / "bg.mp4", "mask_video": folder / "mask.mp4", "replace_flag": True}
        videos |= {"background_video": scene, "mask_video": (free * np.uint8(255)).repeat(3, -1)}
    for role, frames in videos.items():
        media.save_video(given[role], np.ascontiguousarray(frames), fps=FPS, quality=10, overwrite=True)
    return DanceCase(what, scene, given)


def faces(video: Pixels, pose: dance.Pose) -> Pixels:
    """The face in each frame, cut out around the head: uint8 [F, 16, 16, 3]."""
    from PIL import Image

    size, reach, out = video.shape[1], 7.0, []
    for frame, x, y in zip(video, *pose["head"], strict=True):
        sides = [float(v) * size / 64 for v in (x - reach, y - reach, x + reach, y + reach)]
        x0, y0, x1, y1 = (min(max(v, 0.0), float(size)) for v in sides)
        box = (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))
        out.append(np.array(Image.fromarray(frame).resize((FACE, FACE), Image.Resampling.BILINEAR, box=box)))
    return np.stack(out)
