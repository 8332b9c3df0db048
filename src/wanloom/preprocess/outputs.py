"""The folder: videos that are written as the frames come, and appear under their names together when all are whole.

src_mask.mp4 is lossless (grey, so its values survive 4:2:0, too); the others are H.264 at nearly no loss.  The sound
of the driving video goes into src_pose.mp4 as it is, so that the folder needs no other file.
"""

from __future__ import annotations

import heapq
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from wanloom.durable import atomic_path, refuse_target, sweep
from wanloom.errors import InputError, WanloomWarning
from wanloom.media import CODECS, Codec, Frames, read_regular
from wanloom.media.reading import MAX_VIDEO_BYTES, open_video
from wanloom.media.writing import CodecSink
from wanloom.preprocess.crops import Mask
from wanloom.preprocess.driving import Driving

POSE, FACE, BACKGROUND, MASK = "src_pose.mp4", "src_face.mp4", "src_bg.mp4", "src_mask.mp4"
REFERENCE, SHEET = "src_ref.png", "sheet.png"
QUALITY = 10
LOSSLESS = Codec("mp4", "libx264", lambda _quality: 0)


def names(*, replace: bool) -> tuple[str, ...]:
    """The files of a folder."""
    return (POSE, FACE, REFERENCE, *((BACKGROUND, MASK) if replace else ()), SHEET)


def check_folder(folder: Path, *, overwrite: bool, replace: bool) -> None:
    """Say before any work that the folder cannot be made: E5001 no place for it, E5002 it has such files."""
    if not folder.is_dir():
        refuse_target(folder, overwrite=False)
        return
    there = [name for name in names(replace=True) if (folder / name).exists()]
    if there and not overwrite:
        raise InputError(
            "E5002", f"{folder}: has {', '.join(there)} already. Choose another folder or give --overwrite."
        )
    for name in names(replace=replace):
        refuse_target(folder / name, overwrite=True)


class Folder:
    """Where the frames of one clip go, in order."""

    def __init__(self, sinks: dict[str, CodecSink], pictures: dict[str, Path]) -> None:
        self._sinks, self._pictures = sinks, pictures

    def write(self, name: str, frame: Frames) -> None:
        """Append a frame [H, W, 3] to one of the videos."""
        self._sinks[name].write(frame)

    def write_mask(self, mask: Mask) -> None:
        """Append a mask [H, W] as 0 and 255."""
        self._sinks[MASK].write(np.repeat(np.where(mask, np.uint8(255), np.uint8(0))[..., None], 3, 2))

    def picture(self, name: str, pixels: Frames) -> None:
        """Write one of the pictures [H, W, 3]."""
        from PIL import Image

        Image.fromarray(pixels).save(self._pictures[name], "PNG")


@contextmanager
def open_folder(path: Path, driving: Driving, *, replace: bool, overwrite: bool) -> Iterator[Folder]:
    """A folder to write to.  Its files appear when the block ends, and nothing does when it raises.

    Errors: E5001 to E5003, E8004.  Warning: W3029 when the sound does not fit into an MP4.
    """
    made = not path.is_dir()
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError("E5001", f"{path}: cannot be made ({error.strerror}).") from error
    sweep(path)
    try:
        with ExitStack() as files:
            ready = {
                name: files.enter_context(atomic_path(path / name, overwrite=overwrite))
                for name in names(replace=replace)
            }
            silent = files.enter_context(tempfile.TemporaryFile(dir=path))
            targets: dict[str, Path | BinaryIO] = {name: file for name, file in ready.items() if name.endswith(".mp4")}
            targets[POSE] = silent
            with ExitStack() as open_sinks:
                sinks = {}
                for name, target in targets.items():
                    codec = LOSSLESS if name == MASK else CODECS[".mp4"]
                    sinks[name] = open_sinks.enter_context(closing(CodecSink(codec, target, driving.fps, QUALITY, "")))
                yield Folder(sinks, ready)
            add_sound(silent, driving, ready[POSE])
    finally:
        if made:
            with suppress(OSError):  # not empty: all is well
                path.rmdir()


def add_sound(silent: BinaryIO, driving: Driving, target: Path) -> None:
    """Put a video and the sound of the driving video into one MP4; neither is cut or encoded again."""
    import av

    silent.seek(0)
    with ExitStack() as opened:
        video: Any = opened.enter_context(av.open(silent, format="mov"))
        out: Any = opened.enter_context(av.open(str(target), "w", format="mp4", options={"movflags": "faststart"}))
        sources = [_packets(video, video.streams.video[0], out, Fraction(0))]
        if driving.has_sound:
            data = read_regular(driving.path, driving.role, MAX_VIDEO_BYTES)
            sound = opened.enter_context(open_video(data, driving.label))
            stream = sound.streams.audio[0]
            codec = str(stream.codec_context.name)
            if codec in out.supported_codecs:
                sources.append(_packets(sound, stream, out, driving.start))
            else:
                text = f"W3029: sound: {codec} does not fit into {POSE} and is left out. Save the video with AAC sound."
                warnings.warn(WanloomWarning(text), stacklevel=2)
        for _, packet in heapq.merge(*sources, key=lambda item: item[0]):
            out.mux(packet)


def _packets(source: Any, stream: Any, out: Any, start: Fraction) -> Iterator[tuple[float, Any]]:
    """The packets of a stream with their times, as packets of a stream of `out` that begins at `start`."""
    made = out.add_stream_from_template(stream)
    shift = int(start / stream.time_base)

    def packets() -> Iterator[tuple[float, Any]]:
        for packet in source.demux(stream):
            if packet.dts is None or packet.pts is None:
                continue
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            if packet.pts * packet.time_base > -0.1:  # sound from before the first frame; codecs start a little early
                packet.stream = made
                yield float(packet.dts * packet.time_base), packet

    return packets()
