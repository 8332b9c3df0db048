"""The diffusion transformer of all published Wan models: noisy latents, a timestep and text -> a velocity.

One class.  Wan2.1's picture branch and its first/last-frame positions are options of the config; speech, control
videos and the like are parts that an adapter puts in the hook lists `dit.prepare`, `trunk.enter`, `block.after_cross`
and `block.after`.  Tensor names and shapes are those of the published checkpoints, so `state_dict()` is one.

The way through `DiT.forward`: patches -> tokens, positions -> rotation, timesteps -> modulation rows, text -> context,
then the trunk of blocks (`layers.py`), then the head and back to latents.  Source: official wan/modules/model.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanloom.models.config import DiTConfig
from wanloom.models.layers import Block, Pair, Scene, Trunk, per_token
from wanloom.models.numerics import wide


def count(n: int, like: Tensor) -> Tensor:
    """0, 1 ... n-1 as float64, where `like` is."""
    return like.new_ones(n, dtype=torch.float64).cumsum(0) - 1


def grid_positions(grid: tuple[int, int, int], like: Tensor) -> Tensor:
    """Frame, row and column of every token of a grid (frames, rows, columns): [F*H*W, 3] float64."""
    axes = [count(size, like) for size in grid]
    return torch.stack(torch.meshgrid(axes, indexing="ij"), -1).flatten(0, 2)


def rope_at(positions: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """cos and sin of tokens at positions [L, 3] (frame, row, column; any sign): [L, D/2, 2].

    The D/2 pairs are dealt to the axes in that order; each axis turns its pair j of A/2 by position * 10000^(-2j/A).
    Computed in float64, because position times the first frequency is an angle of up to 1000 radians.
    """
    space = 2 * (head_dim // 6)
    widths = (head_dim - 2 * space, space, space)
    angles = []
    for axis, width in enumerate(widths):
        frequency = 10000.0 ** (-2 * count(width // 2, positions) / width)
        angles.append(positions[:, axis, None].double() * frequency)  # [L, A/2]
    angle = torch.cat(angles, -1)  # [L, D/2]
    return torch.stack((angle.cos(), angle.sin()), -1).to(dtype)


def rope_table(grid: tuple[int, int, int], head_dim: int, like: Tensor) -> Tensor:
    """`rope_at` of every token of a grid: [F*H*W, D/2, 2] in the dtype of `like`."""
    return rope_at(grid_positions(grid, like), head_dim, like.dtype)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Timesteps in [0, 1000], any shape, -> [..., dim] float64: the cosines first, then the sines."""
    frequency = 10000.0 ** (-count(dim // 2, t) / (dim // 2))
    angle = t.double()[..., None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1)


def wide_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """A linear layer of the time path or the head, computed in the float32 of x whatever its parameters are.

    A stand-in for nn.Linear is called as it is, with the float32 input.
    """
    if type(linear) is nn.Linear and linear.weight.dtype != x.dtype:
        return F.linear(x, linear.weight.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))
    out: Tensor = linear(x)
    return out


class Head(nn.Module):
    """The last norm, modulated by the time embedding itself, and the projection to patches."""

    def __init__(self, dim: int, out: int, eps: float) -> None:
        super().__init__()
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.eps = eps

    def forward(self, x: Tensor, time: Tensor, group: Tensor) -> Tensor:
        """x [B, L, C], time [B, G, C], group [L] -> [B, L, out] float32."""
        mod = self.modulation.to(time.dtype)[:, None] + time[:, :, None]
        shift, scale = (per_token(row, group) for row in mod.unbind(2))
        return wide_linear(self.head, F.layer_norm(x, x.shape[-1:], None, None, self.eps) * (1 + scale) + shift)


class ImageEmbedding(nn.Module):
    """Picture features [B, 257, 1280] (514 for two pictures) -> context tokens [B, the same, C]."""

    def __init__(self, image_dim: int, dim: int, positions: int | None) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim), nn.Linear(image_dim, image_dim), nn.GELU(), nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )  # fmt: skip
        if positions is not None:
            self.emb_pos = nn.Parameter(torch.zeros(1, positions, image_dim))

    def forward(self, image: Tensor) -> Tensor:
        if hasattr(self, "emb_pos"):
            image = image + self.emb_pos
        out: Tensor = self.proj(image)
        return out


