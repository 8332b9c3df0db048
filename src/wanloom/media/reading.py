"""Videos come in: their frames, at the rate that is wanted, and the text they carry.

Files of strangers: the container is told by its first bytes and nothing but these bytes is ever opened; a first look
through the packets finds size, rate and length before much is decoded; damage is an error and not a grey frame.

Limits (E3010): 4 GiB of file and of frames held at once, 20 000 frames, 8192 pixels a side, 16 million pixels a
frame, 50 thousand million pixels in all frames together (6000 frames of 3840x2160).
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from wanloom.errors import InputError
from wanloom.media.pictures import DAMAGE, PNG, Frames, read_regular

MAX_VIDEO_BYTES = 4 * 2**30  # of the file, and of its frames unpacked
MAX_FRAMES = 20_000
MAX_SIDE = 8192
MAX_FRAME_PIXELS = 16_777_216
MAX_DECODED = 50 * 10**9  # pixels
MAX_RATE = 240  # frames a second, what telephones film in slow motion

ANIMATIONS = ("PNG", "GIF")  # Pillow's
DECODERS = ("av1", "h264", "hevc", "libdav1d", "mpeg4", "vp8", "vp9")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Clip:
    """A video that was read: frames [n, H, W, 3] uint8, how fast they follow, and what file they are from.

    fps: of `frames`.  rate: of the file.  duration: of the file, in seconds.  `frames, fps = clip` works too.
    """

    frames: Frames
    fps: Fraction
    rate: Fraction
    duration: float
    name: str
    sha256: str

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.frames.shape[2], self.frames.shape[1]

    def __getitem__(self, index: int) -> Frames | Fraction:
        return (self.frames, self.fps)[index]


def read_video(path: str | Path, role: str = "video", *, fps: int | None = None, limit: int | None = None) -> Clip:
    """The frames of a video file, all or the first `limit`, at `fps` or as they are.  Errors: as `VideoReader`."""
    with VideoReader(path, role, fps=fps, limit=limit) as video:
        width, height = video.size
        if 3 * width * height * video.count > MAX_VIDEO_BYTES:
            raise InputError("E3010", f"{video.label}: more than {MAX_VIDEO_BYTES} bytes of frames.")
        return Clip(np.stack(list(video)), video.fps, video.rate, video.duration, video.name, video.sha256)


class VideoReader:
    """The frames of a stranger's video one after the other, [H, W, 3] uint8, upright; only one is held.

        with VideoReader(path, "driving video", fps=16) as video:
            for frame in video: ...

    fps=None gives every frame of the file once.  Otherwise frame i is the one whose timestamp is nearest to i/fps
    after the first timestamp (of two equally near ones the earlier), and there are duration * fps of them, rounded,
    at least one; a repeated frame is the same array.  MP4, MOV, MKV, WebM, GIF, animated PNG; one picture is a video of
    one frame with rate 0.

    size: (width, height).  rate: of the file, measured where its header has it wrong.  fps: of what comes.  duration:
    of the file, in seconds.  count: how many frames come.  sha256: of the bytes that are decoded.

    Errors, all naming `role`: E3001 to E3003 and E3006 for the file, E3004 another format, E3009 damaged, cut off or
    encrypted, E3010 beyond the limits, E3011 no video in it or several, E3012 no usable timestamps or more than 240
    frames a second, E3013 the size changes on the way, E3014 an uncommon codec.  What can be told from the packets is
    said at once; E3009, E3012 and E3013 may also come with a later frame.
    """

    def __init__(
        self, path: str | Path, role: str = "video", *, fps: int | None = None, limit: int | None = None
    ) -> None:
        path = Path(path)
        data = read_regular(path, role, MAX_VIDEO_BYTES)
        self.name, self.label = path.name, f"{role}: {path.name}"
        self.sha256 = hashlib.sha256(data).hexdigest()
        source: Any = _Animation if _kind_of(data, self.label) in ANIMATIONS else _Film
        self._source: _Source = source(data, self.label)
        self.size, self.rate = self._source.size, self._source.rate
        self.duration = float(self._source.duration)
        self.fps = self.rate if fps is None else Fraction(fps)
        self._all = self._source.frames if fps is None else max(1, int(self._source.duration * fps + Fraction(1, 2)))
        if self._all > MAX_FRAMES:
            raise _too_many(self.label)
        self._resampled, self._limit = fps is not None, limit
        self.count = self._all if limit is None else min(limit, self._all)
        self._running: Any = None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None:
            self._running.close()

    def __iter__(self) -> Iterator[Frames]:
        self._running = self._pixels()
        return self._running  # type: ignore[no-any-return]

    def _pixels(self) -> Iterator[Frames]:
        timed = self._source.decoded()
        chosen = nearest(timed, self.fps, self._all) if self._resampled else (frame for _, frame in timed)
        last: Any = None
        pixels = np.zeros(0, np.uint8)
        for frame in islice(chosen, self._limit):
            if frame is not last:
                last, pixels = frame, self._source.pixels(frame)
            yield pixels


def nearest(timed: Iterable[tuple[Fraction, Item]], fps: Fraction, count: int) -> Iterator[Item]:
    """For each i < count the item whose time is nearest to i/fps, the earlier of two equally near; times must rise."""
    made, before = 0, Fraction(0)
    held: list[Item] = []
    for time, item in timed:
        while held and made < count and made / fps <= (before + time) / 2:
            yield held[0]
            made += 1
        before, held = time, [item]
    while held and made < count:
        yield held[0]
        made += 1


def read_comment(path: str | Path) -> str:
    """The text in the file's comment tag (the Plan, in our videos); "" when there is none.

    Errors: E3001 to E3003 for the file, E3004 for another format, E3009 when it is damaged.
    """
    path = Path(path)
    data, name = read_regular(path, "video", MAX_VIDEO_BYTES), f"video: {path.name}"
    kind = _kind_of(data, name)
    if kind not in ANIMATIONS:
        with open_video(data, name) as container:
            return comment_of(container)
    with _open_animation(data, name) as image, _damage(name):
        if kind == "GIF":
            comment: bytes = image.info.get("comment", b"")
            return comment.decode()
        return str(image.info.get("Comment", ""))


# ---------------------------------------------------------------- what all containers share


def _kind_of(data: bytes, name: str) -> str:
    """FFmpeg's demuxer or Pillow's format by the first bytes: it is forced, a playlist would be followed elsewhere."""
    if data[4:8] == b"ftyp":
        return "mov"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if data.startswith(PNG):
        return "PNG"
    if data.startswith(b"GIF8"):
        return "GIF"
    raise InputError("E3004", f"{name}: unsupported format; expected MP4, MKV, WebM, GIF or PNG.")


def _check_whole(data: bytes, name: str) -> None:
    """E3009 for a file that ends before its boxes or its segment do; FFmpeg would end there in silence."""
    end = 0
    if data[4:8] == b"ftyp":
        boxes = _boxes(data)
        end = max((after for kind, after in boxes if kind in (b"moov", b"mdat", b"moof")), default=0)
    else:
        header, at = _vint(data, 4)
        if header is not None and data[at + header : at + header + 4] == b"\x18\x53\x80\x67":
            size, at = _vint(data, at + header + 4)
            end = at + (size or 0)
    if end > len(data):
        raise InputError("E3009", f"{name}: damaged video ({end - len(data)} bytes are missing at its end).")


def _boxes(data: bytes) -> Iterator[tuple[bytes, int]]:
    """(type, place after it) of the outermost boxes of an MP4 (ISO 14496-12, 4.2)."""
    at = 0
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:  # 0: to the end of the file
            return
        at += size
        yield kind, at


def _vint(data: bytes, at: int) -> tuple[int | None, int]:
    """An EBML length (RFC 8794) and the place after it; None for "unknown", as live recordings have it."""
    first = data[at] if at < len(data) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(data[at : at + length], "big") & (1 << 7 * length) - 1
    return (None if length > 8 or value == (1 << 7 * length) - 1 else value), at + length


def open_video(data: bytes, name: str) -> Any:
    """A PyAV container over a video file's bytes; no other file nor address is opened.  Errors: E3004, E3009."""
    import av

    kind = _kind_of(data, name)
    if kind in ANIMATIONS:
        raise InputError("E3004", f"{name}: unsupported format; expected MP4, MKV or WebM.")
    _check_whole(data, name)
    options = {"protocol_whitelist": "", "enable_drefs": "0", "codec_whitelist": ",".join(DECODERS)}
    options["max_pixels"] = str(MAX_SIDE**2)  # of the frame that FFmpeg decodes to tell the size, which is checked then
    with _damage(name):
        return av.open(io.BytesIO(data), format=kind, options=options)


