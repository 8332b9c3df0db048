"""Linear layers with weights in int8, one symmetric scale for each row of outputs.

`Int8Linear` stores; it computes in the number format of its input.  An element of its weights differs from the
original by at most half a scale, which is 1/254 of the row's largest value.

`Int8Compute` also rounds its input to int8, one scale for each token, found anew each time, and multiplies integers:
the sum is exact, so all of the error is in the two roundings.  Runs on CPUs and on NVIDIA GPUs from Turing on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wanloom.models.numerics import wide
from wanloom.runtime.frozen import RowScaled, pieces, row_scales

LARGEST = 127  # -128 is not used, so that a weight and its negative are equally near
TILE = 8  # CUDA's int8 product takes widths that are multiples of it
LEAST_TOKENS = 32  # and more than 16 rows


class Int8Linear(RowScaled):
    """codes [out, in] int8 times scale [out] float32."""

    FORMAT = torch.int8

    @staticmethod
    def narrow(values: Tensor) -> tuple[Tensor, Tensor]:
        return to_int8(values)

    def finite(self) -> bool:
        return bool(torch.isfinite(self.scale).all())


class Int8Compute(Int8Linear):
    """The same weights; the product is one of integers.  Its gradient is that of `Int8Linear`."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        out = flat.new_empty(flat.shape[0], self.out_features)
        for first, last in pieces(flat.shape[0], self.out_features):
            y = self._integers(flat[first:last])
            out[first:last] = y if bias is None else y.add_(bias)
        return out.view(*x.shape[:-1], self.out_features)

    def _integers(self, x: Tensor) -> Tensor:
        """x [n, in] -> the product [n, out] without the bias, float32 (float64 of float64)."""
        n, k = x.shape
        codes, scale = to_int8(x.to(wide(x.dtype)))
        weights = self.codes
        if x.is_cuda:
            codes = F.pad(codes, (0, -k % TILE, 0, max(0, LEAST_TOKENS - n)))
            if k % TILE or self.out_features % TILE:
                weights = F.pad(weights, (0, -k % TILE, 0, -self.out_features % TILE))
        product = torch._int_mm(codes, weights.t())[:n, : self.out_features]
        return product.to(scale.dtype).mul_(scale[:, None]).mul_(self.scale)


def to_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """values [n, k] -> codes [n, k] int8 and scales [n] whose product is nearest to them."""
    scale = row_scales(values, LARGEST)
    return (values / scale[:, None]).round_().to(torch.int8), scale
