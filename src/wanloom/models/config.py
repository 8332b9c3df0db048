"""The sizes of a model as plain data. No torch here: plans, budgets and `--help` read these.

All published sizes are defaults or rows of `variants.py`; a checkpoint's own sizes are read from its tensor shapes
(`checkpoint/detect.py`), so a small checkpoint in the published layout loads like a large one.
"""

from __future__ import annotations

from dataclasses import dataclass

# Latent statistics of the two published VAEs (official wan/modules/vae2_1.py, vae2_2.py): z_norm = (mu - mean) / std.
MEAN_16 = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
           0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
STD_16 = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
          3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip
MEAN_48 = (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
           0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
           -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
           -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
           )  # fmt: skip
STD_48 = (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
          0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
          0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
          0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SpeechConfig:
    """Sizes of the parts that s2v adds to a transformer; the defaults are Wan2.2 s2v-14B."""

    audio_dim: int = 1024  # width of the audio encoder's hidden states
    audio_states: int = 25  # how many of them are mixed: the embedding and 24 layers
    tokens: int = 4  # per latent frame from the sound; one learned token joins them
    layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)  # blocks after which tokens hear
    channels: int = 16  # of pose, reference and motion latents
    history: int = 73  # pixel frames that a clip remembers of the one before


@dataclass(frozen=True, kw_only=True)
class AnimateConfig:
    """Sizes of the parts that animate adds to a transformer; the defaults are Wan2.2 animate-14B."""

    layers: tuple[int, ...] = (0, 5, 10, 15, 20, 25, 30, 35)  # blocks after which tokens look at the face
    face_dim: int = 1024  # width of the face encoder, for each of its tokens
    tokens: int = 4  # per latent frame from the face; one learned token joins them
    channels: int = 16  # of pose latents
    motion_dim: int = 512  # numbers that describe a face
    directions: int = 20  # in which they can move
    widths: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512)  # of the motion encoder at 512, 256 ... 4 pixels

    @property
    def face_size(self) -> int:
        """Pixels a side of the picture of a face: the motion encoder halves it down to 4."""
        return 4 << (len(self.widths) - 1)


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of the diffusion transformer; the defaults are Wan2.2 t2v-A14B (one expert)."""

    dim: int = 5120
    ffn_dim: int = 13824
    heads: int = 40
    layers: int = 40
    in_channels: int = 16  # noise latents, then conditioning channels (i2v: 16 + 4 mask + 16 image)
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512  # text is zero-padded to this many rows, and the padding is attended to
    freq_dim: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int | None = None  # 1280: CLIP image tokens beside the text (Wan2.1 i2v and flf2v)
    image_positions: int | None = None  # 514: learned positions of first and last frame tokens (flf2v)
    speech: SpeechConfig | None = None  # the parts of s2v
    animate: AnimateConfig | None = None  # the parts of animate

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Sizes of the causal 3D VAE; the defaults are Wan2.1 (stride 4x8x8, 16 channels)."""

    z: int = 16
    dim: int = 96  # width of the encoder's first stage
    decoder_dim: int = 96  # width of the decoder's last stage
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2  # residual blocks of an encoder stage; a decoder stage has one more
    temporal: tuple[bool, ...] = (False, True, True)  # which encoder downsamplings also halve time
    patch: int = 1  # pixels folded into channels before the encoder (2 in Wan2.2)
    residual: bool = False  # Wan2.2: averaging and duplicating shortcuts around each stage
    mean: tuple[float, ...] = MEAN_16
    std: tuple[float, ...] = STD_16

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent in time, height, width (the first frame stands alone)."""
        space = self.patch * 2 ** len(self.temporal)
        return 2 ** sum(self.temporal), space, space


VAE_21 = VaeConfig()
VAE_22 = VaeConfig(z=48, dim=160, decoder_dim=256, patch=2, residual=True, mean=MEAN_48, std=STD_48)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of the UMT5 encoder; the defaults are UMT5-XXL."""

    dim: int = 4096
    ffn_dim: int = 10240
    heads: int = 64
    head_dim: int = 64
    layers: int = 24
    vocab: int = 256384
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Sizes of the CLIP visual tower of Wan2.1 i2v and flf2v (ViT-H/14)."""

    dim: int = 1280
    ffn_dim: int = 5120
    heads: int = 16
    layers: int = 32
    patch: int = 14
    image: int = 224
    projection: int = 1024
    eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Sizes of the wav2vec2 encoder of s2v; the defaults are wav2vec2-large-xlsr-53."""

    dim: int = 1024
    ffn_dim: int = 4096
    heads: int = 16
    layers: int = 24
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    positions: int = 128  # width of the convolution that tells a token its place
    groups: int = 16  # of that convolution
    eps: float = 1e-5
