"""A transformer step as the official code formulates it, with our weights: the plain reference of `step.py`.

Every token has a timestep of its own, so the time layers run for all tokens in float32 and modulation is a float32
tensor [B, L, 6, C] that each block adds its table to; rotation is complex and in float64; nothing is written in place.
The attention kernel is the one that we use.  Source of the formulation: official wan/modules/model.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wanloom.models.dit import DiT, grid_positions, rope_at
from wanloom.models.layers import Attention, Block, Kernel, RMSNorm, split_heads


def official_step(dit: DiT, kernel: Kernel) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x [1, C, T, h, w], t [1, 1], context) -> velocity."""

    def forward(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        tokens, grid = dit.patchify(x)
        time, mod = dit.embed_time(t.expand(1, tokens.shape[1]), tokens.dtype)  # [1, L, C], [1, L, 6, C]
        turn = torch.view_as_complex(rope_at(grid_positions(grid, tokens), dit.config.head_dim, torch.float64))
        text = dit.embed_context(context)
        for block in dit.blocks:
            assert isinstance(block, Block)
            tokens = _block(block, tokens, mod, turn, text, kernel)
        shift, scale = (dit.head.modulation.float()[:, None] + time[:, :, None]).unbind(2)
        tokens = _norm(tokens, dit.config.eps) * (1 + scale) + shift
        weight, bias = dit.head.head.weight.float(), dit.head.head.bias.float()
        return dit.unpatchify(F.linear(tokens, weight, bias), grid)

    return forward


def _block(block: Block, x: Tensor, mod: Tensor, turn: Tensor, text: Tensor, kernel: Kernel) -> Tensor:
    dtype, eps = block.norm3.weight.dtype, block.eps
    rows = block.modulation.float()[:, None] + mod
    shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = rows.unbind(2)
    y = (_norm(x, eps) * (1 + scale) + shift).to(dtype)
    attention = block.self_attn
    q = _rotated(_rms(attention.q(y), attention.norm_q), attention, turn)
    k = _rotated(_rms(attention.k(y), attention.norm_k), attention, turn)
    out = kernel(q.to(dtype), k.to(dtype), split_heads(attention.v(y), attention.heads), None)
    x = x + attention.o(out.flatten(2)) * gate
    y = F.layer_norm(x, x.shape[-1:], block.norm3.weight.float(), block.norm3.bias.float(), eps).to(dtype)
    cross = block.cross_attn
    heads = cross.heads
    q, k = split_heads(_rms(cross.q(y), cross.norm_q), heads), split_heads(_rms(cross.k(text), cross.norm_k), heads)
    x = x + cross.o(kernel(q, k, split_heads(cross.v(text), heads), None).flatten(2))
    y = block.ffn((_norm(x, eps) * (1 + scale_ffn) + shift_ffn).to(dtype))
    return x + y * gate_ffn


def _norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], None, None, eps)


def _rms(x: Tensor, norm: RMSNorm) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype) * norm.weight


def _rotated(x: Tensor, attention: Attention, turn: Tensor) -> Tensor:
    """[1, L, C] -> [1, L, H, D] float32."""
    heads = split_heads(x, attention.heads)
    pairs = torch.view_as_complex(heads.to(torch.float64).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2).float()
