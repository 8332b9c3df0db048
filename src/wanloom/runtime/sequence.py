"""Sequence parallelism: each process has a part of the tokens, and only self-attention needs them all.

`Sequenced` stands in for the trunk of a DiT: it cuts the tokens and what the scene says of each, runs the trunk on the
part of this process, and joins what comes out.  Cross-attention, feed-forward and the parts of adapters work on their
tokens as they are; `scene.whole` gives a part all tokens where it asks.  Self-attention exchanges by its kernel:

* Ulysses (arXiv 2309.14509): heads are dealt out and tokens joined, so each process has all tokens of some heads, and
  the model's own kernel runs on them;
* the ring (arXiv 2310.01889): keys and values go round, attention to each part is computed with its log-sum-exp, and
  the parts are merged as an online softmax does.

Tokens that do not divide are padded at the end with copies of the last one, whose keys are cut off and whose results
are dropped: no mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from wanloom import pulse
from wanloom.models.layers import Attention, CrossAttention, Kernel, Scene, Trunk
from wanloom.models.numerics import wide
from wanloom.runtime.parallel import gather, swap

PER_TOKEN = ("rope", "group", "frame")  # the [L] fields of Scene
SCORES = 2**26  # at most so many attention scores at a time: 256 MB in float32


class Sequenced(nn.Module):
    """A trunk (x, scene) -> x among the processes of mesh["ring"] and mesh["ulysses"].

    It wraps the kernels of all self-attention in the trunk, also when they are chosen afterwards; with a ring of more
    than one the ring computes attention itself.  Whatever skips a step stands around it: `Cache(Sequenced(trunk))`.
    """

    def __init__(self, trunk: Trunk, mesh: DeviceMesh) -> None:
        super().__init__()
        self.trunk = trunk
        self._share = _Share(mesh)
        inside = (*trunk.modules(), *trunk.blocks.modules())
        self._attentions = [m for m in inside if isinstance(m, Attention) and not isinstance(m, CrossAttention)]
        self._wrap()

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        """x [B, L, C] -> the same, on every process."""
        share = self._share
        self._wrap()
        share.begin(x.shape[1])
        cut: dict[str, Any] = {name: share.cut(getattr(scene, name), 0) for name in PER_TOKEN}
        cut["tokens"] = {name: share.cut(t, 1) for name, t in scene.tokens.items()}
        return share.whole(self.trunk(share.cut(x, 1), replace(scene, **cut, whole=share.whole)))

    def _wrap(self) -> None:
        for attention in self._attentions:
            if not isinstance(attention.kernel, _Exchanged):
                attention.kernel = _Exchanged(attention.kernel, self._share)


class _Share:
    """The part of one process in a sequence of `length` tokens: `each` of them, the last ones perhaps padding."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.ring, self.ulysses = mesh.get_group("ring"), mesh.get_group("ulysses")
        self.size = self.ring.size() * self.ulysses.size()
        self.rank = self.ring.rank() * self.ulysses.size() + self.ulysses.rank()
        self.length = self.each = 0

    def begin(self, length: int) -> None:
        self.length, self.each = length, -(-length // self.size)

    def cut(self, t: Tensor, dim: int) -> Tensor:
        """This process's tokens along `dim`, padded with copies of the last token."""
        begin = min(self.rank * self.each, self.length)
        end = min(begin + self.each, self.length)
        part = t.narrow(dim, begin, end - begin)
        missing = self.each - (end - begin)
        return torch.cat([part] + [t.narrow(dim, self.length - 1, 1)] * missing, dim) if missing else part

    def whole(self, t: Tensor) -> Tensor:
        """[B, the tokens of this process, *] -> [B, all tokens, *]."""
        return gather(gather(t, 1, self.ulysses), 1, self.ring)[:, : self.length]


@dataclass(frozen=True)
class _Exchanged:
    """A kernel for q, k, v [B, L of this process, H, D], each attending to all L."""

    kernel: Kernel
    share: _Share

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        share = self.share
        pulse.beat()
        if mask is not None:
            raise ValueError("self-attention with a mask cannot be cut among processes: run it on one")
        if q.shape[1] != share.each:
            raise ValueError(f"{q.shape[1]} tokens came to a process that has {share.each} of {share.length}")
        q, k, v = (swap(t, 2, 1, share.ulysses) for t in (q, k, v))
        if share.ring.size() == 1:
            out = self.kernel(q, k[:, : share.length], v[:, : share.length], None)
        else:
            out = ring_attention(q, k, v, share.length, share.ring)
        return swap(out, 1, 2, share.ulysses)


# ---------------------------------------------------------------- the ring


def ring_attention(q: Tensor, k: Tensor, v: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
    """Attention of this process's q [B, n, H, D] to the keys and values of all, of which `length` are no padding."""
    out: Tensor = _Ring.apply(q, k, v, length, group)  # type: ignore[no-untyped-call]  # torch's own
    return out


class _Ring(torch.autograd.Function):
    """Keys and values go round once; backward sends them round again, and their gradients with them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
        each, dtype = q.shape[1], q.dtype
        q, kv = q.transpose(1, 2), torch.stack((k.transpose(1, 2), v.transpose(1, 2)))
        out = lse = None
        for owner, last in _rounds(group):
            coming = None if last else _pass_on(kv, group)
            used = _valid(owner, each, length)
            if used:
                part, weight = attend(q, *kv[:, :, :, :used])
                out, lse = (part, weight) if out is None or lse is None else merge(out, lse, part, weight)
            if coming is not None:
                kv = coming()
        assert out is not None  # the first process has a token
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.length, ctx.group = length, group
        return out.to(dtype).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grad, each = grad.transpose(1, 2).to(out.dtype), q.shape[2]
        inner = (grad * out).sum(-1, keepdim=True)
        kv = torch.stack((k.transpose(1, 2), v.transpose(1, 2)))
        grad_q, grad_kv = torch.zeros_like(out), torch.zeros_like(kv, dtype=out.dtype)
        for owner, last in _rounds(ctx.group):
            coming = None if last else _pass_on(kv, ctx.group)
            used = _valid(owner, each, ctx.length)
            if used:
                own_kv = kv[:, :, :, :used]
                grads = attend_backward(grad, inner, lse, q, *own_kv)
                grad_q += grads[0]
                grad_kv[0, :, :, :used] += grads[1]
                grad_kv[1, :, :, :used] += grads[2]
            grad_kv = _pass_on(grad_kv, ctx.group)()  # after the last round they are at home
            if coming is not None:
                kv = coming()
        grad_k, grad_v = grad_kv.to(k.dtype).transpose(2, 3).unbind(0)
        return grad_q.to(q.dtype).transpose(1, 2), grad_k, grad_v, None, None


def _rounds(group: dist.ProcessGroup) -> list[tuple[int, bool]]:
    """For each round: whose keys are here, and whether it is the last."""
    size = group.size()
    return [((group.rank() - i) % size, i == size - 1) for i in range(size)]


def _valid(owner: int, each: int, length: int) -> int:
    """How many of a process's tokens are no padding."""
    return min(max(length - owner * each, 0), each)


def _pass_on(t: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Send a tensor to the next process of the ring; the function that is returned waits for the previous one's."""
    t, size = t.contiguous(), group.size()
    got = torch.empty_like(t)
    after, before = (dist.get_global_rank(group, (group.rank() + step) % size) for step in (1, -1))
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, t, after, group), dist.P2POp(dist.irecv, got, before, group)]
    )

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return got

    return wait


