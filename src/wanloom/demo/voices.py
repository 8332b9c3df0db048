"""Synthetic speech, and how far a mouth opens at a sound: what the demo models of speech are trained on.

A voice is a train of glottal pulses through three formants, cut into syllables; consonants are short noise before them.
It is no language, but its loudness rises and falls as that of speech does, and that is what moves a mouth here:
`opening` is defined for any sound, and the judge uses it on real speech as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .world import Floats

RATE = 16_000  # samples a second
FPS = 16  # video frames a second
WINDOW = 0.2  # seconds of sound that a mouth answers to: about a syllable
LOUD = 0.95  # the quantile of loudness at which a mouth is wide open

# Formant frequencies (Hz) of vowels of a grown-up voice: a, e, i, o, u.
VOWELS = ((730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240))
WIDTHS = (80.0, 100.0, 140.0)  # of the formants, Hz


def sample_voice(rng: np.random.Generator, seconds: float) -> Floats:
    """Somebody speaking: float32 [seconds * 16000], at most 1 in size."""
    count = round(seconds * RATE)
    loudness, vowel, breath = _syllables(rng, count)
    pitch = rng.uniform(85, 260) * (1 + 0.12 * _slow(rng, count, 2.0) + 0.03 * _slow(rng, count, 8.0))
    voiced = _formants(_pulses(pitch), vowel, rng.uniform(0.9, 1.2))
    noise = rng.standard_normal(count).astype(np.float32)
    hiss = np.diff(noise, prepend=noise[:1])  # consonants are bright
    wave = loudness * voiced + 0.25 * breath * hiss
    wave /= np.abs(wave).max() + 1e-6
    wave = wave * rng.uniform(0.3, 0.95) + 10 ** rng.uniform(-4, -2.3) * rng.standard_normal(count)
    return np.asarray(np.clip(wave, -1, 1), np.float32)


def opening(wave: Floats, frames: int, fps: float = FPS, rate: int = RATE) -> Floats:
    """How far a mouth is open in each video frame of a sound: float32 [frames], 0 shut to 1 wide.

    Root mean square loudness around the middle of the frame, against that of the loud parts of the whole sound, less a
    floor that keeps the mouth shut at noise.  Frames behind the end of the sound are shut.
    """
    energy = np.concatenate(([0.0], np.cumsum(np.asarray(wave, np.float64) ** 2)))
    middle = (np.arange(frames) + 0.5) / fps * rate
    low = np.clip(middle - WINDOW * rate / 2, 0, len(wave)).astype(int)
    high = np.clip(middle + WINDOW * rate / 2, 0, len(wave)).astype(int)
    loud = np.sqrt((energy[high] - energy[low]) / np.maximum(high - low, 1))
    step = round(WINDOW * rate / 2)
    blocks = np.sqrt(np.maximum(np.diff(energy[::step]), 0) / step)
    wide = float(np.quantile(blocks, LOUD)) if len(blocks) else 0.0
    return np.asarray(np.clip((loud / max(wide, 1e-6) - 0.08) / 0.92, 0, 1), np.float32)


# ---------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class _Syllable:
    start: int
    stop: int
    loud: float
    vowel: int
    consonant: int  # samples of noise before it


def _plan(rng: np.random.Generator, count: int) -> list[_Syllable]:
    """Words of one to four syllables with pauses between them."""
    out: list[_Syllable] = []
    at = int(rng.uniform(0, 0.5) * RATE)
    while at < count:
        stress = rng.uniform(0.45, 1.0)
        for _ in range(int(rng.integers(1, 5))):
            consonant = int(rng.uniform(0, 0.07) * RATE)
            length = int(rng.uniform(0.1, 0.3) * RATE)
            start = at + consonant
            out.append(
                _Syllable(start, start + length, stress * rng.uniform(0.5, 1.0), int(rng.integers(5)), consonant)
            )
            at = start + length + int(rng.uniform(0, 0.05) * RATE)
        at += int(rng.choice((0.06, 0.15, 0.5), p=(0.5, 0.3, 0.2)) * rng.uniform(0.6, 1.6) * RATE)
    return out


def _syllables(rng: np.random.Generator, count: int) -> tuple[Floats, np.ndarray, Floats]:
    """Loudness, vowel and noise for each sample."""
    loudness, breath = np.zeros(count, np.float32), np.zeros(count, np.float32)
    vowel = np.zeros(count, np.int64)
    for s in _plan(rng, count):
        stop = min(s.stop, count)
        if s.start >= count:
            break
        part = (np.arange(s.start, stop) - s.start) / (s.stop - s.start)
        rise = np.minimum(part / 0.25, 1) * np.minimum((1 - part) / 0.35, 1)
        loudness[s.start : stop] = s.loud * np.sin(0.5 * math.pi * rise) ** 1.5
        vowel[s.start :] = s.vowel
        before = slice(max(s.start - s.consonant, 0), s.start)
        breath[before] = s.loud * 0.5
    return loudness, vowel, breath


def _slow(rng: np.random.Generator, count: int, rate: float) -> Floats:
    """A smooth random signal of about `rate` swings a second, mostly within +-1."""
    time = np.arange(count) / RATE
    parts = sum(np.sin(2 * math.pi * (rng.uniform(0.4, 1.2) * rate * time + rng.random())) for _ in range(3))
    return np.asarray(parts, np.float32) / 2


def _pulses(pitch: Floats) -> Floats:
    """Harmonics of a changing pitch, each softer than the one before, up to 4 kHz."""
    phase = 2 * math.pi * np.cumsum(pitch) / RATE
    out = np.zeros(len(pitch), np.float32)
    for k in range(1, 25):
        out += np.where(k * pitch < 4000, np.sin(k * phase) / k, 0).astype(np.float32)
    return out


def _formants(wave: Floats, vowel: np.ndarray, tract: float) -> Floats:
    """The wave as each vowel's formants let it through, by short overlapping pieces; `tract` scales the formants."""
    size, hop = 512, 256
    window = np.hanning(size + 1)[:-1].astype(np.float32)
    padded = np.pad(wave, (hop, size))
    frequency = np.fft.rfftfreq(size, 1 / RATE)
    gains = []
    for formants in VOWELS:
        gain = 0.02 * np.ones_like(frequency)
        for centre, width, level in zip(formants, WIDTHS, (1.0, 0.6, 0.3), strict=True):
            gain += level / (1 + ((frequency - centre * tract) / width) ** 2)
        gains.append(gain)
    out = np.zeros(len(padded), np.float32)
    for start in range(0, len(padded) - size + 1, hop):
        spoken = vowel[min(max(start, 0), len(vowel) - 1)]
        piece = np.fft.irfft(np.fft.rfft(padded[start : start + size] * window) * gains[spoken], size)
        out[start : start + size] += piece.astype(np.float32)
    return out[hop : hop + len(wave)]
