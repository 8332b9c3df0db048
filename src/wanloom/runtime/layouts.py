"""How several processes share the making of one video: who is which, which branch and which tokens each has.

Without torch, so that a wrong size is said before anything is loaded; `parallel.py` makes the processes of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from wanloom.errors import InputError


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


@dataclass(frozen=True)
class Place:
    """Which process this is: rank of world, and local of those on this machine.

    folder: a private directory in which processes of one machine meet; None: where MASTER_ADDR and MASTER_PORT say.
    """

    rank: int
    world: int
    local: int = 0
    folder: Path | None = None


def choose_layout(
    world: int, heads: int, want_cfg: bool, *, cfg: int | None = None, ring: int | None = None,
    ulysses: int | None = None,
) -> Layout:  # fmt: skip
    """The layout of `world` processes for a model with so many heads; sizes that are given are kept.

    Guidance, where there is some (want_cfg), takes the first factor 2: its halves meet once a step.  Ulysses, which
    keeps attention in one piece, takes what divides the heads, and the ring the rest.
    Error: E2018 sizes that do not multiply to the world, heads that do not divide, two branches of what has one.
    """
    for name, size in (("ring_size", ring), ("ulysses_size", ulysses)):
        if size is not None and size < 1:
            raise InputError("E2018", f"{name}: got {size}, expected a number of processes from 1 to {world}.")
    if cfg is None:
        cfg = 2 if want_cfg and world % (2 * (ring or 1) * (ulysses or 1)) == 0 else 1
    if cfg not in (1, 2) or (cfg == 2 and not want_cfg):
        why = "has two branches: use 1 or 2" if want_cfg else "is off (scale 1): use 1"
        raise InputError("E2018", f"cfg_parallel: got {cfg}, guidance {why}.")
    rest = world // cfg
    if ulysses is None:
        ulysses = math.gcd(rest, heads) if ring is None else rest // ring
    if ring is None:
        ring = rest // ulysses
    layout = Layout(cfg, ring, ulysses)
    if layout.world != world:
        raise InputError(
            "E2018", f"{layout} does not make {world} processes. Start another number, or leave a size out."
        )
    if heads % ulysses:
        fit = ", ".join(str(n) for n in range(1, world + 1) if heads % n == 0 and world % n == 0)
        raise InputError(
            "E2018", f"ulysses_size: {ulysses} does not divide the {heads} heads of this model. Use one of {fit}."
        )
    return layout
