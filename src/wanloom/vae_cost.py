"""What the VAE costs, layer by layer: parameters, operations and memory from its config alone, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from wanloom.models.config import VaeConfig

RESAMPLING = 9  # kernel positions of the layers that double or halve a frame: 3x3, the others look back in time


@dataclass(frozen=True)
class Layer:
    """A convolution of the VAE at its place: `frames` output frames of `pixels` positions, `taps` inputs per output.

    `past`: frames of its input kept between the pieces of a stream.
    """

    inputs: int
    outputs: int
    taps: int  # kernel positions: 27 for 3x3x3
    frames: int
    pixels: int
    norm: int = 0  # parameters of the norm before it
    past: int = 0

    @property
    def parameters(self) -> int:
        return self.taps * self.inputs * self.outputs + self.outputs + self.norm

    @property
    def flops(self) -> int:
        return 2 * self.taps * self.inputs * self.outputs * self.frames * self.pixels


def encoder_layers(config: VaeConfig, frames: int, pixels: int) -> Iterator[Layer]:
    """The convolutions of the encoder for `frames` frames of `pixels` positions (after folding `config.patch`)."""
    widths = [config.dim * m for m in (1, *config.multipliers)]
    yield Layer(3 * config.patch**2, widths[0], 27, frames, pixels, past=2)
    for stage, (inputs, outputs) in enumerate(pairwise(widths)):
        for index in range(config.blocks):
            yield from _residual(inputs if index == 0 else outputs, outputs, frames, pixels)
        if stage < len(config.temporal):
            pixels //= 4
            yield Layer(outputs, outputs, 9, frames, pixels)
            if config.temporal[stage]:
                frames = (frames - 1) // 2 + 1
                yield Layer(outputs, outputs, 3, frames - 1, pixels, past=1)
    yield from _middle(widths[-1], frames, pixels)
    yield Layer(widths[-1], 2 * config.z, 27, frames, pixels, norm=widths[-1], past=2)
    yield Layer(2 * config.z, 2 * config.z, 1, frames, pixels)


def decoder_layers(config: VaeConfig, frames: int, pixels: int) -> Iterator[Layer]:
    """The convolutions of the decoder for `frames` latent frames of `pixels` positions."""
    widths = [config.decoder_dim * m for m in (config.multipliers[-1], *reversed(config.multipliers))]
    temporal = tuple(reversed(config.temporal))
    yield Layer(config.z, config.z, 1, frames, pixels)
    yield Layer(config.z, widths[0], 27, frames, pixels, past=2)
    yield from _middle(widths[0], frames, pixels)
    for stage, (inputs, outputs) in enumerate(pairwise(widths)):
        if stage and not config.residual:
            inputs //= 2  # Wan2.1: the upsampling before it halved the channels
        for index in range(config.blocks + 1):
            yield from _residual(inputs if index == 0 else outputs, outputs, frames, pixels)
        if stage < len(temporal):
            if temporal[stage]:
                yield Layer(outputs, 2 * outputs, 3, frames - 1, pixels, past=2)
                frames = 2 * (frames - 1) + 1
            pixels *= 4
            yield Layer(outputs, outputs if config.residual else outputs // 2, 9, frames, pixels)
    yield Layer(widths[-1], 3 * config.patch**2, 27, frames, pixels, norm=widths[-1], past=2)


def _residual(inputs: int, outputs: int, frames: int, pixels: int) -> Iterator[Layer]:
    yield Layer(inputs, outputs, 27, frames, pixels, norm=inputs, past=2)
    yield Layer(outputs, outputs, 27, frames, pixels, norm=outputs, past=2)
    if inputs != outputs:
        yield Layer(inputs, outputs, 1, frames, pixels)


def _middle(width: int, frames: int, pixels: int) -> Iterator[Layer]:
    yield from _residual(width, width, frames, pixels)
    yield Layer(width, 3 * width, 1, frames, pixels, norm=width)
    yield Layer(width, width, 1, frames, pixels)
    yield from _residual(width, width, frames, pixels)


def vae_parameters(config: VaeConfig) -> int:
    """Parameters of the VAE, encoder and decoder."""
    layers = (*encoder_layers(config, 1, 1 << 20), *decoder_layers(config, 1, 1))
    return sum(layer.parameters for layer in layers)


def encode_flops(config: VaeConfig, frames: int, size: tuple[int, int]) -> int:
    """Operations to encode `frames` pixel frames of size (w, h)."""
    pixels = size[0] * size[1] // config.patch**2
    latents, small = _latents(config, frames), size[0] * size[1] // config.stride[1] ** 2
    return sum(layer.flops for layer in encoder_layers(config, frames, pixels)) + _attention(
        config.dim * config.multipliers[-1], latents, small
    )


def decode_flops(config: VaeConfig, frames: int, size: tuple[int, int]) -> int:
    """Operations to decode the latents of `frames` pixel frames of size (w, h)."""
    latents, small = _latents(config, frames), size[0] * size[1] // config.stride[1] ** 2
    return sum(layer.flops for layer in decoder_layers(config, latents, small)) + _attention(
        config.decoder_dim * config.multipliers[-1], latents, small
    )


def _attention(width: int, frames: int, pixels: int) -> int:
    """The VAE's attention over the positions of each frame."""
    return 4 * frames * pixels * pixels * width


