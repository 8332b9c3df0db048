"""Does this machine compute, and how fast: the part of `wanloom doctor --full` that needs torch."""

from __future__ import annotations

import time

import torch


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
