"""The VAE in stripes of rows: large frames in little memory.  Exact: other bits by rounding alone.

    stripe(vae, rows=64)                # from here on both ways go through in stripes of 64 rows of pixels
    stripe(vae, rows=64, aside="cpu")   # and what the stream remembers waits in the host's memory

How can that be exact?  All norms of this VAE look at one position, and the one attention over a frame stands where
frames are smallest, which is not cut.  What is left are convolutions, which look one row further each.  So the layers
are taken in sections (a few convolutions, one doubling or halving), and a stripe goes through a section with as many
rows of its neighbours as the section can see: what is wrong at the cut has not come as far as the rows that are kept.
At the border of the frame a stripe ends as the frame does, with the convolution's own zeros.

The price: rows at the cuts are computed twice, 8 above and below each stripe, in the last stages of Wan2.2's decoder
20.  Between two sections the whole tensor is there, at a place where it is small.

The past of the stream: each stripe has its own tails, which lie on the one tape in the order of the stripes; what a
stripe needs of its neighbours' past it takes from theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from wanloom.models.vae import (
    CausalVae,
    Decoder,
    Down,
    DownStage,
    Encoder,
    Head,
    ResidualBlock,
    Tape,
    Up,
    UpStage,
    conv3d,
    extend,
    run,
)

Device = torch.device | str


class Layer(Protocol):
    """(x [B, T, H, W, C], tape) -> y, as all layers of the VAE are called."""

    def __call__(self, x: Tensor, tape: Tape) -> Tensor: ...


class Stem(nn.Module):
    """The first convolution, of either way."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        return conv3d(extend(x, 2, tape), self.conv)


def parts_of(layer: Layer) -> Iterator[Layer]:
    """The layers of a stage of Wan2.2, or the layer itself."""
    if isinstance(layer, DownStage | UpStage):
        yield from cast(Iterable[Layer], layer.downsamples if isinstance(layer, DownStage) else layer.upsamples)
    else:
        yield layer


