"""Several processes that make one video together: how they are laid out, and the two halves of guidance.

    layout = choose_layout(world=8, heads=40, want_cfg=True)      # cfg 2 x ring 1 x Ulysses 4
    mesh = open_mesh(layout, "cuda")                              # after dist.init_process_group
    dit.trunk = Sequenced(dit.trunk, mesh)                        # sequence.py: each process has a part of the tokens
    shard(dit, "cuda")                                            # sharding.py: each process has a part of the weights

Every process calls the same functions with the same arguments and gets the same results.  With gradients, every
process computes the whole loss; what each then has is its share of `world` times the gradient, so that the *mean* over
the processes is the gradient of one process, for every parameter.  FSDP2 takes this mean by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wanloom.errors import InputError

Velocity = Callable[[Tensor, float], Tensor]  # (x [B, C, F, H, W], t in [0, 1000]) -> v, of the shape of x


@dataclass(frozen=True)
class Layout:
    """How many processes share what: `cfg` the branches of guidance, `ring` and `ulysses` the tokens of each branch.

    Neighbours are the fastest to reach, so Ulysses, which exchanges the most, is the innermost dimension.
    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def world(self) -> int:
        return self.cfg * self.ring * self.ulysses

    def __str__(self) -> str:
        return f"guidance {self.cfg} x ring {self.ring} x Ulysses {self.ulysses}"


def choose_layout(
    world: int, heads: int, want_cfg: bool, *, cfg: int | None = None, ring: int | None = None,
    ulysses: int | None = None,
) -> Layout:  # fmt: skip
    """The layout of `world` processes for a model with so many heads; sizes that are given are kept.

    Guidance, where there is some (want_cfg), takes the first factor 2: its halves meet once a step.  Ulysses, which
    keeps attention in one piece, takes what divides the heads, and the ring the rest.
    Errors: E5010 sizes that do not multiply to the world, E5011 heads that do not divide, E5012 two branches of what
    has one.
    """
    for name, size in (("ring_size", ring), ("ulysses_size", ulysses)):
        if size is not None and size < 1:
            raise InputError("E5010", f"{name}: got {size}, expected a number of processes from 1 to {world}.")
    if cfg is None:
        cfg = 2 if want_cfg and world % (2 * (ring or 1) * (ulysses or 1)) == 0 else 1
    if cfg not in (1, 2) or (cfg == 2 and not want_cfg):
        why = "has two branches: use 1 or 2" if want_cfg else "is off (scale 1): use 1"
        raise InputError("E5012", f"cfg: got {cfg}, guidance {why}.")
    rest = world // cfg
    if ulysses is None:
        ulysses = math.gcd(rest, heads) if ring is None else rest // ring
    if ring is None:
        ring = rest // ulysses
    layout = Layout(cfg, ring, ulysses)
    if layout.world != world:
        raise InputError(
            "E5010", f"{layout} does not make {world} processes. Start another number, or leave a size out."
        )
    if heads % ulysses:
        fit = ", ".join(str(n) for n in range(1, world + 1) if heads % n == 0 and world % n == 0)
        raise InputError(
            "E5011", f"ulysses_size: {ulysses} does not divide the {heads} heads of this model. Use one of {fit}."
        )
    return layout


def open_mesh(layout: Layout, device: str) -> DeviceMesh:
    """The processes of this run as a mesh with the dimensions cfg, ring, ulysses; `device` is "cpu" or "cuda".

    Every process must call it, once `torch.distributed` runs.  Error: E5010 for another number of processes.
    """
    if dist.get_world_size() != layout.world:
        raise InputError("E5010", f"{layout} needs {layout.world} processes, {dist.get_world_size()} were started.")
    return init_device_mesh(
        device, (layout.cfg, layout.ring, layout.ulysses), mesh_dim_names=("cfg", "ring", "ulysses")
    )


def guided_apart(cond: Velocity, uncond: Velocity | None, scale: float, mesh: DeviceMesh) -> Velocity:
    """v_uncond + scale * (v_cond - v_uncond), each branch on its half of a mesh whose cfg is 2.

    The same bits as one after the other.  With scale 1, or nothing to guide away from, both halves compute `cond`.
    """
    if uncond is None or scale == 1:
        return cond
    mine, group = (cond, uncond)[mesh.get_local_rank("cfg")], mesh.get_group("cfg")

    def velocity(x: Tensor, t: float) -> Tensor:
        with_prompt, without = gather(mine(x, t)[None], 0, group).unbind(0)
        return without + scale * (with_prompt - without)

    return velocity


# ---------------------------------------------------------------- exchanges that gradients pass


def gather(t: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The parts of all processes of a group, one after the other along `dim`."""
    if group.size() == 1:
        return t
    out: Tensor = _Gather.apply(t, dim, group)  # type: ignore[no-untyped-call]  # torch's own
    return out


def swap(t: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
    """Cut dimension `cut` among the processes of a group and join the parts that they have along `join`."""
    if group.size() == 1:
        return t
    out: Tensor = _Swap.apply(t, cut, join, group)  # type: ignore[no-untyped-call]  # torch's own
    return out


class _Gather(torch.autograd.Function):
    """Backward sums what all processes ask of this part."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        parts = t.new_empty(group.size(), *t.shape)
        dist.all_gather(list(parts.unbind()), t.contiguous(), group)
        return parts.movedim(0, dim).flatten(dim, dim + 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = torch.unflatten(grad, ctx.dim, (ctx.group.size(), -1)).movedim(ctx.dim, 0).contiguous()
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, list(parts.unbind()), group=ctx.group)
        return mine, None, None


class _Swap(torch.autograd.Function):
    """Its backward is itself the other way."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dims, ctx.group = (cut, join), group
        parts = torch.unflatten(t, cut, (group.size(), -1)).movedim(cut, 0).contiguous()
        got = torch.empty_like(parts)
        dist.all_to_all_single(got, parts, group=group)
        return got.movedim(0, join).flatten(join, join + 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cut, join = ctx.dims
        return swap(grad, join, cut, ctx.group), None, None, None
