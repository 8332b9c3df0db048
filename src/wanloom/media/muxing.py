"""A finished video gets its sound: that of another file, or of the video it was made from.

The picture's packets are copied as they are, the text in the comment (the Plan) with them.  The sound's are copied too
where the container takes them and nothing is cut from their beginning; otherwise they are decoded, cut and encoded.
"""

from __future__ import annotations

import errno
import heapq
import io
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from wanloom.durable import atomic_path
from wanloom.errors import InputError
from wanloom.media.pictures import DAMAGE, PNG, read_regular
from wanloom.media.reading import MAX_VIDEO_BYTES, comment_of, open_video, video_stream
from wanloom.media.sound import MAX_BYTES, _demuxer, _stream

# Suffix -> codecs that are copied (beginnings of FFmpeg's names), the encoder for all others, its bits a second.
CARRIERS = {
    ".mp4": (("aac", "ac3", "alac", "eac3", "mp3"), "aac", 192_000),
    ".mkv": (("aac", "ac3", "alac", "eac3", "flac", "mp2", "mp3", "opus", "pcm_", "vorbis"), "aac", 192_000),
    ".webm": (("opus", "vorbis"), "libopus", 192_000),
}
RATES = (8000, 12000, 16000, 24000, 48000, 11025, 22050, 32000, 44100)  # of AAC; Opus has the first five


def can_carry_sound(path: str | Path) -> bool:
    """Whether a video with this suffix has a place for sound."""
    return Path(path).suffix.lower() in CARRIERS


def has_sound(path: str | Path, role: str = "video") -> bool:
    """Whether there is sound in a file.  Errors, naming `role`: E3001 to E3004, E3006, E3009."""
    path = Path(path)
    data, name = read_regular(path, role, MAX_VIDEO_BYTES), f"{role}: {path.name}"
    if data.startswith((PNG, b"GIF8")):
        return False
    with _open_sound(data, name) as container:
        return bool(container.streams.audio)


def add_sound(
    video: str | Path, sound: str | Path, out: str | Path, *, start: float = 0.0, whole: bool = False,
    overwrite: bool = True,
) -> Path:  # fmt: skip
    """Write to `out` the picture of `video` with the sound of another file, from `start` seconds on; the path.

    It ends with the shorter of the two: the sound to one frame of its codec, the picture with the last frame that
    begins before, and those it refers to (up to three with H.264).  whole=True keeps the picture to its end, after that
    of the sound.  `out` may be `video` itself; it appears complete or not at all.

    Errors: those of `VideoReader` and `read_sound` for the two files, E5001 to E5003 for the place, E5006 when the
    suffix of `out` or FFmpeg refuses.
    """
    video, sound, out = Path(video), Path(sound), Path(out)
    if not can_carry_sound(out):
        raise _failed(out, f"only {', '.join(CARRIERS)} carry sound")
    with _errors(out):
        seen = _Track(read_regular(video, "video", MAX_VIDEO_BYTES), f"video: {video.name}", open_video, video_stream)
        heard = _Track(read_regular(sound, "sound", MAX_BYTES), f"sound: {sound.name}", _open_sound, _stream)
    end = min(seen.length, heard.length - Fraction(start))
    if end <= 0:
        raise _failed(out, f"{sound.name} has {float(heard.length):.2f} s, nothing is left from {start:.2f} s on")
    with atomic_path(out, overwrite=overwrite) as temporary, _errors(out):
        _mux(seen, heard, temporary, Fraction(start), end, seen.length if whole else end)
    return out


class _Track:
    """One stream of a file in memory, opened anew for each pass; `length` in seconds, the times of its packets."""

    def __init__(self, data: bytes, name: str, opener: Any, chooser: Any) -> None:
        self.name = name
        self._data, self._open, self._choose = data, opener, chooser
        with self.opened() as (_, stream):
            packets = [(packet.pts or 0, packet.duration or 0) for packet in _packets(stream)]
            first = packets[0][0] if packets else 0
            self.begin = first if stream.start_time is None else stream.start_time  # what encoders put before is cut
            last = max((pts + duration for pts, duration in packets), default=self.begin)
            self.length = (last - self.begin) * Fraction(stream.time_base)
            self.times = [pts for pts, _ in packets]

    @contextmanager
    def opened(self) -> Iterator[tuple[Any, Any]]:
        """(container, stream)"""
        with self._open(self._data, self.name) as container:
            yield container, self._choose(container, self.name)


