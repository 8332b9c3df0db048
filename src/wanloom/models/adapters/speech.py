"""What Wan2.2 s2v-14B adds to the transformer, so that a face speaks what is heard.

    sequence    [ the clip's tokens | the reference picture | the frames before, packed ]
    group         0                   1                       1       (noise at t; clean)
    frame         0 .. F-1            -1                      -1      (hears its moment; hears nothing)
    rope, frame   0 .. F-1            30                      -1, -3, -4 .. -19

* `AudioEncoder` turns the hidden states of wav2vec2 into a few tokens for each latent frame, without a look ahead;
* `AudioCross`, after twelve of the blocks, lets the tokens of a frame read the tokens of its sound;
* `FramePacker` shortens the 73 frames before the clip to 1.5 latent frames of tokens, the older the coarser;
* the pose video's latents are added to the clip's tokens, and each token is told of which of the three kinds it is.

All but the cross-attention is the same in every step of a clip: `Speech.once` computes it.  Source: official
wan/modules/s2v/ (model_s2v.py, audio_utils.py, auxi_blocks.py, s2v_utils.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanloom.models.adapters import publish
from wanloom.models.adapters.frames import CausalConv, FrameCross, norm_silu
from wanloom.models.config import DiTConfig, SpeechConfig
from wanloom.models.dit import DiT, grid_positions, rope_at
from wanloom.models.layers import Block, Scene, per_token

REFERENCE_AT = 30  # position in time of the reference picture, behind any clip
NOISY, REFERENCE, MOTION = 0, 1, 2  # rows of trainable_cond_mask
PACKS = (("proj", 1), ("proj_2x", 2), ("proj_4x", 16))  # latent frames that each convolution packs, the last first
EPS_CROSS = 1e-5  # of the norm before the cross-attention (diffusers' AdaLayerNorm, which the reference uses)


# ---------------------------------------------------------------- sound


class SoundTokens(nn.Module):
    """A sequence at the frame rate -> tokens of a quarter of it: several for their moment, and one that sums it up."""

    def __init__(self, inputs: int, dim: int, tokens: int) -> None:
        super().__init__()
        quarter = dim // 4
        self.tokens = tokens
        self.conv1_local = CausalConv(inputs, quarter * tokens)
        self.conv1_global = CausalConv(inputs, quarter)
        self.conv2 = CausalConv(quarter, dim // 2, stride=2)
        self.conv3 = CausalConv(dim // 2, dim, stride=2)
        self.final_linear = nn.Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, inputs] -> [B, T/4, tokens + 1, dim] and [B, T/4, dim]."""
        batch, tokens = x.shape[0], self.tokens
        heads = self.conv1_local(x).reshape(batch, x.shape[1], tokens, -1)
        local = self._shorten(heads.transpose(1, 2).flatten(0, 1))  # [B * tokens, T/4, dim]
        local = local.view(batch, tokens, *local.shape[1:]).transpose(1, 2)
        learned = self.padding_tokens.expand(*local.shape[:2], -1, -1)
        return torch.cat((local, learned), 2), self.final_linear(self._shorten(self.conv1_global(x)))

    def _shorten(self, x: Tensor) -> Tensor:
        return norm_silu(self.conv3(norm_silu(self.conv2(norm_silu(x)))))


class AudioEncoder(nn.Module):
    """Hidden states of an audio model, one set a video frame -> what each latent frame hears."""

    def __init__(self, config: SpeechConfig, dim: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((1, config.audio_states, 1, 1), 0.01))
        self.encoder = SoundTokens(config.audio_dim, dim, config.tokens)
        self.history = config.history

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """states [B, S, audio_dim, 4F] -> tokens [B, F, tokens + 1, C] and one vector [B, F, C] for a frame.

        The first frame stands for all that was before it.
        """
        before = states[..., :1].expand(-1, -1, -1, self.history)
        weights = F.silu(self.weights.float())
        mixed = (torch.cat((before, states), -1).float() * weights).sum(1) / weights.sum()
        local, overall = self.encoder(mixed.transpose(1, 2).to(self.encoder.final_linear.weight.dtype))
        skip = (self.history + 3) // 4
        return local[:, skip:], overall[:, skip:]


