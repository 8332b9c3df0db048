"""Triton kernels of attention with 8-bit scores: what `int8_attention.py` computes with, and its numbers.

Kernels: one rounds queries and keys to int8: one scale for each query, one for each 64 keys, from which the mean of all
keys is taken before (it adds the same to all scores of a query, which softmax does not see, and is often far larger
than what keys differ by).  Another goes over the keys in blocks of 64 with a running softmax: integer products for the
scores, then probabilities times values in the 16-bit format of the values; sums are float32.

With `narrow` a third rounds the values to e4m3, one scale for each channel, without their mean (probabilities sum to
one: it is added at the end), and lays them as the products read them, tokens side by side.  Probabilities are e4m3 too,
up to 256 instead of 1, which moves the smallest that is not lost from 2^-9 to 2^-17.  Tensor cores sum such products in
few bits: each block of 64 keys is summed by them, the blocks in float32.

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
def _e4m3(x, BY_HAND: tl.constexpr):
    """float32 as e4m3, rounded to the nearest; by hand first where Triton's interpreter would lose carries."""
    if BY_HAND:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def _to_fp8(
    v, mean, scale, codes, length, width, padded, v_batch, v_token, v_head,
    BY_HAND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """v [B, L, H, D] -> (v - mean) / scale as codes [B, H, BLOCK, padded]; mean, scale [B, H, BLOCK]."""
    part, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    plane = batch * tl.num_programs(1) + head
    tokens, columns = part * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    there = (tokens < length)[:, None] & (columns < width)[None, :]
    places = batch * v_batch + head * v_head + tokens.to(tl.int64)[:, None] * v_token + columns[None, :]
    values = tl.load(v + places, mask=there, other=0.0).to(tl.float32)
    middle, size = tl.load(mean + plane * BLOCK + columns), tl.load(scale + plane * BLOCK + columns)
    values = tl.where(there, (values - middle[None, :]) / size[None, :], 0.0)
    values = tl.minimum(tl.maximum(values, -448.0), 448.0)
    tl.store(codes + (plane * BLOCK + columns[None, :]) * padded + tokens[:, None], _e4m3(values, BY_HAND))


@triton.jit
def _look(
    sums, total, top, query, query_scale, k, k_scale, v, first, last, keys, width, v_token, v_column,
    NARROW: tl.constexpr, BY_HAND: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
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
        weights, fade = tl.exp2(scores - now[:, None] + (8.0 if NARROW else 0.0)), tl.exp2(top - now)
        places = v + tokens.to(tl.int64)[:, None] * v_token + columns[None, :] * v_column
        if NARROW:  # there up to a whole block, as keys are
            value = tl.load(places)
            sums = sums * fade[:, None] + tl.dot(_e4m3(weights, BY_HAND), value)
        else:
            value = tl.load(places, mask=there, other=0.0)
            sums = tl.dot(weights.to(value.dtype), value, sums * fade[:, None])
        total, top = total * fade + tl.sum(weights, 1), now
    return sums, total, top


@triton.jit
def _attend(
    q, q_scale, k, k_scale, v, v_mean, v_scale, out, queries, keys, width, padded_q, padded_k,
    v_batch, v_token, v_head, v_column, out_batch, out_token, out_head,
    NARROW: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
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
        sums, total, top, query, query_scale, k, k_scale, v, 0, whole, keys, width, v_token, v_column,
        NARROW, BY_HAND, False, BLOCK, KEYS,
    )  # fmt: skip
    sums, total, top = _look(
        sums, total, top, query, query_scale, k, k_scale, v, whole, keys, keys, width, v_token, v_column,
        NARROW, BY_HAND, True, BLOCK, KEYS,
    )  # fmt: skip
    result = sums / total[:, None]
    if NARROW:
        channels = plane * BLOCK + columns
        result = result * tl.load(v_scale + channels)[None, :] + tl.load(v_mean + channels)[None, :]
    result = result.to(out.dtype.element_ty)
    places = batch * out_batch + head * out_head + tokens.to(tl.int64)[:, None] * out_token + columns[None, :]
    tl.store(out + places, result, mask=(tokens < queries)[:, None] & (columns < width)[None, :])


# ---------------------------------------------------------------- launching them


def attend(q: Tensor, k: Tensor, v: Tensor, *, narrow: bool = False) -> Tensor:
    """Softmax attention of q [B, L, H, D] to k and v [B, M, H, D], D <= 128: [B, L, H, D] in the dtype of q.

    narrow: probabilities and values in e4m3, which a GPU multiplies from Ada on.
    """
    batch, length, heads, width = q.shape
    keys = k.shape[1]
    block = max(16, triton.next_power_of_2(width))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with on_device_of(q):
        values, v_mean, v_scale, steps = to_fp8(packed(v), block) if narrow else _values(v)
        q_codes, q_scale = to_int8(q, width**-0.5 * math.log2(math.e), None, block, QUERIES)
        k_codes, k_scale = to_int8(k, 1.0, k.mean(1, dtype=torch.float32), block, KEYS)
        _attend[(triton.cdiv(length, QUERIES), heads, batch)](
            q_codes, q_scale, k_codes, k_scale, values, v_mean, v_scale, out, length, keys, width,
            q_codes.shape[2], k_codes.shape[2], *steps, *_steps(out),
            NARROW=narrow, BY_HAND=_interpreted(q), BLOCK=block, QUERIES=QUERIES, KEYS=KEYS,
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


Values = tuple[Tensor, Tensor | None, Tensor | None, tuple[int, int, int, int]]


def to_fp8(v: Tensor, block: int) -> Values:
    """Values [B, M, H, D] as e4m3 codes [B, H, block, M up to a multiple], means and scales [B, H, block], strides."""
    batch, length, heads, width = v.shape
    padded = triton.cdiv(length, KEYS) * KEYS
    mean = v.mean(1, dtype=torch.float32)
    reach = torch.maximum(v.amax(1).float() - mean, mean - v.amin(1).float())
    scale = (reach / 448).clamp_min_(1e-30)
    mean, scale = (torch.nn.functional.pad(t, (0, block - width), value=1.0) for t in (mean, scale))
    codes = torch.empty(batch, heads, block, padded, dtype=torch.float8_e4m3fn, device=v.device)
    _to_fp8[(padded // KEYS, heads, batch)](
        v, mean, scale, codes, length, width, padded, *_steps(v),
        BY_HAND=_interpreted(v), ROWS=KEYS, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return codes, mean, scale, (codes.stride(0), 1, codes.stride(1), padded)


def _values(v: Tensor) -> Values:
    """Values as they lie, in the format that they are multiplied in (16 bits on a GPU), and their strides."""
    v = packed(_sixteen(v))
    return v, None, None, (*_steps(v), 1)


def _interpreted(x: Tensor) -> bool:
    """Whether Triton's interpreter computes with `x`: it has no bfloat16 products, and rounds to e4m3 wrongly."""
    return not x.is_cuda


def _sixteen(v: Tensor) -> Tensor:
    if _interpreted(v):
        return v.float()
    return v.bfloat16() if v.dtype == torch.float32 else v


def _steps(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head of a tensor [B, L, H, D]."""
    return x.stride(0), x.stride(1), x.stride(2)
