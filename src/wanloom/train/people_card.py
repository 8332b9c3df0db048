"""What the judges say of the demo models of people, through the pipeline that everybody uses.

demo-s2v: held-out heads, each with four seconds of a synthetic voice of its own; demo-animate: held-out figures, each
with a dance of its own, every second one put into another room.  Case i is a function of i.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

import wanloom
from wanloom import media
from wanloom.clips import DROPPED
from wanloom.demo import dance, dance_judge, talk
from wanloom.demo.cases import DANCE_SIZE as SIZE
from wanloom.demo.cases import DANCES, SPEAKS, dance_case, speech_case
from wanloom.demo.voices import opening
from wanloom.train.vae import psnr

Row = tuple[str, list[np.ndarray]]
FLOORS_SPEECH = {"mouth": (0.8, 0.9), "lag_at_most_1": (0.95, 1.0), "colours": (0.95, 0.99)}
FLOORS_DANCE = {
    "colours": (0.95, 0.99), "kept_db": (28.0, 34.0), "movement": (0.8, 0.9), "distance_of_another": (0.15, 0.17),
}  # fmt: skip
CEILINGS_SPEECH = {"mouth_of_another": 0.2}
CEILINGS_DANCE = {"distance": 0.06}


# ---------------------------------------------------------------- heads


def spoken(frames: np.ndarray, sound: np.ndarray, who: talk.Talk) -> talk.Verdict:
    """Hold a video against a sound: its first frame stands for the fourth of the sound."""
    heard = opening(sound, len(frames) + DROPPED)[DROPPED:]
    return talk.compare(talk.observe(frames), heard, who.face)


def speech_figures(
    pipe: wanloom.Pipeline, count: int, folder: Path, real: Path | None
) -> tuple[list[dict[str, float]], list[Row]]:
    """Figures of each case and a row of the sheet for it; `real`: a file of real speech, for as many heads again."""
    figures, rows = [], []
    for i in range(count):
        case = speech_case(i, folder)
        who = case.who
        start = time.perf_counter()
        frames = pipe(SPEAKS, seed=i, **case.given).frames
        seconds = time.perf_counter() - start
        verdict = spoken(frames, case.sound, who)
        other = spoken(frames, speech_case(i + 1, folder).sound, who)
        figures.append(
            {
                "mouth": verdict.correlation, "lag_at_most_1": float(abs(verdict.lag) <= 1),
                "mouth_of_another": other.correlation, "colours": float(verdict.colours), "seconds": seconds,
            }
        )  # fmt: skip
        rows.append((f"mouth {verdict.correlation:.2f}", [talk.portrait(who)[None], frames]))
    if real is not None:
        sound = media.read_sound(real).wave
        for i in range(10):
            case = speech_case(1000 + i, folder)
            frames = pipe(SPEAKS, seed=i, **{**case.given, "audio": real}).frames
            verdict = spoken(frames, sound, case.who)
            figures[i] |= {"mouth_real_speech": verdict.correlation}
    return figures, rows


# ---------------------------------------------------------------- figures


def dance_figures(pipe: wanloom.Pipeline, count: int, folder: Path) -> tuple[list[dict[str, float]], list[Row]]:
    """Figures of each case and a row of the sheet for it."""
    figures, rows = [], []
    for i in range(count):
        case = dance_case(i, folder)
        what = case.dance
        start = time.perf_counter()
        frames = pipe(DANCES, seed=i, **case.given).frames
        seconds = time.perf_counter() - start
        seen = dance_judge.observe(dance_judge.shrunk(frames), what.outfit, dance.draw_room(what.room))
        verdict = dance_judge.compare(seen, what.pose, what.outfit)
        other = dance_judge.compare(seen, dance_case(i + 1, folder).dance.pose, what.outfit)
        found = {
            "distance": verdict.distance, "movement": verdict.movement, "distance_of_another": other.distance,
            "colours": float(verdict.colours), "colours_each": float(np.mean(list(verdict.parts.values()))),
            "psnr": psnr(dance.perform(what, size=SIZE), frames), "seconds": seconds,
        }  # fmt: skip
        if case.scene is not None:
            outside = dance.cover(what, size=SIZE) == 0
            found["kept_db"] = psnr(case.scene[outside], frames[outside])
        figures.append(found)
        rows.append((f"distance {verdict.distance:.3f}", [dance.drive(what, size=SIZE), frames]))
    return figures, rows