def needed(layer: Layer, rows: int) -> int:
    """How many rows more than its share a layer must be given, above and below, to make `rows` more of its output."""
    if isinstance(layer, Up):
        return -(-(rows + 1) // 2)
    if isinstance(layer, Down):
        return 2 * rows + 1
    assert isinstance(layer, ResidualBlock | Head | Stem), "every layer of a section has a reach"
    return rows + (2 if isinstance(layer, ResidualBlock) else 1)


def has(kind: type[Layer], layers: Iterable[Layer]) -> bool:
    return any(isinstance(part, kind) for layer in layers for part in parts_of(layer))


def tails(layer: Layer) -> int:
    """How many tails a layer pulls and pushes."""
    if isinstance(layer, Up | Down):
        return 0 if layer.time_conv is None else 1
    return 2 if isinstance(layer, ResidualBlock) else 1


@dataclass(frozen=True)
class Stripe:
    """Rows begin to end - 1 of a tensor, and those from top to bottom - 1 that it is made from."""

    begin: int
    end: int
    top: int
    bottom: int

    def takes(self, other: Stripe) -> tuple[int, int]:
        """From where to where, exclusive, this stripe is made from rows of another one; nowhere: (n, n or less)."""
        return max(other.begin, self.top), min(other.end, self.bottom)


class StripeTape(Tape):
    """The tape of one stripe, cut out of those of all.

    On the tape of the whole, a tail has the rows of its stripe and no more.  `old` holds those of the last call, for
    each stripe in the order of the layers; those of the neighbours are needed for the rows above and below.
    """

    def __init__(
        self, tape: Tape, stripes: Sequence[Stripe], number: int, old: Sequence[Sequence[Tensor]],
        here: Device, there: Device,
    ) -> None:  # fmt: skip
        super().__init__()
        self.first = tape.first
        self._tape, self._stripes, self._own, self._tails = tape, stripes, stripes[number], old
        self._here, self._there = here, there
        self._layer = 0

    def pull(self) -> Tensor | None:
        if self.first:
            return None
        pieces = []
        for stripe, old in zip(self._stripes, self._tails, strict=True):
            begin, end = self._own.takes(stripe)
            if begin < end:
                tail = old[self._layer]
                each = stripe.end - stripe.begin
                rows = [(row - stripe.begin) * tail.shape[2] // each for row in (begin, end)]
                pieces.append(tail[:, :, rows[0] : rows[1]])
        self._layer += 1
        return torch.cat(pieces, 2).to(self._here)

    def push(self, x: Tensor, frames: int) -> None:
        own, each = self._own, self._own.bottom - self._own.top
        first, last = ((row - own.top) * x.shape[2] // each for row in (own.begin, own.end))
        self._tape.push(x[:, x.shape[1] - frames :, first:last].to(self._there), frames)


class Section:
    """Some layers that double (`up` 2) or halve (`down` 2) the rows once, or not at all."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.up = 2 if has(Up, layers) else 1
        self.down = 2 if has(Down, layers) else 1
        parts = [part for layer in layers for part in parts_of(layer)]
        self.tails = sum(tails(part) for part in parts)
        halo = 0
        for part in reversed(parts):
            halo = needed(part, halo)
        self.halo = -(-halo // self.down) * self.down  # a stripe begins where a pair of rows does

    def __call__(self, x: Tensor, tape: Tape, rows: int | None, aside: Device | None = None) -> Tensor:
        """x [B, T, H, W, C] in stripes of at most `rows` rows where there are most of them; tails wait `aside`.

        rows None: all at once, as the layers do it.
        """
        if rows is None:
            return run(cast(Iterable[nn.Module], self.layers), x, tape)
        stripes = self._stripes(x.shape[2], rows)
        old = [] if tape.first else [[cast(Tensor, tape.pull()) for _ in range(self.tails)] for _ in stripes]
        out: Tensor | None = None
        for number, cut in enumerate(stripes):
            own = StripeTape(tape, stripes, number, old, x.device, aside or x.device)
            stripe = x[:, :, cut.top : cut.bottom].contiguous()
            y = run(cast(Iterable[nn.Module], self.layers), stripe, own)
            if out is None:
                out = y.new_empty(*y.shape[:2], self.out(x.shape[2]), *y.shape[3:])
            first, last = self.out(cut.begin), self.out(cut.end)
            out[:, :, first:last] = y[:, :, first - self.out(cut.top) : last - self.out(cut.top)]
            for stripe_before, tails_before in zip(stripes, old, strict=False):
                if stripe_before.end <= cut.end - self.halo:  # no stripe to come reaches as far up
                    tails_before.clear()
        assert out is not None
        return out

    def _stripes(self, height: int, rows: int) -> list[Stripe]:
        step = max(self.down, rows // (self.up * self.down) * self.down)
        ends = [min(begin + step, height) for begin in range(0, height, step)]
        return [
            Stripe(begin, end, max(0, begin - self.halo), min(height, end + self.halo))
            for begin, end in zip(range(0, height, step), ends, strict=True)
        ]

    def out(self, row: int) -> int:
        """The row of the output at this row of the input."""
        return row * self.up // self.down


def sections(layers: Iterable[Layer]) -> list[Section]:
    """The layers cut before what doubles and after what halves, so that the whole tensors between are small ones."""
    groups: list[list[Layer]] = [[]]
    for layer in layers:
        if has(Up, [layer]) and groups[-1]:
            groups.append([])
        groups[-1].append(layer)
        if has(Down, [layer]):
            groups.append([])
    return [Section(group) for group in groups if group]


class StripedDecoder(nn.Module):
    """Stands in for `CausalVae.decoder`.  rows: of its output; aside: where tails wait (None: where they are made)."""

    def __init__(self, decoder: Decoder, rows: int, aside: Device | None = None) -> None:
        super().__init__()
        self.whole, self.rows, self.aside = decoder, rows, aside
        self.late = sections([*cast(Iterable[Layer], decoder.upsamples), decoder.head])

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        x = run(self.whole.middle, conv3d(extend(x, 2, tape), self.whole.conv1), tape)
        for section in self.late:
            x = section(x, tape, self.rows, self.aside)
        return x


class StripedEncoder(nn.Module):
    """Stands in for `CausalVae.encoder`; see `StripedDecoder`.  rows: of its input."""

    def __init__(self, encoder: Encoder, rows: int, aside: Device | None = None) -> None:
        super().__init__()
        self.whole, self.rows, self.aside = encoder, rows, aside
        self.early = sections([Stem(encoder.conv1), *cast(Iterable[Layer], encoder.downsamples)])

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        for section in self.early:
            x = section(x, tape, self.rows, self.aside)
        return cast(Tensor, self.whole.head(run(self.whole.middle, x, tape), tape))


def inner_rows(vae: CausalVae, rows: int) -> int:
    """Rows of pixels as rows of the widest layers, which see `patch` of them as one."""
    return max(1, rows // vae.config.patch)


def stripe(vae: CausalVae, rows: int, *, aside: Device | None = None) -> CausalVae:
    """Let a VAE work in stripes of about `rows` rows of pixels, from the next stream on; returns it.

    aside: where what the stream remembers waits between its pieces, "cpu" for a VAE on a GPU.  For use without
    gradients.  The names of its tensors change: load the weights before.
    """
    inner = inner_rows(vae, rows)
    vae.encoder = cast(Encoder, StripedEncoder(vae.encoder, inner, aside))
    vae.decoder = cast(Decoder, StripedDecoder(vae.decoder, inner, aside))
    return vae