def video_stream(container: Any, name: str) -> Any:
    """The one video stream of a container, ready to be decoded.  Errors: E3009, E3010, E3011, E3014."""
    from av.stream import Disposition

    films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if len(films) != 1:
        raise InputError("E3011", f"{name}: {len(films) or 'no'} videos in it, one is expected.")
    context = films[0].codec_context
    if context is None:
        raise InputError("E3009", f"{name}: damaged video (its codec is not known).")
    if context.name not in DECODERS:
        raise InputError("E3014", f"{name}: the codec {context.name} is not read. Save it as H.264.")
    _check_size((context.width, context.height), 1, name)
    # `explode`: a frame with an error in it is an error.  The pixels are checked again where a header lied.
    context.options = {"err_detect": "explode", "max_pixels": str(MAX_FRAME_PIXELS)}
    return films[0]


def comment_of(container: Any) -> str:
    """The text in a container's comment tag, whatever its case; "" when there is none."""
    return next((str(text) for key, text in container.metadata.items() if key.lower() == "comment"), "")


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """What FFmpeg and Pillow raise for damaged files becomes E3009."""
    import av

    try:
        yield
    except (av.FFmpegError, *DAMAGE) as error:
        raise InputError("E3009", f"{name}: damaged video ({str(error)[:80] or type(error).__name__}).") from None


