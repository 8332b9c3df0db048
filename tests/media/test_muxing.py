"""Sound is put into a finished video: the picture untouched, both of one length, never a silent failure."""

from __future__ import annotations

import resource
import wave as wavefile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from wanloom import media
from wanloom.errors import InputError
from wanloom.media.sound import RATE, read_sound

PLAN = '{"prompt": "é 猫"}'
FRAME = 1024 / 16000  # seconds of one AAC frame at the lowest rate that is used here


def clip(path: Path, frames: int = 33, comment: str = PLAN) -> Path:
    """A video of `frames` frames at 16 a second, with the Plan in it."""
    t, y, x = np.mgrid[:frames, :32, :48].astype(np.float64)
    waves = np.stack([np.sin(x / 9 + t / 3), np.cos(y / 7 - t / 4), np.sin((x + y) / 11)], -1)
    media.save_video(path, (127.5 + 110 * waves).astype(np.uint8), fps=16, comment=comment)
    return path


def clicks(seconds: float, rate: int) -> np.ndarray:
    """[1, n] float32: silence with a click of 10 ms at every whole second, the k-th (k + 1) tenths loud."""
    wave = np.zeros((1, round(seconds * rate)), np.float32)
    for second in range(int(np.ceil(seconds))):
        at = second * rate
        wave[:, at : at + rate // 100] = (second + 1) / 10
    return wave


def wav(path: Path, samples: np.ndarray, rate: int) -> Path:
    with wavefile.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T * 32767).round().astype("<i2").tobytes())
    return path


def encoded(path: Path, codec: str, seconds: float, container: str | None = None) -> Path:
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=48000, layout="mono")
        resampler = av.AudioResampler(stream.format, "mono", 48000, frame_size=stream.frame_size or 1024)
        frame = av.AudioFrame.from_ndarray(clicks(seconds, 48000), format="fltp", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = 48000, Fraction(1, 48000), 0
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    return path


def packets(path: Path, kind: str) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(**{kind: 0}) if packet.size]


def codec_of(path: Path) -> str:
    with av.open(str(path)) as container:
        return str(container.streams.audio[0].codec_context.codec.canonical_name)


def heard(path: Path) -> list[float]:
    """The seconds after the first picture at which clicks begin, by the timestamps that a player goes by."""
    found: list[float] = []
    with av.open(str(path)) as container:
        begin = next(container.decode(video=0)).time
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            wave = np.abs(frame.to_ndarray().astype(np.float32)).max(0) / (32768 if "s16" in frame.format.name else 1)
            for at in np.flatnonzero(wave > 0.04) / frame.sample_rate + frame.time - begin:
                if not found or at > found[-1] + 0.5:
                    found.append(float(at))
    return found


def refused(call: Callable[[], Any], code: str, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code, caught.value
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "aac"), (".mkv", "aac"), (".webm", "opus")])
def test_the_picture_is_copied_and_the_sound_encoded(suffix: str, codec: str, tmp_path: Path) -> None:
    video = clip(tmp_path / f"a{suffix}")
    sound = wav(tmp_path / "a.wav", clicks(4, 44100), 44100)
    out = media.add_sound(video, sound, tmp_path / f"b{suffix}", start=0.5)
    assert packets(out, "video") == packets(video, "video")
    assert media.read_comment(out) == PLAN
    assert codec_of(out) == codec
    before, after = media.read_video(video), media.read_video(out)
    assert np.array_equal(before.frames, after.frames)
    assert (before.fps, round(before.duration, 2)) == (after.fps, round(after.duration, 2))
    assert abs(read_sound(out).seconds - 33 / 16) <= 1024 / 44100 + 0.001
    assert heard(out) == pytest.approx([0.5, 1.5], abs=0.005)  # the second and third click


