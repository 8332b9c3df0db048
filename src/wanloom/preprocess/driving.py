"""The driving video at the rate that is wanted, and which frames of its file those are.

Points and masks are given for every frame of the file; `chosen` picks theirs by the same rule.  Frames are decoded as
they are asked for, by `media.VideoReader`; never more than one is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from wanloom.errors import InputError
from wanloom.media import Frames, VideoReader, read_regular
from wanloom.media.reading import MAX_VIDEO_BYTES, nearest, open_video, video_stream
from wanloom.preprocess.crops import Size

RATES = (1, 120)  # frames per second


@dataclass(frozen=True)
class Driving:
    """A video that was opened: iterating decodes it and gives the frames [H, W, 3] uint8 that were chosen."""

    path: Path
    role: str
    size: Size  # of an upright frame
    total: int  # frames in the file
    fps: Fraction  # of what iterating gives
    chosen: tuple[int, ...]  # for each frame that iterating gives, its index in the file
    start: Fraction  # when the first frame is shown, in seconds of the file
    has_sound: bool

    @property
    def label(self) -> str:
        """'video: dance.mp4'"""
        return f"{self.role}: {self.path.name}"

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Frames]:
        """Errors: those of `VideoReader`, and E3009 when far fewer frames come than the file announced."""
        with VideoReader(self.path, self.role) as video:
            frames, at = iter(video), -1
            last: Frames | None = None
            for index in self.chosen:
                while at < index and (frame := next(frames, None)) is not None:
                    last, at = frame, at + 1
                # A few frames less than announced is how cut videos end; the last one stays.
                if last is None or index - at > max(1, self.total // 20):
                    ends = f"ends after {at + 1} of {self.total} frames"
                    raise InputError("E3009", f"{self.label}: damaged video ({ends}).")
                yield last


def open_driving(path: Path, role: str, fps: float | None = None) -> Driving:
    """A video to be read at `fps` frames per second; None keeps its own rate.  Errors: those of `VideoReader`."""
    with VideoReader(path, role) as video:
        label, size, rate, duration = video.label, video.size, video.rate, video.duration
    with open_video(read_regular(path, role, MAX_VIDEO_BYTES), label) as container:
        stream = video_stream(container, label)
        has_sound, tick = bool(container.streams.audio), Fraction(stream.time_base)
        packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
        moments = sorted(packet.pts * tick for packet in packets)
    start, chosen = moments[0], tuple(range(len(moments)))
    if fps is not None:
        rate = Fraction(fps).limit_denominator(1001)
        chosen = choose([moment - start for moment in moments], duration, rate)
    return Driving(path, role, size, len(moments), rate, chosen, start, has_sound)


def choose(moments: list[Fraction], duration: float, fps: Fraction) -> tuple[int, ...]:
    """Which frame of a video (shown at `moments`, in seconds from 0) is shown at 0, 1/fps, 2/fps, ... seconds.

    The nearest one, of two equally near ones the earlier.  duration: of the video in seconds.
    """
    count = max(1, int(duration * fps + 1e-6))
    return tuple(nearest(((moment, index) for index, moment in enumerate(moments)), fps, count))
