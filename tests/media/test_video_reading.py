"""Videos of strangers: the rate that is wanted, and B050 to B057, B064 and B065 of the bad inputs.

What the tests of sound leave open of B058, B059, B064 and B065 is at the end.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from wanloom import media
from wanloom.errors import InputError
from wanloom.media import reading
from wanloom.media.reading import VideoReader, nearest, read_video
from wanloom.media.sound import read_sound

CENC = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "00" * 16, "encryption_kid": "11" * 16}


def greys(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """[count, H, W, 3]: frame i is grey 10 + 6 i, so that a frame says which it is."""
    return np.broadcast_to((10 + 6 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3))


def numbers(frames: Any) -> list[int]:
    return [round((float(frame.mean()) - 10) / 6) for frame in frames]


def film(
    path: Path, frames: np.ndarray, codec: str = "libx264", *, rate: int = 8, times: Any = None,
    pixels: str = "yuv420p", **options: str,
) -> Path:  # fmt: skip
    """A video; times: milliseconds of the frames, where they are not even."""
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream(codec, rate=rate, options={"preset": "ultrafast"} if max(frames.shape) > 1000 else {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixel in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixel), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def refused(call: Callable[[], Any], code: str, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code, caught.value
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def read_all(path: Path, **options: Any) -> list[np.ndarray]:
    with VideoReader(path, "driving video", **options) as video:
        return list(video)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".mkv", "mpeg4"), (".webm", "libvpx-vp9")])
def test_a_video_knows_its_facts_before_a_frame_is_asked_for(suffix: str, codec: str, tmp_path: Path) -> None:
    path = film(tmp_path / f"a{suffix}", greys(20), codec)
    with VideoReader(path, "driving video") as video:
        assert (video.size, video.rate, video.fps, video.count) == ((48, 32), 8, 8, 20)
        assert video.duration == pytest.approx(2.5, abs=0.002)
        assert (video.name, video.sha256) == (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
        assert numbers(video) == numbers(video) == list(range(20))  # it can be gone through again
    clip = read_video(path, fps=4, limit=3)
    assert (clip.frames.shape, clip.size, clip.fps, clip.rate) == ((3, 32, 48, 3), (48, 32), 4, 8)
    assert (clip.name, clip.sha256, clip.duration) == (video.name, video.sha256, video.duration)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif", ".png"])
@pytest.mark.parametrize("fps", [3, 8, 16, 25])
def test_frames_are_taken_by_their_timestamps(suffix: str, fps: int, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    media.save_video(path, greys(20), fps=8)
    frames = read_all(path, fps=fps)
    assert len(frames) == int(2.5 * fps + 0.5)
    for index, number in enumerate(numbers(frames)):
        assert abs(index / fps - number / 8) <= 1 / 16 + 0.006 or number == 19  # 5 ms: the clock of a GIF


def test_a_variable_rate_becomes_an_even_one(tmp_path: Path) -> None:
    times = [0, 40, 80, 500, 540, 1200, 1240, 1280]
    path = film(tmp_path / "a.mkv", greys(8), rate=25, times=times)
    want = [min(range(8), key=lambda at: (abs(times[at] - 62.5 * i), at)) for i in range(21)]
    with VideoReader(path, fps=16) as video:
        assert abs(video.duration - 1.32) < 0.03
        assert numbers(video) == want[: video.count]
        assert video.rate == pytest.approx(8 / 1.32, rel=0.03)
    assert numbers(read_all(path)) == list(range(8))


def test_of_two_equally_near_frames_the_earlier_is_taken() -> None:
    timed = [(Fraction(i, 4), i) for i in range(4)]
    assert list(nearest(iter(timed), Fraction(8), 8)) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert list(nearest(iter(timed), Fraction(2), 2)) == [0, 2]


def test_the_first_timestamp_is_the_beginning(tmp_path: Path) -> None:
    late = film(tmp_path / "late.mkv", greys(8), times=range(5000, 6000, 125))
    before = film(tmp_path / "before.mkv", greys(8), times=range(-500, 500, 125))
    for path in (late, before):
        with VideoReader(path, fps=8) as video:
            assert (video.count, numbers(video)) == (8, list(range(8)))
    cut = film(tmp_path / "cut.mp4", greys(8), times=range(-500, 500, 125))  # an edit list hides what is below zero
    assert numbers(read_all(cut)) == numbers(read_all(cut, fps=8)) == [4, 5, 6, 7]


def test_no_more_is_decoded_than_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "a.mp4", greys(20), rate=8)
    converted = []
    plain = reading._Film.pixels
    monkeypatch.setattr(reading._Film, "pixels", lambda self, frame: converted.append(frame.pts) or plain(self, frame))
    assert len(read_all(path, fps=16, limit=6)) == 6
    assert len(converted) == 3  # each frame twice, converted once
    converted.clear()
    assert len(read_all(path, fps=2)) == 5
    assert len(converted) == 5


def test_the_cameras_rotation_is_obeyed(tmp_path: Path) -> None:
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :, :32] = 255  # the left half
    path = film(tmp_path / "a.mp4", frames)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the matrix of the track, version 0
    assert struct.unpack(">9i", data[at : at + 36])[0] == 0x10000
    data[at : at + 36] = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)  # a quarter clockwise
    path.write_bytes(data)
    clip = read_video(path)
    assert clip.size == (32, 64)
    assert clip.frames[0, :24].min() > 200 and clip.frames[0, 40:].max() < 50  # the left is now above


def test_one_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    media.save_video(tmp_path / "a.png", greys(1), fps=8)
    with VideoReader(tmp_path / "a.png", fps=16) as video:
        assert (video.count, video.rate, len(list(video))) == (1, 0, 1)


def test_an_early_end_lets_the_file_go(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", greys(20))
    with VideoReader(path) as video:
        frames = iter(video)
        next(frames)
    assert list(frames) == []


# ---------------------------------------------------------------- B050, B065: damage and locks


def test_a_cut_video_is_noticed_wherever_it_is_cut(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 48, 3), dtype=np.uint8)
    for name, options in (("a.mp4", {"movflags": "faststart"}), ("b.mp4", {}), ("a.mkv", {}), ("a.webm", {})):
        codec = "libvpx-vp9" if name == "a.webm" else "libx264"
        whole = film(tmp_path / name, noise, codec, **options).read_bytes()
        for percent in range(2, 100, 7):
            (tmp_path / name).write_bytes(whole[: len(whole) * percent // 100])
            refused(lambda name=name: read_all(tmp_path / name), "E3009", f"driving video: {name}: ")


def test_flipped_bits_are_an_error_or_hardly_seen(tmp_path: Path) -> None:
    t, y, x = np.mgrid[:20, :64, :64]
    waves = 127.5 + 110 * np.stack([np.sin(x / 9 + t / 3), np.cos(y / 7 - t / 4), np.sin((x + y) / 11)], -1)
    whole = film(tmp_path / "a.mp4", waves.astype(np.uint8), movflags="faststart").read_bytes()
    found, start = 0, whole.index(b"mdat") + 800  # after what the encoder says of itself
    places = range(start, len(whole), (len(whole) - start) // 40)
    for at in places:
        data = bytearray(whole)
        data[at] ^= 0x55
        (tmp_path / "a.mp4").write_bytes(data)
        try:
            assert len(read_all(tmp_path / "a.mp4")) == 20
        except InputError as error:
            assert error.code == "E3009"
            found += 1
    assert found >= len(places) // 3, found  # H.264 has no checksum: what still can be decoded passes


def test_an_encrypted_video_is_said_to_be_one(tmp_path: Path) -> None:
    refused(lambda: read_all(film(tmp_path / "a.mp4", greys(3), **CENC)), "E3009", "encrypted")


# ---------------------------------------------------------------- B051: limits


def test_too_many_frames_are_noticed_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "a.mp4", greys(20), "mpeg4")
    gif = tmp_path / "a.gif"
    media.save_video(gif, greys(20), fps=8)
    monkeypatch.setattr(reading, "MAX_FRAMES", 19)
    for file in (path, gif):
        refused(lambda file=file: VideoReader(file), "E3010", "more than 19 frames")
        refused(lambda file=file: VideoReader(file, limit=1), "E3010")
    monkeypatch.setattr(reading, "MAX_FRAMES", 20)
    assert len(read_all(path)) == 20
    refused(lambda: VideoReader(path, fps=16), "E3010")
    monkeypatch.setattr(reading, "MAX_DECODED", 20 * 32 * 48 - 1)
    for file in (path, gif):
        refused(lambda file=file: VideoReader(file), "E3010", "20 frames of 48x32")


def test_a_gap_of_days_does_not_become_a_million_frames(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", greys(2), times=[0, 10**8])
    refused(lambda: VideoReader(path, fps=16), "E3010")


@pytest.mark.parametrize("size", [(7680, 4320), (8208, 16)])
def test_frames_too_large_are_not_decoded(size: tuple[int, int], tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", np.zeros((1, size[1], size[0], 3), np.uint8))
    refused(lambda: VideoReader(path), "E3010", f"{size[0]}x{size[1]}")
    Image.new("L", size).save(tmp_path / "a.gif")
    refused(lambda: VideoReader(tmp_path / "a.gif"), "E3010")


def test_a_header_that_hides_the_size_does_not_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "a.mp4", greys(3, 64, 64))
    monkeypatch.setattr(reading, "MAX_FRAME_PIXELS", 1000)
    monkeypatch.setattr(reading, "_check_size", lambda *_: None)
    refused(lambda: read_all(path), "E3009")


def test_a_clip_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "a.mp4", greys(20))
    monkeypatch.setattr(reading, "MAX_VIDEO_BYTES", 50_000)
    refused(lambda: read_video(path), "E3010", "more than 50000 bytes")
    assert len(read_all(path)) == 20


# ---------------------------------------------------------------- B052, B057: streams and codecs


def with_streams(path: Path, count: int) -> Path:
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("mpeg4", rate=8) for _ in range(count)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in greys(2):
            for stream in streams:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        for stream in streams:
            out.mux(stream.encode(None))
    return path


def with_sound(path: Path, *, cover: bytes = b"", seconds: float = 0.5, **options: str) -> Path:
    """A file with sound only, and perhaps a cover picture."""
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream("aac", rate=48000, layout="mono")
        if cover:
            out.add_attachment("cover.png", "image/png", cover)
        for number in range(round(seconds * 48000 / 1024)):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, 1024 * number, Fraction(1, 48000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def test_none_or_several_videos_in_a_file(tmp_path: Path) -> None:
    media.save_video(tmp_path / "cover.png", greys(1), fps=1)
    cover = (tmp_path / "cover.png").read_bytes()
    refused(lambda: VideoReader(with_sound(tmp_path / "a.mp4")), "E3011", "no videos")
    refused(lambda: VideoReader(with_sound(tmp_path / "a.mkv", cover=cover)), "E3011", "no videos")
    refused(lambda: VideoReader(with_streams(tmp_path / "b.mp4", 2)), "E3011", "2 videos")


@pytest.mark.parametrize(("name", "codec", "pixels"), [
    ("a.mkv", "jpeg2000", "yuv420p"), ("a.mov", "magicyuv", "gbrp"), ("a.mov", "prores_ks", "yuv422p10le"),
    ("a.mkv", "ffv1", "yuv420p"),
])  # fmt: skip
def test_uncommon_codecs_are_not_decoded(name: str, codec: str, pixels: str, tmp_path: Path) -> None:
    refused(lambda: VideoReader(film(tmp_path / name, greys(3), codec, pixels=pixels)), "E3014", codec[:6])


# ---------------------------------------------------------------- B053, B054: times and sizes


def test_rates_that_cannot_be(tmp_path: Path) -> None:
    refused(lambda: VideoReader(film(tmp_path / "a.mp4", greys(20), rate=1000)), "E3012", "1000 frames a second")
    still = [Image.fromarray(frame) for frame in greys(3)]
    still[0].save(tmp_path / "a.gif", save_all=True, append_images=still[1:], duration=0)
    refused(lambda: VideoReader(tmp_path / "a.gif"), "E3012", "no usable timestamps")


def test_timestamps_that_all_are_the_same(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", greys(5), "mpeg4")
    data = bytearray(path.read_bytes())
    at = data.index(b"stts") + 8
    entries, count, _ = struct.unpack(">III", data[at : at + 12])
    assert (entries, count) == (1, 5)
    data[at + 8 : at + 12] = bytes(4)  # each frame lasts no time
    path.write_bytes(data)
    refused(lambda: read_all(path, fps=8), "E3012")


def test_a_size_that_changes_on_the_way(tmp_path: Path) -> None:
    parts = [film(tmp_path / f"{w}.webm", greys(4, 32, w), "libvpx-vp9") for w in (48, 64)]
    with av.open(str(tmp_path / "a.webm"), "w") as out, av.open(str(parts[0])) as one, av.open(str(parts[1])) as other:
        target = out.add_stream_from_template(one.streams.video[0], opaque=True)
        for part, shift in ((one, 0), (other, 500)):
            for packet in part.demux(video=0):
                if packet.size:
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.pts + shift, target
                    out.mux(packet)
    refused(lambda: read_all(tmp_path / "a.webm"), "E3013", "48x32", "64x32")


# ---------------------------------------------------------------- B055, B056: files that lead to others


@pytest.mark.parametrize("text", [
    "ffconcat version 1.0\nfile secret.mp4\n", "#EXTM3U\n#EXTINF:1,\nsecret.mp4\n",
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>',
    "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n", "RIFF\0\0\0\0AVI LIST", "\0\0\1\xba\x44",
])  # fmt: skip
def test_playlists_and_other_containers_are_never_opened(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(tmp_path / "secret.mp4", greys(2))
    monkeypatch.setattr(av, "open", lambda *_, **__: pytest.fail("FFmpeg was asked"))
    (tmp_path / "a.mp4").write_bytes(text.encode("latin-1"))
    refused(lambda: VideoReader(tmp_path / "a.mp4"), "E3004", "MP4, MKV, WebM, GIF or PNG")


def test_attachments_are_ignored(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        out.add_attachment("font.ttf", "application/x-truetype-font", b"not a font")
        for frame in greys(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        out.mux(stream.encode(None))
    assert numbers(read_all(tmp_path / "a.mkv")) == [0, 1, 2]


def test_a_track_in_another_file_is_not_followed(tmp_path: Path) -> None:
    secret = film(tmp_path / "secret.mp4", greys(5), "mpeg4")
    data = bytearray(secret.read_bytes())
    place = str(secret).encode()
    place += b"\0" * (len(place) % 2)
    record = struct.pack(">HH", 2, len(place)) + place + struct.pack(">hH", -1, 0)
    alias = b"alis\0\0\0\0" + bytes(150) + record
    at = data.index(b"dref") + 12
    data[at : at + 12] = struct.pack(">I", len(alias) + 4) + alias
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        size = data.index(box) - 4
        (old,) = struct.unpack_from(">I", data, size)
        struct.pack_into(">I", data, size, old + len(alias) + 4 - 12)
    (tmp_path / "a.mp4").write_bytes(data)
    with av.open(str(tmp_path / "a.mp4"), options={"enable_drefs": "1", "use_absolute_path": "1"}) as container:
        assert len(list(container.decode(video=0))) == 5  # FFmpeg would follow it
    refused(lambda: VideoReader(tmp_path / "a.mp4"), "E3004", "another file")


# ---------------------------------------------------------------- B064: a file replaced while it is read


def test_what_is_decoded_is_what_the_hash_is_of(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", greys(8))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with VideoReader(path) as video:
        film(path, greys(3, 64, 64))
        assert (numbers(video), video.sha256) == (list(range(8)), digest)
    path.unlink()
    assert numbers(video) == list(range(8))


# ---------------------------------------------------------------- B058, B059, B064, B065 for sound


def wav(path: Path, body: bytes, *, rate: int = 16000, channels: int = 1, promised: int | None = None) -> Path:
    wide = 2 * channels
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(body), b"WAVE", b"fmt ", 16, 1, channels, rate,
                       wide * rate, wide, 16, b"data", len(body) if promised is None else promised)  # fmt: skip
    path.write_bytes(head + body)
    return path


def test_a_wav_of_44_bytes_that_promises_four_gigabytes(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav", b"", promised=2**32 - 2)
    assert path.stat().st_size == 44
    refused(lambda: read_sound(path), "E3015", "audio: a.wav")


def test_a_flac_of_eight_channels_at_655350(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.flac"), "w") as out:
        stream = out.add_stream("flac", rate=655_350, layout="7.1")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8 * 4608), np.int16), format="s16", layout="7.1")
        frame.sample_rate, frame.pts, frame.time_base = 655_350, 0, Fraction(1, 655_350)
        out.mux([*stream.encode(frame), *stream.encode(None)])
    refused(lambda: read_sound(tmp_path / "a.flac"), "E3016", "8 channels of 655350")


def test_an_encrypted_sound(tmp_path: Path) -> None:
    refused(lambda: read_sound(with_sound(tmp_path / "a.m4a", format="mp4", **CENC)), "E3009")


def test_the_hash_of_a_sound_is_that_of_the_bytes_that_were_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = wav(tmp_path / "a.wav", bytes(8000))
    digest, plain = hashlib.sha256(path.read_bytes()).hexdigest(), media.sound.read_regular

    def read_and_replace(*given: Any) -> bytes:
        data = plain(*given)
        wav(path, b"\x10\x10" * 9000)
        return data

    monkeypatch.setattr(media.sound, "read_regular", read_and_replace)
    sound = read_sound(path)
    assert (sound.sha256, len(sound.wave), float(np.abs(sound.wave).max())) == (digest, 4000, 0.0)
