"""Pictures in, videos out, and the Plan kept inside the file.

Reading is for files of strangers: only four formats, told by their first bytes and not by the name, only regular files
(no device, pipe or socket is waited for), sizes checked before anything is unpacked, every check of the format on.
A picture becomes RGB as the official pipelines do it (`Image.convert("RGB")`; an ICC profile is not applied), except
that the camera's rotation is obeyed, 16-bit values keep their upper half and transparency is laid over black.

Writing is for files that must not fail late: `check_output` and `try_encoder` ask everything that can be asked before
the work, frames are streamed, and `save_video` publishes a file complete or not at all.

    .mp4 .mkv   H.264, 4:2:0, BT.709, constant quality        .webm   VP9, the same
    .png        lossless: one frame a picture, more an animated PNG        .gif   256 colours a frame
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from wanloom.durable import atomic_path, refuse_target
from wanloom.errors import InputError, did_you_mean

Frames = NDArray[np.uint8]  # [F, H, W, 3], or [H, W, 3] for one picture

MAX_PIXELS = 40_000_000
MAX_FILE = 256 * 2**20
MIN_SIDE = 16
MAX_ASPECT = 10  # longer side : shorter side
SPARE = 16 * 2**20  # bytes a file may hold beside its pixels (profiles, thumbnails, texts)
MAX_VIDEO_BYTES = 4 * 2**30  # decoded, for read_video

PNG = b"\x89PNG\r\n\x1a\n"
SIGNATURES = ((PNG, "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"), (b"RIFF", "WEBP"))

# What Pillow raises for damaged files, beside its own OSError.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, struct.error, zlib.error,
          MemoryError, RuntimeError)  # fmt: skip


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Picture:
    """A picture that was read: pixels [H, W, 3] uint8, its base name, the SHA-256 of its bytes, the format."""

    pixels: Frames
    name: str
    sha256: str

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]


def read_image(source: Any) -> Frames:
    """The pixels [H, W, 3] uint8 of a picture; see `read_picture`."""
    return read_picture(source).pixels


def read_picture(source: Any, role: str = "image") -> Picture:
    """A picture from a path, a PIL image or an array [H, W, 3] uint8.

    Errors, all naming `role`: E3001 not a regular file, E3002 no permission, E3003 empty, E3004 not PNG, JPEG, WebP or
    GIF, E3005 damaged, E3006 too large (40 Mpx, or a file far larger than its pixels explain), E3007 too small or too
    narrow, E3008 an animation.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        data = read_regular(path, role)
        return Picture(decode_image(data, f"{role}: {path.name}"), path.name, hashlib.sha256(data).hexdigest())
    pixels = _from_memory(source, role)
    _check_size((pixels.shape[1], pixels.shape[0]), role)
    digest = hashlib.sha256(b"%d %d " % pixels.shape[:2] + pixels.tobytes()).hexdigest()
    return Picture(pixels, "picture", digest)


def _from_memory(source: Any, role: str) -> Frames:
    from PIL import Image

    if isinstance(source, Image.Image):
        return _rgb(_upright(source))
    pixels = np.asarray(source)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise InputError("E3004", f"{role}: expected a path, a PIL image or an array [H, W, 3] uint8.")
    return pixels


