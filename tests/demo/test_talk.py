"""The world of talking heads, and the judge of them."""

from __future__ import annotations

import numpy as np
import pytest

from wanloom.demo.talk import Seen, Verdict, compare, held_out, observe, portrait, sample_talk, speak
from wanloom.demo.voices import FPS, RATE, opening, sample_voice

COUNT, FRAMES = 60, 49


@pytest.fixture(scope="module")
def clips() -> list[tuple[Seen, np.ndarray, object]]:
    """What is seen of rendered heads, what they should say, who they are."""
    out = []
    for i in range(COUNT):
        rng = np.random.default_rng(i)
        mouth = opening(sample_voice(rng, FRAMES / FPS), FRAMES)
        talk = sample_talk(rng, split="held_out")
        out.append((observe(speak(talk, mouth, fps=FPS)), mouth, talk.face))
    return out


def right(verdict: Verdict) -> bool:
    return verdict.correlation >= 0.8 and abs(verdict.lag) <= 1 and verdict.colours


def test_rendered_heads_are_judged_right(clips: list) -> None:
    verdicts = [compare(seen, mouth, face) for seen, mouth, face in clips]
    assert all(right(verdict) for verdict in verdicts)
    assert np.mean([verdict.correlation for verdict in verdicts]) > 0.97
    assert all(verdict.lag == 0 for verdict in verdicts)


def test_with_another_sound_they_are_not(clips: list) -> None:
    others = [compare(seen, clips[(i + 1) % COUNT][1], face) for i, (seen, _, face) in enumerate(clips)]
    assert np.mean([verdict.correlation for verdict in others]) < 0.2
    assert sum(right(verdict) for verdict in others) == 0


def test_a_late_mouth_is_found_late(clips: list) -> None:
    for seen, mouth, face in clips[:10]:
        late = Seen(np.roll(seen.mouth, 3), seen.skin, seen.ground)
        assert compare(late, mouth, face).lag == 3


def test_black_noise_and_a_mouth_that_stands_still_are_wrong(clips: list) -> None:
    _, mouth, face = clips[0]
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, 64, 64, 3), dtype=np.uint8)
    talk = sample_talk(np.random.default_rng(1), split="held_out")
    still = speak(talk, np.full(FRAMES, 0.5, np.float32), fps=FPS)
    for video in (np.zeros((FRAMES, 64, 64, 3), np.uint8), noise, still):
        assert not right(compare(observe(video), mouth, face))


def test_faces_are_split_by_rule_and_drawn_alike() -> None:
    rng = np.random.default_rng(0)
    train, held = ([sample_talk(rng, split=split) for _ in range(50)] for split in ("train", "held_out"))
    assert not any(held_out(talk.face) for talk in train)
    assert all(held_out(talk.face) for talk in held)
    talk = held[0]
    assert np.array_equal(portrait(talk), portrait(talk))
    one = speak(talk, np.linspace(0, 1, 32, dtype=np.float32), fps=FPS)
    rest = speak(talk, np.linspace(0, 1, 32, dtype=np.float32)[16:], fps=FPS, start=1.0)
    assert np.array_equal(one[16:], rest)  # a clip may be cut anywhere


def test_a_mouth_is_shut_at_silence_and_wide_at_the_loudest() -> None:
    quiet = 1e-4 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    loud = 0.5 * np.sin(np.arange(RATE) * 0.2).astype(np.float32)
    mouth = opening(np.concatenate((quiet, loud, quiet)), 60)
    assert mouth[:14].max() == mouth[34:].max() == 0
    assert mouth[18:30].min() > 0.9
    assert opening(np.zeros(RATE, np.float32), 16).max() == 0
    assert np.allclose(opening(0.1 * loud, 16), opening(loud, 16))  # loudness is against the sound's own


def test_a_voice_is_drawn_by_its_seed_and_pauses() -> None:
    one, two = (sample_voice(np.random.default_rng(seed), 4.0) for seed in (0, 0))
    assert np.array_equal(one, two)
    assert one.dtype == np.float32 and len(one) == 4 * RATE and np.abs(one).max() <= 1
    shares = [opening(sample_voice(np.random.default_rng(i), 8.0), 128) for i in range(20)]
    shut = np.mean([np.mean(mouth < 0.05) for mouth in shares])
    wide = np.mean([np.mean(mouth > 0.6) for mouth in shares])
    assert 0.1 < shut < 0.6 and 0.1 < wide < 0.6
