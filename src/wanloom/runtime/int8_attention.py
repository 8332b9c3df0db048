"""Attention whose scores are products of 8-bit integers: near, not exact.

Queries and keys are rounded to int8 after the mean of the keys is taken off them.  With `int8_attention` probabilities
and values are multiplied in 16 bits: on normally distributed q, k and v of width 128 the result is off by 1 % of its
norm, bounded by tests at 2 %.  With `int8_fp8_attention` they are e4m3 as well (Ada and later): off by 3 to 4 %,
bounded at 5 %.

    use_kernel(dit, int8_attention)

What has a mask, few keys, heads wider than 128 or a gradient to bring back goes through SDPA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wanloom.models.layers import sdpa
from wanloom.models.numerics import recording

# Rounding the queries costs as much as it saves with about as many keys; a text of 512 tokens stays exact.
LEAST_KEYS = 1024
WIDEST_HEAD = 128  # what a block keeps of keys and values has to go into a GPU's shared memory


@torch.library.custom_op("wanloom::int8_attention", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, narrow: bool = False) -> Tensor:
    """Softmax attention of q [B, L, H, D] to k and v [B, M, H, D], few keys or many: [B, L, H, D]."""
    from wanloom.runtime import triton_attention

    return triton_attention.attend(q, k, v, narrow=narrow)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, narrow: bool = False) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def int8_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The kernel for the seam `Attention.kernel`: 8-bit scores, 16-bit values."""
    return _near(q, k, v, mask, narrow=False)


def int8_fp8_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The kernel for the seam `Attention.kernel`: 8-bit scores, 8-bit probabilities and values."""
    return _near(q, k, v, mask, narrow=True)


def _near(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, narrow: bool) -> Tensor:
    unfit = k.shape[1] < LEAST_KEYS or q.shape[-1] > WIDEST_HEAD
    if mask is not None or unfit or q.dtype == torch.float64 or recording(q, k, v):
        return sdpa(q, k, v, mask)
    out: Tensor = attend(q, k, v, narrow)
    return out
