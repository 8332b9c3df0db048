"""Tokens of a latent frame read what belongs to that frame: speech at this moment, the face of this picture.

A part for `block.after` or `block.after_cross`.  Frames are told apart by a mask over (token, memory) and not by
folding time into the batch, so the part does not mind how the sequence is cut, padded or lengthened.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanloom.models.layers import CrossAttention, RMSNorm, Scene

EPS = 1e-6  # of the norms between the convolutions


class CausalConv(nn.Module):
    """A convolution over time that sees no later frame: [B, T, Cin] -> [B, ceil(T / stride), Cout]."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x.transpose(1, 2), (self.conv.kernel_size[0] - 1, 0), mode="replicate")
        out: Tensor = self.conv(x)
        return out.transpose(1, 2)


def norm_silu(x: Tensor) -> Tensor:
    """SiLU of the norm without parameters, over the last dimension."""
    return F.silu(F.layer_norm(x, x.shape[-1:], None, None, EPS))


class FrameCross(nn.Module):
    """x + attention of each token to its own frame's memory, `scene.shared[name]` [B, F, N, C].

    Tokens outside the clip (frame -1) read nothing and stay as they are.
    """

    def __init__(self, name: str, dim: int, heads: int, eps: float, attn: nn.Module | None = None) -> None:
        super().__init__()
        self.attn = CrossAttention(dim, heads, eps) if attn is None else attn
        self.name, self.eps = name, eps

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        """x [B, L, C] float32 -> the same."""
        memory: Tensor = scene.shared[self.name]
        norm = self.attn.norm_q
        assert isinstance(norm, RMSNorm)
        dtype = norm.weight.dtype
        frames = scene.frame.new_ones(memory.shape[1]).cumsum(0) - 1
        owner = frames.repeat_interleave(memory.shape[2])  # [F * N]
        reads = scene.frame >= 0
        # A row that may look nowhere would be NaN: tokens outside the clip look everywhere and are then taken out.
        mask = (scene.frame[:, None] == owner) | ~reads[:, None]
        query = self.query(x, scene).to(dtype)
        out: Tensor = self.attn(query, memory.flatten(1, 2).to(dtype), mask=mask)
        return x + torch.where(reads[None, :, None], out, torch.zeros_like(out))

    def query(self, x: Tensor, scene: Scene) -> Tensor:
        """What the tokens ask with: their norm, unless a kind of speech or face says otherwise."""
        return F.layer_norm(x, x.shape[-1:], None, None, self.eps)
