"""Does this machine compute, and how fast: the part of `wanloom doctor --full` and `--measure` that needs torch."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from wanloom.models.layers import sdpa
from wanloom.runtime.attention import kernel_for


def matrix_rate(size: int = 1024, repeats: int = 4) -> float:
    """Floating point operations per second of a float32 matrix product on the CPU."""
    a = torch.full((size, size), 1 / size)
    b = a @ a  # the first product also starts the library's threads
    started = time.perf_counter()
    for _ in range(repeats):
        b = b @ a
    return repeats * 2 * size**3 / (time.perf_counter() - started)


def try_gpus() -> list[str]:
    """One line for each GPU that torch sees: its name, and whether a small product comes out right."""
    lines = []
    for index in range(torch.cuda.device_count()):
        ones = torch.ones(256, 256, device=f"cuda:{index}")
        right = bool((ones @ ones == 256).all())
        lines.append(f"{torch.cuda.get_device_name(index)}: {'works' if right else 'computes wrongly'}")
    return lines


def time_kernel(name: str) -> dict[str, float]:
    """Of an attention kernel, in bfloat16 on the GPU if there is one: seconds, operations, relative error to float64.

    12 heads of 128; 1024 tokens on a CPU, 32768 on a GPU, where the error is that of 1024.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = kernel_for(name, device)
    q, k, v = _heads(1024, device)
    exact = sdpa(q.double(), k.double(), v.double())
    error = (kernel(q, k, v, None).double() - exact).norm() / exact.norm()
    length = 1024 if device == "cpu" else 32768
    q, k, v = _heads(length, device)
    best = float("inf")
    for _ in range(3):
        _wait(device)
        started = time.perf_counter()
        kernel(q, k, v, None)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return {"seconds": best, "flops": 4.0 * length**2 * 12 * 128, "error": float(error)}


def _heads(length: int, device: str) -> tuple[Tensor, ...]:
    """Random q, k and v [1, L, 12, 128]."""
    drawn = torch.randn(3, 1, length, 12, 128, generator=torch.Generator().manual_seed(0))
    return drawn.to(device, torch.bfloat16).unbind()


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
