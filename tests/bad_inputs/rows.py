"""What all rows of bad input share: which there are, the models they use, the form of a refusal, forged files."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from command_line import Ran

# The rows of the catalogue that this version answers for.
OWNED = (*range(1, 88), 94, 95, 96)
T2V, I2V, TI2V, SMALL, I2V_21 = "t2v-A14B", "i2v-A14B", "ti2v-5B", "t2v-1.3B", "i2v-14B"
S2V, ANIMATE = "s2v-14B", "animate-14B"
SHORT = ("--size", "64x64", "--frames", "5", "--steps", "2", "--seed", "1")
SHARD = "diffusion_pytorch_model.safetensors"


def check_refusal(ran: Ran, code: str) -> None:
    """The form that every refusal has."""
    *warnings, error = ran.err.splitlines() or [""]
    assert error.startswith(f"error[{code}]: "), ran.err
    assert ran.code == int(code[1])
    assert all(line.startswith("warning[W") for line in warnings)
    assert "Traceback" not in ran.err
    assert not re.search(r"0x[0-9a-f]{6,}", ran.err)


def safetensors(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with any header: a dict, or the text of one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], Any], **metadata: str) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt", **metadata})


def greys(count: int = 5, height: int = 64, width: int = 64) -> np.ndarray:
    """[count, H, W, 3], each frame lighter than the one before."""
    levels = (10 + 6 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def film(
    path: Path, frames: np.ndarray | None = None, codec: str = "libx264", *, rate: int = 8, times: Any = None,
    pixels: str = "yuv420p", videos: int = 1, **options: str,
) -> Path:  # fmt: skip
    """A video file; times: milliseconds of the frames, where they are not even; videos: how many streams show them."""
    frames = greys() if frames is None else frames
    with av.open(str(path), "w", options=options) as out:
        streams = [out.add_stream(codec, rate=rate) for _ in range(videos)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
            if times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixel in enumerate(frames):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixel), format="rgb24")
                if times is not None:
                    frame.pts, frame.time_base = times[number], Fraction(1, 1000)
                out.mux(stream.encode(frame))
        for stream in streams:
            out.mux(stream.encode(None))
    return path


def wav(
    path: Path, seconds: float = 0.5, *, rate: int = 16_000, channels: int = 1, promised: int | None = None,
    samples: np.ndarray | None = None,
) -> Path:  # fmt: skip
    """A sound file: silence, or these float32 samples; promised: bytes of sound that its header tells of."""
    body = bytes(2 * channels * round(rate * seconds)) if samples is None else samples.astype("<f4").tobytes()
    kind, size = (1, 2) if samples is None else (3, 4)
    wide = size * channels
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(body), b"WAVE", b"fmt ", 16, kind, channels, rate,
                       wide * rate, wide, 8 * size, b"data", len(body) if promised is None else promised)  # fmt: skip
    path.write_bytes(head + body)
    return path
