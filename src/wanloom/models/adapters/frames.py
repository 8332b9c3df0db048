"""Tokens of a latent frame read what belongs to that frame: speech at this moment, the face of this picture.

A part for `block.after` or `block.after_cross`.  Frames are told apart by a mask over (token, memory) and not by
folding time into the batch, so the part does not mind how the sequence is cut, padded or lengthened.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanloom.models.layers import CrossAttention, Scene


class FrameCross(nn.Module):
    """x + attention of each token to its own frame's memory, `scene.shared[name]` [B, F, N, C].

    Tokens outside the clip (frame -1) read nothing and stay as they are.
    """

    def __init__(self, name: str, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.attn = CrossAttention(dim, heads, eps)
        self.name, self.eps = name, eps

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        """x [B, L, C] float32 -> the same."""
        memory: Tensor = scene.shared[self.name]
        dtype = self.attn.norm_q.weight.dtype
        frames = scene.frame.new_ones(memory.shape[1]).cumsum(0) - 1
        owner = frames.repeat_interleave(memory.shape[2])  # [F * N]
        reads = scene.frame >= 0
        # A row that may look nowhere would be NaN: tokens outside the clip look everywhere and are then taken out.
        mask = (scene.frame[:, None] == owner) | ~reads[:, None]
        normed = F.layer_norm(x, x.shape[-1:], None, None, self.eps).to(dtype)
        out: Tensor = self.attn(normed, memory.flatten(1, 2).to(dtype), mask=mask)
        return x + torch.where(reads[None, :, None], out, torch.zeros_like(out))
