"""Weights among processes: each keeps a part, and a block is whole only while it runs (FSDP2, `fully_shard`).

A block's parameters are gathered when its forward is called, given back after it, and gathered again for backward;
gradients are averaged and each process keeps its part.  Whatever is not in a block - embeddings, head, what adapters
put before and around the trunk - belongs to the root, is gathered with the first call and stays.

The model reads parameters only inside `DiT.forward`, `DiT.once` and the forward of a block, so FSDP2's hooks on these
are enough: the patches' weight, norms and modulations that operations take as they are lie within them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from wanloom.models.layers import Block


def shard(module: nn.Module, device: str, blocks: Iterable[nn.Module] | None = None) -> None:
    """Cut the parameters of a module among all processes, in place; `device` is "cpu" or "cuda".

    blocks: what is gathered piece by piece; without it every `Block` that is found, also those of adapters.  Every
    process must call it, with the same values in the same number format, and after whatever replaces linear layers.
    `state_dict` holds DTensors afterwards; `.full_tensor()` gives the whole.
    """
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("weights",))
    found = [part for part in module.modules() if isinstance(part, Block)] if blocks is None else list(blocks)
    for block in found:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if hasattr(module, "once"):  # reads parameters of the root, and is no forward
        register_fsdp_forward_method(module, "once")


def share_of(module: nn.Module) -> Callable[[str, Tensor], Tensor]:
    """(name, whole tensor) -> what this process keeps of it, for a module that was built on "meta" and then sharded.

    With it a checkpoint is read tensor by tensor and no process ever holds more than one whole:

        module.load_state_dict({name: keep(name, value) for name, value in tensors}, assign=True)

    Values must already be where they are computed with, in their final number format.
    """
    targets = module.state_dict()

    def keep(name: str, value: Tensor) -> Tensor:
        target = targets[name]
        if not isinstance(target, DTensor):
            return value
        shared = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        local = shared.to_local().clone()  # a view would keep the whole tensor alive
        return DTensor.from_local(
            local, target.device_mesh, target.placements, shape=value.shape, stride=value.stride(), run_check=False
        )

    return keep


def is_cut(module: nn.Module) -> bool:
    """Whether the weights of a module are cut among processes."""
    return isinstance(module, FSDPModule)
