"""Frames become a file, and what can go wrong is asked before there are any.

.mp4 .mkv   H.264, 4:2:0, BT.709, constant quality        .webm   VP9, the same
.png        lossless: one frame a picture, more an animated PNG        .gif   256 colours a frame
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np

from wanloom.durable import atomic_path, refuse_target
from wanloom.errors import InputError, did_you_mean
from wanloom.media.pictures import PNG, Frames, png_chunks
from wanloom.runtime import machine

# ---------------------------------------------------------------- before the work


def check_output(path: str | Path, *, overwrite: bool = False, need: int = 0) -> None:
    """Say in the first second whether `path` can be written: E2017 suffix, E5001 place, E5002 exists, E5003 disk."""
    path = Path(path)
    sink_for(path)
    refuse_target(path, overwrite=overwrite)
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
            free = os.fstatvfs(probe.fileno())
    except OSError as error:
        raise InputError("E5001", f"{path}: cannot be written ({error.strerror or error}).") from error
    have = free.f_bavail * free.f_frsize
    if need > have:
        mega = 10**6
        raise InputError(
            "E5003", f"{path.parent}: the disk is too full: need {need / mega:.0f} MB, have {have / mega:.0f} MB."
        )


def try_encoder(path: str | Path, *, size: tuple[int, int], fps: Rate, quality: int) -> None:
    """Encode two frames of this size with the settings of `path`, in memory.  Error: E8004, naming the encoder."""
    path = Path(path)
    ramp = np.linspace(0, 255, size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    sink = sink_for(path)(io.BytesIO(), fps, quality, "{}")
    for frame in (ramp, ramp[::-1]):
        sink.write(np.ascontiguousarray(frame))
    sink.close()


# ---------------------------------------------------------------- videos out


class Sink(Protocol):
    """Something that takes frames [H, W, 3] uint8 of one size and makes a file."""

    def write(self, frame: Frames) -> None: ...
    def close(self) -> None: ...


Target = Path | BinaryIO
Rate = int | Fraction  # frames a second


class VideoWriter:
    """Write frames to `path` as they come; the suffix chooses the format.

        with VideoWriter(path, fps=16, quality=8, comment=plan.to_json()) as video:
            video.write(frames)          # [n, H, W, 3] uint8, any number of times

    quality 0..10 is the official scale: 8 is H.264 with a rate factor of 10, 10 is visually lossless.  An odd side is
    padded by one repeated row or column where the format needs even ones.  The file is complete when the block ends
    without an error; use `save_video` to make that atomic.  Errors: E2017 for a suffix, E8004 for a missing encoder.
    """

    def __init__(self, path: str | Path, *, fps: Rate, quality: int = 8, comment: str = "") -> None:
        self.frames = 0
        self._sink = sink_for(Path(path))(Path(path), fps, quality, comment)

    def write(self, frames: Frames) -> None:
        """Append frames [n, H, W, 3] uint8 (or one, [H, W, 3])."""
        for frame in frames if frames.ndim == 4 else frames[None]:
            self._sink.write(np.ascontiguousarray(frame))
            self.frames += 1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._sink.close()
            return
        with suppress(OSError, ValueError, InputError):  # the first error is the one to hear about
            self._sink.close()


def save_video(
    path: str | Path,
    frames: Frames | Iterable[Frames],
    *,
    fps: Rate,
    quality: int = 8,
    comment: str = "",
    overwrite: bool = False,
) -> int:
    """Write a whole video under its final name, complete or not at all; the number of frames.

    frames: [F, H, W, 3] uint8, or pieces of it.  Errors: those of `VideoWriter` and of `durable.atomic_path`.
    """
    pieces: Iterable[Frames] = (frames,) if isinstance(frames, np.ndarray) else frames
    with atomic_path(path, overwrite=overwrite) as temporary:
        with VideoWriter(temporary, fps=fps, quality=quality, comment=comment) as video:
            for piece in pieces:
                video.write(piece)
        return video.frames


@dataclass(frozen=True)
class Codec:
    """A container and a codec of FFmpeg's libraries; `factor(quality)` is the codec's constant rate factor."""

    container: str
    codec: str
    factor: Callable[[int], int]
    options: tuple[tuple[str, str], ...] = ()


def _x264_factor(quality: int) -> int:
    """imageio's mapping, which the official code uses; 0 would be lossless in a profile that few players know."""
    return max(1, int(51 * (1 - quality / 10)))


