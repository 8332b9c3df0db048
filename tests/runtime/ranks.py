"""Several gloo processes for a test: started once, used for worlds of several sizes, ended whatever happens.

    results = run(work, (2, 3), *args)        # {2: [of rank 0, of rank 1], 3: [...]}

`work(*args)` is a function of a module; it runs in each process of a world with the default group set up.  Only the
processes that were started here are ever ended.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run(work: Callable[..., Any], worlds: Sequence[int], *args: Any, seconds: float = 600) -> dict[int, list[Any]]:
    """What `work(*args)` returns on every rank of every world; what torch.save can write, and only data.

    Raises RuntimeError with the traceback of the first process that failed, TimeoutError after `seconds`.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=_enter, args=(rank, tuple(worlds), folder, seconds, work, args), daemon=True)
            for rank in range(max(worlds))
        ]
        for process in started:
            process.start()
        try:
            _wait(started, Path(folder), time.monotonic() + seconds)
        finally:
            for process in started:
                process.kill()
                process.join()
        return {
            world: [torch.load(_place(folder, world, rank), weights_only=True) for rank in range(world)]
            for world in worlds
        }


def _wait(started: Sequence[Any], folder: Path, end: float) -> None:
    """Until all have ended well."""
    while any(process.is_alive() for process in started):
        _raise_first(started, folder)
        if time.monotonic() > end:
            stood = "\n".join(path.read_text() for path in sorted(folder.glob("stood-*")))
            raise TimeoutError(f"the processes of a test did not end in time. Where they were:\n{stood}")
        time.sleep(0.05)
    _raise_first(started, folder)


def _raise_first(started: Sequence[Any], folder: Path) -> None:
    failed = [process.exitcode for process in started if process.exitcode]
    if not failed:
        return
    time.sleep(0.5)  # the others fail because of it; the first to say something is the cause
    said = sorted(folder.glob("failed-*"), key=lambda path: path.stat().st_mtime_ns)
    raise RuntimeError(said[0].read_text() if said else f"a process ended with {failed[0]}")


def _place(folder: str, world: int, rank: int) -> Path:
    return Path(folder) / f"result-{world}-{rank}"


def _enter(
    rank: int, worlds: tuple[int, ...], folder: str, seconds: float, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if "lo" in {name for _, name in socket.if_nameindex()}:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine without a network has this one
    with Path(f"{folder}/stood-{rank}").open("w") as stood:
        faulthandler.dump_traceback_later(0.9 * seconds, file=stood)
        try:
            for world in worlds:
                if rank < world:
                    store = dist.FileStore(f"{folder}/meet-{world}", world)
                    patience = timedelta(seconds=seconds)
                    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
                    torch.save(work(*args), _place(folder, world, rank))
                    dist.barrier()
                    dist.destroy_process_group()
        except BaseException:
            Path(f"{folder}/failed-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