def _mux(seen: _Track, heard: _Track, path: Path, start: Fraction, end: Fraction, picture_end: Fraction) -> None:
    """Both tracks into a new file, from the beginning of the picture and from `start` of the sound."""
    import av

    copied, encoder, bits = CARRIERS[path.suffix.lower()]
    options = {"movflags": "faststart"} if path.suffix.lower() == ".mp4" else {}
    with seen.opened() as (film, shots), heard.opened() as (_, voice), av.open(str(path), "w", options=options) as made:
        made.metadata["comment"] = comment_of(film)
        picture = made.add_stream_from_template(shots, opaque=True)
        if start == 0 and voice.codec_context.name.startswith(copied):
            track: Any = made.add_stream_from_template(voice, opaque=True)
            sound = _copied_sound(voice, track, heard.begin, end)
        else:
            track = made.add_stream(encoder, rate=_rate(encoder, voice.rate), layout=_layout(voice))
            track.bit_rate = bits
            sound = _encoded_sound(voice, track, start, end)
        made.start_encoding()
        for packet in heapq.merge(_copied_picture(seen, shots, picture, picture_end), sound, key=_moment):
            made.mux(packet)


def _packets(stream: Any) -> Iterator[Any]:
    return (packet for packet in stream.container.demux(stream) if packet.size)


def _moment(packet: Any) -> Fraction:
    return Fraction((packet.pts if packet.dts is None else packet.dts) * packet.time_base)


def _copied_picture(seen: _Track, stream: Any, target: Any, end: Fraction) -> Iterator[Any]:
    """The packets up to the last one that is shown before `end`; the order of decoding is made anew (MKV has none)."""
    ordered = sorted(seen.times)
    delay = max(late - time for late, time in zip(ordered, seen.times, strict=True))
    ticks = end / stream.time_base + seen.begin
    keep = 1 + max(number for number, time in enumerate(seen.times) if time < ticks)
    for packet, dts in zip(_packets(stream), ordered[:keep], strict=False):
        packet.pts, packet.dts, packet.stream = packet.pts - seen.begin, dts - delay - seen.begin, target
        yield packet


def _copied_sound(stream: Any, target: Any, begin: int, end: Fraction) -> Iterator[Any]:
    ticks = end / stream.time_base
    for packet in _packets(stream):
        if packet.pts - begin >= ticks:
            return
        packet.pts, packet.dts, packet.stream = packet.pts - begin, packet.pts - begin, target
        yield packet


def _rate(encoder: str, rate: int) -> int:
    return rate if rate in (RATES if encoder == "aac" else RATES[:5]) else 48_000


def _layout(stream: Any) -> str:
    return "mono" if stream.channels == 1 else "stereo"


def _encoded_sound(stream: Any, target: Any, start: Fraction, end: Fraction) -> Iterator[Any]:
    import av

    fifo, made = av.AudioFifo(), 0
    for samples in _samples(stream, target, start, end):
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=_layout(stream))
        frame.sample_rate, frame.time_base, frame.pts = target.rate, Fraction(1, target.rate), made
        made += frame.samples
        fifo.write(frame)
        while full := fifo.read(target.frame_size):
            yield from target.encode(full)
    if rest := fifo.read(0, True):
        yield from target.encode(rest)
    yield from target.encode(None)


def _samples(stream: Any, target: Any, start: Fraction, end: Fraction) -> Iterator[Any]:
    """What lies between `start` and `start + end` seconds, in pieces [channels, n] float32 at the target's rate."""
    import av

    resampler = av.AudioResampler(format="fltp", layout=_layout(stream), rate=target.rate)
    at, first, last = 0, round(start * target.rate), round((start + end) * target.rate)
    for frame in _and_none(stream.container.decode(stream)):
        for piece in resampler.resample(frame):
            cut = piece.to_ndarray()[:, max(0, first - at) : max(0, last - at)]
            at += piece.samples
            if cut.size:
                yield np.ascontiguousarray(cut)
        if at >= last:
            return


def _and_none(frames: Iterator[Any]) -> Iterator[Any]:
    """The frames, and None, which makes a resampler give what it still holds."""
    yield from frames
    yield None


def _open_sound(data: bytes, name: str) -> Any:
    """A PyAV container over the bytes of a file with sound; nothing else is opened.  Errors: E3004, E3009, E3015."""
    import av

    demuxer = _demuxer(data, name)
    options = {"protocol_whitelist": ""} | ({"enable_drefs": "0"} if demuxer == "mov" else {})
    try:
        return av.open(io.BytesIO(data), format=demuxer, options=options)
    except (av.FFmpegError, *DAMAGE) as error:
        raise InputError("E3009", f"{name}: damaged sound ({str(error)[:80]}).") from None


@contextmanager
def _errors(out: Path) -> Iterator[None]:
    """FFmpeg's errors become E5006; a full disk stays what it is."""
    import av

    try:
        yield
    except (av.FFmpegError, *DAMAGE) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise _failed(out, str(error)[:120] or type(error).__name__) from error


def _failed(out: Path, why: str) -> InputError:
    return InputError("E5006", f"sound: could not be put into the {out.suffix} file ({why}).")
