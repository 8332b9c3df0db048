"""The driving video: which frames at which rate, upright, never more than asked."""

from __future__ import annotations

import struct
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import walker

from wanloom.errors import InputError
from wanloom.preprocess.driving import choose, open_driving


def numbered(count: int, size=(64, 48)) -> np.ndarray:
    """Frames whose brightness says their number."""
    frames = np.zeros((count, size[1], size[0], 3), np.uint8)
    return frames + (10 * np.arange(count, dtype=np.uint8) + 5)[:, None, None, None]


def numbers(driving) -> list[int]:
    return [round((float(frame.mean()) - 5) / 10) for frame in driving]


@pytest.mark.parametrize(
    ("source", "wanted", "frames"),
    [
        (60, 30, [0, 2, 4, 6, 8, 10]),
        (25, 30, [0, 1, 2, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11]),  # 2.5 and 7.5: the earlier one
        (24, 30, [0, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 10, 11]),
        (30, 30, list(range(12))),
    ],
)
def test_frames_are_chosen_by_the_nearest_time(source, wanted, frames):
    chosen = choose([Fraction(i, source) for i in range(12)], 12 / source, Fraction(wanted))
    assert list(chosen) == frames
    exact = np.arange(int(12 / source * wanted)) / wanted * source
    assert np.abs(np.array(chosen) - exact).max() <= 0.5


def test_uneven_times_are_followed():
    moments = [Fraction(i, 10) for i in (0, 1, 2, 9, 10)]  # nothing new for a while
    assert choose(moments, 1.1, Fraction(10)) == (0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4)


def test_a_video_is_read_at_the_rate_that_is_wanted(tmp_path):
    path = walker.write_video(tmp_path / "v.mp4", numbered(12), fps=24)
    own = open_driving(path, "video")
    assert (own.fps, len(own), own.total, own.size) == (24, 12, 12, (64, 48))
    assert numbers(own) == list(range(12))
    assert numbers(own) == list(range(12)), "it can be read again"
    half = open_driving(path, "video", 12.0)
    assert (half.fps, numbers(half)) == (12, [0, 2, 4, 6, 8, 10])


def test_a_rate_that_is_no_whole_number_stays_exact(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(30000, 1001))
        stream.width, stream.height = 64, 48
        for frame in numbered(6):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    assert open_driving(tmp_path / "v.mp4", "video").fps == Fraction(30000, 1001)


def test_webm_is_read_too(tmp_path):
    path = walker.write_video(tmp_path / "v.webm", numbered(5))
    assert numbers(open_driving(path, "video")) == list(range(5))


def test_a_video_filmed_sideways_is_turned(tmp_path):
    """A quarter turn in the track's matrix, as phones write it."""
    frames = np.zeros((3, 48, 64, 3), np.uint8)
    frames[:, :, :16] = (250, 20, 20)  # red on the left
    path = walker.write_video(tmp_path / "v.mp4", frames)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(data)
    driving = open_driving(path, "video")
    assert driving.size == (48, 64)
    frame = next(iter(driving))
    assert frame.shape == (64, 48, 3)
    assert frame[4, 24, 0] > 200  # clockwise: what was on the left is on top
    assert frame[60, 24, 0] < 60


def test_the_first_time_and_the_sound_are_known(tmp_path):
    silent = open_driving(walker.write_video(tmp_path / "a.mp4", numbered(4)), "video")
    loud = open_driving(walker.write_with_sound(tmp_path / "b.mp4", numbered(10)), "video")
    assert (silent.has_sound, loud.has_sound) == (False, True)
    assert silent.start == loud.start == 0


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (None, "E3001"),
        (b"", "E3003"),
        (b"#EXTM3U\nhttp://example.invalid/x.ts\n", "E3004"),
        (b"\0\0\0\x18ftypmp42 and then nothing", "E3009"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, data, code):
    if data is not None:
        (tmp_path / "v.mp4").write_bytes(data)
    with pytest.raises(InputError) as caught:
        open_driving(tmp_path / "v.mp4", "video")
    assert caught.value.code == code
    assert caught.value.message.startswith("video: ")


def test_a_sound_without_a_picture_is_refused(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=44100, layout="mono")
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 44100
        out.mux([*stream.encode(tone), *stream.encode(None)])
    with pytest.raises(InputError) as caught:
        open_driving(tmp_path / "v.mp4", "video")
    assert caught.value.code == "E3011"


def test_a_video_that_ends_a_little_early_keeps_its_last_frame_and_a_stump_is_refused(tmp_path):
    path = walker.write_video(tmp_path / "v.mp4", numbered(10))
    driving = open_driving(path, "video")
    short = replace(driving, total=11, chosen=tuple(range(11)))
    assert numbers(short) == [*range(10), 9]
    stump = replace(driving, total=40, chosen=tuple(range(40)))
    with pytest.raises(InputError, match="ends after 10 of 40 frames") as caught:
        list(stump)
    assert caught.value.code == "E3009"


def test_a_rate_beyond_all_measure_is_refused(tmp_path):
    path = walker.write_video(tmp_path / "v.mp4", numbered(4), fps=500)
    with pytest.raises(InputError) as caught:
        open_driving(path, "video")
    assert caught.value.code == "E3012"