# ---------------------------------------------------------------- attention in parts


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, H, L, D], k and v [B, H, M, D] -> attention [B, H, L, D] and the log-sum-exp of its scores [B, H, L, 1].

    Both at least float32.  On a GPU half precision takes the flash kernel; the plain form is for everything else.
    """
    dtype = wide(q.dtype)
    if q.is_cuda and q.dtype != dtype and q.shape[-1] % 8 == 0:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        return out.to(dtype), lse[..., None]
    parts = []
    for rows in torch.split(q, _rows(q, k), 2):
        scores = (rows.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).mT
        lse = scores.logsumexp(-1, keepdim=True)
        parts.append((scores.sub_(lse).exp_() @ v.to(dtype), lse))
    outs, weights = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(weights, 2)


def merge(out: Tensor, lse: Tensor, part: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys, from the attention to each and the log-sum-exp of its scores."""
    both = torch.logaddexp(lse, weight)
    return out * (lse - both).exp() + part * (weight - both).exp(), both


def attend_backward(
    grad: Tensor, inner: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in the dtype of `grad`, for keys that are a part of all that q attended to.

    grad [B, H, L, D] is the gradient of the whole attention, lse its log-sum-exp and inner [B, H, L, 1] its product
    with grad, summed over D (arXiv 2205.14135, appendix B).
    """
    q, k, v, scale = q.to(grad.dtype), k.to(grad.dtype), v.to(grad.dtype), q.shape[-1] ** -0.5
    grad_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
    step = _rows(q, k)
    for rows, asked, total, norm in zip(*(torch.split(t, step, 2) for t in (q, grad, inner, lse)), strict=True):
        weights = ((rows * scale) @ k.mT).sub_(norm).exp_()
        grad_v += weights.mT @ asked
        grad_scores = weights.mul_((asked @ v.mT).sub_(total))
        grad_q.append(grad_scores @ k * scale)
        grad_k += grad_scores.mT @ rows * scale
    return torch.cat(grad_q, 2), grad_k, grad_v


def _rows(q: Tensor, k: Tensor) -> int:
    """How many queries at a time keep to `SCORES`."""
    return max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
