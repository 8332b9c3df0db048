"""The causal video VAE: pixels to latents and back, in one pass or frame by frame.

What is causal?  A latent never depends on later pixels and a pixel never on later latents: every 3D convolution pads time
on the left only.  The first frame stands alone; after it `stride[0]` pixel frames (four in both releases) make a latent.

What is streaming?  A layer that looks back in time needs the last one or two frames of its input.  These tails are the
only state; they come in and go out as a `VaeState` and never stay on the module.  So one code serves a whole clip
(training), one latent at a time (memory flat in frames) and everything between, and all give the same numbers.

Tensor names and their indices are the official ones (Wan2.2 `wan/modules/vae2_1.py`, `vae2_2.py`), so a state_dict of this
module is an official checkpoint.  Parameters run in the dtype they are loaded in; norms and latent statistics are computed in
float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanloom.models.config import VaeConfig


@dataclass(frozen=True)
class VaeState:
    """What a stream remembers between two calls: the tails of layer inputs, in the order the layers run."""

    tails: tuple[Tensor, ...]


class Tape:
    """One pass over the layers: hands each its tail from the last call and gathers the new ones.

    `keep=False` gathers nothing: a whole clip needs no tails, and keeping them would only cost memory.
    """

    def __init__(self, state: VaeState | None = None, *, keep: bool = True) -> None:
        self.first = state is None
        self._old = iter(state.tails if state is not None else ())
        self._new: list[Tensor] | None = [] if keep else None

    def pull(self) -> Tensor:
        """The tail that this layer pushed in the last call; only legal when not `first`."""
        return next(self._old)

    def push(self, x: Tensor, frames: int) -> None:
        """Remember the last `frames` frames of x [B, C, T, H, W]; a copy, so that the rest of x can be freed."""
        if self._new is not None:
            self._new.append(x[:, :, x.shape[2] - frames :].clone())

    def state(self) -> VaeState:
        return VaeState(tuple(self._new or ()))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and statistics: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over the channels of [B, C, ...], each position by itself."""

    eps = 1e-12

    def __init__(self, dim: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).clamp_min(self.eps)
        y = x.to(dtype) * (x.shape[1] ** 0.5 / norm) * self.gamma.to(dtype)
        return y.to(x.dtype)