class AudioCross(FrameCross):
    """The tokens of a latent frame, shifted and scaled by its sound as a whole, read the tokens of its sound."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__("speech", dim, heads, eps)
        self.adain = nn.Linear(dim, 2 * dim)

    def query(self, x: Tensor, scene: Scene) -> Tensor:
        overall: Tensor = scene.shared["speech_overall"]  # [B, F, C]
        shift, scale = self.adain(F.silu(overall)).to(x.dtype).chunk(2, -1)
        frame = scene.frame.clamp(min=0)  # tokens outside the clip get some row and are taken out afterwards
        normed = F.layer_norm(x, x.shape[-1:], None, None, EPS_CROSS)
        return torch.addcmul(per_token(shift, frame), normed, 1 + per_token(scale, frame))


# ---------------------------------------------------------------- the frames before


class FramePacker(nn.Module):
    """Latents of the frames before the clip -> tokens: the last one in full, two at half, sixteen at a quarter size."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, (1, 2, 2), (1, 2, 2))
        self.proj_2x = nn.Conv3d(channels, dim, (2, 4, 4), (2, 4, 4))
        self.proj_4x = nn.Conv3d(channels, dim, (4, 8, 8), (4, 8, 8))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents [B, C, T, h, w], oldest first -> tokens [B, M, dim] and their positions [M, 3]."""
        need = sum(frames for _, frames in PACKS)
        latents = F.pad(latents, (0, 0, 0, 0, max(0, need - latents.shape[2]), 0))
        fine = latents.shape[3] // 2, latents.shape[4] // 2
        tokens, places, end = [], [], latents.shape[2]
        for name, frames in PACKS:
            packed: Tensor = getattr(self, name)(latents[:, :, end - frames : end])
            begin = latents.shape[2] - end + frames  # frames back in time
            axes = [[-b for b in spread(begin, begin - frames + 1, packed.shape[2])]]
            axes += [spread(0, size - 1, count) for size, count in zip(fine, packed.shape[3:], strict=True)]
            tokens.append(packed.flatten(2).transpose(1, 2))
            places += [(t, row, column) for t in axes[0] for row in axes[1] for column in axes[2]]
            end -= frames
        return torch.cat(tokens, 1), latents.new_tensor(places, dtype=torch.float64)


def spread(first: int, last: int, count: int) -> list[int]:
    """`count` whole numbers from first to last, cut and not rounded: what numpy.linspace(...).astype(int) gives."""
    step = (last - first) / max(count - 1, 1)
    return [int(i * step + first) if i < count - 1 or count == 1 else last for i in range(count)]


# ---------------------------------------------------------------- together


class Speech(nn.Module):
    """A part for `dit.prepare`: adds pose and kind to the clip's tokens, and appends reference and motion tokens."""

    def __init__(self, config: SpeechConfig, dit: DiTConfig) -> None:
        super().__init__()
        self.config, self.head_dim = config, dit.head_dim
        self.cond_encoder = nn.Conv3d(config.channels, dit.dim, dit.patch, dit.patch)
        self.casual_audio_encoder = AudioEncoder(config, dit.dim)  # the published spelling
        self.trainable_cond_mask = nn.Embedding(3, dit.dim)
        self.frame_packer = FramePacker(config.channels, dit.dim)

    def once(self, dit: DiT, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a clip hears and remembers.  Takes out of `given`:

        audio [B, S, audio_dim, 4F] hidden states at the video's frame rate; reference [B, C, 1, h, w] latents; pose
        [B, C, F, h, w] latents (may be absent: zeros); motion [B, C, T, h, w] latents of the frames before (absent:
        nothing was before).
        """
        kinds = self.trainable_cond_mask.weight
        reference = given.pop("reference")
        local, overall = self.casual_audio_encoder(given.pop("audio"))
        tokens, grid = dit.patchify(reference)
        positions = grid_positions(grid, tokens)
        positions[:, 0] = REFERENCE_AT
        beside, places = [tokens + kinds[REFERENCE]], [positions]
        motion = given.pop("motion", None)
        if motion is not None:
            packed, places_back = self.frame_packer(motion.to(dit.dtype))
            beside.append(packed.to(tokens.dtype) + kinds[MOTION])
            places.append(places_back)
        pose = given.pop("pose", None)
        if pose is None:
            pose = reference.new_zeros(*reference.shape[:2], 1, *reference.shape[3:])  # the same for every frame
        added = self.cond_encoder(pose.to(dit.dtype)).flatten(3).permute(0, 2, 3, 1)  # [B, F or 1, h*w, C]
        return {
            "speech": local,
            "speech_overall": overall,
            "beside": torch.cat(beside, 1),
            "beside_rope": rope_at(torch.cat(places), self.head_dim, tokens.dtype),
            "added": added.to(tokens.dtype) + kinds[NOISY],
        }

    def forward(self, x: Tensor, scene: Scene) -> tuple[Tensor, Scene]:
        """x [B, L, C] of the clip -> [B, L + M, C]."""
        shared = scene.shared
        beside: Tensor = shared["beside"]
        added: Tensor = shared["added"]
        frames = x.view(x.shape[0], -1, *added.shape[2:])  # [B, F, h*w, C]
        x = torch.cat(((frames + added).flatten(1, 2), beside.expand(x.shape[0], -1, -1)), 1)
        outside = scene.frame.new_ones(beside.shape[1])
        return x, replace(
            scene,
            rope=torch.cat((scene.rope, shared["beside_rope"])),
            group=torch.cat((scene.group, outside)),
            frame=torch.cat((scene.frame, -outside)),
        )


def add_speech(dit: DiT, config: SpeechConfig) -> None:
    """Put the parts of s2v into a transformer; `state_dict` calls them by their published names."""
    sizes = dit.config
    dit.prepare.append(Speech(config, sizes))
    names = {f"prepare.{len(dit.prepare) - 1}.": ""}
    for i, layer in enumerate(config.layers):
        block = dit.blocks[layer]
        assert isinstance(block, Block) and isinstance(block.after, nn.ModuleList)
        part = f"blocks.{layer}.after.{len(block.after)}."
        names[f"{part}adain."] = f"audio_injector.injector_adain_layers.{i}.linear."
        names[f"{part}attn."] = f"audio_injector.injector.{i}."
        block.after.append(AudioCross(sizes.dim, sizes.heads, sizes.eps))
    publish(dit, names)