@pytest.mark.parametrize(("name", "codec", "container", "suffix"), [
    ("a.m4a", "aac", "mp4", ".mp4"), ("a.m4a", "aac", "mp4", ".mkv"), ("a.aac", "aac", "adts", ".mp4"),
    ("a.mp3", "libmp3lame", None, ".mp4"), ("a.mp3", "libmp3lame", None, ".mkv"), ("a.flac", "flac", None, ".mkv"),
    ("a.mka", "aac", "matroska", ".mp4"), ("a.ogg", "libopus", "ogg", ".webm"), ("a.ogg", "libopus", "ogg", ".mkv"),
])  # fmt: skip
def test_sound_that_fits_is_copied(name: str, codec: str, container: str | None, suffix: str, tmp_path: Path) -> None:
    video = clip(tmp_path / f"a{suffix}")
    sound = encoded(tmp_path / name, codec, 3.0, container)
    out = media.add_sound(video, sound, tmp_path / f"b{suffix}")
    copied, original = packets(out, "audio"), packets(sound, "audio")
    if container == "adts":
        original = [packet[7:] for packet in original]  # an MP4 keeps that header once
    assert copied == original[: len(copied)]
    assert len(copied) < len(original)
    assert packets(out, "video") == packets(video, "video")
    assert abs(read_sound(out).seconds - 33 / 16) <= 4608 / 48000 + 0.03  # FLAC's packets; what encoders put before
    late = 1024 / 48000 if container == "adts" else 0  # this format cannot say what its encoder put before
    assert heard(out) == pytest.approx([late, 1 + late, 2 + late], abs=0.005)


@pytest.mark.parametrize("name", ["a.ogg", "a.flac"])
def test_sound_that_does_not_fit_is_encoded(name: str, tmp_path: Path) -> None:
    sound = encoded(tmp_path / name, "libopus" if name == "a.ogg" else "flac", 3.0)
    out = media.add_sound(clip(tmp_path / "a.mp4"), sound, tmp_path / "b.mp4")
    assert codec_of(out) == "aac"
    assert heard(out) == pytest.approx([0, 1, 2], abs=0.005)


@pytest.mark.parametrize("start", [0.0, 0.1875])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_the_picture_ends_with_a_shorter_sound(suffix: str, start: float, tmp_path: Path) -> None:
    video = clip(tmp_path / f"a{suffix}")
    sound = wav(tmp_path / "a.wav", clicks(1.0, RATE), RATE)
    out = media.add_sound(video, sound, tmp_path / f"b{suffix}", start=start)
    frames = media.read_video(out).frames
    shown = int(np.ceil((1 - start) * 16))
    assert shown <= len(frames) <= shown + 3  # H.264: frames that the last ones refer to
    assert np.array_equal(frames[:shown], media.read_video(video).frames[:shown])
    assert abs(read_sound(out).seconds - (1 - start)) <= FRAME


def test_lengths_agree_to_one_frame_of_the_sound(tmp_path: Path) -> None:
    video = clip(tmp_path / "a.mp4")
    for rate in (16000, 44100, 48000):
        sound = wav(tmp_path / f"{rate}.wav", clicks(4, rate), rate)
        out = media.add_sound(video, sound, tmp_path / "b.mp4", start=0.1875)
        assert abs(read_sound(out).seconds - 33 / 16) <= 1024 / rate, rate


def test_the_sound_of_a_video_is_carried_over(tmp_path: Path) -> None:
    first = media.add_sound(
        clip(tmp_path / "a.mp4"), wav(tmp_path / "a.wav", clicks(4, RATE), RATE), tmp_path / "b.mp4"
    )
    again = clip(tmp_path / "c.mkv", frames=17, comment="other")
    out = media.add_sound(again, first, tmp_path / "d.mkv")
    assert packets(out, "audio") == packets(first, "audio")[: len(packets(out, "audio"))]
    assert media.read_comment(out) == "other"
    assert len(media.read_video(out).frames) == 17


def test_a_video_may_be_replaced_by_itself_with_sound(tmp_path: Path) -> None:
    video, sound = clip(tmp_path / "a.mp4"), wav(tmp_path / "a.wav", clicks(4, RATE), RATE)
    assert media.add_sound(video, sound, video) == video
    assert media.has_sound(video)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.wav"]


