"""Triton kernels of attention with 8-bit scores: what `int8_attention.py` computes with, and its numbers.

Two kernels.  The first rounds queries and keys to int8: one scale for each query, one for each 64 keys, from which the
mean of all keys is taken before (it adds the same to all scores of a query, which softmax does not see, and is often
far larger than what keys differ by).  The second goes over the keys in blocks of 64 with a running softmax: integer
products for the scores, then probabilities times values in the 16-bit format of the values; sums are float32.

Importing this needs Triton.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanloom.runtime.triton_rows import on_device_of, packed

QUERIES, KEYS = 128, 64  # of a block


@triton.jit
def _to_int8(
    x, mean, codes, scales, factor, length, width, padded, x_batch, x_token, x_head,
    CENTRED: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [B, L, H, D] -> codes [B, H, padded, BLOCK] with scales [B, H, padded], or one for ROWS tokens unless EACH."""
    part, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    plane = batch * tl.num_programs(1) + head
    tokens, columns = part * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    there = (tokens < length)[:, None] & (columns < width)[None, :]
    places = batch * x_batch + head * x_head + tokens.to(tl.int64)[:, None] * x_token + columns[None, :]
    values = tl.load(x + places, mask=there, other=0.0).to(tl.float32)
    if CENTRED:
        middle = tl.load(mean + plane * width + columns, mask=columns < width, other=0.0)
        values = tl.where(there, values - middle[None, :], 0.0)
    values *= factor
    largest = tl.max(tl.abs(values), 1)
    if EACH:
        scale = tl.maximum(largest, 1e-30) / 127.0
        tl.store(scales + plane * padded + tokens, scale)
        values = values / scale[:, None]
    else:
        one = tl.maximum(tl.max(largest, 0), 1e-30) / 127.0
        tl.store(scales + plane * (padded // ROWS) + part, one)
        values = values / one
    rounded = (values + tl.where(values < 0, -0.5, 0.5)).to(tl.int8)  # conversion cuts towards zero
    tl.store(codes + (plane * padded + tokens[:, None]) * BLOCK + columns[None, :], rounded)


@triton.jit
def _look(
    sums, total, top, query, query_scale, k, k_scale, v, first, last, keys, width, v_token,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The running softmax over blocks of keys: sums [Q, D], their weights' total and the largest score [Q] so far."""
    columns = tl.arange(0, BLOCK)
    for start in range(first, last, KEYS):
        tokens = start + tl.arange(0, KEYS)
        key = tl.load(k + tokens[None, :] * BLOCK + columns[:, None])  # [D, K]; rows are there up to a whole block
        scores = tl.dot(query, key).to(tl.float32) * (query_scale * tl.load(k_scale + start // KEYS))[:, None]
        there = (columns < width)[None, :]
        if RAGGED:
            scores = tl.where((tokens < keys)[None, :], scores, float("-inf"))
            there = there & (tokens < keys)[:, None]
        now = tl.maximum(top, tl.max(scores, 1))
        weights, fade = tl.exp2(scores - now[:, None]), tl.exp2(top - now)
        value = tl.load(v + tokens.to(tl.int64)[:, None] * v_token + columns[None, :], mask=there, other=0.0)
        sums = tl.dot(weights.to(value.dtype), value, sums * fade[:, None])
        total, top = total * fade + tl.sum(weights, 1), now
    return sums, total, top


@triton.jit
def _attend(
    q, q_scale, k, k_scale, v, out, queries, keys, width, padded_q, padded_k,
    v_batch, v_token, v_head, out_batch, out_token, out_head,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    part, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    plane = batch * tl.num_programs(1) + head
    tokens, columns = part * QUERIES + tl.arange(0, QUERIES), tl.arange(0, BLOCK)
    query = tl.load(q + (plane * padded_q + tokens[:, None]) * BLOCK + columns[None, :])
    query_scale = tl.load(q_scale + plane * padded_q + tokens)
    k += plane * padded_k * BLOCK
    k_scale += plane * (padded_k // KEYS)
    v += batch * v_batch + head * v_head
    sums = tl.zeros((QUERIES, BLOCK), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    whole = keys // KEYS * KEYS
    sums, total, top = _look(
        sums, total, top, query, query_scale, k, k_scale, v, 0, whole, keys, width, v_token, False, BLOCK, KEYS
    )
    sums, total, top = _look(
        sums, total, top, query, query_scale, k, k_scale, v, whole, keys, keys, width, v_token, True, BLOCK, KEYS
    )
    result = (sums / total[:, None]).to(out.dtype.element_ty)
    places = batch * out_batch + head * out_head + tokens.to(tl.int64)[:, None] * out_token + columns[None, :]
    tl.store(out + places, result, mask=(tokens < queries)[:, None] & (columns < width)[None, :])


# ---------------------------------------------------------------- launching them


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q [B, L, H, D] to k and v [B, M, H, D], D <= 128: [B, L, H, D] in the dtype of q."""
    batch, length, heads, width = q.shape
    keys = k.shape[1]
    block = max(16, triton.next_power_of_2(width))
    v, out = packed(_values(v)), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with on_device_of(q):
        q_codes, q_scale = to_int8(q, width**-0.5 * math.log2(math.e), None, block, QUERIES)
        k_codes, k_scale = to_int8(k, 1.0, k.mean(1, dtype=torch.float32), block, KEYS)
        _attend[(triton.cdiv(length, QUERIES), heads, batch)](
            q_codes, q_scale, k_codes, k_scale, v, out, length, keys, width, q_codes.shape[2], k_codes.shape[2],
            *_steps(v), *_steps(out), BLOCK=block, QUERIES=QUERIES, KEYS=KEYS,
            num_warps=4 if block <= 64 else 8, num_stages=3,
        )  # fmt: skip
    return out


def to_int8(x: Tensor, factor: float, mean: Tensor | None, block: int, multiple: int) -> tuple[Tensor, Tensor]:
    """(x - mean) * factor of x [B, L, H, D] as codes [B, H, L, block] int8 and scales, L up to a multiple.

    Scales are [B, H, L], one for each token, without a mean; with one [B, H, D] they are one for each KEYS tokens.
    """
    x = packed(x)
    batch, length, heads, width = x.shape
    padded = triton.cdiv(length, multiple) * multiple
    codes = torch.empty(batch, heads, padded, block, dtype=torch.int8, device=x.device)
    scales = torch.empty(batch, heads, padded if mean is None else padded // KEYS, device=x.device)
    _to_int8[(padded // KEYS, heads, batch)](
        x, mean, codes, scales, factor, length, width, padded, *_steps(x),
        CENTRED=mean is not None, EACH=mean is None, ROWS=KEYS, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return codes, scales


def _values(v: Tensor) -> Tensor:
    """Values in the format that they are multiplied in: 16 bits on a GPU; the interpreter multiplies no bfloat16."""
    if not v.is_cuda:
        return v.float()
    return v.bfloat16() if v.dtype == torch.float32 else v


def _steps(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head of a tensor [B, L, H, D]."""
    return x.stride(0), x.stride(1), x.stride(2)
