"""In which precision sums are made, and when memory may be written over."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and statistics beside parameters of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def recording(*tensors: Tensor) -> bool:
    """Whether autograd will come back for these; if not, buffers may be reused and written in place."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y; without gradients into x."""
    return x + y if recording(x, y) else x.add_(y)
