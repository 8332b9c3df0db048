"""Blocks that take their tokens in rows: long videos in little memory.  Exact: other bits by rounding alone.

    use_rows(dit, 4096)         # from here on each block works on 4096 tokens at a time

How can that be exact?  A token needs the others for one thing only, their keys and values in self-attention.  These are
made first, for all tokens, in rows; then some rows after the other go through the whole rest: queries, attention to all
keys, context, feed-forward.  What else a block holds - normed tokens, queries, the attention's output, the hidden layer
of the feed-forward, the largest of all - is then as long as the rows.  Parts that adapters put between are given all
tokens, as always.

The price: norms before self-attention are computed twice, and products of few rows may be slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from wanloom.models.dit import DiT
from wanloom.models.layers import Attention, Block, Scene, split_heads
from wanloom.models.numerics import add, recording


@dataclass(frozen=True)
class InRows:
    """The way through a block, (x, scene) -> x, with `rows` tokens at a time.  RuntimeError with gradients."""

    block: Block
    rows: int

    def __call__(self, x: Tensor, scene: Scene) -> Tensor:
        if recording(x, self.block.modulation):
            raise RuntimeError("blocks in rows write over their tokens, which backward would read: train without them")
        mod = self.block.modulation.to(scene.mod.dtype)[:, None] + scene.mod
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = mod.unbind(2)  # 6 x [B, G, C]
        self._attend(x, scene, shift, scale, gate)
        for part in self.block.after_cross:
            x = part(x, scene)
        self._feed_forward(x, scene, shift_ffn, scale_ffn, gate_ffn)
        for part in self.block.after:
            x = part(x, scene)
        return x

    def _attend(self, x: Tensor, scene: Scene, shift: Tensor, scale: Tensor, gate: Tensor) -> None:
        """Self-attention and what the tokens read, into x."""
        block, ops = self.block, self.block.ops
        attention, cross, dtype = block.self_attn, block.cross_attn, block.norm3.weight.dtype
        k, v = self._keys(x, scene, shift, scale)
        context = cross.pair(scene.context)
        image = None if scene.image is None else cross.pair(scene.image, image=True)
        for cut in self._cuts(x):
            rows, group = x[:, cut], scene.group[cut]
            y = ops.norm_modulate(rows, shift, scale, group, block.eps, dtype)
            y = attention.leave(attention.kernel(queries(attention, y, scene.rope[cut]), k, v, None))
            made, y = ops.gate_add_norm(rows, y, gate, group, block.norm3, dtype)
            q = queries(cross, y, None)
            out = cross.kernel(q, *context, None)
            if image is not None:
                out = out + cross.kernel(q, *image, None)
            put(rows, add(made, cross.leave(out)))

    def _keys(self, x: Tensor, scene: Scene, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens: 2 x [B, L, H, D]."""
        block, attention = self.block, self.block.self_attn
        dtype = block.norm3.weight.dtype
        shape = (*x.shape[:2], attention.heads, x.shape[2] // attention.heads)
        k, v = x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)
        for cut in self._cuts(x):
            y = block.ops.norm_modulate(x[:, cut], shift, scale, scene.group[cut], block.eps, dtype)
            k[:, cut] = attention.ops.rms_rotate(attention.k(y), attention.norm_k, attention.heads, scene.rope[cut])
            v[:, cut] = split_heads(attention.v(y), attention.heads)
        return k, v

    def _feed_forward(self, x: Tensor, scene: Scene, shift: Tensor, scale: Tensor, gate: Tensor) -> None:
        """The feed-forward's gated sum, into x."""
        block, ops, dtype = self.block, self.block.ops, self.block.norm3.weight.dtype
        for cut in self._cuts(x):
            rows, group = x[:, cut], scene.group[cut]
            y = ops.norm_modulate(rows, shift, scale, group, block.eps, dtype)
            put(rows, ops.gate_add(rows, ops.feed_forward(block.ffn, y), gate, group))

    def _cuts(self, x: Tensor) -> Iterator[slice]:
        return (slice(begin, begin + self.rows) for begin in range(0, x.shape[1], self.rows))


def queries(attention: Attention, y: Tensor, rope: Tensor | None) -> Tensor:
    """[B, n, C] -> [B, n, H, D]."""
    q: Tensor = attention.ops.rms_rotate(attention.q(y), attention.norm_q, attention.heads, rope)
    return q


def put(rows: Tensor, made: Tensor) -> None:
    """`made` into the tokens `rows`, where an operation has not written them itself."""
    if made is not rows:
        rows.copy_(made)


def use_rows(dit: DiT, rows: int) -> None:
    """Let every block of a transformer work on `rows` tokens at a time.  For use without gradients.

    Sequence parallelism cuts the tokens already, and its kernels want all of a process's: not both.
    """
    for block in dit.blocks:
        assert isinstance(block, Block), "what else stands in for a block stands around this"
        setattr(block, "forward", InRows(block, rows))  # noqa: B010 (mypy: a method)
