"""What Wan2.2 animate-14B adds to the transformer, so that a character moves as a driver does.

* `MotionEncoder` turns each picture of the driver's face into one vector of 512 numbers: 20 amounts of 20 directions
  that it has learned, which are kept orthogonal;
* `FaceEncoder` makes of them a few tokens for each latent frame, without a look ahead;
* `FaceAttention`, after every fifth block, lets the tokens of a frame read the face of that frame;
* latents of the driver's drawn pose are added to the clip's tokens.

Latent frame 0 is the picture of the character: it has no pose and its face is nothing.  All but the attention is the
same in every step of a clip: `Animate.once` computes it.  Source: official wan/modules/animate/ (model_animate.py,
face_blocks.py, motion_encoder.py); the motion encoder is LIA's (arXiv 2203.09043).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanloom.models.adapters import publish
from wanloom.models.adapters.frames import CausalConv, FrameCross, norm_silu
from wanloom.models.config import AnimateConfig, DiTConfig
from wanloom.models.dit import DiT
from wanloom.models.layers import Block, Kernel, RMSNorm, Scene, sdpa, split_heads
from wanloom.models.numerics import wide

AT_ONCE = 8  # faces in one pass of the motion encoder
EPS = 1e-6


# ---------------------------------------------------------------- a face as numbers


class ScaledConv(nn.Module):
    """A convolution whose weight is divided by the root of its fan-in when it is used."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.scale = 1 / math.sqrt(inputs * kernel**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, stride=self.stride, padding=self.padding)


class ScaledLinear(nn.Linear):
    """The same of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / math.sqrt(self.in_features), self.bias)


class BiasLeaky(nn.Module):
    """x + bias through a leaky ReLU that keeps the variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.bias, 0.2) * math.sqrt(2)


