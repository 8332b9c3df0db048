"""The layers of the diffusion transformer, and the places where machines may touch them from outside.

A block sees its tokens `x [B, L, C]` and a `Scene`: everything about the tokens that stays the same through the trunk.
Nothing here knows on what machine, in how many pieces or how often it runs.  What may be exchanged from outside:

* `Attention.kernel`, a function (q, k, v, mask) -> out; `sdpa` unless replaced;
* the `Ops` table, the named operations in plain torch, replaced as a whole by `use_ops`;
* any `nn.Linear`, any `Block`, and the `Trunk` that runs the blocks.

Precision: the residual stream, the norms, the modulation and the rotation are float32 (float64 in a float64 model);
the linear layers run in the dtype of their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanloom.models.numerics import add, recording, wide

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Pair = tuple[Tensor, Tensor]  # keys and values, [B, M, H, D] each


def _same(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True)
class Scene:
    """What every block sees besides x.  L counts the tokens that x has: when x is cut, the [L] fields are cut alike.

    `group` chooses the row of `mod` for each token; with one row (G = 1) that row serves all tokens and `group` is
    not read.  A part that appends tokens appends to every [L] field and to each tensor of `tokens`.
    """

    rope: Tensor  # [L, D/2, 2]   cos and sin of each token's position
    group: Tensor  # [L] long     which timestep modulates it: 0 noisy, 1 clean (the given first frame, references)
    frame: Tensor  # [L] long     the latent frame it lies in, -1 for tokens outside the clip
    mod: Tensor  # [B, G, 6, C]   one row per distinct timestep, not per token
    context: Tensor | Pair  # [B, Lc, C] text, or its keys and values in the block at hand
    image: Tensor | Pair | None = None  # [B, Li, C] picture tokens of the models that have that branch, or theirs
    tokens: dict[str, Tensor] = field(default_factory=dict)  # [B, L, *] an adapter's own, one per token
    shared: dict[str, Any] = field(default_factory=dict)  # an adapter's own, the same for all tokens
    whole: Callable[[Tensor], Tensor] = _same  # [B, the tokens at hand, *] -> [B, all tokens, *]
    kept: Sequence[tuple[Pair, Pair | None]] | None = None  # of each block: keys and values of context and image

    def of_block(self, number: int) -> Scene:
        """The scene as block `number` is to see it."""
        if self.kept is None:
            return self
        context, image = self.kept[number]
        return replace(self, context=context, image=image, kept=None)


# ---------------------------------------------------------------- attention kernels and named operations


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, L, H, D], [B, M, H, D] twice -> [B, L, H, D]; mask [L, M] is True where a token may look."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def per_token(row: Tensor, group: Tensor) -> Tensor:
    """[B, G, C] -> [B, 1, C] when there is one row for all, else each token's row [B, L, C]."""
    return row if row.shape[1] == 1 else row[:, group]


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, group: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift for x [B, L, C] and rows [B, G, C], returned in `dtype`."""
    shape = x.shape[-1:]
    if shift.shape[:2] == (1, 1):  # one row for everything is the affine part of the norm: one pass instead of three
        return F.layer_norm(x, shape, 1 + scale[0, 0], shift[0, 0], eps).to(dtype)
    out = F.layer_norm(x, shape, None, None, eps)
    return torch.addcmul(per_token(shift, group), out, 1 + per_token(scale, group)).to(dtype)


def gate_add(x: Tensor, y: Tensor, gate: Tensor, group: Tensor) -> Tensor:
    """x + gate * y for x, y [B, L, C] and gate [B, G, C], in the dtype of x; without gradients into x."""
    y, gate = y.to(x.dtype), per_token(gate, group)
    return torch.addcmul(x, y, gate) if recording(x, y, gate) else x.addcmul_(y, gate)


def gate_add_norm(
    x: Tensor, y: Tensor, gate: Tensor, group: Tensor, norm: nn.LayerNorm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gated sum (`gate_add`) and its affine LayerNorm, the latter in `dtype`: both [B, L, C]."""
    x = gate_add(x, y, gate, group)
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps).to(dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, C] -> [B, L, H, D]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def rms_rotate(x: Tensor, norm: RMSNorm, heads: int, rope: Tensor | None) -> Tensor:
    """RMSNorm over all of C, then heads, then the rotation: [B, L, C] -> [B, L, H, D]."""
    x = split_heads(norm(x), heads)
    return x if rope is None else rotate(x, rope)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each pair (x[2j], x[2j+1]) of x [B, L, H, D] by the angle whose cos and sin are rope[:, j], in float32."""
    pairs = x.to(wide(x.dtype)).view(*x.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # the compiler fuses this form and cannot fuse complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), rope[:, None].unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    else:  # one pass: on a CPU ten times faster than taking even and odd parts
        numbers, turn = torch.view_as_complex(pairs), torch.view_as_complex(rope)[:, None]
        copied = x.dtype != pairs.dtype and not recording(x)
        turned = torch.view_as_real(numbers.mul_(turn) if copied else numbers * turn)
    return turned.flatten(-2).to(x.dtype)


def project_qkv(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three projections of the same tokens: [B, L, C] -> 3 x [B, L, C], not yet normalised or split in heads."""
    return attention.q(x), attention.k(x), attention.v(x)


