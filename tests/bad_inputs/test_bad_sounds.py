"""Bad input: sounds that are damaged, forged, too much or too little, given to s2v on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from rows import S2V, film, wav


@pytest.fixture
def words(models, picture) -> Callable[..., tuple[object, ...]]:
    """`words(sound)`: the command line that makes the picture speak."""

    def typed(sound: Path) -> tuple[object, ...]:
        model = ("--task", S2V, "--ckpt-dir", models / S2V, "--size", "64x64", "--seed", "1", "--prompt", "x")
        return (*model, "--image", picture, "--audio", sound)

    return typed


@pytest.fixture
def unheard(refused, words) -> Callable[..., str]:
    """`unheard("E3017", sound)`: refused with this code, and the file is named."""

    def call(code: str, sound: Path) -> str:
        said = refused(code, *words(sound))
        assert f"audio: {sound.name}: " in said
        return said

    return call


def test_b058_a_header_that_promises_four_gigabytes(unheard, tmp_path):
    sound = wav(tmp_path / "a.wav", 0, promised=2**32 - 2)
    assert sound.stat().st_size == 44
    assert "promises 4294967294 bytes of sound, it has 0" in unheard("E3015", sound)


def test_b059_a_flac_of_eight_channels_at_655350(unheard, tmp_path):
    with av.open(str(tmp_path / "a.flac"), "w") as out:
        stream = out.add_stream("flac", rate=655_350, layout="7.1")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8 * 4608), np.int16), format="s16", layout="7.1")
        frame.sample_rate, frame.pts, frame.time_base = 655_350, 0, Fraction(1, 655_350)
        out.mux([*stream.encode(frame), *stream.encode(None)])
    assert "8 channels of 655350 samples a second" in unheard("E3016", tmp_path / "a.flac")


def test_b060_nothing_two_hours_numbers_that_are_none_and_96_channels(unheard, tmp_path):
    bad = np.zeros(8000, np.float32)
    bad[100] = np.nan
    assert "0.00 s of sound" in unheard("E3017", wav(tmp_path / "none.wav", 0))
    assert "longer than 60 minutes" in unheard("E3017", wav(tmp_path / "long.wav", 7200, rate=100))
    assert "not finite" in unheard("E3017", wav(tmp_path / "nan.wav", samples=bad))
    assert "96 channels" in unheard("E3016", wav(tmp_path / "many.wav", channels=96))
    assert "no sound in it" in unheard("E3011", film(tmp_path / "silent.mp4"))


@pytest.mark.parametrize(("seconds", "frames"), [(0.25, 1), (1.0, 13), (4.0, 61)])
def test_b061_a_sound_shorter_than_a_clip_ends_the_file(seconds, frames, run, words, tmp_path):
    ran = run("generate", *words(wav(tmp_path / "a.wav", seconds)), "--dry-run")
    assert ran.code == 0, ran.err
    plan = json.loads(ran.out)
    assert plan["frames"] == frames == int((seconds - 3 / 16) * 16)  # what is left behind the trimmed beginning
    assert [clip["frames"] for clip in plan["segments"]] == [77]  # a whole clip is made; it hears zeros at its end


def test_b061_a_sound_that_is_all_trimmed_is_refused(refused, words, tmp_path):
    assert "at least 0.25 s are needed" in refused("E3017", *words(wav(tmp_path / "a.wav", 0.15)))