class DiT(nn.Module):
    """Wan's transformer; see `forward`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, patch, patch)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        image = config.image_dim is not None
        self.blocks = nn.ModuleList(
            Block(dim, config.ffn_dim, config.heads, config.eps, image=image) for _ in range(config.layers)
        )
        self.head = Head(dim, config.out_channels * patch[0] * patch[1] * patch[2], config.eps)
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.image_dim, dim, config.image_positions)
        # Parts of adapters: (x, scene) -> (x, scene), on the whole sequence.  One may also have `once`: see there.
        self.prepare = nn.ModuleList()
        self.trunk: nn.Module = Trunk(self.blocks)
        self.keeps = False  # whether `once` makes what blocks read; for blocks that are all here, and no gradients

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the linear layers' arithmetic (a stand-in for one may store its weight otherwise)."""
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        *,
        group: Tensor | None = None,
        y: Tensor | None = None,
        image: Tensor | None = None,
        parts: Mapping[str, Tensor] | None = None,
        kept: Sequence[tuple[Pair, Pair | None]] | None = None,
    ) -> Tensor:
        """Predict the velocity noise - x0, [B, out, F, H, W] float32, of noisy latents x [B, in - Cy, F, H, W].

        t [B, G] holds the distinct timesteps in [0, 1000] and group [F] (long) says which column each latent frame
        uses; without it all use the first.  context [B, <= text_len, text_dim] is padded with zeros, and the padding
        is read.  y [B, Cy, F, H, W] are conditioning channels, image [B, 257 or 514, 1280] picture features.
        parts: what the parts of adapters read, by the names they gave it (see `once`).  kept: keys and values of
        context and image in every block, which then are not looked at.
        Raises ValueError for shapes that do not fit this model.
        """
        self._check(x, t, context, y, image)
        if y is not None:
            x = torch.cat((x, y.to(x.dtype)), 1)
        tokens, grid = self.patchify(x)  # [B, L, C]
        per_frame = grid[1] * grid[2]
        time, mod = self.embed_time(t, tokens.dtype)
        frame = count(grid[0], tokens).long()
        if group is None:
            group = torch.zeros_like(frame)
        scene = Scene(
            rope=rope_table(grid, self.config.head_dim, tokens),
            group=group.repeat_interleave(per_frame),
            frame=frame.repeat_interleave(per_frame),
            mod=mod,
            context=self.embed_context(context) if kept is None else kept[0][0],
            image=self.embed_image(image) if kept is None else kept[0][1],
            shared=dict(parts or {}),
            kept=kept,
        )
        length = tokens.shape[1]
        for part in self.prepare:
            tokens, scene = part(tokens, scene)
        tokens = self.trunk(tokens, scene)[:, :length]
        return self.unpatchify(self.head(tokens, time, scene.group[:length]), grid)

    def once(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keywords of `forward` from what a conditioner gives: x and t aside, everything a clip needs.

        Adapters compute here what is the same in all steps of a clip - audio tokens, say, from audio features - and put
        it under `parts`.  What they do not take is passed on as it is.  With `keeps` the keys and values of text and
        pictures in all blocks are made here too (`kept`: 2 x text_len x dim numbers a block).
        """
        given: dict[str, Any] = dict(inputs)
        if self.keeps:
            context, image = self.embed_context(given["context"]), self.embed_image(given.get("image"))
            crosses = (cast(Block, block).cross_attn for block in self.blocks)
            given["kept"] = [cross.read(context, image) for cross in crosses]
        parts: dict[str, Tensor] = {}
        for part in self.prepare:
            once = getattr(part, "once", None)
            if once is not None:
                parts |= once(self, given)
        return {**given, "parts": parts} if parts else given

    def patchify(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """[B, in, F, H, W] -> tokens [B, L, C] float32 in the order frame, row, column, and the grid of patches."""
        conv, (p, q, r) = self.patch_embedding, self.config.patch
        batch, channels, frames, height, width = x.shape
        grid = frames // p, height // q, width // r
        x = x.to(self.dtype).reshape(batch, channels, grid[0], p, grid[1], q, grid[2], r)
        patches = x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, grid[0] * grid[1] * grid[2], -1)
        # A convolution whose stride is its kernel is one matrix product; torch's conv3d is far slower at it on a CPU.
        tokens = F.linear(patches, conv.weight.flatten(1), conv.bias)
        return tokens.to(wide(tokens.dtype)), grid

    def unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, L, patch * out], channels fastest, -> [B, out, F, H, W]."""
        p, q, r = self.config.patch
        x = x.view(x.shape[0], *grid, p, q, r, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(x.shape[0], -1, grid[0] * p, grid[1] * q, grid[2] * r)

    def embed_time(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """t [B, G] -> the time embedding [B, G, C] for the head and the modulation rows [B, G, 6, C] for the blocks."""
        time = wide_linear(self.time_embedding[0], sinusoid(t, self.config.freq_dim).to(dtype))
        time = wide_linear(self.time_embedding[2], self.time_embedding[1](time))
        mod = wide_linear(self.time_projection[1], self.time_projection[0](time))
        return time, mod.view(*t.shape, 6, -1)

    def embed_context(self, context: Tensor) -> Tensor:
        """Text features [B, n, text_dim], padded with zeros to text_len *before* the layers, -> [B, text_len, C]."""
        context = F.pad(context, (0, 0, 0, self.config.text_len - context.shape[1]))
        out: Tensor = self.text_embedding(context.to(self.dtype))
        return out

    def embed_image(self, image: Tensor | None) -> Tensor | None:
        """Picture features [B, 257 or 514, 1280], where there are some -> [B, the same, C]."""
        return None if image is None else self.img_emb(image.to(self.dtype))

    def _check(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None, image: Tensor | None) -> None:
        config = self.config
        channels = x.shape[1] + (0 if y is None else y.shape[1])
        if channels != config.in_channels:
            raise ValueError(f"x and y have {channels} channels together, this model takes {config.in_channels}")
        if any(size % step for size, step in zip(x.shape[2:], config.patch, strict=True)):
            raise ValueError(f"latents of {tuple(x.shape[2:])} cannot be cut into patches of {config.patch}")
        if t.dim() != 2 or t.shape[0] != x.shape[0]:
            raise ValueError(f"t has shape {tuple(t.shape)}, expected [{x.shape[0]}, G]")
        if context.shape[1] > config.text_len:
            raise ValueError(f"context has {context.shape[1]} rows, this model reads {config.text_len}")
        if (image is None) != (config.image_dim is None):
            raise ValueError("this model " + ("takes no image" if config.image_dim is None else "needs image features"))


def init_for_training(dit: DiT, generator: torch.Generator) -> DiT:
    """Fill the parameters as the published models were started, in place; returns `dit`.

    Xavier-uniform matrices and zero biases; text and time embeddings N(0, 0.02); modulation N(0, 1)/sqrt(C); the head
    zero, so that the first prediction is zero.  (Official wan/modules/model.py, init_weights.)
    """
    with torch.no_grad():
        for module in dit.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, Block | Head):
                module.modulation.normal_(0, dit.config.dim**-0.5, generator=generator)
        for layer in (*dit.text_embedding, *dit.time_embedding):
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0, 0.02, generator=generator)
        dit.head.head.weight.zero_()
    return dit
