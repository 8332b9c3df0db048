"""Several processes that work on the orders of one.

The first process runs everything, and tells the others what to do with it; they wait, do it, and wait again.  An order
is a word, plain values (JSON) and tensors, sent to all in one message and one more for each tensor:

    crew.tell("forward", 3, x=x, t=t)                  # the first process
    order = crew.hear()                                # every other: order.what, order.words, order.tensors

An exchange that a process does not come to, because it died, raises `Lost` in the others.  After that, or after an
interruption within an exchange, the processes no longer agree on where they are: the crew is torn, and tells nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wanloom import pulse
from wanloom.errors import InputError
from wanloom.runtime.layouts import Place
from wanloom.runtime.watchdog import Board, FileBoard, StoreBoard

MEETING = timedelta(minutes=10)  # until all processes are there
EXCHANGE = timedelta(days=7)  # of one exchange: the others may wait while the first decodes; the watchdog looks on
LOOK = timedelta(seconds=5)  # for the watchdog's own questions to a store


class Lost(Exception):
    """Another process of this run is gone."""


@dataclass(frozen=True)
class Order:
    """What the first process told."""

    what: str
    words: tuple[Any, ...]
    tensors: dict[str, Tensor]


class Crew:
    """The processes of a run, seen from one of them; every process makes one (`meet`)."""

    def __init__(self, place: Place) -> None:
        self.place, self.torn = place, False
        self.within = False  # whether an exchange is under way
        self.device = torch.device("cpu")  # where tensors of orders are, on every process; `compute_on` changes it

    @property
    def first(self) -> bool:
        return self.place.rank == 0

    def compute_on(self, kind: str) -> str:
        """Take this process's device of a kind, "cpu" or "cuda": its name.  Error: E8003 when there is none left."""
        if kind == "cuda":
            if self.place.local >= torch.cuda.device_count():
                there = torch.cuda.device_count()
                raise InputError(
                    "E8003", f"process {self.place.rank} has no GPU: {there} are here, one is needed each."
                )
            self.device = torch.device("cuda", self.place.local)
            torch.cuda.set_device(self.device)
        return str(self.device)

    def tell(self, what: str, *words: Any, **tensors: Tensor) -> None:
        """Give an order to all others; nothing when the crew is torn."""
        if self.torn:
            return
        forms = {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}
        text = json.dumps([what, words, forms]).encode()
        with self.exchange():
            dist.broadcast(torch.tensor([len(text)]), 0)
            dist.broadcast(torch.frombuffer(bytearray(text), dtype=torch.uint8), 0)
            for tensor in tensors.values():
                dist.broadcast(_bytes_of(tensor.to(self.device)), 0)

    def hear(self) -> Order:
        """Wait for the next order, as long as it takes."""
        with self.exchange():
            length = torch.zeros(1, dtype=torch.long)
            dist.broadcast(length, 0)
            text = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(text, 0)
            what, words, forms = json.loads(text.numpy().tobytes())
            tensors = {}
            for name, (dtype, shape) in forms.items():
                kind = getattr(torch, dtype)
                flat = torch.empty(math.prod(shape) * kind.itemsize, dtype=torch.uint8, device=self.device)
                dist.broadcast(flat, 0)
                tensors[name] = flat.view(kind).view(shape)
        return Order(what, tuple(words), tensors)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Something that all processes do together.  Raises Lost when one of them is gone, or the crew is torn."""
        if self.torn:
            raise Lost("the processes do not agree on where they are")
        self.torn = self.within = True
        try:
            yield
        except RuntimeError as error:
            if is_loss(error):
                raise Lost(str(error)) from error
            raise
        finally:
            self.within = False
        self.torn = False
        pulse.beat()

    def leave(self) -> None:
        """The end of the run, for this process; the first tells it to the others."""
        if self.first:
            self.tell("end")
        if not self.torn:
            dist.destroy_process_group()
            self.torn = True  # whoever still lets go of a part has nobody to tell it to


def meet(place: Place) -> tuple[Crew, Board]:
    """Meet all other processes of the run; this one's view of them, and the board of their watchdogs.

    On one machine they talk over its own (loopback) interface, unless the environment names another.
    Error: E8001 when they are not there after ten minutes.
    """
    store: Any
    board: Board
    try:
        if place.folder is not None:
            store = dist.FileStore(str(place.folder / "meeting"), place.world)  # type: ignore[attr-defined]  # torch's own
            board = FileBoard(place.folder / "board", place.rank)
        else:
            found = dist.rendezvous("env://", place.rank, place.world, timeout=MEETING)  # type: ignore[attr-defined]
            store = next(found)[0]
            own = store.clone()
            own.set_timeout(LOOK)
            board = StoreBoard(own, place.rank, place.world)
        board.write((0, 0.0))
        store.set_timeout(MEETING)
        store.set(f"here/{place.rank}", "")
        store.wait([f"here/{rank}" for rank in range(place.world)])
    except (RuntimeError, OSError) as error:
        said = str(error).splitlines()[0][:120]
        raise InputError("E8001", f"the {place.world} processes of this run did not meet ({said}).") from error
    if place.folder is not None or os.environ.get("LOCAL_WORLD_SIZE") == str(place.world):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=EXCHANGE)
    return Crew(place), board


def is_loss(error: BaseException) -> bool:
    """Whether an error of an exchange says that a process is gone, and not that something is wrong with the tensors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _bytes_of(tensor: Tensor) -> Tensor:
    """The values of a tensor as bytes [n]: every number format can be sent so."""
    return tensor.contiguous().view(-1).view(torch.uint8)
