"""Several processes that make one video together: how they are laid out, and the two halves of guidance.

    layout = choose_layout(world=8, heads=40, want_cfg=True)      # layouts.py: cfg 2 x ring 1 x Ulysses 4
    mesh = open_mesh(layout, "cuda")                              # after dist.init_process_group
    dit.trunk = Sequenced(dit.trunk, mesh)                        # sequence.py: each process has a part of the tokens
    shard(dit, "cuda")                                            # sharding.py: each process has a part of the weights

Every process calls the same functions with the same arguments and gets the same results.  With gradients, every
process computes the whole loss; what each then has is its share of `world` times the gradient, so that the *mean* over
the processes is the gradient of one process, for every parameter.  FSDP2 takes this mean by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wanloom.errors import InputError
from wanloom.runtime.layouts import Layout

Velocity = Callable[[Tensor, float], Tensor]  # (x [B, C, F, H, W], t in [0, 1000]) -> v, of the shape of x


def open_mesh(layout: Layout, device: str) -> DeviceMesh:
    """The processes of this run as a mesh with the dimensions cfg, ring, ulysses; `device` is "cpu" or "cuda".

    Every process must call it, once `torch.distributed` runs.  Error: E2018 for another number of processes.
    """
    if dist.get_world_size() != layout.world:
        raise InputError("E2018", f"{layout} needs {layout.world} processes, {dist.get_world_size()} were started.")
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
