"""Several processes that train one model: each takes its own samples, gradients are averaged in one message.

On a CPU, processes with one thread each and one flat all-reduce a step keep going when something else takes a core,
where one process with many threads stalls at every barrier.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; with one process every method is the identity."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_(self, t: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def mean_(self, t: Tensor) -> Tensor:
        return self.sum_(t).div_(self.size) if self.size > 1 else t

    def share_(self, t: Tensor, owner: int) -> Tensor:
        """The owner's values, on every rank."""
        if self.size > 1:
            dist.broadcast(t, owner)
        return t

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def mine(self, count: int) -> range:
        """This rank's share of `count` things, contiguous."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)


def _enter(
    rank: int, size: int, meeting: str, backend: str, parent: int, work: Callable[..., None], args: tuple[object, ...]
) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if backend == "gloo":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(hours=2)
    )
    try:
        work(Ranks(rank, size), *args)
    finally:
        dist.destroy_process_group()


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone: nobody would wait for it, and it would train on."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def spawn(work: Callable[..., None], size: int, device: str, *args: object) -> None:
    """Run `work(ranks, *args)` in `size` processes that meet through a private file."""
    if size == 1:
        work(Ranks(), *args)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        backend = "gloo" if device == "cpu" else "nccl"
        start_processes(_enter, (size, meeting, backend, os.getpid(), work, args), nprocs=size, start_method="spawn")  # type: ignore[no-untyped-call]  # untyped in torch