def context_kv(attention: CrossAttention, context: Tensor, image: bool = False) -> tuple[Tensor, Tensor]:
    """Keys and values of what a block reads, [B, M, C] -> 2 x [B, M, H, D].

    They depend on the prompt alone, not on the step: `DiT.once` may make them for all steps.  `image` takes
    the projections of the picture branch.
    """
    if image:
        k, v, norm = attention.k_img(context), attention.v_img(context), attention.norm_k_img
    else:
        k, v, norm = attention.k(context), attention.v(context), attention.norm_k
    return attention.ops.rms_rotate(k, norm, attention.heads, None), split_heads(v, attention.heads)


def feed_forward(ffn: nn.Sequential, x: Tensor) -> Tensor:
    """Linear, GELU (tanh form), Linear: [B, L, C] -> [B, L, C].

    The hidden layer is the largest tensor of a forward pass; without gradients GELU writes over it.
    """
    up, gelu, down = ffn
    hidden: Tensor = up(x)
    if recording(hidden):
        hidden = gelu(hidden)
    else:
        torch.ops.aten.gelu_(hidden, approximate=gelu.approximate)
    out: Tensor = down(hidden)
    return out


@dataclass(frozen=True)
class Ops:
    """The named operations that a fused kernel may replace; the defaults are the definitions in plain torch."""

    norm_modulate: Callable[..., Tensor] = norm_modulate
    gate_add: Callable[..., Tensor] = gate_add
    gate_add_norm: Callable[..., tuple[Tensor, Tensor]] = gate_add_norm
    rms_rotate: Callable[..., Tensor] = rms_rotate
    project_qkv: Callable[..., tuple[Tensor, Tensor, Tensor]] = project_qkv
    context_kv: Callable[..., tuple[Tensor, Tensor]] = context_kv
    feed_forward: Callable[..., Tensor] = feed_forward


PLAIN = Ops()


# ---------------------------------------------------------------- modules


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; rounded to the dtype of x before the weight, as the reference."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        high = x.to(wide(x.dtype))
        length = torch.linalg.vector_norm(high, dim=-1, keepdim=True)  # sums squares without storing them
        scale = torch.rsqrt(length.square() / x.shape[-1] + self.eps)
        if recording(x, self.weight) or self.weight.dtype != x.dtype:
            return (high * scale).to(x.dtype) * self.weight
        high = high * scale if high is x else high.mul_(scale)
        return high.to(x.dtype).mul_(self.weight)


class Attention(nn.Module):
    """Self-attention of all tokens with all tokens; q and k are normalised over C before the split in heads."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.heads = heads
        self.kernel: Kernel = sdpa
        self.ops = PLAIN

    def forward(self, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, L, C] in the dtype of the parameters, rope [L, D/2, 2] -> [B, L, C]."""
        q, k, v = self.ops.project_qkv(self, x)
        q = self.ops.rms_rotate(q, self.norm_q, self.heads, rope)
        k = self.ops.rms_rotate(k, self.norm_k, self.heads, rope)
        return self.leave(self.kernel(q, k, split_heads(v, self.heads), mask))

    def leave(self, out: Tensor) -> Tensor:
        """Join the heads and project: [B, L, H, D] -> [B, L, C]."""
        y: Tensor = self.o(out.flatten(-2))
        return y