def read_regular(path: Path, role: str, limit: int = MAX_FILE) -> bytes:
    """All bytes of a regular file; a pipe or a device is never waited for.  Errors: E3001 to E3003, E3006."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    except PermissionError:
        raise InputError("E3002", f"{role}: {path}: permission denied.") from None
    except FileNotFoundError:
        raise InputError("E3001", f"{role}: {path}: no such file.") from None
    except (OSError, ValueError):
        raise InputError("E3001", f"{role}: {path}: not a regular file.") from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise InputError("E3001", f"{role}: {path}: not a regular file.")
    with os.fdopen(handle, "rb") as file:
        if status.st_size > limit:
            raise InputError("E3006", f"{role}: {path.name}: {status.st_size} bytes, at most {limit}.")
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise InputError("E3005", f"{role}: {path.name}: cannot be read ({error.strerror}).") from error
    if not data:
        raise InputError("E3003", f"{role}: {path.name}: the file is empty.")
    if len(data) > limit:
        raise InputError("E3006", f"{role}: {path.name}: more than {limit} bytes.")
    return data


def decode_image(data: bytes, name: str) -> Frames:
    """The pixels [H, W, 3] uint8 of an image file's bytes.  Errors: E3004 to E3008, naming `name`."""
    from PIL import Image

    kind = _sniff(data, name)
    if kind == "WEBP":  # its decoder allocates on opening, so the size is read here
        _check_size(_webp_size(data, name), name)
    if kind == "PNG":  # Pillow checks neither the sums of all chunks nor that the last one is there
        for chunk, _ in png_chunks(data, name):
            if chunk == b"acTL":
                raise _animated(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks about odd metadata; the limits are ours
        try:
            image = Image.open(io.BytesIO(data), formats=[kind])
            _check_size(image.size, name)
            if len(data) > SPARE + 8 * image.width * image.height:
                raise _overweight(name)
            if kind != "JPEG" and getattr(image, "is_animated", False):  # a phone's JPEG may hold a depth map too
                raise _animated(name)
            image.load()
            return _rgb(_upright(image))
        except Image.DecompressionBombError:
            raise InputError("E3006", f"{name}: too large, at most {MAX_PIXELS // 10**6} Mpx.") from None
        except DAMAGE as error:
            if isinstance(error, ValueError) and re.search("too (large|much)", str(error), re.IGNORECASE):
                raise _overweight(name) from None  # texts and profiles that unpack to more than Pillow's own limits
            raise InputError("E3005", f"{name}: damaged image ({str(error)[:80] or type(error).__name__}).") from None


def _sniff(data: bytes, name: str) -> str:
    for signature, kind in SIGNATURES:
        if data.startswith(signature) and (kind != "WEBP" or data[8:12] == b"WEBP"):
            return kind
        if len(data) < len(signature) and signature.startswith(data):
            raise InputError("E3005", f"{name}: damaged image (it ends after {len(data)} bytes).")
    raise InputError("E3004", f"{name}: unsupported format; expected PNG, JPEG, WebP or GIF.")


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise InputError("E3006", f"{name}: {width}x{height} is too large, at most {MAX_PIXELS // 10**6} Mpx.")
    if min(size) < MIN_SIDE:
        raise InputError("E3007", f"{name}: {width}x{height} is too small, at least {MIN_SIDE} pixels a side.")
    if max(size) > MAX_ASPECT * min(size):
        raise InputError("E3007", f"{name}: {width}x{height} is too narrow, at most {MAX_ASPECT}:1.")


def _animated(name: str) -> InputError:
    return InputError("E3008", f"{name}: an animation, one frame expected. Save the frame you mean as a picture.")


def _overweight(name: str) -> InputError:
    return InputError("E3006", f"{name}: holds far more data than its pixels explain. Save it again without metadata.")


def png_chunks(data: bytes, name: str = "png") -> Iterator[tuple[bytes, bytes]]:
    """(type, payload) of every chunk up to IEND.  Error: E3005 for a cut file or a wrong checksum."""
    at = len(PNG)
    while True:
        head = data[at : at + 8]
        end = at + 12 + (struct.unpack(">I", head[:4])[0] if len(head) == 8 else 0)
        if len(head) < 8 or end > len(data):
            raise InputError("E3005", f"{name}: damaged image (cut off at byte {len(data)}).")
        body = data[at + 8 : end - 4]
        if zlib.crc32(body, zlib.crc32(head[4:])) != struct.unpack(">I", data[end - 4 : end])[0]:
            raise InputError("E3005", f"{name}: damaged image (a checksum at byte {at} does not match).")
        yield head[4:], body
        if head[4:] == b"IEND":
            return
        at = end


def _webp_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) in the first chunk (VP8X, VP8L or VP8) of a WebP file, RFC 9649."""
    kind, at = data[12:16], data[20:]
    if len(at) < 10:
        raise InputError("E3005", f"{name}: damaged image (cut off at byte {len(data)}).")
    if kind == b"VP8X":
        return 1 + int.from_bytes(at[4:7], "little"), 1 + int.from_bytes(at[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(at[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", at[6:10])
    return width & 0x3FFF, height & 0x3FFF


def _upright(image: Any) -> Any:
    """The picture turned as its EXIF orientation says; unreadable EXIF data says nothing."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except DAMAGE:
        return image


