"""A linear layer whose weights are kept in few bits and made wide piece by piece while it computes.

`FrozenLinear` is what all of them share: it stands in for an `nn.Linear`, computes in the number format of its input,
and has the gradient of an `nn.Linear` with the widened weights, to the input and to the bias; the weights have none.
A subclass says how its weights are stored and what `rows` of them are.

Weights and scales are buffers.  They move with the module, and keep their number formats whatever the module is asked
to become: `.float()` or `.to(torch.bfloat16)` would widen or ruin them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanloom.models.numerics import recording, wide

PIECE = 2**24  # weights that are wide at once: 32 MB in bfloat16, and a product that still fills a GPU


class FrozenLinear(nn.Module, ABC):
    """x [..., in] -> x @ W^T + bias [..., out], in the dtype of x."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    # There is no whole tensor of weights.  Modules of transformers look at a layer's weight to learn in which dtype it
    # computes, and leave their input alone when it is no tensor.
    weight = None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.bias = bias

    # ------------------------------------------------------------ what a subclass says

    @abstractmethod
    def rows(self, first: int, last: int) -> Tensor:
        """Rows of the weights [last - first, in], float32."""

    @abstractmethod
    def finite(self) -> bool:
        """Whether all weights are finite numbers, told without widening them."""

    # ------------------------------------------------------------ computing

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All weights [out, in]."""
        return torch.cat([self.rows(*piece).to(dtype) for piece in self._pieces()])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x.  ValueError for another width."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has width {x.shape[-1]}, this layer takes {self.in_features}")
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if recording(x) or (bias is not None and recording(bias)):
            return cast(Tensor, _Product.apply(x, bias, self))  # type: ignore[no-untyped-call]  # torch's own
        return self.product(x, bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without its gradient; `bias` in the dtype of x."""
        flat = x.reshape(-1, self.in_features)
        if self.out_features * self.in_features <= PIECE:
            out = F.linear(flat, self.rows(0, self.out_features).to(x.dtype), bias)
        else:
            out = flat.new_empty(flat.shape[0], self.out_features)
            for first, last in self._pieces():
                part = None if bias is None else bias[first:last]
                out[:, first:last] = F.linear(flat, self.rows(first, last).to(x.dtype), part)
        return out.view(*x.shape[:-1], self.out_features)

    def product_back(self, grad: Tensor) -> Tensor:
        """The gradient to the input: grad [..., out] -> grad @ W [..., in], summed over the pieces in float32."""
        flat = grad.reshape(-1, self.out_features)
        total = flat.new_zeros(flat.shape[0], self.in_features, dtype=wide(grad.dtype))
        for first, last in self._pieces():
            total += flat[:, first:last] @ self.rows(first, last).to(grad.dtype)
        return total.to(grad.dtype).view(*grad.shape[:-1], self.in_features)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        return pieces(self.out_features, self.in_features)

    # ------------------------------------------------------------ being a module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Everything moves; nothing but the bias changes its number format."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        for name, kept in before.items():
            moved = self._buffers[name]
            if kept is not None and moved is not None and moved.dtype != kept.dtype:
                self._buffers[name] = kept.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class RowScaled(FrozenLinear):
    """codes [out, in] in 8 bits times scale [out] float32."""

    FORMAT: ClassVar[torch.dtype]
    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(codes.shape[1], codes.shape[0], bias)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @staticmethod
    @abstractmethod
    def narrow(values: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [n, in] float32 -> their codes [n, in] and scales [n]."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """The layer of an nn.Linear's weight [out, in] and bias, narrowed piece by piece."""
        weight = weight.detach()
        codes, scale = torch.empty_like(weight, dtype=cls.FORMAT), weight.new_empty(len(weight), dtype=torch.float32)
        for first, last in pieces(*weight.shape):
            codes[first:last], scale[first:last] = cls.narrow(weight[first:last].float())
        return cls(codes, scale, bias)

    def rows(self, first: int, last: int) -> Tensor:
        return self.codes[first:last].float().mul_(self.scale[first:last, None])


class _Product(torch.autograd.Function):
    """`FrozenLinear.product` with its gradient.  What is kept for it is the layer, which has its weights anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_input, to_bias, _ = ctx.needs_input_grad
        return (
            ctx.layer.product_back(grad) if to_input else None,
            grad.flatten(0, -2).sum(0) if to_bias else None,
            None,
        )


def pieces(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) row of pieces of at most PIECE values, one row at least."""
    step = max(1, PIECE // max(columns, 1))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def row_scales(weight: Tensor, largest: float) -> Tensor:
    """For each row of weight [n, k] float32 the scale [n] that brings its largest value to `largest`.

    It is 1 where that would not be a normal number: such a row becomes zeros.
    """
    scale = weight.abs().amax(-1) / largest
    return torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)