class CrossAttention(Attention):
    """Tokens read a context, and where the model has the branch, picture tokens by a softmax of their own."""

    def __init__(self, dim: int, heads: int, eps: float, *, image: bool = False) -> None:
        super().__init__(dim, heads, eps)
        if image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(  # type: ignore[override]  # reads a second sequence
        self, x: Tensor, context: Tensor | Pair, image: Tensor | Pair | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x [B, L, C], context [B, M, C], image [B, Li, C] -> [B, L, C]; mask [L, M] is of the context only.

        context and image may be the keys and values that `pair` made of them.
        """
        q = self.ops.rms_rotate(self.q(x), self.norm_q, self.heads, None)
        out = self.kernel(q, *self.pair(context), mask)
        if image is not None:
            out = out + self.kernel(q, *self.pair(image, image=True), None)
        return self.leave(out)

    def read(self, context: Tensor, image: Tensor | None) -> tuple[Pair, Pair | None]:
        """Keys and values of both."""
        return self.pair(context), None if image is None else self.pair(image, image=True)

    def pair(self, read: Tensor | Pair, *, image: bool = False) -> Pair:
        """Keys and values of what is read; as they are where it is such already."""
        if isinstance(read, tuple):
            return read
        made: Pair = self.ops.context_kv(self, read, image)
        return made


class Block(nn.Module):
    """One transformer block: modulated self-attention, cross-attention, modulated feed-forward.

    `after_cross` and `after` hold the parts that adapters add: modules (x, scene) -> x.
    """

    def __init__(self, dim: int, ffn_dim: int, heads: int, eps: float, *, image: bool = False) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = Attention(dim, heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)  # 1 and 2 have no parameters: they are in norm_modulate
        self.cross_attn = CrossAttention(dim, heads, eps, image=image)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.after_cross, self.after = nn.ModuleList(), nn.ModuleList()
        self.eps = eps
        self.ops = PLAIN

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        """x [B, L, C] float32 -> the same; without gradients x is written over."""
        ops, group, eps = self.ops, scene.group, self.eps
        dtype = self.norm3.weight.dtype  # not a Linear's: a stand-in for one may store its weight in another
        mod = self.modulation.to(scene.mod.dtype)[:, None] + scene.mod
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = mod.unbind(2)  # 6 x [B, G, C]

        y = self.self_attn(ops.norm_modulate(x, shift, scale, group, eps, dtype), scene.rope)
        x, y = ops.gate_add_norm(x, y, gate, group, self.norm3, dtype)
        x = add(x, self.cross_attn(y, scene.context, scene.image))
        for part in self.after_cross:
            x = part(x, scene)
        y = ops.norm_modulate(x, shift_ffn, scale_ffn, group, eps, dtype)
        x = ops.gate_add(x, ops.feed_forward(self.ffn, y), gate_ffn, group)
        for part in self.after:
            x = part(x, scene)
        return x


class Trunk(nn.Module):
    """(x, scene) -> x: the blocks one after another.  Whatever cuts the sequence or skips a step stands here.

    The blocks belong to the DiT, whose tensor names must be `blocks.N...`; the trunk only refers to them, so that
    `dit.trunk = Something(dit.trunk)` changes no name.  `enter` holds parts of adapters: (x, scene) -> scene.
    """

    blocks: nn.ModuleList

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.__dict__["blocks"] = blocks  # past nn.Module's registration: see above
        self.enter = nn.ModuleList()

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        for part in self.enter:
            scene = part(x, scene)
        x = x if recording(x) else x.clone()  # the blocks write over it
        for number, block in enumerate(self.blocks):
            x = block(x, scene.of_block(number))
        return x


def use_ops(root: nn.Module, ops: Ops) -> None:
    """Give every block and attention under `root` (a DiT, a Trunk or any part) this table of operations."""
    for module in root.modules():
        if isinstance(module, Block | Attention):
            module.ops = ops
        elif isinstance(module, Trunk):
            use_ops(module.blocks, ops)
