"""Sound of any common format, and what strangers may put into a file."""

from __future__ import annotations

import struct
import wave as wavefile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from wanloom.errors import InputError
from wanloom.media.sound import RATE, read_sound


def tone(seconds: float, rate: int, channels: int = 1, pitch: float = 440.0) -> np.ndarray:
    """[channels, n] float32: a tone on the first channel, half as loud on each further one."""
    t = np.arange(round(seconds * rate)) / rate
    return np.stack([0.5 / 2**c * np.sin(2 * np.pi * pitch * t) for c in range(channels)]).astype(np.float32)


def wav(path: Path, samples: np.ndarray, rate: int) -> Path:
    with wavefile.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T * 32767).round().astype("<i2").tobytes())
    return path


def encoded(path: Path, codec: str, samples: np.ndarray, rate: int, container: str | None = None) -> Path:
    layout = {1: "mono", 2: "stereo"}[len(samples)]
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(stream.format, layout, rate, frame_size=stream.frame_size or 1024)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read_sound(path)
    assert path.name in error.value.message
    return error.value.code


def test_a_wav_at_sixteen_kilohertz_comes_back_as_it_is(tmp_path: Path) -> None:
    samples = tone(0.5, RATE)
    sound = read_sound(wav(tmp_path / "a.wav", samples, RATE))
    assert sound.wave.dtype == np.float32
    assert sound.seconds == 0.5
    assert np.abs(sound.wave - samples[0]).max() < 1e-4


def test_channels_are_averaged_and_other_rates_become_sixteen_kilohertz(tmp_path: Path) -> None:
    sound = read_sound(wav(tmp_path / "a.wav", tone(1.0, 44100, 2), 44100))
    assert len(sound.wave) == RATE
    want = 0.75 * tone(1.0, RATE)[0]
    assert np.abs(sound.wave - want)[200:-200].max() < 1e-3


@pytest.mark.parametrize("channels", [3, 6, 8, 16])
def test_the_mean_of_many_channels_is_heard(channels: int, tmp_path: Path) -> None:
    """Each channel is another tone, none as loud as the others: a lost or doubled one would be heard."""
    t = np.arange(RATE // 2) / RATE
    pitches = [200 + 100 * c for c in range(channels)]
    samples = np.stack([np.sin(2 * np.pi * f * t) * (c + 1) / (channels + 1) for c, f in enumerate(pitches)])
    sound = read_sound(wav(tmp_path / "a.wav", samples.astype(np.float32), RATE))
    assert len(sound.wave) == RATE // 2
    assert np.abs(sound.wave - samples.mean(0)).max() < 1e-4


def test_resampling_piece_by_piece_is_resampling_at_once(tmp_path: Path) -> None:
    import soxr

    samples = np.random.default_rng(0).normal(0, 0.1, (1, 48000)).astype(np.float32)
    sound = read_sound(wav(tmp_path / "a.wav", samples, 48000))
    whole = soxr.resample((samples[0] * 32767).round() / 32768, 48000, RATE, quality="HQ").astype(np.float32)
    assert len(sound.wave) == len(whole)
    assert np.abs(sound.wave - whole).max() < 1e-5


@pytest.mark.parametrize(("suffix", "codec", "container"), [
    (".flac", "flac", None), (".mp3", "libmp3lame", None), (".m4a", "aac", "mp4"), (".ogg", "libopus", "ogg"),
    (".opus", "libopus", "opus"), (".mka", "flac", "matroska"), (".aac", "aac", "adts"),
])  # fmt: skip
def test_every_common_format_is_heard(tmp_path: Path, suffix: str, codec: str, container: str | None) -> None:
    sound = read_sound(encoded(tmp_path / f"a{suffix}", codec, tone(1.0, 48000, 2), 48000, container))
    assert abs(sound.seconds - 1) < 0.08  # encoders pad a frame or two
    spectrum = np.abs(np.fft.rfft(sound.wave[2000:14000]))
    assert abs(np.argmax(spectrum) * RATE / 12000 - 440) < 3


def test_the_suffix_does_not_count(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.mp3", tone(0.3, RATE), RATE)
    assert read_sound(path).seconds == pytest.approx(0.3)


def test_a_header_that_promises_more_than_there_is(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav", tone(0.3, RATE), RATE)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 40, 2**32 - 100)
    path.write_bytes(data)
    assert refused(path) == "E3015"
    struct.pack_into("<I", data, 40, 2**32 - 1)  # what a program writes that did not know the length
    path.write_bytes(data)
    assert read_sound(path).seconds == pytest.approx(0.3)


def test_a_playlist_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    path.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    assert refused(path) == "E3004"
    path.write_text("ffconcat version 1.0\nfile secret.wav\n")
    assert refused(path) == "E3004"


def test_a_video_without_sound(tmp_path: Path) -> None:
    from wanloom.media import save_video

    save_video(tmp_path / "a.mp4", np.zeros((2, 32, 32, 3), np.uint8), fps=8)
    assert refused(tmp_path / "a.mp4") == "E3011"


@pytest.mark.parametrize(("seconds", "code"), [(0.0, "E3017"), (0.05, "E3017")])
def test_next_to_nothing(tmp_path: Path, seconds: float, code: str) -> None:
    assert refused(wav(tmp_path / "a.wav", tone(seconds, RATE), RATE)) == code


def test_longer_than_an_hour_is_found_while_decoding(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav", np.zeros((1, 8 * 3700), np.float32), 8)
    assert refused(path) == "E3017"


def test_samples_that_are_not_finite(tmp_path: Path) -> None:
    samples = tone(0.3, RATE)[0]
    samples[100] = np.nan
    body = samples.astype("<f4").tobytes()
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(body), b"WAVE", b"fmt ", 16, 3, 1, RATE, 4 * RATE, 4, 32,
                       b"data", len(body))  # fmt: skip
    path = tmp_path / "a.wav"
    path.write_bytes(head + body)
    assert refused(path) == "E3017"


def test_channels_and_rates_beyond_all_measure(tmp_path: Path) -> None:
    many = wav(tmp_path / "many.wav", np.zeros((96, 2000), np.float32), RATE)
    fast = wav(tmp_path / "fast.wav", np.zeros((1, 200_000), np.float32), 655_350)
    assert refused(many) == refused(fast) == "E3016"


def test_a_damaged_file(tmp_path: Path) -> None:
    path = encoded(tmp_path / "a.m4a", "aac", tone(1.0, 48000), 48000, "mp4")
    path.write_bytes(path.read_bytes()[:200])
    assert refused(path) == "E3009"


def test_an_empty_file_and_none(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"")
    assert refused(tmp_path / "a.wav") == "E3003"
    assert refused(tmp_path / "b.wav") == "E3001"
