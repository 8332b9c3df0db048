"""The causal video VAE: pixels to latents and back, in one pass or frame by frame.

What is causal?  A latent never depends on later pixels and a pixel never on later latents: every 3D convolution pads
time on the left only.  The first frame stands alone; after it `stride[0]` pixel frames (four in both releases) make a
latent.

What is streaming?  A layer that looks back in time needs the last one or two frames of its input.  These tails are the
only state; they come in and go out as a `VaeState` and never stay on the module.  So one code serves a whole clip
(training), one latent at a time (memory flat in frames) and everything between, and all give the same numbers.

Inside, tensors are [B, T, H, W, C]: frames and positions are then rows of channels, so that norms read one row, images
and pointwise convolutions are views, and convolutions run in the layout they like best.  The public methods speak
[B, C, T, H, W].

Tensor names and their indices are the official ones (Wan2.2 `wan/modules/vae2_1.py`, `vae2_2.py`), so a state_dict of
this module is an official checkpoint.  Parameters run in the dtype they are loaded in; norms and latent statistics are
computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanloom.models.config import VaeConfig
from wanloom.models.numerics import add, recording, wide


@dataclass(frozen=True)
class VaeState:
    """What a stream remembers between two calls: the tails of layer inputs, in the order the layers run."""

    tails: tuple[Tensor, ...]


class Tape:
    """One pass over the layers: hands each its tail from the last call and gathers the new ones.

    `keep=False` gathers nothing: after the last piece no tails are needed, and keeping them would only cost memory.
    """

    def __init__(self, state: VaeState | None = None, *, keep: bool = True) -> None:
        self.first = state is None
        self._old = list(reversed(state.tails)) if state is not None else []
        self._new: list[Tensor] | None = [] if keep else None

    def pull(self) -> Tensor | None:
        """The tail that this layer pushed in the last call, now the layer's own; None in the first call of a stream."""
        return None if self.first else self._old.pop()

    def push(self, x: Tensor, frames: int) -> None:
        """Remember the last `frames` frames of x [B, T, H, W, C]; a copy, so that the rest of x can be freed."""
        if self._new is not None:
            self._new.append(x[:, x.shape[1] - frames :].clone())

    def state(self) -> VaeState:
        return VaeState(tuple(self._new or ()))


MIN_PIECE = 1 << 16  # values; below this, starting an operation costs more than the memory traffic it saves


class ChannelNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over the channels of [..., C], each position by itself."""

    eps = 1e-12
    pieces = 64  # see silu_into; fewer where starting an operation is dear and memory is fast

    def __init__(self, dim: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        y = x.to(dtype)
        y = y * self._scale(y) * self.gamma.flatten().to(dtype)
        return y.to(x.dtype)

    def silu_into(self, out: Tensor, x: Tensor) -> None:
        """Write silu(norm(x)) into `out`, both contiguous [..., C]; without gradients.

        The rows go through in pieces, so that a piece stays in the processor's cache between the operations.
        """
        dtype = wide(x.dtype)
        gamma = self.gamma.flatten().to(dtype)
        x, out = x.flatten(0, -2), out.flatten(0, -2)
        rows = max(MIN_PIECE // x.shape[1], -(-x.shape[0] // self.pieces))
        for a in range(0, x.shape[0], rows):
            piece, target = x[a : a + rows], out[a : a + rows]
            if x.dtype == dtype:
                torch.mul(piece, self._scale(piece), out=target)
                F.silu(target.mul_(gamma), inplace=True)
            else:
                y = piece.to(dtype)
                target.copy_(F.silu(y.mul_(self._scale(y)).mul_(gamma), inplace=True))

    def _scale(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return cast(Tensor, x.shape[-1] ** 0.5 / norm.clamp_min(self.eps))


def causal_conv(inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> nn.Conv3d:
    """A 3D convolution that keeps the spatial size; its past is set before it (`extend`), not padded by it."""
    return nn.Conv3d(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))


def conv3d(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """[B, T, H, W, Cin] -> [B, T', H', W', Cout], without padding of time."""
    small = x.dtype == torch.float32 and x.shape[0] == 1 and x.shape[1] * x.shape[2] * x.shape[4] <= SMALL
    if small and 8 * x.numel() >= conv.weight.numel():  # else rearranging the weights costs more than it saves
        return conv3d_by_frames(x, conv)
    y = F.conv3d(x.permute(0, 4, 1, 2, 3), conv.weight, conv.bias, conv.stride, conv.padding)
    return y.permute(0, 2, 3, 4, 1).contiguous()


# PyTorch's own bound (aten/src/ATen/native/Convolution.cpp, use_mkldnn): one float32 clip with T * H * C up to here
# goes to a plain loop instead of oneDNN, up to ten times slower.  As a batch of frames it does not.
SMALL = 20480


def conv3d_by_frames(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """`conv3d` as a 2D convolution of frames that carry the frames of their window in their channels."""
    taps, step = conv.kernel_size[0], conv.stride[0]
    end = x.shape[1] - taps + 1
    window = torch.cat([x[:, k : k + end : step] for k in range(taps)], dim=-1)
    weight = conv.weight.transpose(1, 2).flatten(1, 2)
    return conv2d(window, weight, conv.bias, padding=conv.kernel_size[1] // 2)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int) -> Tensor:
    """Every frame of [B, T, H, W, Cin] -> [B, T, H', W', Cout]."""
    y = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, stride, padding).permute(0, 2, 3, 1)
    return y.contiguous().view(x.shape[0], x.shape[1], *y.shape[1:])


def pointwise(x: Tensor, conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    """A convolution with a kernel of one position: a linear map of each row [..., Cin] -> [..., Cout]."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def extend(x: Tensor, frames: int, tape: Tape) -> Tensor:
    """x [B, T, H, W, C] with `frames` frames before it: the tail of the last call, or zeros at the start."""
    tail = tape.pull()
    x = F.pad(x, (0, 0, 0, 0, 0, 0, frames, 0)) if tail is None else torch.cat((tail, x), dim=1)
    tape.push(x, frames)
    return x


def norm_silu_conv(norm: ChannelNorm, conv: nn.Conv3d, x: Tensor, tape: Tape) -> Tensor:
    """conv(silu(norm(x))), causal.  Without gradients the convolution's input, with its past, is written once."""
    back = conv.kernel_size[0] - 1
    if recording(x, norm.gamma):
        return conv3d(extend(F.silu(norm(x)), back, tape), conv)
    y = x.new_empty(x.shape[0], back + x.shape[1], *x.shape[2:])
    tail = tape.pull()
    y[:, :back] = 0 if tail is None else tail
    for clip, out in zip(x, y, strict=True):
        norm.silu_into(out[back:], clip)
    tape.push(y, back)
    return conv3d(y, conv)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv twice, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(inputs, 3),
                "2": causal_conv(inputs, outputs),
                "3": ChannelNorm(outputs, 3),
                "6": causal_conv(outputs, outputs),
            }
        )
        self.shortcut = causal_conv(inputs, outputs, (1, 1, 1)) if inputs != outputs else None

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        norm1, conv1, norm2, conv2 = cast(tuple[ChannelNorm, nn.Conv3d, ChannelNorm, nn.Conv3d], self.residual.values())
        y = norm_silu_conv(norm1, conv1, x, tape)
        y = norm_silu_conv(norm2, conv2, y, tape)
        return add(y, x if self.shortcut is None else pointwise(x, self.shortcut))


class FrameAttention(nn.Module):
    """Single-head self-attention over the positions of each frame; nothing crosses time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, tape: Tape, rows: slice = slice(None)) -> Tensor:
        """Those rows of the result; all of x [B, T, H, W, C] is looked at."""
        b, t, _, _, c = x.shape
        q, k, v = pointwise(self.norm(x), self.to_qkv).chunk(3, dim=-1)
        q, k, v = (part.reshape(b * t, 1, -1, c) for part in (q[:, :, rows], k, v))
        x = x[:, :, rows]
        y = F.scaled_dot_product_attention(q, k, v).reshape(x.shape)
        return add(pointwise(y, self.proj), x)


class Down(nn.Module):
    """Halve height and width, and time too when `temporal` (the first frame of the stream stays alone)."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, stride=2)})
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        conv = cast(nn.Conv2d, self.resample["1"])
        x = F.pad(x, (0, 0, 0, 1, 0, 1))  # zeros right and below only
        y = conv2d(x, conv.weight, conv.bias, stride=2, padding=0)
        if self.time_conv is None:
            return y
        tail = tape.pull()
        tape.push(y, 1)
        if tail is not None:
            return conv3d(torch.cat((tail, y), dim=1), self.time_conv)
        head = y[:, :1]
        return head.contiguous() if y.shape[1] == 1 else torch.cat((head, conv3d(y, self.time_conv)), dim=1)


class Up(nn.Module):
    """Double height and width, and time too when `temporal` (the first frame of the stream stays single)."""

    def __init__(self, dim: int, outputs: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, outputs, 3, padding=1)})
        self.time_conv = causal_conv(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        if self.time_conv is not None:
            x = self._double_time(x, self.time_conv, tape)
        conv = cast(nn.Conv2d, self.resample["1"])
        assert conv.bias is not None
        few = x.shape[1] * x.shape[2] * x.shape[3] < 512  # positions; folding the kernel would cost more than it saves
        double = double_size if few or recording(x, conv.weight) else double_size_folded
        return double(x, conv.weight, conv.bias)

    def _double_time(self, x: Tensor, conv: nn.Conv3d, tape: Tape) -> Tensor:
        """[B, T, H, W, C] -> [B, 2T, H, W, C], less one frame in the first call.

        The stream's first frame passes as it is, and later frames do not see it: their past begins with zeros.
        """
        if not tape.first:
            return interleave(conv3d(extend(x, 2, tape), conv))
        head, rest = x[:, :1], x[:, 1:]
        if rest.shape[1]:
            return torch.cat((head, interleave(conv3d(extend(rest, 2, tape), conv))), dim=1)
        tape.push(torch.zeros_like(head).expand(-1, 2, -1, -1, -1), 2)
        return head


def interleave(x: Tensor) -> Tensor:
    """[B, T, H, W, 2C] -> [B, 2T, H, W, C]: the first C channels are the even frames, the last C the odd ones."""
    b, t, h, w, c = x.shape
    return x.view(b, t, h, w, 2, c // 2).permute(0, 1, 4, 2, 3, 5).reshape(b, 2 * t, h, w, c // 2)


def double_size(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Repeat every position of [B, T, H, W, C] 2 x 2, then convolve 3 x 3."""
    x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return conv2d(x, weight, bias, padding=1)


def double_size_folded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`double_size` in 4/9 of the multiplications, for use without gradients.

    After the repetition a 3 x 3 window sees only 2 x 2 different positions; which ones depends on whether the output's
    row and column are even or odd.  So the kernel folds into four of 2 x 2, and the repeated input is never made.
    """
    dtype = wide(x.dtype)
    even, odd = [[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]
    weight = weight.to(dtype)
    which = weight.new_tensor([even, odd])
    kernels = torch.einsum("aik,bjl,ockl->abocij", which, which, weight).to(x.dtype)
    b, t, h, w, _ = x.shape
    c = weight.shape[0]
    out = x.new_empty(b, t, h, 2, w, 2, c)
    stacked, biases = kernels.flatten(0, 2), bias.repeat(4)
    group = max(1, 1024 // (h * w))  # large frames one at a time: the parts take as much memory as the result
    for i in range(0, t, group):
        y = conv2d(x[:, i : i + group], stacked, biases, padding=1)
        parts = y.view(b, -1, h + 1, w + 1, 2, 2, c)
        for row in (0, 1):
            for column in (0, 1):
                out[:, i : i + group, :, row, :, column] = parts[:, :, row : row + h, column : column + w, row, column]
    return out.view(b, t, 2 * h, 2 * w, c)


def average_down(x: Tensor, channels: int, ft: int, fs: int) -> Tensor:
    """Wan2.2's shortcut around an encoder stage: fold ft x fs x fs cells into channels and average groups of them.

    [B, T, H, W, C] -> [B, ceil(T / ft), H / fs, W / fs, channels].  The first call of a stream has an odd number of
    frames: a zero frame goes before it.  Where a stage widens more than it folds (in no release), channels repeat.
    """
    x = F.pad(x, (0, 0, 0, 0, 0, 0, -x.shape[1] % ft, 0))
    b, t, h, w, c = x.shape
    x = x.view(b, t // ft, ft, h // fs, fs, w // fs, fs, c).permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)
    if x.shape[-1] < channels:
        return x.repeat_interleave(channels // x.shape[-1], dim=-1)
    return x.view(*x.shape[:4], channels, -1).mean(dim=-1)


def duplicate_up(x: Tensor, channels: int, ft: int, fs: int, *, first: bool) -> Tensor:
    """Wan2.2's shortcut around a decoder stage: spread repeated channels over ft x fs x fs cells.

    [B, T, H, W, C] -> [B, T * ft, H * fs, W * fs, channels]; the first call of a stream loses its first ft - 1 frames.
    """
    b, t, h, w, c = x.shape
    x = x.repeat_interleave(channels * ft * fs * fs // c, dim=-1)
    x = x.view(b, t, h, w, channels, ft, fs, fs).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(b, t * ft, h * fs, w * fs, channels)
    return x[:, ft - 1 :] if first else x


class DownStage(nn.Module):
    """An encoder stage of Wan2.2: its layers beside an averaging shortcut without parameters."""

    def __init__(self, layers: list[nn.Module], outputs: int, ft: int, fs: int) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList(layers)
        self.outputs, self.ft, self.fs = outputs, ft, fs

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        shortcut = average_down(x, self.outputs, self.ft, self.fs)
        return add(run(self.downsamples, x, tape), shortcut)


class UpStage(nn.Module):
    """A decoder stage of Wan2.2: its layers beside a duplicating shortcut (none around the last stage)."""

    def __init__(self, layers: list[nn.Module], outputs: int, ft: int, fs: int) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(layers)
        self.outputs, self.ft, self.fs = outputs, ft, fs

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        y = run(self.upsamples, x, tape)
        if self.fs == 1:
            return y
        return add(y, duplicate_up(x, self.outputs, self.ft, self.fs, first=tape.first))


def run(layers: Iterable[nn.Module], x: Tensor, tape: Tape) -> Tensor:
    for layer in layers:
        x = layer(x, tape)
    return x


class Head(nn.ModuleDict):
    """norm, SiLU, conv: the last layers of encoder and decoder."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__({"0": ChannelNorm(dim, 3), "2": causal_conv(dim, outputs)})

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        norm, conv = cast(tuple[ChannelNorm, nn.Conv3d], self.values())
        return norm_silu_conv(norm, conv, x, tape)


def middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim)])


class Encoder(nn.Module):
    """[B, F, H, W, 3 * patch^2] -> [B, T, h, w, 2 * z]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.dim * m for m in (1, *config.multipliers)]
        self.conv1 = causal_conv(3 * config.patch**2, widths[0])
        self.downsamples = nn.ModuleList()
        for stage, (inputs, outputs) in enumerate(pairwise(widths)):
            layers: list[nn.Module] = [
                ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(config.blocks)
            ]
            last = stage == len(config.temporal)
            temporal = not last and config.temporal[stage]
            if not last:
                layers.append(Down(outputs, temporal))
            if config.residual:
                layers = [DownStage(layers, outputs, 2 if temporal else 1, 1 if last else 2)]
            self.downsamples.extend(layers)
        self.middle = middle(widths[-1])
        self.head = Head(widths[-1], 2 * config.z)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        x = conv3d(extend(x, 2, tape), self.conv1)
        x = run(self.downsamples, x, tape)
        x = run(self.middle, x, tape)
        return cast(Tensor, self.head(x, tape))


class Decoder(nn.Module):
    """[B, T, h, w, z] -> [B, F, H, W, 3 * patch^2]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.decoder_dim * m for m in (config.multipliers[-1], *reversed(config.multipliers))]
        temporal_up = tuple(reversed(config.temporal))
        self.conv1 = causal_conv(config.z, widths[0])
        self.middle = middle(widths[0])
        self.upsamples = nn.ModuleList()
        for stage, (inputs, outputs) in enumerate(pairwise(widths)):
            if stage and not config.residual:
                inputs //= 2  # the upsampling convolution before it halves the channels (Wan2.1 only)
            layers: list[nn.Module] = [
                ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(config.blocks + 1)
            ]
            last = stage == len(temporal_up)
            temporal = not last and temporal_up[stage]
            if not last:
                layers.append(Up(outputs, outputs if config.residual else outputs // 2, temporal))
            if config.residual:
                layers = [UpStage(layers, outputs, 2 if temporal else 1, 1 if last else 2)]
            self.upsamples.extend(layers)
        self.head = Head(widths[-1], 3 * config.patch**2)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        x = conv3d(extend(x, 2, tape), self.conv1)
        x = run(self.middle, x, tape)
        x = run(self.upsamples, x, tape)
        return cast(Tensor, self.head(x, tape))


def fold(video: Tensor, patch: int) -> Tensor:
    """[B, C, F, H, W] -> [B, F, H / patch, W / patch, C * patch^2]; in a cell the rows run fastest (official order)."""
    b, c, f, h, w = video.shape
    x = video.reshape(b, c, f, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 3, 5, 1, 6, 4).reshape(b, f, h // patch, w // patch, c * patch * patch)


def unfold(x: Tensor, patch: int) -> Tensor:
    """The inverse of `fold`."""
    b, f, h, w, c = x.shape
    x = x.view(b, f, h, w, c // patch**2, patch, patch)
    return x.permute(0, 4, 1, 2, 6, 3, 5).reshape(b, c // patch**2, f, h * patch, w * patch)


class CausalVae(nn.Module):
    """Video [B, 3, F, H, W] in [-1, 1] <-> normalised latents [B, z, T, h, w]; T, h, w by `config.stride`."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = causal_conv(2 * config.z, 2 * config.z, (1, 1, 1))
        self.conv2 = causal_conv(config.z, config.z, (1, 1, 1))
        self.decoder = Decoder(config)

    def encode(self, video: Tensor, state: VaeState | None = None) -> tuple[Tensor, VaeState]:
        """Pixels [B, 3, F, H, W] in [-1, 1] to normalised latents [B, z, T, h, w], float32, and the next call's state.

        The first call of a stream (no state) takes 1 + k * stride frames and gives 1 + k latents, later calls take
        k * stride frames and give k latents; any other number is a ValueError (the reference drops frames silently).
        The latent is the mean of the posterior, as in the reference: nothing is drawn.
        """
        tape = Tape(state)
        mu, _ = self._moments(video, tape)
        return self.normalise(mu), tape.state()

    def decode(self, z: Tensor, state: VaeState | None = None) -> tuple[Tensor, VaeState]:
        """Normalised latents [B, z, T, h, w] to pixels [B, 3, F, H, W] clamped to [-1, 1], float32, and the next state.

        Any number of latents: the first of a stream makes one frame, every other `stride[0]`.
        """
        tape = Tape(state)
        return self._frames(z, tape), tape.state()

    def encode_chunks(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a stream of pieces [B, 3, F, H, W] (first 1 + k * stride frames, then k * stride); yields latents."""
        state = None
        for piece in frames:
            tape, state = Tape(state), None  # nobody else holds the tails: each goes when its layer has read it
            mu, _ = self._moments(piece, tape)
            state = tape.state()
            yield self.normalise(mu)

    def decode_chunks(self, z: Tensor, latents_per_chunk: int = 1) -> Iterator[Tensor]:
        """Decode z [B, z, T, h, w] piece by piece; yields pixels [B, 3, F, H, W].  Memory does not grow with T."""
        if latents_per_chunk < 1:
            raise ValueError(f"latents_per_chunk={latents_per_chunk}: at least 1 latent makes a chunk")
        state = None
        for start in range(0, z.shape[2], latents_per_chunk):
            end = start + latents_per_chunk
            tape, state = Tape(state, keep=end < z.shape[2]), None  # as in `encode_chunks`
            video = self._frames(z[:, :, start:end], tape)
            state = tape.state()
            yield video

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, z, T, h, w] of the posterior of a whole clip, not normalised (for training)."""
        return self._moments(video, Tape(keep=False))

    def render(self, mu: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] of un-normalised latents of a whole clip, not clamped (for training)."""
        self._check_latents(mu)
        return self._pixels(mu, Tape(keep=False))

    def normalise(self, mu: Tensor) -> Tensor:
        """(mu - mean) / std by the config's statistics, in float32 at least."""
        mu = mu.to(wide(mu.dtype))
        mean, std = self._statistics(mu)
        return (mu - mean) * (1 / std)

    def denormalise(self, z: Tensor) -> Tensor:
        """z * std + mean by the config's statistics, in float32 at least."""
        z = z.to(wide(z.dtype))
        mean, std = self._statistics(z)
        return z * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # made at use: a buffer would be missing from published checkpoints, and lost when built on meta
        return like.new_tensor(self.config.mean).view(-1, 1, 1, 1), like.new_tensor(self.config.std).view(-1, 1, 1, 1)

    def _moments(self, video: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        self._check_video(video, first=tape.first)
        x = fold(video.to(self.conv1.weight.dtype), self.config.patch)
        y = pointwise(self.encoder(x, tape), self.conv1).movedim(-1, 1)
        mu, logvar = y.to(wide(y.dtype)).contiguous().chunk(2, dim=1)
        return mu, logvar

    def _frames(self, z: Tensor, tape: Tape) -> Tensor:
        self._check_latents(z)
        return self._pixels(self.denormalise(z), tape).clamp(-1, 1)

    def _pixels(self, mu: Tensor, tape: Tape) -> Tensor:
        x = mu.to(self.conv2.weight.dtype).movedim(1, -1)
        x = self.decoder(pointwise(x, self.conv2), tape)
        return unfold(x.to(wide(x.dtype)), self.config.patch)

    def _check_latents(self, z: Tensor) -> None:
        if z.dim() != 5 or z.shape[1] != self.config.z or z.shape[2] < 1:
            raise ValueError(f"latents {tuple(z.shape)}: this VAE reads [B, {self.config.z}, T >= 1, h, w]")

    def _check_video(self, video: Tensor, *, first: bool) -> None:
        time, height, width = self.config.stride
        if video.dim() != 5 or video.shape[1] != 3 or video.shape[3] % height or video.shape[4] % width:
            raise ValueError(
                f"video {tuple(video.shape)}: this VAE reads [B, 3, F, H, W], H and W multiples of {height}"
            )
        frames = video.shape[2]
        if frames < 1 or (frames - first) % time:
            want = f"1 + {time}k frames at the start of a stream" if first else f"{time}k frames after its start"
            raise ValueError(f"video of {frames} frames: this VAE reads {want}")


@torch.no_grad()
def init_for_training(vae: CausalVae, generator: torch.Generator | None = None) -> None:
    """Start values from which a VAE trains well; PyTorch's defaults shrink the signal at every layer.

    Matrices keep the signal's size (std 1 / sqrt(fan in)), biases are zero, residual branches start small.  A clip
    starts as a set of still pictures: 3x3x3 kernels read this frame only, `time_conv` averages two frames or repeats
    one.
    """
    for name, module in vae.named_modules():
        if isinstance(module, ChannelNorm):
            module.gamma.fill_(1)
        if not isinstance(module, (nn.Conv2d, nn.Conv3d)):
            continue
        assert module.bias is not None
        module.bias.zero_()
        weight = module.weight.zero_()
        if name.endswith("time_conv"):
            outputs, inputs = weight.shape[:2]
            if outputs == inputs:  # down: frames 2k + 1 and 2k + 2 make latent frame k + 1
                nn.init.eye_(weight[:, :, 1, 0, 0]).mul_(0.5)
                nn.init.eye_(weight[:, :, 2, 0, 0]).mul_(0.5)
            else:  # up: both output frames are this frame
                nn.init.eye_(weight[:inputs, :, 2, 0, 0])
                nn.init.eye_(weight[inputs:, :, 2, 0, 0])
            continue
        this_frame = weight[:, :, -1] if weight.dim() == 5 else weight
        gain = 0.2 if name.endswith("residual.6") else 0.0 if name.endswith(".proj") else 1.0
        this_frame.normal_(0, gain * this_frame[0].numel() ** -0.5, generator=generator)


__all__ = ["CausalVae", "VaeState", "init_for_training"]