def _too_many(name: str) -> InputError:
    return InputError("E3010", f"{name}: more than {MAX_FRAMES} frames. Cut it.")


def _check_size(size: tuple[int, int], frames: int, name: str) -> None:
    if max(size) > MAX_SIDE or size[0] * size[1] > MAX_FRAME_PIXELS:
        most = f"{MAX_SIDE} a side and {MAX_FRAME_PIXELS // 10**6} million in all"
        raise InputError("E3010", f"{name}: {size[0]}x{size[1]} is too large, at most {most}. Scale it down.")
    if size[0] * size[1] * frames > MAX_DECODED:
        raise InputError(
            "E3010", f"{name}: {frames} frames of {size[0]}x{size[1]} are too much. Scale it down or cut it."
        )


class _Source(Protocol):
    """A video that was looked through; `decoded` gives (time since the first, frame), `pixels` makes [H, W, 3]."""

    size: tuple[int, int]
    rate: Fraction
    duration: Fraction
    frames: int

    def decoded(self) -> Iterator[tuple[Fraction, Any]]: ...
    def pixels(self, frame: Any) -> Frames: ...


# ---------------------------------------------------------------- FFmpeg's containers


class _Film:
    """The one video stream of a container."""

    def __init__(self, data: bytes, name: str) -> None:
        self._data, self._name = data, name
        self._reformatter: Any = None
        with open_video(data, name) as container, _damage(name):
            stream = video_stream(container, self._name)
            moments, first = self._look_through(container, stream)
            self._turns = round((first.rotation or 0) / 90) % 4
            self._coded = (first.width, first.height)
            _check_size(self._coded, len(moments), name)
            self._measure(moments, stream)
        self.size = self._coded[::-1] if self._turns % 2 else self._coded

    def _look_through(self, container: Any, stream: Any) -> tuple[list[tuple[int, int]], Any]:
        """(timestamp, duration) of every packet that is shown, in ticks, and the first frame."""
        moments, packets, first = [], 0, None
        for packet in container.demux(stream):
            if not packet.size:
                continue
            packets += 1
            if packets > MAX_FRAMES:
                raise _too_many(self._name)
            self._check_packet(packet)
            if not packet.is_discard:
                moments.append((packet.pts, packet.duration or 0))
            first = first or next(iter(packet.decode()), None)
        first = first or next(iter(stream.decode(None)), None)
        if first is None or not moments:
            raise self._nothing()
        return sorted(moments), first

    def _check_packet(self, packet: Any) -> None:
        if packet.has_sidedata("encryption_info"):
            raise InputError("E3009", f"{self._name}: encrypted video. Use a copy without protection.")
        if packet.is_corrupt:
            raise InputError("E3009", f"{self._name}: damaged video (a frame is cut off).")
        if packet.pts is None:
            raise InputError("E3012", f"{self._name}: no usable timestamps. Save it again.")

    def _nothing(self) -> InputError:
        if b"alis\0\0\0\0" in self._data:
            return InputError("E3004", f"{self._name}: its video lies in another file. Save it as one file.")
        return InputError("E3009", f"{self._name}: damaged video (no frame in it).")

    def _measure(self, moments: list[tuple[int, int]], stream: Any) -> None:
        """Start, duration, number, rate; the header's rate counts when it is within 2 % of what the timestamps say."""
        header = Fraction(stream.average_rate or 0)
        tick = Fraction(stream.time_base)
        (start, _), (last, length) = moments[0], moments[-1]
        if not length and len(moments) > 1:
            length = last - moments[-2][0]
        self._start, self.frames = start * tick, len(moments)
        self.duration = (last - start + length) * tick or (1 / header if header else Fraction(0))
        measured = self.frames / self.duration if self.duration else Fraction(0)
        self.rate = header if abs(header - measured) <= measured / 50 else measured
        if not 0 < self.rate <= MAX_RATE:
            told = f"{float(self.rate):.6g} frames a second, at most {MAX_RATE} are read"
            raise InputError("E3012", f"{self._name}: {told if self.rate else 'no usable timestamps'}. Save it again.")

    def decoded(self) -> Iterator[tuple[Fraction, Any]]:
        time, any_frame = Fraction(0), False
        with open_video(self._data, self._name) as container, _damage(self._name):
            for frame in container.decode(video_stream(container, self._name)):
                if frame.is_corrupt:
                    raise InputError("E3009", f"{self._name}: damaged video (frame at {float(time):.2f} s).")
                if (frame.width, frame.height) != self._coded:
                    was, now = (f"{w}x{h}" for w, h in (self._coded, (frame.width, frame.height)))
                    raise InputError("E3013", f"{self._name}: the size changes from {was} to {now} on the way.")
                before, time = time, self._time(frame)
                if time < before and any_frame:
                    raise InputError("E3012", f"{self._name}: its timestamps run backwards. Save it again.")
                any_frame = True
                yield time, frame
        if not any_frame:
            raise self._nothing()

    def _time(self, frame: Any) -> Fraction:
        if frame.pts is None:
            raise InputError("E3012", f"{self._name}: no usable timestamps. Save it again.")
        return Fraction(frame.pts * frame.time_base) - self._start

    def pixels(self, frame: Any) -> Frames:
        from av.video.reformatter import Interpolation, VideoReformatter

        best = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        self._reformatter = self._reformatter or VideoReformatter()
        with _damage(self._name):
            pixels: Frames = self._reformatter.reformat(frame, format="rgb24", interpolation=best).to_ndarray()
        return np.ascontiguousarray(np.rot90(pixels, self._turns))