def _rgb(image: Any) -> Frames:
    """Any Pillow image as [H, W, 3] uint8."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would cut everything above 255
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        return np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return np.array(image.convert("RGB"))


def cover_crop(pixels: Frames, size: tuple[int, int]) -> Frames:
    """The picture scaled (Lanczos) until it covers `size` (w, h), and its centre cut out: [h, w, 3].

    The official preparation of a TI2V picture (wan/textimage2video.py).
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    image = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return np.array(image.crop((left, top, left + size[0], top + size[1])))


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


def try_encoder(path: str | Path, *, size: tuple[int, int], fps: int, quality: int) -> None:
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


class VideoWriter:
    """Write frames to `path` as they come; the suffix chooses the format.

        with VideoWriter(path, fps=16, quality=8, comment=plan.to_json()) as video:
            video.write(frames)          # [n, H, W, 3] uint8, any number of times

    quality 0..10 is the official scale: 8 is H.264 with a rate factor of 10, 10 is visually lossless.  An odd side is
    padded by one repeated row or column where the format needs even ones.  The file is complete when the block ends
    without an error; use `save_video` to make that atomic.  Errors: E2017 for a suffix, E8004 for a missing encoder.
    """

    def __init__(self, path: str | Path, *, fps: int, quality: int = 8, comment: str = "") -> None:
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
    fps: int,
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


class CodecSink:
    """H.264 or VP9 in a container, by PyAV."""

    def __init__(self, codec: Codec, target: Target, fps: int, quality: int, comment: str) -> None:
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
        target = str(self._target) if to_file else self._target
        self._container = av.open(target, "w", format=self._codec.container, options=faststart)
        if self._comment:
            self._container.metadata["comment"] = self._comment
        options = {"crf": self._factor, **dict(self._codec.options)}
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

    def __init__(self, target: Target, fps: int, quality: int, comment: str) -> None:
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

    def __init__(self, target: Target, fps: int, quality: int, comment: str) -> None:
        self._fps, self._comment = fps, comment
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
        if self._frames == 1:
            self._begin(animated=False)
        if self._frames:
            self._chunk(b"IEND", b"")
        if self._control:
            self._file.seek(self._control)
            self._chunk(b"acTL", struct.pack(">II", self._frames, 0))
        self._file.flush()
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
        at, rate = struct.pack(">II", 0, 0), struct.pack(">HHBB", 1, self._fps, 0, 0)
        self._chunk(b"fcTL", struct.pack(">I", self._pieces) + self._size + at + rate)
        self._pieces += 1

    def _chunk(self, kind: bytes, body: bytes) -> None:
        check = zlib.crc32(body, zlib.crc32(kind))
        self._file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check))


def _pixels(chunks: list[tuple[bytes, bytes]]) -> list[bytes]:
    return [body for kind, body in chunks if kind == b"IDAT"]


def _codec_sink(suffix: str) -> Callable[[Target, int, int, str], Sink]:
    return lambda target, fps, quality, comment: CodecSink(CODECS[suffix], target, fps, quality, comment)


SINKS: dict[str, Callable[[Target, int, int, str], Sink]] = {
    **{suffix: _codec_sink(suffix) for suffix in CODECS},
    ".gif": GifSink,
    ".png": PngSink,
}


def sink_for(path: Path) -> Callable[[Target, int, int, str], Sink]:
    """What writes files with this suffix.  Error: E2017."""
    try:
        return SINKS[path.suffix.lower()]
    except KeyError:
        raise InputError(
            "E2017", f"out: '{path.name}': the suffix is not known. {did_you_mean(path.suffix, SINKS)}"
        ) from None


# ---------------------------------------------------------------- videos in