def _latents(config: VaeConfig, frames: int) -> int:
    return (frames - 1) // config.stride[0] + 1


def vae_activations(
    config: VaeConfig,
    size: tuple[int, int],
    *,
    decode: bool,
    rows: int | None = None,
    aside: bool = False,
    width: int = 4,
) -> int:
    """Bytes of a streamed encode or decode in values of `width` bytes: what it remembers, and its widest layer at work.

    A piece of the stream is one latent.  What is remembered is replaced layer by layer.  A layer at work holds its
    input and the same with the past before it, its output, and that twice more in the convolution's own layout.

    rows: rows of pixels in a stripe (`_striped`); aside: what is remembered waits elsewhere then.
    """
    layers = _of_a_piece(config, size, decode=decode)
    past = remembered(config, size, decode=decode) * width // 4
    if rows is not None and rows < size[1]:
        return (0 if aside else past) + _striped(config, layers, size, rows, decode=decode) * width // 4
    return past + width * max(layer.pixels * _at_work(layer) for layer in layers if layer.taps != RESAMPLING)


def _at_work(layer: Layer) -> int:
    """Values of a layer at work for each of its positions; RESAMPLING ones are never the widest, for what they read or
    write is held by the layer beside them as well."""
    frames = max(1, layer.frames - 1)
    return layer.inputs * (2 * frames + layer.past) + 3 * layer.outputs * frames


def _striped(config: VaeConfig, layers: list[Layer], size: tuple[int, int], rows: int, *, decode: bool) -> int:
    """Bytes at work in stripes of `rows` rows of pixels, measured within a quarter for both VAEs.

    A stripe has up to 8 rows above and below it, and 20 in the decoder of Wan2.2; beside the layer at work there are
    the stripe that came in and the one that went out before.  Between two sections the tensor is whole: what a doubling
    layer was given (twice that in Wan2.2, whose stages halve the channels before it), what a halving layer made; and
    half as much again of the next.
    """
    inner, halo = rows // config.patch, 40 if decode and config.residual else 16
    widest = between = 0.0
    for layer in layers:
        frames = max(1, layer.frames - 1)
        if layer.taps == RESAMPLING:
            given = layer.inputs / 4 * (2 if config.residual else 1)
            between = max(between, layer.pixels * (given if decode else layer.outputs) * frames)
        else:
            height = size[1] / config.patch * (layer.pixels * config.patch**2 / (size[0] * size[1])) ** 0.5
            share = min(1.0, (inner + halo) / height)
            values = _at_work(layer) + (layer.inputs + layer.outputs) * frames
            widest = max(widest, layer.pixels * values * share)
    return int(4 * (widest + 1.5 * between))


def remembered(config: VaeConfig, size: tuple[int, int], *, decode: bool) -> int:
    """Bytes of the tails that a stream keeps from piece to piece, in float32."""
    layers = _of_a_piece(config, size, decode=decode)
    return 4 * sum(layer.past * layer.inputs * layer.pixels for layer in layers)


def _of_a_piece(config: VaeConfig, size: tuple[int, int], *, decode: bool) -> list[Layer]:
    if decode:
        # Two latents of which the first stands alone: the frames of the second are those of a later piece.
        return list(decoder_layers(config, 2, size[0] * size[1] // config.stride[1] ** 2))
    return list(encoder_layers(config, 1 + config.stride[0], size[0] * size[1] // config.patch**2))
