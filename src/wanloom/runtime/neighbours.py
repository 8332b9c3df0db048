"""The VAE on several processes, each with a stripe of rows of every tensor.  Exact: other bits by rounding alone.

    deal_out(vae)               # on every process; from here on both ways go through on all of them
    deal_out(vae, rows=64)      # and each takes its rows in stripes of 64 rows of pixels (`stripes.py`)

Every process calls the same methods with the same arguments, whole videos and whole latents, and computes its own rows
of each layer.  The first process gets the result; what the others get is their part of it, and of no use.

What is exchanged?  Rows of latents are dealt out as evenly as they go, and the rows of all other tensors follow them.
Before a layer each process gets from its neighbours the rows that the layer sees beyond its own: two for a residual
block, one or two around the others, where a latent has one row from further away, too.  At the border of the frame
there is nothing beyond, and the layer's own zeros stand there.  The attention over a frame needs all rows: each process
gathers them and answers for its own.  The rows of the result go to the first.

The past of the stream stays where it was made: a process remembers its rows and those that it was given with them.
With more processes than rows of latents the last ones have none, and do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wanloom.models.vae import CausalVae, Decoder, DownStage, Encoder, FrameAttention, Tape, UpStage, run
from wanloom.runtime.stripes import Device, Layer, Section, Stem, Stripe, inner_rows, sections


def deal(rows: int, processes: int) -> list[tuple[int, int]]:
    """From which row to which, exclusive, each process has them: the first ones one more where they do not divide."""
    each, more = divmod(rows, processes)
    ends = [each * (number + 1) + min(number + 1, more) for number in range(processes)]
    return list(zip([0, *ends], ends, strict=False))


def trade(x: Tensor, stripes: Sequence[Stripe]) -> Tensor:
    """The rows from top to bottom of this process's stripe.

    x [B, T, H, W, C]: its rows from begin to end.  stripes: of all processes, in their order; each calls this.
    """
    own, pieces, moves = stripes[dist.get_rank()], [], []
    for number, other in enumerate(stripes):
        if other is own:
            pieces.append(x)
            continue
        begin, end = other.takes(own)
        if begin < end:
            given = x[:, :, begin - own.begin : end - own.begin].contiguous()
            moves.append(dist.P2POp(dist.isend, given, number))
        begin, end = own.takes(other)
        if begin < end:
            pieces.append(x.new_empty(*x.shape[:2], end - begin, *x.shape[3:]))
            moves.append(dist.P2POp(dist.irecv, pieces[-1], number))
    for move in dist.batch_isend_irecv(moves) if moves else ():
        move.wait()
    return torch.cat(pieces, 2) if len(pieces) > 1 else x


class RowTape(Tape):
    """The tape of one process, whose tensors are its rows alone; it knows which rows the others have.

    dealt: of the rows of latents, by process.
    """

    def __init__(self, tape: Tape, dealt: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.first = tape.first
        self._tape, self._dealt = tape, dealt
        self.begin, self.end = dealt[dist.get_rank()]

    def pull(self) -> Tensor | None:
        return self._tape.pull()

    def push(self, x: Tensor, frames: int) -> None:
        self._tape.push(x, frames)

    def stripes(self, x: Tensor, halo: int | None) -> list[Stripe]:
        """What each process has of a tensor of which x is this one's part, and needs: `halo` rows beside it; all."""
        each = x.shape[2] // (self.end - self.begin)
        height = self._dealt[-1][1] * each
        halo = height if halo is None else halo
        found = []
        for begin, end in ((each * begin, each * end) for begin, end in self._dealt):
            more = halo if begin < end else 0  # who has nothing needs nothing
            found.append(Stripe(begin, end, max(0, begin - more), min(height, end + more)))
        return found


class Shared(nn.Module):
    """Layers that see a few rows beside each, as one of several processes computes them: of its rows, and to its rows.

    rows, aside: as for `Section`, within the rows of this process.
    """

    def __init__(self, section: Section, rows: int | None = None, aside: Device | None = None) -> None:
        super().__init__()
        self.section, self.rows, self.aside = section, rows, aside
        self.layers = nn.ModuleList(cast(Iterable[nn.Module], section.layers))

    def forward(self, x: Tensor, tape: RowTape) -> Tensor:
        stripes = tape.stripes(x, self.section.halo)
        own, out = stripes[dist.get_rank()], self.section.out
        y = self.section(trade(x, stripes), tape, self.rows, self.aside)
        return y[:, :, out(own.begin - own.top) : out(own.end - own.top)]


class SharedAttention(nn.Module):
    """The attention over a frame, asked for the rows of this process."""

    def __init__(self, attention: FrameAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, tape: RowTape) -> Tensor:
        stripes = tape.stripes(x, None)
        own = stripes[dist.get_rank()]
        return cast(Tensor, self.attention(trade(x, stripes), tape, slice(own.begin, own.end)))


def shared(layer: Layer) -> nn.Module:
    """A layer as one of several processes computes it; the layers of a stage one by one, as its shortcut needs none."""
    if isinstance(layer, FrameAttention):
        return SharedAttention(layer)
    if isinstance(layer, DownStage):
        layer.downsamples = nn.ModuleList(shared(part) for part in cast(Iterable[Layer], layer.downsamples))
        return layer
    if isinstance(layer, UpStage):
        layer.upsamples = nn.ModuleList(shared(part) for part in cast(Iterable[Layer], layer.upsamples))
        return layer
    return Shared(Section([layer]))


class Dealt(nn.Module):
    """Stands in for `CausalVae.encoder` or `.decoder`: layers of which this process computes its rows.

    unit: rows of what comes in for each row of latents; channels: of what goes out.
    """

    def __init__(self, layers: Sequence[nn.Module], unit: int, channels: int) -> None:
        super().__init__()
        self.layers, self.unit, self.channels = nn.ModuleList(layers), unit, channels

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        """x whole on each process [B, T, H, W, C] -> the whole result on the first, a part of it on the others."""
        own = RowTape(tape, deal(x.shape[2] // self.unit, dist.get_world_size()))
        if own.begin == own.end:
            return x.new_empty(*x.shape[:2], 0, x.shape[3], self.channels)
        y = run(self.layers, x[:, :, own.begin * self.unit : own.end * self.unit], own)
        stripes = own.stripes(y, 0)
        stripes[0] = Stripe(0, stripes[0].end, 0, stripes[-1].end)
        return trade(y, stripes)


def deal_out(vae: CausalVae, *, rows: int | None = None, aside: Device | None = None) -> CausalVae:
    """Let a VAE work on all processes of this run together, from the next stream on; returns it.

    rows, aside: as for `stripe`, of the rows that a process has; None: all at once.  For use without gradients.  The
    names of its tensors change: load the weights before.
    """

    def small(*layers: nn.Module) -> list[nn.Module]:
        return [shared(cast(Layer, layer)) for layer in layers]

    def large(*layers: nn.Module) -> list[nn.Module]:
        if rows is None:
            return small(*layers)
        return [Shared(section, inner_rows(vae, rows), aside) for section in sections(cast(Iterable[Layer], layers))]

    encoder, decoder, config = vae.encoder, vae.decoder, vae.config
    inward = large(Stem(encoder.conv1), *encoder.downsamples) + small(*encoder.middle, encoder.head)
    outward = small(Stem(decoder.conv1), *decoder.middle) + large(*decoder.upsamples, decoder.head)
    vae.encoder = cast(Encoder, Dealt(inward, config.stride[1] // config.patch, 2 * config.z))
    vae.decoder = cast(Decoder, Dealt(outward, 1, 3 * config.patch**2))
    return vae
