"""The named operations of `models/layers.py` as fused kernels, to be put on from outside.

    use_ops(dit, FUSED)

Each is a custom operation of torch around a Triton kernel (`triton_rows.py`), so that a compiled block calls it as one
node.  It reads and writes its tensors once; the plain forms differ from it by rounding.  What comes back to autograd
goes through the same kernels, and its gradient is that of the plain form, computed anew from the inputs.

Replaced are `norm_modulate`, `gate_add`, `gate_add_norm` and `rms_rotate`.  The others stay: products are the work of
libraries, and GELU between two of them is one pass in place already.  float64 goes through the plain forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanloom.models import layers
from wanloom.models.layers import PLAIN, RMSNorm
from wanloom.models.numerics import recording

NARROW = (torch.float32, torch.bfloat16, torch.float16)


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels, which compute in float32, are as exact as the plain forms for these."""
    return all(tensor.dtype in NARROW for tensor in tensors)


# ---------------------------------------------------------------- custom operations


@torch.library.custom_op("wanloom::norm_modulate", mutates_args=())
def _norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, group: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    from wanloom.runtime import triton_rows

    return triton_rows.norm_modulate(x, shift, scale, group, eps, dtype)


@_norm_modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, group: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op("wanloom::gate_add", mutates_args=())
def _gate_add(x: Tensor, y: Tensor, gate: Tensor, group: Tensor) -> Tensor:
    from wanloom.runtime import triton_rows

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    triton_rows.gate_add(x, y, gate, group, out)
    return out


@_gate_add.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, group: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("wanloom::gate_add_", mutates_args=("x",))
def _gate_add_(x: Tensor, y: Tensor, gate: Tensor, group: Tensor) -> None:
    from wanloom.runtime import triton_rows

    triton_rows.gate_add(x, y, gate, group, x)


@_gate_add_.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, group: Tensor) -> None:
    return None


@torch.library.custom_op("wanloom::gate_add_norm", mutates_args=())
def _gate_add_norm(
    x: Tensor, y: Tensor, gate: Tensor, group: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from wanloom.runtime import triton_rows

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out, triton_rows.gate_add_norm(x, y, gate, group, out, weight, bias, eps, dtype)


@_gate_add_norm.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor, group: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op("wanloom::gate_add_norm_", mutates_args=("x",))
def _gate_add_norm_(
    x: Tensor, y: Tensor, gate: Tensor, group: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    from wanloom.runtime import triton_rows

    return triton_rows.gate_add_norm(x, y, gate, group, x, weight, bias, eps, dtype)


@_gate_add_norm_.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor, group: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op("wanloom::rms_rotate", mutates_args=())
def _rms_rotate(x: Tensor, weight: Tensor, eps: float, heads: int, rope: Tensor | None) -> Tensor:
    from wanloom.runtime import triton_rows

    return triton_rows.rms_rotate(x, weight, eps, heads, rope)


@_rms_rotate.register_fake
def _(x: Tensor, weight: Tensor, eps: float, heads: int, rope: Tensor | None) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return torch.empty(*x.shape[:-1], heads, x.shape[-1] // heads, dtype=dtype, device=x.device)


# ---------------------------------------------------------------- their gradients: those of the plain forms


def _plain_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, group: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor]:
    return (layers.norm_modulate(x, shift, scale, group, eps, dtype),)


def _plain_gate_add(x: Tensor, y: Tensor, gate: Tensor, group: Tensor) -> tuple[Tensor]:
    return (torch.addcmul(x, y.to(x.dtype), layers.per_token(gate, group)),)


def _plain_gate_add_norm(
    x: Tensor, y: Tensor, gate: Tensor, group: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    (out,) = _plain_gate_add(x, y, gate, group)
    return out, F.layer_norm(out, out.shape[-1:], weight.to(out.dtype), bias.to(out.dtype), eps).to(dtype)


def _plain_rms_rotate(x: Tensor, weight: Tensor, eps: float, heads: int, rope: Tensor | None) -> tuple[Tensor]:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    out = layers.split_heads((x.float() * scale).to(x.dtype) * weight, heads)
    if rope is None:
        return (out,)
    (even, odd), (cos, sin) = out.float().view(*out.shape[:-1], -1, 2).unbind(-1), rope[:, None].unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return (turned.flatten(-2).to(out.dtype),)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Of a call of a custom operation its inputs: tensors where autograd keeps them, the rest beside."""
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = tuple(None if isinstance(value, Tensor) else value for value in inputs)
    ctx.tensors = tuple(isinstance(value, Tensor) for value in inputs)


def _plain_backward(plain: Callable[..., tuple[Tensor, ...]], ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients to the inputs of a custom operation, by running its plain form once more."""
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if tensor else other for tensor, other in zip(ctx.tensors, ctx.others, strict=True)]
    wanted = [place for place, needed in enumerate(ctx.needs_input_grad) if needed]

    def of_wanted(*values: Tensor) -> tuple[Tensor, ...]:
        given = list(inputs)
        for place, value in zip(wanted, values, strict=True):
            given[place] = value
        return plain(*given)

    back = torch.func.vjp(of_wanted, *(inputs[place] for place in wanted))[1]
    found = dict(zip(wanted, back(grads), strict=True))
    return tuple(found.get(place) for place in range(len(inputs)))


_norm_modulate.register_autograd(partial(_plain_backward, _plain_norm_modulate), setup_context=_keep)
_gate_add.register_autograd(partial(_plain_backward, _plain_gate_add), setup_context=_keep)
_gate_add_norm.register_autograd(partial(_plain_backward, _plain_gate_add_norm), setup_context=_keep)
_rms_rotate.register_autograd(partial(_plain_backward, _plain_rms_rotate), setup_context=_keep)


# ---------------------------------------------------------------- the table


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, group: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if not fits(x, shift, scale):
        return layers.norm_modulate(x, shift, scale, group, eps, dtype)
    out: Tensor = _norm_modulate(x, shift, scale, group, eps, dtype)
    return out


def gate_add(x: Tensor, y: Tensor, gate: Tensor, group: Tensor) -> Tensor:
    if not fits(x, y, gate) or x.stride(-1) != 1:
        return layers.gate_add(x, y, gate, group)
    if recording(x, y, gate):
        out: Tensor = _gate_add(x, y, gate, group)
        return out
    _gate_add_(x, y, gate, group)
    return x


def gate_add_norm(
    x: Tensor, y: Tensor, gate: Tensor, group: Tensor, norm: nn.LayerNorm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    if not fits(x, y, gate) or x.stride(-1) != 1:
        return layers.gate_add_norm(x, y, gate, group, norm, dtype)
    if recording(x, y, gate, weight, bias):
        both: tuple[Tensor, Tensor] = _gate_add_norm(x, y, gate, group, weight, bias, eps, dtype)
        return both
    return x, _gate_add_norm_(x, y, gate, group, weight, bias, eps, dtype)


def rms_rotate(x: Tensor, norm: RMSNorm, heads: int, rope: Tensor | None) -> Tensor:
    if not fits(x, norm.weight):
        return layers.rms_rotate(x, norm, heads, rope)
    out: Tensor = _rms_rotate(x, norm.weight, norm.eps, heads, rope)
    return out


FUSED = replace(
    PLAIN, norm_modulate=norm_modulate, gate_add=gate_add, gate_add_norm=gate_add_norm, rms_rotate=rms_rotate
)  # fmt: skip