def _vp9_factor(quality: int) -> int:
    return max(1, int(63 * (1 - quality / 10)))


CODECS = {
    ".mp4": Codec("mp4", "libx264", _x264_factor),
    ".mkv": Codec("matroska", "libx264", _x264_factor),
    ".webm": Codec("webm", "libvpx-vp9", _vp9_factor, (("b", "0"), ("row-mt", "1"), ("cpu-used", "2"))),
}


def _same_bytes(codec: str) -> dict[str, str]:
    """What a codec needs to make the same file of the same frames in every process.

    With AVX-512 x264 (build 165) reads memory that it never wrote when it looks ahead (mb-tree), and what lies there
    decides the bytes; without mb-tree files would be a quarter larger.
    """
    return {"x264-params": "asm=avx2"} if codec == "libx264" and "AVX-512" in machine.cpu().features else {}


class CodecSink:
    """H.264 or VP9 in a container, by PyAV."""

    def __init__(self, codec: Codec, target: Target, fps: Rate, quality: int, comment: str) -> None:
        self._codec, self._target, self._comment = codec, target, comment
        self._fps, self._factor = fps, str(codec.factor(quality))
        self._container: Any = None
        self._stream: Any = None

    def write(self, frame: Frames) -> None:
        frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
        with _encoder_errors(self._codec.codec):
            import av
            from av.video.reformatter import ColorRange, Colorspace, Interpolation

            if self._container is None:
                self._open(frame.shape[1], frame.shape[0])
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                # swscale's fast default is off by up to 3 of 255
                interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
            )
            for packet in self._stream.encode(picture):
                self._container.mux(packet)

    def close(self) -> None:
        if self._container is None:
            return
        with _encoder_errors(self._codec.codec):
            for packet in self._stream.encode(None):
                self._container.mux(packet)
            self._container.close()

    def _open(self, width: int, height: int) -> None:
        import av

        to_file = isinstance(self._target, Path)
        # the index first, so that a browser shows the video while it loads
        faststart = {"movflags": "faststart"} if to_file and self._codec.container == "mp4" else {}
        # Matroska and WebM get a random number otherwise.
        same = {} if self._codec.container == "mp4" else {"fflags": "+bitexact"}
        target = str(self._target) if to_file else self._target
        self._container = av.open(target, "w", format=self._codec.container, options=faststart | same)
        if self._comment:
            self._container.metadata["comment"] = self._comment
        options = {"crf": self._factor, **dict(self._codec.options), **_same_bytes(self._codec.codec)}
        self._stream = self._container.add_stream(self._codec.codec, rate=Fraction(self._fps), options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709, said so that no player guesses
        context.color_range = 1  # limited ("MPEG") range


class _encoder_errors:
    """FFmpeg's errors become E8004; the disk's stay OSError."""

    def __init__(self, codec: str) -> None:
        self.codec = codec

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, InputError):
            return
        if isinstance(error, ImportError):
            raise InputError("E8004", f"encoder: PyAV is missing ({error}). Install it: pip install av") from error
        import av

        if isinstance(error, OSError) and error.errno is not None and 0 < error.errno < 200:
            return
        if isinstance(error, av.FFmpegError | ValueError):
            raise InputError("E8004", f"encoder: {self.codec} does not work here ({str(error)[:120]}).") from error


