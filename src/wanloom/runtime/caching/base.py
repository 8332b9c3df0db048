"""What all step caches share: one class standing in for the trunk, that sometimes adds what the trunk added before.

    dit.trunk = MagCache(dit.trunk, clock, ...)      # (x, scene) -> x, as the trunk

Neighbouring steps make almost the same change to the tokens, so a step may be skipped: x plus what the trunk added when
it last ran.  The methods differ in when they skip and in what they add.  Class of loss: lossy; with a threshold of 0
nothing is skipped and every bit is that of the trunk alone.

State is kept for each video and each branch of guidance, is never taken from one expert to the next, and begins anew
when the steps do (a new clip, a new video).  A branch that is not called in some steps keeps its own count.

Where the sequence is cut among ranks, a cache may stand around what cuts it, and every rank remembers all tokens and
decides by the same numbers; or within it, and each remembers its own tokens.  Then methods that compare tensors need
`reduce`, which sums a small tensor over the ranks, so that all decide alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from wanloom.models.layers import Scene
from wanloom.runtime.caching.clock import StepClock

Reduce = Callable[[Tensor], Tensor]  # a small float64 tensor -> its sum over all ranks that share the sequence


def total(*tensors: Tensor) -> Tensor:
    """The sum of absolute values of each, float64: [n].  Sums, not means: those of several ranks can be added."""
    return torch.stack([torch.linalg.vector_norm(t, 1).double() for t in tensors])


@dataclass
class Entry:
    """What is remembered of one branch of one video under one expert."""

    start: int  # the first step of the expert
    step: int = -1  # the last step that this branch made
    computed: int = -1  # the last step in which the trunk ran
    idle: int = 0  # steps skipped since
    numbers: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class StepCache(nn.Module, ABC):
    """A trunk that is skipped in some steps; see the module.  Subclasses say when (`small`) and keep what they need.

    retention: the share of each expert's steps, from its first, in which the trunk always runs; one number, or one for
    each expert (the last of them for all that follow).  last: how many steps at the end of the run are never skipped.
    most: how many may be skipped in a row.  `ran` and `skipped` count calls.

    Memory: "added", one tensor of the size and dtype of x, for each branch of each video, unless a subclass says more.
    It is given back when the expert has made its last step.
    """

    START: ClassVar[Mapping[str, float]] = {}  # the numbers of an entry whenever the trunk has run

    def __init__(
        self,
        trunk: nn.Module,
        clock: StepClock,
        *,
        retention: float | Sequence[float] = 0.0,
        last: int = 0,
        most: int | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        super().__init__()
        self.trunk, self.clock, self.reduce = trunk, clock, reduce
        self.retention = (retention,) if isinstance(retention, int | float) else tuple(retention)
        self.last, self.most = last, most
        self.ran = self.skipped = 0
        self._entries: dict[tuple[int, str], Entry] = {}

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the trunk, for whatever else stands around it."""
        return cast(nn.ModuleList, self.trunk.blocks)

    # --- what a subclass may say

    def watch(self, x: Tensor, scene: Scene) -> Tensor:
        """What the decision looks at; by default x."""
        return x

    @abstractmethod
    def small(self, entry: Entry, seen: Tensor) -> bool:
        """Whether so little has happened since the trunk ran that this step can be skipped."""

    def added(self, entry: Entry) -> Tensor:
        """What a skipped step adds to x, of the shape of x."""
        return entry.tensors["added"]

    def learn(self, entry: Entry, x: Tensor, out: Tensor) -> None:
        """Remember a step in which the trunk made `out` of x."""
        entry.tensors["added"] = out - x

    def note(self, entry: Entry, seen: Tensor) -> None:
        """Remember what was seen; called in every step, at its end."""

    # --- the way through a step

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        """x [B, L, C] -> [B, L, C]."""
        return self._step(x, scene, self.trunk, self.watch(x, scene))

    def _step(self, x: Tensor, scene: Scene, run: Callable[[Tensor, Scene], Tensor], seen: Tensor) -> Tensor:
        entry = self._entry()
        skip = self._may_skip(entry) and self.small(entry, seen)
        out = x + self.added(entry) if skip else run(x, scene)
        step, closing = self.clock.step, self.clock.step + 1 == self.clock.span[1]
        if skip:
            entry.idle += 1
            self.skipped += 1
        else:
            self.ran += 1
            entry.idle, entry.numbers = 0, dict(self.START)
            if not closing:
                with torch.no_grad():
                    self.learn(entry, x, out)
                entry.computed = step
        self.note(entry, seen)
        entry.step = step
        if closing:  # the next step is another expert's, or of another clip
            del self._entries[self.clock.video, self.clock.branch]
        return out

    def _entry(self) -> Entry:
        """The entry of this call, or a new one where the old is of another expert or of steps still to come."""
        clock = self.clock
        key, start = (clock.video, clock.branch), clock.span[0]
        entry = self._entries.get(key)
        if entry is None or entry.start != start or entry.step >= clock.step:
            entry = self._entries[key] = Entry(start, numbers=dict(self.START))
        return entry

    def _may_skip(self, entry: Entry) -> bool:
        clock = self.clock
        start, stop = clock.span
        share = self.retention[min(clock.expert, len(self.retention) - 1)]
        return (
            entry.computed >= 0
            and clock.step - start >= int(share * (stop - start) + 0.5)
            and clock.step < clock.steps - self.last
            and (self.most is None or entry.idle < self.most)
        )

    def agree(self, sums: Tensor) -> list[float]:
        """Sums of this rank as those of all ranks.  The one place where the host waits for the device."""
        values: list[float] = (sums if self.reduce is None else self.reduce(sums)).tolist()
        return values

    # --- the state as data

    def state(self, video: int = 0) -> dict[str, Tensor]:
        """What is remembered of a video between two steps, as tensors by name; `load` goes on with the same bits.

        Nothing here is written over later.  Where the sequence is cut, this is the share of this rank.
        """
        found: dict[str, Tensor] = {}
        for (which, branch), entry in self._entries.items():
            if which == video:
                plain = [entry.start, entry.step, entry.computed, entry.idle, *(entry.numbers[n] for n in self.START)]
                found[f"{branch}/plain"] = torch.tensor(plain, dtype=torch.float64)
                found |= {f"{branch}/{name}": tensor.contiguous() for name, tensor in entry.tensors.items()}
        return found

    def load(self, state: Mapping[str, Tensor], video: int = 0) -> None:
        """Take up what `state` gave, its tensors where they are to be used.  Raises ValueError for anything else."""
        entries: dict[tuple[int, str], Entry] = {}
        for name, tensor in state.items():
            branch, _, what = name.rpartition("/")
            if what == "plain":
                start, step, computed, idle, *numbers = tensor.tolist()
                if len(numbers) != len(self.START):
                    raise ValueError(f"{name}: {len(numbers)} numbers, {type(self).__name__} has {len(self.START)}")
                named = dict(zip(self.START, numbers, strict=True))
                entries[video, branch] = Entry(int(start), int(step), int(computed), int(idle), named)
        for name, tensor in state.items():
            branch, _, what = name.rpartition("/")
            if (video, branch) not in entries:
                raise ValueError(f"{name}: its branch has no numbers")
            if what != "plain":
                entries[video, branch].tensors[what] = tensor
        self.reset(video)
        self._entries |= entries

    def reset(self, video: int | None = None) -> None:
        """Forget a video, or all of them."""
        self._entries = {key: entry for key, entry in self._entries.items() if video is not None and key[0] != video}


@contextmanager
def standing_in(dit: Any, make: Callable[[nn.Module], StepCache]) -> Iterator[StepCache]:
    """`dit.trunk` replaced by `make(dit.trunk)`, and put back afterwards: a model may stay loaded between runs."""
    cache = make(dit.trunk)
    dit.trunk = cache
    try:
        yield cache
    finally:
        dit.trunk = cache.trunk
        cache.reset()
