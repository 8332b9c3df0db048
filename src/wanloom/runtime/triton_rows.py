"""Triton kernels that go over tokens row by row: norm, modulation, gate and rotation, each in one pass over memory.

A program of a kernel has one token's row of C values in registers, in float32.  Tensors are [B, L, C] with any strides
but the last, which is 1; results are contiguous.  Importing this needs Triton; `fused.py` says when that is done.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

# ---------------------------------------------------------------- what kernels share


@triton.jit
def _normalised(values, there, width, eps):
    """(values - mean) / sqrt(variance + eps) of a row whose first `width` values are there."""
    mean = tl.sum(values, 0) / width
    centred = tl.where(there, values - mean, 0.0)
    return centred * (1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps))


@triton.jit
def _modulation(rows, group, batch, token, columns, there, of_batch, of_group, MANY: tl.constexpr):
    """The row [C] of rows [B, G, C] that modulates a token: that of its group, or the only one."""
    base = rows + batch * of_batch
    if MANY:
        base += tl.load(group + token) * of_group
    return tl.load(base + columns, mask=there, other=0.0).to(tl.float32)


# ---------------------------------------------------------------- kernels


@triton.jit
def _norm_modulate(
    x, shift, scale, group, out, length, width, eps,
    x_batch, x_row, shift_batch, shift_group, scale_batch, scale_group,
    MANY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # offsets go beyond 2^31
    batch, token = program // length, program % length
    columns = tl.arange(0, BLOCK)
    there = columns < width
    values = tl.load(x + batch * x_batch + token * x_row + columns, mask=there, other=0.0).to(tl.float32)
    add = _modulation(shift, group, batch, token, columns, there, shift_batch, shift_group, MANY)
    times = _modulation(scale, group, batch, token, columns, there, scale_batch, scale_group, MANY)
    result = _normalised(values, there, width, eps) * (1.0 + times) + add
    tl.store(out + program * width + columns, result.to(out.dtype.element_ty), mask=there)


@triton.jit
def _gate_add(
    x, y, gate, group, weight, bias, out, normed, length, width, eps,
    x_batch, x_row, y_batch, y_row, gate_batch, gate_group, out_batch, out_row,
    NORM: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // length, program % length
    columns = tl.arange(0, BLOCK)
    there = columns < width
    values = tl.load(x + batch * x_batch + token * x_row + columns, mask=there, other=0.0).to(tl.float32)
    added = tl.load(y + batch * y_batch + token * y_row + columns, mask=there, other=0.0).to(tl.float32)
    values += added * _modulation(gate, group, batch, token, columns, there, gate_batch, gate_group, MANY)
    tl.store(out + batch * out_batch + token * out_row + columns, values.to(out.dtype.element_ty), mask=there)
    if NORM:
        values = values.to(out.dtype.element_ty).to(tl.float32)
        times = tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
        add = tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)
        result = _normalised(values, there, width, eps) * times + add
        tl.store(normed + program * width + columns, result.to(normed.dtype.element_ty), mask=there)


@triton.jit
def _rms_rotate(
    x, weight, rope, out, length, width, eps, x_batch, x_row, rope_row,
    HEAD: tl.constexpr, TURN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // length, program % length
    columns = tl.arange(0, BLOCK)
    there = columns < width
    values = tl.load(x + batch * x_batch + token * x_row + columns, mask=there, other=0.0).to(tl.float32)
    values *= 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
    times = tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    # Rounded where the plain form rounds: before the weight, and before the rotation.
    result = (values.to(x.dtype.element_ty).to(tl.float32) * times).to(out.dtype.element_ty)
    if TURN:  # a head's cosines and sines lie as its pairs do
        turn = tl.load(rope + token * rope_row + columns % HEAD, mask=there, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(result.to(tl.float32), (BLOCK // 2, 2)))
        cos, sin = tl.split(tl.reshape(turn, (BLOCK // 2, 2)))
        turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        result = tl.reshape(turned, (BLOCK,)).to(out.dtype.element_ty)
    tl.store(out + program * width + columns, result, mask=there)


# ---------------------------------------------------------------- launching them


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, group: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift for x [B, L, C] and rows [B, G, C], in `dtype`."""
    x, shift, scale = packed(x), rows_for(x, shift), rows_for(x, scale)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    with on_device_of(x):
        _norm_modulate[_grid(x)](
            x, shift, scale, group.contiguous(), out, x.shape[1], x.shape[2], eps, *x.stride()[:2],
            *shift.stride()[:2], *scale.stride()[:2], MANY=shift.shape[1] > 1, **_block(x.shape[2]),
        )  # fmt: skip
    return out


def gate_add(x: Tensor, y: Tensor, gate: Tensor, group: Tensor, out: Tensor) -> None:
    """x + gate * y into `out`, which may be x: all [B, L, C] but the rows gate [B, G, C]."""
    _gated(x, y, gate, group, out, None, None, 0.0, None)


def gate_add_norm(
    x: Tensor, y: Tensor, gate: Tensor, group: Tensor, out: Tensor,
    weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same, and the LayerNorm of the sum with weight and bias [C], in `dtype`."""
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    _gated(x, y, gate, group, out, weight.contiguous(), bias.contiguous(), eps, normed)
    return normed


def _gated(
    x: Tensor, y: Tensor, gate: Tensor, group: Tensor, out: Tensor,
    weight: Tensor | None, bias: Tensor | None, eps: float, normed: Tensor | None,
) -> None:  # fmt: skip
    x, y, gate = packed(x), packed(y), rows_for(x, gate)
    with on_device_of(x):
        _gate_add[_grid(x)](
            x, y, gate, group.contiguous(), weight, bias, out, normed, x.shape[1], x.shape[2], eps,
            *x.stride()[:2], *y.stride()[:2], *gate.stride()[:2], *out.stride()[:2],
            NORM=normed is not None, MANY=gate.shape[1] > 1, **_block(x.shape[2]),
        )  # fmt: skip


def rms_rotate(x: Tensor, weight: Tensor, eps: float, heads: int, rope: Tensor | None) -> Tensor:
    """RMSNorm of x [B, L, C] over C, then the rotation of pairs by rope [L, D/2, 2]: [B, L, H, D]."""
    x = packed(x)
    batch, length, width = x.shape
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    turn = None if rope is None else rope.flatten(1)
    turn = turn if turn is None or turn.stride(1) == 1 else turn.contiguous()
    with on_device_of(x):
        _rms_rotate[_grid(x)](
            x, weight.contiguous(), turn, out, length, width, eps, *x.stride()[:2],
            0 if turn is None else turn.stride(0), HEAD=width // heads, TURN=turn is not None, **_block(width),
        )  # fmt: skip
    return out.view(batch, length, heads, width // heads)


def packed(t: Tensor) -> Tensor:
    """The tensor, copied if its last dimension has gaps."""
    return t if t.stride(-1) == 1 else t.contiguous()


def rows_for(x: Tensor, rows: Tensor) -> Tensor:
    """Modulation rows [B or 1, G, C] as [B, G, C] for x [B, L, C], without copying what lies well."""
    return packed(rows).expand(x.shape[0], -1, -1)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which may be another than the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _grid(x: Tensor) -> tuple[int]:
    return (x.shape[0] * x.shape[1],)


def _block(width: int) -> dict[str, int]:
    """Values that a program holds, and the warps that share them: 16 values a thread."""
    block = triton.next_power_of_2(max(width, 2))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
