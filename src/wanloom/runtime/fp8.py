"""Linear layers with weights in 8-bit floating point, one scale for each row of outputs.

`Fp8Linear` stores; it computes in the number format of its input.  e4m3 has three bits of mantissa, so an element of
its weights differs from the original by at most a sixteenth of itself, or by 2^-10 of the row's scale, which is the
row's largest value / 448.

`Fp8Compute` also rounds its input to e4m3, one scale for each token, found anew each time, and multiplies 8-bit
numbers on the tensor cores of NVIDIA GPUs from Ada and Hopper on; the product comes in bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wanloom.models.numerics import wide
from wanloom.runtime.frozen import RowScaled, pieces, row_scales
from wanloom.runtime.kernels import require_method

E4M3 = torch.float8_e4m3fn
TILE = 16  # the tensor cores' product takes widths that are multiples of it
# Bits of the exponent field and above all ones: what is no number in e4m3 (it has no infinity), and in e5m2.
NOT_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}


class Fp8Linear(RowScaled):
    """codes [out, in] float8 (e4m3, or e5m2 as some files have it) times scale [out] float32."""

    FORMAT = E4M3

    @staticmethod
    def narrow(values: Tensor) -> tuple[Tensor, Tensor]:
        return to_fp8(values)

    def finite(self) -> bool:
        special = NOT_FINITE[self.codes.dtype]
        codes = self.codes.view(torch.uint8)
        bad = any(bool(((codes[first:last] & special) == special).any()) for first, last in pieces(*self.codes.shape))
        return not bad and bool(torch.isfinite(self.scale).all())


class Fp8Compute(Fp8Linear):
    """The same weights (e4m3); the product is one of 8-bit numbers.  Its gradient is that of `Fp8Linear`."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not x.is_cuda:  # torch would compute it on a CPU, slowly and without a word
            require_method("fp8-compute", None)
        flat = x.reshape(-1, self.in_features)
        codes, scale = to_fp8(flat.to(wide(x.dtype)))
        weights, weight_scale = self.codes, self.scale
        bias = None if bias is None else bias.to(torch.bfloat16)
        k, n = -self.in_features % TILE, -self.out_features % TILE
        if k or n:  # no linear layer of a published model
            codes, weights = _pad(codes, k, 0), _pad(weights, k, n)
            weight_scale = F.pad(weight_scale, (0, n))
            bias = None if bias is None else F.pad(bias, (0, n))
        y = torch._scaled_mm(
            codes,
            weights.t(),
            scale_a=scale.float()[:, None],
            scale_b=weight_scale[None, :],
            bias=bias,
            out_dtype=torch.bfloat16,  # the only one that scales by row and column go with
            use_fast_accum=True,
        )
        return y[:, : self.out_features].to(x.dtype).view(*x.shape[:-1], self.out_features)


def _pad(codes: Tensor, columns: int, rows: int) -> Tensor:
    """Zeros to the right and below; as bytes, because few operations know 8-bit floating point."""
    return F.pad(codes.view(torch.uint8), (0, columns, 0, rows)).view(codes.dtype)


def to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """values [n, k] -> codes [n, k] e4m3 and scales [n] whose product is nearest to them."""
    scale = row_scales(values, torch.finfo(E4M3).max)
    return (values / scale[:, None]).to(E4M3), scale