class GifSink:
    """An animated GIF: 256 colours chosen for each frame, hundredths of a second, endless."""

    def __init__(self, target: Target, fps: Rate, quality: int, comment: str) -> None:
        self._target, self._fps, self._comment = target, fps, comment
        self._frames: list[Any] = []  # one byte a pixel

    def write(self, frame: Frames) -> None:
        from PIL import Image

        self._frames.append(Image.fromarray(frame).quantize(256, dither=Image.Dither.FLOYDSTEINBERG))

    def close(self) -> None:
        if not self._frames:
            return
        ticks = [round(100 * i / self._fps) for i in range(len(self._frames) + 1)]
        durations = [10 * max(2, b - a) for a, b in pairwise(ticks)]  # browsers slow down below 2
        first, rest = self._frames[0], self._frames[1:]
        comment = {"comment": self._comment.encode()} if self._comment else {}
        first.save(
            self._target,
            "GIF",
            save_all=True,
            append_images=rest,
            duration=durations,
            loop=0,
            optimize=False,
            **comment,
        )


class PngSink:
    """A PNG, or an animated PNG when more frames follow: lossless, and memory does not grow with the frames."""

    def __init__(self, target: Target, fps: Rate, quality: int, comment: str) -> None:
        self._fps, self._comment = Fraction(fps).limit_denominator(2000), comment
        self._file: BinaryIO = target.open("wb") if isinstance(target, Path) else target
        self._owned = isinstance(target, Path)
        self._first: list[tuple[bytes, bytes]] = []  # chunks of the first frame, until it is known if another follows
        self._size = b""
        self._frames = self._pieces = 0
        self._control = 0  # where the number of frames is written in the end

    def write(self, frame: Frames) -> None:
        from PIL import Image

        packed = io.BytesIO()
        Image.fromarray(frame).save(packed, "PNG")
        chunks = list(png_chunks(packed.getvalue()))
        self._frames += 1
        if self._frames == 1:
            self._size = struct.pack(">II", frame.shape[1], frame.shape[0])
            self._first = chunks
            return
        if self._frames == 2:
            self._begin(animated=True)
        self._frame_control()
        for body in _pixels(chunks):
            self._chunk(b"fdAT", struct.pack(">I", self._pieces) + body)
            self._pieces += 1

    def close(self) -> None:
        try:
            if self._frames == 1:
                self._begin(animated=False)
            if self._frames:
                self._chunk(b"IEND", b"")
            if self._control:
                self._file.seek(self._control)
                self._chunk(b"acTL", struct.pack(">II", self._frames, 0))
            self._file.flush()
        finally:
            if self._owned:
                self._file.close()

    def _begin(self, *, animated: bool) -> None:
        """Everything up to the pixels of the first frame, and these."""
        self._file.write(PNG)
        self._chunk(*self._first[0])
        if self._comment:  # iTXt: keyword, not compressed, no language, no translation, UTF-8
            self._chunk(b"iTXt", b"Comment\0\0\0\0\0" + self._comment.encode())
        if animated:
            self._control = self._file.tell()
            self._chunk(b"acTL", struct.pack(">II", 0, 0))
            self._frame_control()
        for body in _pixels(self._first):
            self._chunk(b"IDAT", body)

    def _frame_control(self) -> None:
        at, rate = struct.pack(">II", 0, 0), struct.pack(">HHBB", self._fps.denominator, self._fps.numerator, 0, 0)
        self._chunk(b"fcTL", struct.pack(">I", self._pieces) + self._size + at + rate)
        self._pieces += 1

    def _chunk(self, kind: bytes, body: bytes) -> None:
        check = zlib.crc32(body, zlib.crc32(kind))
        self._file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check))


def _pixels(chunks: list[tuple[bytes, bytes]]) -> list[bytes]:
    return [body for kind, body in chunks if kind == b"IDAT"]


def _codec_sink(suffix: str) -> Callable[[Target, Rate, int, str], Sink]:
    return lambda target, fps, quality, comment: CodecSink(CODECS[suffix], target, fps, quality, comment)


SINKS: dict[str, Callable[[Target, Rate, int, str], Sink]] = {
    **{suffix: _codec_sink(suffix) for suffix in CODECS},
    ".gif": GifSink,
    ".png": PngSink,
}


def sink_for(path: Path) -> Callable[[Target, Rate, int, str], Sink]:
    """What writes files with this suffix.  Error: E2017."""
    try:
        return SINKS[path.suffix.lower()]
    except KeyError:
        raise InputError(
            "E2017", f"out: '{path.name}': the suffix is not known. {did_you_mean(path.suffix, SINKS)}"
        ) from None