# First bytes -> (Pillow's format or None, FFmpeg's demuxer).  The demuxer is forced: a playlist named .mp4 would
# otherwise be followed to other files.
def _kind_of(data: bytes, name: str) -> tuple[str | None, str]:
    if data[4:8] == b"ftyp":
        return None, "mov"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return None, "matroska"
    if data.startswith(PNG):
        return "PNG", ""
    if data.startswith(b"GIF8"):
        return "GIF", ""
    raise InputError("E3004", f"{name}: unsupported format; expected MP4, MKV, WebM, GIF or PNG.")


def read_comment(path: str | Path) -> str:
    """The text in the file's comment tag (the Plan, in our videos); "" when there is none.

    Errors: E3001 to E3003 for the file, E3004 for another format, E3009 when it is damaged.
    """
    from PIL import Image

    path = Path(path)
    data = read_regular(path, "video", MAX_VIDEO_BYTES)
    still, demuxer = _kind_of(data, path.name)
    if not still:
        with _open_video(data, demuxer, path.name) as container:
            return next((str(text) for key, text in container.metadata.items() if key.lower() == "comment"), "")
    try:
        with Image.open(io.BytesIO(data), formats=[still]) as image:
            if still == "GIF":
                comment: bytes = image.info.get("comment", b"")
                return comment.decode()
            return str(image.info.get("Comment", ""))
    except DAMAGE as error:
        raise InputError("E3009", f"{path.name}: damaged file ({str(error)[:80]}).") from None


def read_video(path: str | Path) -> tuple[Frames, float]:
    """All frames [F, H, W, 3] uint8 of a video file, and its frames per second.

    Errors: E3001 to E3004, E3009 damaged, E3010 above 4 GiB of frames, E3011 no video stream.
    """
    path = Path(path)
    data = read_regular(path, "video", MAX_VIDEO_BYTES)
    still, demuxer = _kind_of(data, path.name)
    if still:
        return _read_animation(data, still, path.name)
    import av
    from av.video.reformatter import Interpolation

    best = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    frames: list[Frames] = []
    with _open_video(data, demuxer, path.name) as container:
        if not container.streams.video:
            raise InputError("E3011", f"{path.name}: no video stream.")
        stream = container.streams.video[0]
        try:
            for frame in container.decode(stream):
                _check_total(len(frames) + 1, frame.width * frame.height, path.name)
                frames.append(frame.reformat(format="rgb24", interpolation=best).to_ndarray())
        except (av.FFmpegError, *DAMAGE) as error:
            raise InputError("E3009", f"{path.name}: damaged video ({str(error)[:80]}).") from None
        fps = float(stream.average_rate or 0)
    if not frames:
        raise InputError("E3009", f"{path.name}: damaged video (no frame in it).")
    return np.stack(frames), fps


def _open_video(data: bytes, demuxer: str, name: str) -> Any:
    import av

    try:
        # Nothing but these bytes may be opened: neither another file nor an address.
        return av.open(io.BytesIO(data), format=demuxer, options={"protocol_whitelist": "", "enable_drefs": "0"})
    except (av.FFmpegError, *DAMAGE) as error:
        raise InputError("E3009", f"{name}: damaged video ({str(error)[:80]}).") from None


def _read_animation(data: bytes, kind: str, name: str) -> tuple[Frames, float]:
    from PIL import Image, ImageSequence

    frames: list[Frames] = []
    milliseconds = 0.0
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            for frame in ImageSequence.Iterator(image):
                _check_total(len(frames) + 1, image.width * image.height, name)
                frames.append(np.array(frame.convert("RGB")))
                milliseconds += float(frame.info.get("duration", 0))
    except DAMAGE as error:
        raise InputError("E3009", f"{name}: damaged file ({str(error)[:80]}).") from None
    return np.stack(frames), 1000 * len(frames) / milliseconds if milliseconds else 0.0


def _check_total(frames: int, pixels: int, name: str) -> None:
    if pixels > MAX_PIXELS or 3 * pixels * frames > MAX_VIDEO_BYTES:
        raise InputError("E3010", f"{name}: more than {MAX_VIDEO_BYTES} bytes of frames.")