class CausalConv(nn.Conv3d):
    """A 3D convolution that sees this frame and the ones before it; spatial size is kept."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, tape: Tape | None = None) -> Tensor:
        """[B, Cin, T, H, W] -> [B, Cout, T, H, W]; `tape` is needed when the kernel spans time."""
        back = self.kernel_size[0] - 1
        if back:
            assert tape is not None
            x = extend(x, None if tape.first else tape.pull(), back)
            tape.push(x, back)
        return super().forward(x)


def extend(x: Tensor, tail: Tensor | None, frames: int) -> Tensor:
    """x [B, C, T, H, W] with `frames` frames before it: the tail of the last call, or zeros at the start."""
    if tail is None:
        return F.pad(x, (0, 0, 0, 0, frames, 0))
    return torch.cat((tail, x), dim=2)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv twice, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(inputs, 3),
                "2": CausalConv(inputs, outputs),
                "3": RMSNorm(outputs, 3),
                "6": CausalConv(outputs, outputs),
            }
        )
        self.shortcut = CausalConv(inputs, outputs, (1, 1, 1)) if inputs != outputs else None

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        r = self.residual
        y = r["2"](F.silu(r["0"](x)), tape)
        y = r["6"](F.silu(r["3"](y)), tape)
        return cast(Tensor, y + (x if self.shortcut is None else self.shortcut(x)))


class FrameAttention(nn.Module):
    """Single-head self-attention over the positions of each frame; nothing crosses time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        b, c, t, h, w = x.shape
        y = x.transpose(1, 2).reshape(b * t, c, h, w)
        qkv = self.to_qkv(self.norm(y)).flatten(2).transpose(1, 2).unsqueeze(1)  # [BT, 1, HW, 3C]
        q, k, v = (part.contiguous() for part in qkv.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(b * t, c, h, w)
        y = self.proj(y).view(b, t, c, h, w).transpose(1, 2)
        return cast(Tensor, x + y)


def per_frame(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a module of images to every frame of x [B, C, T, H, W]."""
    b, c, t, h, w = x.shape
    y: Tensor = conv(x.transpose(1, 2).reshape(b * t, c, h, w))
    return y.view(b, t, *y.shape[1:]).transpose(1, 2)


class Down(nn.Module):
    """Halve height and width, and time too when `temporal` (the first frame of the stream stays alone)."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, stride=2)})
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        conv = self.resample["1"]
        y = per_frame(conv, F.pad(x, (0, 1, 0, 1)))
        if self.time_conv is None:
            return y
        if not tape.first:
            y = torch.cat((tape.pull(), y), dim=2)
        tape.push(y, 1)
        if not tape.first:
            return cast(Tensor, self.time_conv(y))
        head = y[:, :, :1]
        return head if y.shape[2] == 1 else torch.cat((head, self.time_conv(y)), dim=2)


class Up(nn.Module):
    """Double height and width, and time too when `temporal` (the first frame of the stream stays single)."""

    def __init__(self, dim: int, outputs: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, outputs, 3, padding=1)})
        self.time_conv = CausalConv(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        if self.time_conv is not None:
            x = self._double_time(x, self.time_conv, tape)
        return per_frame(self.resample["1"], F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest-exact"))

    def _double_time(self, x: Tensor, conv: CausalConv, tape: Tape) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2T, H, W], less one frame in the first call.

        The stream's first frame passes as it is, and later frames do not see it: their past begins with zeros.
        """
        if not tape.first:
            return interleave(conv(x, tape))
        head, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2]:
            return torch.cat((head, interleave(conv(rest, tape))), dim=2)
        tape.push(F.pad(torch.zeros_like(head), (0, 0, 0, 0, 1, 0)), 2)
        return head


def interleave(x: Tensor) -> Tensor:
    """[B, 2C, T, H, W] -> [B, C, 2T, H, W]: the first C channels are the even frames, the last C the odd ones."""
    b, c, t, h, w = x.shape
    return x.view(b, 2, c // 2, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c // 2, 2 * t, h, w)


def average_down(x: Tensor, channels: int, ft: int, fs: int) -> Tensor:
    """Wan2.2's shortcut around an encoder stage: fold ft x fs x fs cells into channels and average groups of them.

    [B, C, T, H, W] -> [B, channels, ceil(T / ft), H / fs, W / fs].  The first call of a stream has an odd number of frames: a zero
    frame goes before it.  Where a stage widens more than it folds (in no release), channels are repeated instead.
    """
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % ft, 0))
    b, c, t, h, w = x.shape
    x = x.view(b, c, t // ft, ft, h // fs, fs, w // fs, fs).permute(0, 1, 3, 5, 7, 2, 4, 6)
    cells = c * ft * fs * fs
    x = x.reshape(b, cells, t // ft, h // fs, w // fs)
    if cells < channels:
        return x.repeat_interleave(channels // cells, dim=1)
    return x.view(b, channels, cells // channels, *x.shape[2:]).mean(dim=2)


def duplicate_up(x: Tensor, channels: int, ft: int, fs: int, *, first: bool) -> Tensor:
    """Wan2.2's shortcut around a decoder stage: spread repeated channels over ft x fs x fs cells.

    [B, C, T, H, W] -> [B, channels, T * ft, H * fs, W * fs]; the first call of a stream loses its first ft - 1 frames.
    """
    b, c, t, h, w = x.shape
    x = x.repeat_interleave(channels * ft * fs * fs // c, dim=1)
    x = x.view(b, channels, ft, fs, fs, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(b, channels, t * ft, h * fs, w * fs)
    return x[:, :, ft - 1 :] if first else x


class DownStage(nn.Module):
    """An encoder stage of Wan2.2: its layers beside an averaging shortcut without parameters."""

    def __init__(self, layers: list[nn.Module], outputs: int, ft: int, fs: int) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList(layers)
        self.outputs, self.ft, self.fs = outputs, ft, fs

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        shortcut = average_down(x, self.outputs, self.ft, self.fs)
        return run(self.downsamples, x, tape) + shortcut


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
        return y + duplicate_up(x, self.outputs, self.ft, self.fs, first=tape.first)


def run(layers: Iterable[nn.Module], x: Tensor, tape: Tape) -> Tensor:
    for layer in layers:
        x = layer(x, tape)
    return x


class Head(nn.ModuleDict):
    """norm, SiLU, conv: the last layers of encoder and decoder."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__({"0": RMSNorm(dim, 3), "2": CausalConv(dim, outputs)})

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        return cast(Tensor, self["2"](F.silu(self["0"](x)), tape))


def middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim)])


class Encoder(nn.Module):
    """[B, 3 * patch^2, F, H, W] -> [B, 2 * z, T, h, w]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.dim * m for m in (1, *config.multipliers)]
        self.conv1 = CausalConv(3 * config.patch**2, widths[0])
        self.downsamples = nn.ModuleList()
        for stage, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
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
        x = self.conv1(x, tape)
        x = run(self.downsamples, x, tape)
        x = run(self.middle, x, tape)
        return cast(Tensor, self.head(x, tape))


class Decoder(nn.Module):
    """[B, z, T, h, w] -> [B, 3 * patch^2, F, H, W]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.decoder_dim * m for m in (config.multipliers[-1], *reversed(config.multipliers))]
        temporal_up = tuple(reversed(config.temporal))
        self.conv1 = CausalConv(config.z, widths[0])
        self.middle = middle(widths[0])
        self.upsamples = nn.ModuleList()
        for stage, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
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
        x = self.conv1(x, tape)
        x = run(self.middle, x, tape)
        x = run(self.upsamples, x, tape)
        return cast(Tensor, self.head(x, tape))