# ---------------------------------------------------------------- Pillow's animations


class _Animation:
    """A GIF or an animated PNG."""

    def __init__(self, data: bytes, name: str) -> None:
        self._data, self._name = data, name
        with _open_animation(data, name) as image, _damage(name):
            self.size = image.size
            _check_size(self.size, 1, name)
            self.frames = int(getattr(image, "n_frames", 1))
            if self.frames > MAX_FRAMES:
                raise _too_many(name)
            _check_size(self.size, self.frames, name)
            self._lengths = [_shown(image, number) for number in range(self.frames)]
        self.duration = sum(self._lengths, Fraction(0))
        self.rate = self.frames / self.duration if self.duration else Fraction(0)
        if self.rate > MAX_RATE or (not self.rate and self.frames > 1):
            raise InputError("E3012", f"{name}: no usable timestamps. Save it again.")

    def decoded(self) -> Iterator[tuple[Fraction, Any]]:
        time = Fraction(0)
        with _open_animation(self._data, self._name) as image:
            for number, length in enumerate(self._lengths):
                with _damage(self._name):
                    image.seek(number)
                    frame = image.convert("RGB")
                yield time, frame
                time += length

    def pixels(self, frame: Any) -> Frames:
        return np.array(frame)


def _open_animation(data: bytes, name: str) -> AbstractContextManager[Any]:
    from PIL import Image

    with _damage(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks about odd metadata; the limits are ours
        try:
            return Image.open(io.BytesIO(data), formats=ANIMATIONS)
        except Image.DecompressionBombError:
            raise InputError("E3010", f"{name}: too large, at most {MAX_SIDE} a side. Scale it down.") from None


def _shown(image: Any, number: int) -> Fraction:
    """How long a frame is shown, in seconds."""
    image.seek(number)
    return Fraction(image.info.get("duration", 0)).limit_denominator(10**6) / 1000
