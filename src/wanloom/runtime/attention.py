"""Attention kernels: functions (q, k, v, mask) -> out on [B, L, H, D], for the seam `Attention.kernel`.

SDPA is the default of the models and the reference for every kernel here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Two matrix products and a softmax.

    On a CPU the backward pass of SDPA is slow for short sequences; with about 100 tokens this form trains faster.
    It holds the [L, M] scores, so it is not for long ones.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    out: Tensor = scores.softmax(-1) @ v
    return out.transpose(1, 2)


KERNELS = {"plain": plain}


def use_kernel(model: nn.Module, name: str) -> None:
    """Give every attention of `model` (whatever has a `kernel` that is no tensor) the kernel of that name."""
    for module in model.modules():
        if not isinstance(getattr(module, "kernel", None), Tensor | None):
            setattr(module, "kernel", KERNELS[name])  # noqa: B010 (an attribute that nn.Module does not declare)
