"""Blocks that come when they are needed and go afterwards: a trunk in the memory of two blocks.  Exact: the same bits.

    source = load_streamed(dit, weights, dtype=torch.bfloat16, device="cuda")    # checkpoint/blocks.py
    with Streamed(dit.trunk, source, "cuda", resident=4) as dit.trunk:
        dit(x, t, context)                                                       # as often as wanted

While a block computes, a thread reads the next ones, and after the last the first again, so that the next forward pass
finds it there.  On the CPU a block computes in the buffer it was read into.  On a GPU each of the slots has a pinned
buffer on the host and one on the device; a stream of its own copies from the one to the other.

Three things may not overtake each other, and an order or an event keeps each in its place:
  reading into a host buffer   waits for the last upload out of it (`_arrived`, waited for by the reading thread);
  uploading into a slot        waits for the block that computed there last (`_left`, waited for by the copy stream);
  computing in a slot          waits for the upload into it (`_arrived`, waited for by the computing stream).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import prod
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from wanloom.models.layers import Scene, Trunk
from wanloom.models.numerics import recording

ALIGN = 512  # bytes; as CUDA's allocator does, and enough for every kernel on a CPU

# (block, name in the block -> tensor on the host): writes the block's values into the tensors, in their dtypes.
Fill = Callable[[int, Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Layout:
    """How the tensors of a block lie in a buffer of `size` bytes: name, dtype, shape and first byte of each."""

    places: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]
    size: int

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Layout:
        """Room for tensors like these, one behind the other."""
        places, end = [], 0
        for name, tensor in tensors.items():
            places.append((name, tensor.dtype, tuple(tensor.shape), end))
            end += -(-tensor.nbytes // ALIGN) * ALIGN
        return Layout(tuple(places), end)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors in a buffer [>= size] of bytes."""
        return {
            name: flat[begin : begin + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, dtype, shape, begin in self.places
        }


class Home:
    """The places of a block's streamed tensors: all that are on the meta device when this is made.

    What a block has already (a low-rank branch, say) stays in it.  Whoever wraps a layer does so after this was made.
    """

    def __init__(self, block: nn.Module) -> None:
        self._meta = {name: tensor for name, tensor in tensors_of(block).items() if tensor.is_meta}
        self._owners = {name: block.get_submodule(name.rpartition(".")[0]) for name in self._meta}
        self.layout = Layout.of(self._meta)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if isinstance(self._meta[name], nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(self._owners[name], name.rpartition(".")[2], tensor)

    def empty(self) -> None:
        """Back on the meta device: shapes and dtypes without values."""
        for name, tensor in self._meta.items():
            setattr(self._owners[name], name.rpartition(".")[2], tensor)


class HostBlocks:
    """A source of blocks that stay in host memory, each in one buffer; a GPU reads them from there.

    Takes the tensors out of loaded blocks, one block after another, and leaves these on the meta device.  pinned: in
    memory that a GPU can read while it computes.
    """

    def __init__(self, blocks: Iterable[nn.Module], *, pinned: bool = False) -> None:
        self.flats = [self._take(block, pinned) for block in blocks]

    @staticmethod
    def _take(block: nn.Module, pinned: bool) -> Tensor:
        tensors = tensors_of(block)
        layout = Layout.of(tensors)
        flat = host_buffer(layout.size, pinned)
        for name, view in layout.views(flat).items():
            view.copy_(tensors[name].detach())
        block.to("meta")
        return flat


class Streamed(Trunk):
    """Stands in for a trunk whose blocks have their tensors on the meta device between uses.

    source: `Fill`, or HostBlocks.  resident: how many blocks stay, spread evenly; all others share `slots` buffers.
    An error of the source is raised in the next forward pass that needs what it could not read; closing frees
    everything.  There are no gradients: RuntimeError when they are asked for.
    """

    def __init__(
        self,
        trunk: nn.Module,
        source: Fill | HostBlocks,
        device: torch.device | str = "cpu",
        *,
        resident: int = 0,
        slots: int = 2,
    ) -> None:
        assert isinstance(trunk, Trunk), "what else stands in for the trunk stands around this"
        super().__init__(trunk.blocks)
        self.enter = trunk.enter
        self._homes = [Home(block) for block in trunk.blocks]
        layouts = [home.layout for home in self._homes]
        kept = spread(len(layouts), resident)
        for block in kept:
            on_host = read_to_host(source, block, layouts[block], None)
            self._homes[block].fill(layouts[block].views(on_host.to(device)))
        order = [block for block in range(len(layouts)) if block not in kept]
        self._feed = Feed(order, (CudaSlots if on_gpu(device) else Slots)(source, layouts, order, slots, device))
        self._end = weakref.finalize(self, self._feed.close)  # also when nobody closes this, and at the end of Python

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        for part in self.enter:
            scene = part(x, scene)
        x = x.clone()  # the blocks write over it
        for i, block in enumerate(self.blocks):
            with self._present(i):
                x = block(x, scene.of_block(i))
            if recording(x):
                raise RuntimeError("streamed blocks have no gradients: they are gone when backward would read them")
        return x

    def close(self) -> None:
        """End the reading and free all buffers.  The blocks are empty afterwards; a forward pass is a RuntimeError."""
        self._end()
        for home in self._homes:
            home.empty()

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _present(self, block: int) -> Iterator[None]:
        """The block has its values for a while."""
        if not self._feed.brings(block):
            yield
            return
        self._homes[block].fill(self._feed.take(block))
        try:
            yield
        finally:
            self._homes[block].empty()
            self._feed.drop()


class StreamedLayers(nn.Module):
    """The same for the layers of a module that calls them itself, one after another: hooks around each of them.

    layers: with their tensors on the meta device; they are no children of this.  Hung into the module that has them, so
    that whoever lets that go finds it.  Close it as a `Streamed`.
    """

    def __init__(
        self, layers: Iterable[nn.Module], source: Fill | HostBlocks, device: torch.device | str = "cpu",
        *, slots: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        found = list(layers)
        self._homes = [Home(layer) for layer in found]
        layouts, order = [home.layout for home in self._homes], range(len(found))
        self._feed = Feed(order, (CudaSlots if on_gpu(device) else Slots)(source, layouts, order, slots, device))
        self._end = weakref.finalize(self, self._feed.close)
        for number, layer in enumerate(found):
            layer.register_forward_pre_hook(partial(_come, self._feed, self._homes[number], number))
            layer.register_forward_hook(partial(_go, self._feed, self._homes[number]), always_call=True)

    def close(self) -> None:
        """End the reading and free the buffers; the layers are empty afterwards."""
        self._end()
        for home in self._homes:
            home.empty()


def _come(feed: Feed, home: Home, number: int, layer: nn.Module, given: Any) -> None:
    home.fill(feed.take(number))


def _go(feed: Feed, home: Home, layer: nn.Module, given: Any, result: Any) -> None:
    home.empty()
    feed.drop()


def spread(blocks: int, kept: int) -> set[int]:
    """Which of so many blocks are kept, with equal gaps between: what is read meanwhile has the longest time."""
    kept = min(kept, blocks)
    return {(2 * i + 1) * blocks // (2 * kept) for i in range(kept)}


def tensors_of(block: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names in the block."""
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


def on_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


# ---------------------------------------------------------------- buffers


def host_buffer(size: int, pinned: bool) -> Tensor:
    """Bytes that another thread may write to, whatever mode this one is in."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def read_to_host(source: Fill | HostBlocks, block: int, layout: Layout, flat: Tensor | None) -> Tensor:
    """The bytes of a block: where they lie already, or read into `flat` (a new buffer when it is None)."""
    if isinstance(source, HostBlocks):
        return source.flats[block]
    flat = host_buffer(layout.size, False) if flat is None else flat
    source(block, layout.views(flat))
    return flat


class Slots:
    """Where blocks lie while they compute; here, on the CPU, the buffers they were read into.

    `load` is the reading thread's, `enter` and `leave` are the caller's.
    """

    def __init__(
        self,
        source: Fill | HostBlocks,
        layouts: Sequence[Layout],
        order: Sequence[int],
        slots: int,
        device: torch.device | str,
    ) -> None:
        self.count, self._source, self._layouts = slots, source, layouts
        self._size = max((layouts[block].size for block in order), default=0)
        needed = not isinstance(source, HostBlocks)
        self._host = [host_buffer(self._size, on_gpu(device)) if needed else None for _ in range(slots)]

    def load(self, block: int, slot: int) -> dict[str, Tensor]:
        """Bring a block into a slot whose last block has left: its tensors by name."""
        return self._layouts[block].views(self._read(block, slot))

    def _read(self, block: int, slot: int) -> Tensor:
        return read_to_host(self._source, block, self._layouts[block], self._host[slot])

    def enter(self, slot: int) -> None:
        """Before the block in this slot computes; on the CPU it is there."""

    def leave(self, slot: int) -> None:
        """After it has; on the CPU nothing of it is still to come."""

    def close(self) -> None:
        self._host.clear()


class CudaSlots(Slots):
    """Slots on a GPU, filled by a stream of their own: see the module for who waits for whom.

    The slots live until the end, so no allocator can give them away under a running copy: no `record_stream`.
    """

    def __init__(
        self,
        source: Fill | HostBlocks,
        layouts: Sequence[Layout],
        order: Sequence[int],
        slots: int,
        device: torch.device | str,
    ) -> None:
        super().__init__(source, layouts, order, slots, device)
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's own
        with torch.inference_mode(False):
            self._flats = [torch.empty(self._size, dtype=torch.uint8, device=device) for _ in range(slots)]
        # blocking: the reading thread sleeps instead of asking again and again.
        self._arrived = [torch.cuda.Event(blocking=True) for _ in range(slots)]  # type: ignore[no-untyped-call]
        self._left = [torch.cuda.Event() for _ in range(slots)]  # type: ignore[no-untyped-call]
        for slot in range(slots):
            self.leave(slot)  # the memory may come from something that is still to be computed with

    def load(self, block: int, slot: int) -> dict[str, Tensor]:
        layout = self._layouts[block]
        self._arrived[slot].synchronize()
        flat, host = self._flats[slot], self._read(block, slot)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._left[slot])
            flat[: layout.size].copy_(host[: layout.size], non_blocking=True)
            self._arrived[slot].record(self._stream)
        return layout.views(flat)

    def enter(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived[slot])

    def leave(self, slot: int) -> None:
        self._left[slot].record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        super().close()
        self._flats.clear()


# ---------------------------------------------------------------- the thread


class Feed:
    """Loads blocks in a thread, in `order` and again from its beginning, as far ahead as there are slots.

    The n-th block ever loaded lies in slot n % slots.  Of the two counters the thread writes `_loaded` and the caller
    `_done`: whatever interrupts the caller, none of the slots is lost.
    """

    def __init__(self, order: Sequence[int], slots: Slots) -> None:
        self._order, self._slots = tuple(order), slots
        self._items: list[dict[str, Tensor]] = [{} for _ in range(slots.count)]
        self._loaded = self._done = 0
        self._closed = False
        self._error: BaseException | None = None
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="blocks", daemon=True)
        if self._order:
            self._thread.start()

    def brings(self, block: int) -> bool:
        return block in self._order

    def take(self, block: int) -> dict[str, Tensor]:
        """The tensors of the next block of the order, when they are there; to be given back by `drop`.

        Other blocks before it, left over from a pass that did not come to its end, are passed over.
        """
        while True:
            with self._change:
                self._change.wait_for(lambda: self._loaded > self._done or self._error or self._closed)
                if self._closed:
                    raise RuntimeError("the streamed blocks were closed")
                if self._loaded == self._done and self._error is not None:
                    raise self._error
            slot = self._done % self._slots.count
            self._slots.enter(slot)
            if self._order[self._done % len(self._order)] == block:
                return self._items[slot]
            self.drop()

    def drop(self) -> None:
        """The block taken last has been computed (on a GPU: is going to be, before what is asked for later)."""
        self._slots.leave(self._done % self._slots.count)
        with self._change:
            self._done += 1
            self._change.notify_all()

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._items.clear()
        self._slots.close()

    def _run(self) -> None:
        try:
            for n in count():
                with self._change:
                    while not self._closed and n - self._done >= self._slots.count:
                        self._change.wait()
                    if self._closed:
                        return
                slot = n % self._slots.count
                self._items[slot] = self._slots.load(self._order[n % len(self._order)], slot)
                with self._change:
                    self._loaded = n + 1
                    self._change.notify_all()
        except BaseException as error:  # whatever it is, the caller has to hear of it and not wait for ever
            with self._change:
                self._error = error
                self._change.notify_all()