class Blur(nn.Module):
    """Every channel smoothed by [1, 3, 3, 1] x [1, 3, 3, 1] / 64, after `pad` zeros on each side."""

    kernel: Tensor

    def __init__(self, pad: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", row[:, None] * row)  # the published files have it
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(x, kernel, padding=self.pad, groups=channels)


class Halve(nn.Module):
    """A residual block that halves the picture: [N, Cin, H, W] -> [N, Cout, H/2, W/2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(ScaledConv(inputs, inputs, 3, padding=1), BiasLeaky(inputs))
        self.conv2 = nn.Sequential(Blur(2), ScaledConv(inputs, outputs, 3, stride=2), BiasLeaky(outputs))
        self.skip = nn.Sequential(Blur(1), ScaledConv(inputs, outputs, 1, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)
        return out


class MotionEncoder(nn.Module):
    """Faces [N, 3, size, size] in [-1, 1] -> [N, motion_dim] float32: how each looks and moves, not who it is."""

    def __init__(self, config: AnimateConfig) -> None:
        super().__init__()
        dim, widths = config.motion_dim, config.widths
        first = nn.Sequential(ScaledConv(3, widths[0], 1), BiasLeaky(widths[0]))
        halves = [Halve(a, b) for a, b in pairwise(widths)]
        self.convs = nn.ModuleList([first, *halves, ScaledConv(widths[-1], dim, 4)])
        self.fc = nn.Sequential(*(ScaledLinear(dim, dim) for _ in range(4)), ScaledLinear(dim, config.directions))
        self.direction = nn.Parameter(torch.randn(dim, config.directions))

    def forward(self, faces: Tensor) -> Tensor:
        amounts = []
        for x in torch.split(faces, AT_ONCE):
            for layer in self.convs:
                x = layer(x)
            amounts.append(self.fc(x.flatten(1)))
        # The signs of Q's columns are part of the model: torch's QR is LAPACK's (Householder), as in training.
        directions, _ = torch.linalg.qr(self.direction.to(wide(self.direction.dtype)) + 1e-8)
        motion: Tensor = torch.cat(amounts).to(directions.dtype) @ directions.T
        return motion


class FaceEncoder(nn.Module):
    """Motion [B, T, motion_dim] of the frames of a clip -> [B, T/4, tokens + 1, dim]."""

    def __init__(self, config: AnimateConfig, dim: int) -> None:
        super().__init__()
        width, self.tokens = config.face_dim, config.tokens
        self.conv1_local = CausalConv(config.motion_dim, width * config.tokens)
        self.conv2 = CausalConv(width, width, stride=2)
        self.conv3 = CausalConv(width, width, stride=2)
        self.out_proj = nn.Linear(width, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens = x.shape[0], self.tokens
        heads = self.conv1_local(x).reshape(batch, x.shape[1], tokens, -1)
        local = norm_silu(heads.transpose(1, 2).flatten(0, 1))
        local = self.out_proj(norm_silu(self.conv3(norm_silu(self.conv2(local)))))
        local = local.view(batch, tokens, *local.shape[1:]).transpose(1, 2)
        return torch.cat((local, self.padding_tokens.expand(*local.shape[:2], -1, -1)), 2)


# ---------------------------------------------------------------- a frame reads its face


class FaceAttention(nn.Module):
    """Attention with one projection for keys and values, and norms over each head instead of over all of them."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = RMSNorm(dim // heads, eps), RMSNorm(dim // heads, eps)
        self.heads, self.eps = heads, eps
        self.kernel: Kernel = sdpa

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, L, C], context [B, M, C], mask [L, M] -> [B, L, C]."""
        k, v = self.kv(F.layer_norm(context, context.shape[-1:], None, None, self.eps)).chunk(2, -1)
        q = self.norm_q(split_heads(self.q(x), self.heads))
        out = self.kernel(q, self.norm_k(split_heads(k, self.heads)), split_heads(v, self.heads), mask)
        y: Tensor = self.o(out.flatten(-2))
        return y


# ---------------------------------------------------------------- together


class Animate(nn.Module):
    """A part for `dit.prepare`: adds the pose to all latent frames but the first, and remembers the face."""

    def __init__(self, config: AnimateConfig, dit: DiTConfig) -> None:
        super().__init__()
        self.pose_patch_embedding = nn.Conv3d(config.channels, dit.dim, dit.patch, dit.patch)
        self.motion_encoder = MotionEncoder(config)
        self.face_encoder = FaceEncoder(config, dit.dim)

    def once(self, dit: DiT, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a clip looks at.  Takes out of `given`:

        face [B, 3, 4F - 3, face_size, face_size] in [-1, 1], the driver's face in each frame; pose [B, C, F, h, w]
        latents of the drawn pose.  The clip has F + 1 latent frames, the first being the character's picture.  In place
        of faces it takes what `motion` makes of them.
        """
        pose = given.pop("pose")
        motion = given.pop("motion") if "motion" in given else self.motion(given.pop("face").to(dit.dtype))
        tokens = self.face_encoder(motion.to(dit.dtype))
        nothing = torch.zeros_like(tokens[:, :1])
        added = self.pose_patch_embedding(pose.to(dit.dtype)).flatten(3).permute(0, 2, 3, 1)  # [B, F, h*w, C]
        return {"face": torch.cat((nothing, tokens), 1), "pose": added}

    def motion(self, face: Tensor) -> Tensor:
        """face [B, 3, T, face_size, face_size] in [-1, 1] -> how it moves, [B, T, motion_dim] float32."""
        found: Tensor = self.motion_encoder(face.transpose(1, 2).flatten(0, 1))
        return found.view(face.shape[0], face.shape[2], -1)

    def forward(self, x: Tensor, scene: Scene) -> tuple[Tensor, Scene]:
        """x [B, L, C] -> the same."""
        added: Tensor = scene.shared["pose"]
        per_frame = added.shape[2]
        moving = x[:, per_frame:] + added.flatten(1, 2).to(x.dtype)
        return torch.cat((x[:, :per_frame], moving), 1), scene


def add_animate(dit: DiT, config: AnimateConfig) -> None:
    """Put the parts of animate into a transformer; `state_dict` calls them by their published names."""
    sizes = dit.config
    dit.prepare.append(Animate(config, sizes))
    own = f"prepare.{len(dit.prepare) - 1}."
    names = {
        own: "",
        f"{own}motion_encoder.convs.": "motion_encoder.enc.net_app.convs.",
        f"{own}motion_encoder.fc.": "motion_encoder.enc.fc.",
        f"{own}motion_encoder.direction": "motion_encoder.dec.direction.weight",
    }
    for i, layer in enumerate(config.layers):
        block = dit.blocks[layer]
        assert isinstance(block, Block) and isinstance(block.after, nn.ModuleList)
        part = f"blocks.{layer}.after.{len(block.after)}.attn."
        published = f"face_adapter.fuser_blocks.{i}."
        for ours, theirs in (("q", "linear1_q"), ("kv", "linear1_kv"), ("o", "linear2")):
            names[f"{part}{ours}."] = f"{published}{theirs}."
        for ours, theirs in (("norm_q", "q_norm"), ("norm_k", "k_norm")):
            names[f"{part}{ours}."] = f"{published}{theirs}."
        attn = FaceAttention(sizes.dim, sizes.heads, EPS)
        block.after.append(FrameCross("face", sizes.dim, sizes.heads, EPS, attn))
    publish(dit, names)
