"""The number formats of GGUF files (ggml's), and a linear layer that keeps them packed.

A row of weights is cut into blocks of 32 or 256 values.  A block has a scale in half precision, some have a minimum
too, and so many bits for each value; the K formats have scales of their own for groups of 16 or 32 values, in 4 or 6
bits, relative to that of the block.  Each function below turns blocks [n, bytes] into their values [n, values] in
float32.  Layouts: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wanloom.runtime.frozen import FrozenLinear, pieces


def _half(blocks: Tensor, at: int) -> Tensor:
    """The half-precision number at a byte of each block: [n, bytes] -> [n, 1] float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _split(data: Tensor, bits: int) -> Tensor:
    """Each byte in numbers of so many bits, the lowest first: [n, *, k] -> [n, *, 8 / bits, k]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    return torch.bitwise_and(data.unsqueeze(-2) >> shifts[:, None], 2**bits - 1)


def _nibbles(data: Tensor) -> Tensor:
    """[n, k] bytes -> [n, 2k]: all lower halves, then all upper ones."""
    return _split(data, 4).flatten(1)


def _fifth_bits(data: Tensor) -> Tensor:
    """Four bytes -> the fifth bit of 32 values, in its place: [n, 4] -> [n, 32] of 0 or 16."""
    return (_split(data, 1).transpose(1, 2) << 4).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _nibbles(b[:, 4:]).float() + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])).float() + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return _half(b, 0) * b[:, 2:].contiguous().view(torch.int8).float()


def _q2_k(b: Tensor) -> Tensor:
    """16 groups of 16 values: a byte of scale and minimum each, then two bits a value, then both of the block."""
    groups = b[:, :16, None]
    quads = _split(b[:, 16:80].view(-1, 2, 32), 2).reshape(-1, 16, 16).float()
    scale = _half(b, 80)[:, None] * (groups & 15).float()
    least = _half(b, 82)[:, None] * (groups >> 4).float()
    return (scale * quads - least).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    """The third bits, two bits a value, 16 scales of 6 bits (their upper two last), the scale of the block."""
    third = _split(b[:, :32], 1).reshape(-1, 16, 16)
    quads = _split(b[:, 32:96].view(-1, 2, 32), 2).reshape(-1, 16, 16)
    upper = _split(b[:, 104:108], 2).flatten(1)
    scales = (_nibbles(b[:, 96:104]) | (upper << 4)).float() - 32
    values = (quads | (third << 2)).float() - 4
    return ((_half(b, 108) * scales)[:, :, None] * values).flatten(1)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes -> eight scales and eight minima of 6 bits, [n, 8] each (Q4_K and Q5_K)."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scale = torch.cat((a & 63, (c & 15) | ((a >> 6) << 4)), 1)
    least = torch.cat((b & 63, (c >> 4) | ((b >> 6) << 4)), 1)
    return scale.float(), least.float()


def _of_eight(b: Tensor, values: Tensor) -> Tensor:
    """Eight groups of 32 values [n, 8, 32] with scales and minima at byte 4, those of the block before them."""
    scale, least = _scales_and_minima(b[:, 4:16])
    scale, least = _half(b, 0) * scale, _half(b, 2) * least
    return (scale[:, :, None] * values.float() - least[:, :, None]).flatten(1)


def _q4_k(b: Tensor) -> Tensor:
    return _of_eight(b, _split(b[:, 16:].view(-1, 4, 32), 4).reshape(-1, 8, 32))


def _q5_k(b: Tensor) -> Tensor:
    low = _split(b[:, 48:].view(-1, 4, 32), 4).reshape(-1, 8, 32)
    return _of_eight(b, low | (_split(b[:, 16:48], 1) << 4))


def _q6_k(b: Tensor) -> Tensor:
    """Lower four bits, upper two bits, 16 signed scales, the scale of the block."""
    low = _split(b[:, :128].view(-1, 2, 64), 4).reshape(-1, 2, 4, 32)
    high = _split(b[:, 128:192].view(-1, 2, 32), 2)
    values = (low | (high << 4)).reshape(-1, 16, 16).float() - 32
    scales = _half(b, 208) * b[:, 192:208].contiguous().view(torch.int8).float()
    return (scales[:, :, None] * values).flatten(1)


@dataclass(frozen=True)
class BlockFormat:
    """How many values a block has in how many bytes, where its half-precision numbers lie, and how it is read."""

    values: int
    size: int
    halves: tuple[int, ...]
    read: Callable[[Tensor], Tensor]


FORMATS = {
    "Q4_0": BlockFormat(32, 18, (0,), _q4_0),
    "Q4_1": BlockFormat(32, 20, (0, 2), _q4_1),
    "Q5_0": BlockFormat(32, 22, (0,), _q5_0),
    "Q5_1": BlockFormat(32, 24, (0, 2), _q5_1),
    "Q8_0": BlockFormat(32, 34, (0,), _q8_0),
    "Q2_K": BlockFormat(256, 84, (80, 82), _q2_k),
    "Q3_K": BlockFormat(256, 110, (108,), _q3_k),
    "Q4_K": BlockFormat(256, 144, (0, 2), _q4_k),
    "Q5_K": BlockFormat(256, 176, (0, 2), _q5_k),
    "Q6_K": BlockFormat(256, 210, (208,), _q6_k),
}


def dequantise(packed: Tensor, format_: str) -> Tensor:
    """Packed bytes [..., blocks * bytes] -> values [..., blocks * values], float32."""
    form = FORMATS[format_]
    blocks = packed.reshape(-1, form.size)
    return form.read(blocks).view(*packed.shape[:-1], packed.shape[-1] // form.size * form.values)


def finite(packed: Tensor, format_: str) -> bool:
    """Whether all values are: those of a block are as soon as its half-precision numbers are."""
    form = FORMATS[format_]
    blocks = packed.reshape(-1, form.size)
    return all(
        bool(torch.isfinite(_half(blocks[first:last], at)).all())
        for first, last in pieces(len(blocks), form.size)
        for at in form.halves
    )


class GgufLinear(FrozenLinear):
    """packed [out, bytes of a row] uint8 in a format of `FORMATS`, as it lies in the file."""

    packed: Tensor

    def __init__(self, packed: Tensor, format_: str, bias: Tensor | None = None) -> None:
        form = FORMATS[format_]
        super().__init__(packed.shape[1] // form.size * form.values, packed.shape[0], bias)
        self.format = format_
        self.register_buffer("packed", packed)

    def rows(self, first: int, last: int) -> Tensor:
        return dequantise(self.packed[first:last], self.format)

    def finite(self) -> bool:
        return finite(self.packed, self.format)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format}"
