"""Videos come back: their frames, and the text they carry."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from wanloom.errors import InputError
from wanloom.media.pictures import DAMAGE, MAX_PIXELS, PNG, Frames, read_regular

MAX_VIDEO_BYTES = 4 * 2**30  # of the file, and of its frames unpacked


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