def test_where_sound_is_and_where_it_can_be(tmp_path: Path) -> None:
    sound = wav(tmp_path / "a.wav", clicks(1, RATE), RATE)
    assert media.has_sound(sound)
    for suffix in (".mp4", ".mkv", ".webm", ".gif", ".png"):
        silent = clip(tmp_path / f"a{suffix}")
        assert media.can_carry_sound(silent) == (suffix not in (".gif", ".png"))
        assert not media.has_sound(silent)
        if media.can_carry_sound(silent):
            assert media.has_sound(media.add_sound(silent, sound, tmp_path / f"b{suffix}"))
    assert media.can_carry_sound("A.MP4")


# ---------------------------------------------------------------- what goes wrong is said


def test_what_cannot_be_put_together(tmp_path: Path) -> None:
    video, sound = clip(tmp_path / "a.mp4"), wav(tmp_path / "a.wav", clicks(1, RATE), RATE)
    start = "sound: could not be put into the "
    refused(lambda: media.add_sound(video, sound, tmp_path / "b.gif"), "E5006", f"{start}.gif file", "only .mp4, .mkv")
    refused(lambda: media.add_sound(video, sound, tmp_path / "b.webm"), "E5006", f"{start}.webm file")  # H.264 in WebM
    refused(lambda: media.add_sound(video, sound, tmp_path / "b.mp4", start=1.0), "E5006", "nothing is left")
    refused(lambda: media.add_sound(video, video, tmp_path / "b.mp4"), "E3011", "sound: a.mp4: no sound")
    refused(lambda: media.add_sound(video, tmp_path / "no.wav", tmp_path / "b.mp4"), "E3001", "sound: ")
    refused(lambda: media.add_sound(video, sound, tmp_path / "none" / "b.mp4"), "E5001")
    refused(lambda: media.add_sound(video, sound, sound.with_suffix(".mp4"), overwrite=False), "E5002")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.wav"]


def test_a_playlist_is_no_sound(tmp_path: Path) -> None:
    video, secret = clip(tmp_path / "a.mp4"), wav(tmp_path / "secret.wav", clicks(1, RATE), RATE)
    (tmp_path / "a.mp3").write_text(f"ffconcat version 1.0\nfile {secret}\n")
    refused(lambda: media.add_sound(video, tmp_path / "a.mp3", tmp_path / "b.mp4"), "E3004", "sound: a.mp3")


def failing(container: Any) -> Any:
    """The container; for one that is written a stand-in that hands everything on but the 20th packet."""
    if not isinstance(container, av.container.OutputContainer):
        return container
    calls: list[Any] = []

    class StandIn:
        def __enter__(self) -> StandIn:
            return self

        def __exit__(self, *given: Any) -> None:
            container.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(container, name)

        def mux(self, packet: Any) -> None:
            calls.append(packet)
            if len(calls) == 20:
                raise av.error.InvalidDataError(1094995529, "Invalid data found")
            container.mux(packet)

    return StandIn()


@pytest.mark.parametrize("start", [0.0, 0.25])
def test_an_error_of_ffmpeg_in_the_middle_is_not_swallowed(
    start: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video, sound = clip(tmp_path / "a.mp4"), encoded(tmp_path / "a.m4a", "aac", 3.0, "mp4")
    opened = av.open
    monkeypatch.setattr(av, "open", lambda *given, **more: failing(opened(*given, **more)))
    refused(lambda: media.add_sound(video, sound, tmp_path / "b.mp4", start=start), "E5006", "Invalid data found")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.m4a", "a.mp4"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    video, sound = clip(tmp_path / "a.mp4"), wav(tmp_path / "a.wav", clicks(4, 44100), 44100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        refused(lambda: media.add_sound(video, sound, tmp_path / "b.mp4"), "E5003")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.wav"]
