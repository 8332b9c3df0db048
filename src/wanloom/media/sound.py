"""Sound comes in: any file that FFmpeg's libraries read, as one channel of float32 at 16 kHz.

As librosa does it, which the reference uses: the mean of the channels, then soxr at high quality.  Files of strangers:
the container is told by its first bytes, only common codecs are decoded, and rate, channels, length and bytes are
checked while decoding and not afterwards.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanloom.errors import InputError
from wanloom.media.pictures import DAMAGE, read_regular

Wave = NDArray[np.float32]  # [n] in about [-1, 1]

RATE = 16_000  # samples a second, what wav2vec2 hears
MAX_SECONDS = 3600
MAX_RATE = 192_000
MAX_CHANNELS = 16
MAX_BYTES = 2 * 2**30  # of the file

CODECS = ("aac", "ac3", "alac", "eac3", "flac", "mp1", "mp2", "mp3", "opus", "vorbis", "wavpack", "wmav2")


@dataclass(frozen=True)
class Sound:
    """A sound that was read: its wave at 16 kHz, the file's base name and SHA-256."""

    wave: Wave
    name: str
    sha256: str

    @property
    def seconds(self) -> float:
        return len(self.wave) / RATE


def read_sound(path: str | Path, role: str = "audio") -> Sound:
    """The sound of an audio file, or of a video file.

    Errors, all naming `role`: E3001 to E3003 and E3006 for the file, E3004 another format, E3009 damaged, E3011 no
    sound in it, E3013 the rate changes on the way, E3014 an uncommon codec, E3015 shorter than its header says, E3016
    rate or channels beyond all measure, E3017 nothing in it, not finite, or longer than an hour.
    """
    path = Path(path)
    data = read_regular(path, role, MAX_BYTES)
    name = f"{role}: {path.name}"
    demuxer = _demuxer(data, name)
    wave = _mono_16k(_decoded(data, demuxer, name), name)
    return Sound(wave, path.name, hashlib.sha256(data).hexdigest())


def _demuxer(data: bytes, name: str) -> str:
    """FFmpeg's demuxer by the first bytes: it is forced, because a playlist would be followed to other files."""
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        _check_wav(data, name)
        return "wav"
    if data.startswith(b"fLaC"):
        return "flac"
    if data.startswith(b"OggS"):
        return "ogg"
    if data.startswith(b"ID3") or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0):
        return "aac" if data[:1] == b"\xff" and data[1] & 0xF6 == 0xF0 else "mp3"
    if data[4:8] == b"ftyp":
        return "mov"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    raise InputError("E3004", f"{name}: unsupported format; expected WAV, FLAC, MP3, M4A, OGG, or a video with sound.")


def _check_wav(data: bytes, name: str) -> None:
    """E3015 when the header promises more samples than the file has (0 and 2^32-1 mean: until the end)."""
    at = 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        if kind == b"data":
            if size not in (0, 0xFFFFFFFF) and at + 8 + size > len(data):
                have = len(data) - at - 8
                raise InputError("E3015", f"{name}: its header promises {size} bytes of sound, it has {have}.")
            return
        at += 8 + size + size % 2


def _decoded(data: bytes, demuxer: str, name: str) -> Iterator[tuple[int, Wave]]:
    """(rate, samples of one channel) piece by piece."""
    import io

    import av

    options = {"protocol_whitelist": "", "enable_drefs": "0"} if demuxer == "mov" else {"protocol_whitelist": ""}
    try:
        container: Any
        with av.open(io.BytesIO(data), format=demuxer, options=options) as container:
            stream = _stream(container, name)
            to_float = av.AudioResampler(format="flt")  # one plane: PyAV 18 reads beyond the planes of 8 channels
            for frame in container.decode(stream):
                yield from _pieces(to_float, frame)
            yield from _pieces(to_float, None)
    except (av.FFmpegError, *DAMAGE) as error:
        raise InputError("E3009", f"{name}: damaged sound ({str(error)[:80]}).") from None


def _stream(container: Any, name: str) -> Any:
    if not container.streams.audio:
        raise InputError("E3011", f"{name}: no sound in it.")
    stream = container.streams.audio[0]
    codec = str(stream.codec_context.name)
    if not codec.startswith(("pcm_", *CODECS)):
        raise InputError("E3014", f"{name}: the codec {codec} is not read. Use WAV, FLAC, MP3, AAC, Opus or Vorbis.")
    rate, channels = int(stream.rate or 0), int(stream.channels or 0)
    if not 1 <= rate <= MAX_RATE or not 1 <= channels <= MAX_CHANNELS:
        limits = f"at most {MAX_RATE} and {MAX_CHANNELS}"
        raise InputError("E3016", f"{name}: {channels} channels of {rate} samples a second, {limits} are read.")
    return stream


def _pieces(to_float: Any, frame: Any) -> Iterator[tuple[int, Wave]]:
    for made in to_float.resample(frame):
        samples: NDArray[Any] = made.to_ndarray().reshape(made.samples, -1)
        yield made.sample_rate, samples.mean(1, dtype=np.float32)


def _mono_16k(pieces: Iterator[tuple[int, Wave]], name: str) -> Wave:
    import soxr

    stream: Any = None
    first, seconds, out = 0, 0.0, []
    for rate, samples in pieces:
        if not np.isfinite(samples).all():
            raise InputError("E3017", f"{name}: samples that are not finite.")
        first = first or rate
        if rate != first:
            raise InputError("E3013", f"{name}: the rate changes from {first} to {rate} on the way.")
        seconds += len(samples) / rate
        if seconds > MAX_SECONDS:
            raise InputError("E3017", f"{name}: longer than {MAX_SECONDS // 60} minutes.")
        if rate != RATE:
            stream = stream or soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")
            samples = stream.resample_chunk(samples)
        out.append(samples)
    if stream is not None:
        out.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    wave = np.concatenate(out) if out else np.zeros(0, np.float32)
    if len(wave) < RATE // 10:
        raise InputError("E3017", f"{name}: {len(wave) / RATE:.2f} s of sound, at least 0.1 s are needed.")
    return wave
