"""A picture file becomes RGB pixels, whatever a stranger put into it.

As in the official pipelines (`Image.convert("RGB")`; an ICC profile is not applied), except that the camera's rotation
is obeyed, 16-bit values keep their upper half and transparency is laid over black.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanloom.errors import InputError

Frames = NDArray[np.uint8]  # [F, H, W, 3], or [H, W, 3] for one picture

MAX_PIXELS = 40_000_000
MAX_FILE = 256 * 2**20
MIN_SIDE = 16
MAX_ASPECT = 10  # longer side : shorter side
SPARE = 16 * 2**20  # bytes a file may hold beside its pixels (profiles, thumbnails, texts)

PNG = b"\x89PNG\r\n\x1a\n"
SIGNATURES = ((PNG, "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"), (b"RIFF", "WEBP"))

# What Pillow raises for damaged files, beside its own OSError.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, struct.error, zlib.error,
          MemoryError, RuntimeError)  # fmt: skip


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