def fold(x: Tensor, patch: int) -> Tensor:
    """[B, C, F, H, W] -> [B, C * patch^2, F, H / patch, W / patch]; in a cell the rows run fastest (official order)."""
    if patch == 1:
        return x
    b, c, f, h, w = x.shape
    x = x.view(b, c, f, h // patch, patch, w // patch, patch).permute(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(b, c * patch * patch, f, h // patch, w // patch)


def unfold(x: Tensor, patch: int) -> Tensor:
    """The inverse of `fold`."""
    if patch == 1:
        return x
    b, c, f, h, w = x.shape
    x = x.view(b, c // patch**2, patch, patch, f, h, w).permute(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(b, c // patch**2, f, h * patch, w * patch)


class CausalVae(nn.Module):
    """Video [B, 3, F, H, W] in [-1, 1] <-> normalised latents [B, z, T, h, w]; T, h, w by `config.stride`."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv(2 * config.z, 2 * config.z, (1, 1, 1))
        self.conv2 = CausalConv(config.z, config.z, (1, 1, 1))
        self.decoder = Decoder(config)

    def encode(self, video: Tensor, state: VaeState | None = None) -> tuple[Tensor, VaeState]:
        """Pixels [B, 3, F, H, W] in [-1, 1] to normalised latents [B, z, T, h, w], float32, and the state for the next call.

        The first call of a stream (no state) takes 1 + k * stride frames and gives 1 + k latents, later calls take k * stride
        frames and give k latents.  The latent is the mean of the posterior, as in the reference: nothing is drawn.
        """
        tape = Tape(state)
        mu, _ = self._moments(video, tape)
        return self.normalise(mu), tape.state()

    def decode(self, z: Tensor, state: VaeState | None = None) -> tuple[Tensor, VaeState]:
        """Normalised latents [B, z, T, h, w] to pixels [B, 3, F, H, W] clamped to [-1, 1], float32, and the next state.

        Any number of latents: the first of a stream makes one frame, every other `stride[0]`.
        """
        tape = Tape(state)
        return self._pixels(self.denormalise(z), tape).clamp_(-1, 1), tape.state()

    def encode_chunks(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a stream of pieces [B, 3, F, H, W] (first 1 + k * stride frames, then k * stride); yields latents."""
        state = None
        for piece in frames:
            z, state = self.encode(piece, state)
            yield z

    def decode_chunks(self, z: Tensor, latents_per_chunk: int = 1) -> Iterator[Tensor]:
        """Decode z [B, z, T, h, w] piece by piece; yields pixels [B, 3, F, H, W].  Memory does not grow with T."""
        if latents_per_chunk < 1:
            raise ValueError(f"latents_per_chunk={latents_per_chunk}: at least 1 latent makes a chunk")
        state = None
        for piece in z.split(latents_per_chunk, dim=2):
            video, state = self.decode(piece, state)
            yield video

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, z, T, h, w] of the posterior of a whole clip, not normalised (for training)."""
        return self._moments(video, Tape(keep=False))

    def render(self, mu: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] of un-normalised latents of a whole clip, not clamped (for training)."""
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
        mu, logvar = self.conv1(self.encoder(x, tape)).chunk(2, dim=1)
        return mu.to(wide(mu.dtype)), logvar.to(wide(mu.dtype))

    def _pixels(self, mu: Tensor, tape: Tape) -> Tensor:
        if mu.dim() != 5 or mu.shape[1] != self.config.z or mu.shape[2] < 1:
            raise ValueError(f"latents {tuple(mu.shape)}: this VAE reads [B, {self.config.z}, T >= 1, h, w]")
        x = self.decoder(self.conv2(mu.to(self.conv2.weight.dtype)), tape)
        return unfold(x.to(wide(x.dtype)), self.config.patch)

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

    Matrices keep the signal's size (std 1 / sqrt(fan in)), biases are zero, residual branches start small.  The clip starts as a
    set of still pictures: 3x3x3 kernels read this frame only, `time_conv` averages two frames or repeats one.
    """
    for name, module in vae.named_modules():
        if isinstance(module, RMSNorm):
            module.gamma.fill_(1)
        if not isinstance(module, (nn.Conv2d, nn.Conv3d)):
            continue
        weight: Any = module.weight
        assert module.bias is not None
        module.bias.zero_()
        if name.endswith("time_conv"):
            weight.zero_()
            outputs, inputs = weight.shape[:2]
            same = weight.new_zeros(inputs, inputs).fill_diagonal_(1).view(inputs, inputs, 1, 1)
            if outputs == inputs:  # down: frames 2k + 1 and 2k + 2 make latent frame k + 1
                weight[:, :, 1:] = 0.5 * same[:, :, None]
            else:  # up: both output frames are this frame
                weight[:, :, -1] = same.repeat(2, 1, 1, 1)
            continue
        spatial = weight[:, :, -1] if weight.dim() == 5 else weight
        fan_in = spatial[0].numel()
        scale = 0.2 if name.endswith("residual.6") else 0.0 if name.endswith("1.proj") else 1.0
        weight.zero_()
        spatial.normal_(0, scale * fan_in**-0.5, generator=generator)


__all__ = ["CausalVae", "VaeState", "init_for_training"]
