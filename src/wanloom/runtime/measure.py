"""How much this machine does in a second: the measuring behind `wanloom doctor --calibrate`.

    for name, rate in measure("cuda", folder): ...        # some seconds in all; share=0.1 is quicker and rougher

Each rate is the best of several repetitions, after one that does not count; what else the machine does meanwhile can
only make it smaller.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wanloom.errors import InputError
from wanloom.models.layers import sdpa

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS = 0.6  # for each rate
FILE = 2**28  # bytes of the file that is read
PIECE = 2**24


def measure(device: str, folder: Path, *, share: float = 1.0) -> Iterator[tuple[str, float]]:
    """(name, rate) of everything that `rates.Rates` has, as "matrix float32", ..., "call", one after another.

    folder: where a file may be written to be read again, and where it is deleted.  share: of the usual sizes and times.
    """
    large = device != "cpu"
    side = _scaled(8192 if large else 1536, share**0.5, 64)
    length = _scaled(8192 if large else 1024, share**0.5, 32)
    for name, dtype in DTYPES.items():
        yield f"matrix {name}", _matrix(device, dtype, side, share)
        yield f"attention {name}", _attention(device, dtype, length, share)
    yield "conv", _conv(device, _scaled(192 if large else 64, share**0.5, 8), share)
    yield "copy", _copy(device, _scaled(PIECE * 8, share, 2**20), share)
    yield "disk", _disk(folder, _scaled(FILE, share, 2**20))
    yield "call", _call(device, share)


def present_device(device: str | None) -> str:
    """The device itself, or the best there is.  Error: E8002 when it is not there."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise InputError("E8002", f"device: {device} was asked for and is not there. Use --device cpu.")
    return device


def _scaled(size: int, share: float, step: int) -> int:
    """A part of a size, as a multiple of `step` and at least that."""
    return max(step, round(size * min(share, 1.0) / step) * step)


def _best(work: Callable[[], object], device: str, share: float) -> float:
    """Seconds of `work`, the best of as many as the time allows, at least three."""
    work()
    _wait(device)
    best, count, begin = float("inf"), 0, time.perf_counter()
    while count < 3 or time.perf_counter() - begin < SECONDS * share:
        started = time.perf_counter()
        work()
        _wait(device)
        best, count = min(best, time.perf_counter() - started), count + 1
    return max(best, 1e-9)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _matrix(device: str, dtype: torch.dtype, side: int, share: float) -> float:
    """Operations a second of a square matrix product."""
    a = torch.full((side, side), 1 / side, device=device, dtype=dtype)
    return 2 * side**3 / _best(lambda: a @ a, device, share)


def _attention(device: str, dtype: torch.dtype, length: int, share: float) -> float:
    """Operations a second of the attention of `length` tokens to each other, 12 heads of 128."""
    drawn = torch.randn(3, 1, length, 12, 128, generator=torch.Generator().manual_seed(0))
    q, k, v = drawn.to(device, dtype).unbind()
    return 4 * length**2 * 12 * 128 / _best(lambda: sdpa(q, k, v), device, share)


def _conv(device: str, side: int, share: float) -> float:
    """Operations a second of a convolution as the VAE's: 96 channels, 3x3x3, two frames, float32."""
    x = torch.ones(1, 96, 4, side + 2, side + 2, device=device)
    weight = torch.full((96, 96, 3, 3, 3), 1e-3, device=device)
    return 2 * 27 * 96 * 96 * 2 * side * side / _best(lambda: F.conv3d(x, weight), device, share)


def _copy(device: str, count: int, share: float) -> float:
    """Bytes a second from pinned host memory to the device; on a CPU from one place to another."""
    host = torch.zeros(count, dtype=torch.uint8, pin_memory=device != "cpu")
    there = torch.zeros(count, dtype=torch.uint8, device=device)
    return count / _best(lambda: there.copy_(host, non_blocking=True), device, share)


def _call(device: str, share: float) -> float:
    """Seconds of an operation that has next to nothing to do."""
    x: Tensor = torch.zeros(8, device=device)

    def some() -> None:
        for _ in range(200):
            torch.add(x, x)

    return _best(some, device, share) / 200


def _disk(folder: Path, count: int) -> float:
    """Bytes a second of reading a file that the system was asked to forget."""
    path = folder / f".reading-{os.getpid()}.tmp"
    room = memoryview(bytearray(PIECE))
    try:
        with path.open("wb") as file:
            for _ in range(-(-count // PIECE)):
                file.write(os.urandom(min(count, PIECE)))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size, started = path.stat().st_size, time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass
        return size / max(time.perf_counter() - started, 1e-9)
    finally:
        path.unlink(missing_ok=True)
