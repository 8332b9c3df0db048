"""A picture to start from (and one to end on), in the three ways that the Wan models take pictures.

`channels`     i2v-A14B, Wan2.1 i2v and flf2v: beside the noise the transformer reads 4 channels that say which frames
               are given and 16 channels of a latent video whose other frames are grey; Wan2.1 also reads CLIP's view.
`clean_frame`  ti2v-5B: the first latent frame is the picture itself, held through all steps and told t = 0.

Sources: official wan/image2video.py, wan/first_last_frame2video.py (Wan2.1), wan/textimage2video.py; the last picture
without CLIP as diffusers does it (pipeline_wan_i2v.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from wanloom.conditioning import Conditioning, text
from wanloom.encoders import encode_image
from wanloom.errors import InputError
from wanloom.media import Frames, Picture, cover_crop
from wanloom.models.vae import CausalVae
from wanloom.parts import Parts
from wanloom.plan import Plan


def channels(parts: Parts, plan: Plan, pictures: Mapping[str, Picture]) -> Conditioning:
    """Text, and y [1, 4 + C, T, h, w] of the pictures "image" and "last_image"; with CLIP image [1, 257 or 514, dim].

    Error: E2005 for a last picture in a video of one frame.
    """
    conditioning = text.condition(parts, plan, pictures)
    views = [to_tensor(pictures[role].pixels) for role in ("image", "last_image") if role in pictures]
    if len(views) == 2 and plan.frames == 1:
        raise InputError("E2005", "frames: got 1, a last picture needs more. Use 5 or more.")
    shared = {}
    if parts.variant.clip is not None:
        with parts.use("clip") as tower:
            like = tower.embeddings.patch_embedding.weight
            seen = [encode_image(tower, view[None].to(like)) for view in views]  # each its own size
        shared["image"] = torch.cat(seen, 1)
    with parts.use("vae") as vae:
        frames = clip_frames([fit(view, plan.size) for view in views], plan.frames, vae)
        latent = torch.cat(list(vae.encode_chunks(frames)), 2)
    mask = given_mask(latent, vae.config.stride[0], last=len(views) == 2)
    shared["y"] = torch.cat((mask, latent), 1)
    assert conditioning.uncond is None or set(conditioning.uncond) == {"context"}
    return Conditioning(
        {**conditioning.cond, **shared},
        None if conditioning.uncond is None else {**conditioning.uncond, **shared},
    )


def clean_frame(parts: Parts, plan: Plan, pictures: Mapping[str, Picture]) -> Conditioning:
    """Text, and with a picture its latent [1, C, 1, h, w] to hold; `group` [T] is 1 for this frame, 0 for others."""
    conditioning = text.condition(parts, plan, pictures)
    if "image" not in pictures:
        return conditioning
    view = to_tensor(cover_crop(pictures["image"].pixels, plan.size))
    with parts.use("vae") as vae:
        clean, _ = vae.encode(view[None, :, None].to(vae.conv1.weight))
    group = torch.zeros(plan.latent[1], dtype=torch.long)
    group[0] = 1

    def with_group(side: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**side, "group": group}

    uncond = None if conditioning.uncond is None else with_group(conditioning.uncond)
    return replace(conditioning, cond=with_group(conditioning.cond), uncond=uncond, clean=clean)


def to_tensor(pixels: Frames) -> Tensor:
    """Pixels [H, W, 3] uint8 -> [3, H, W] float32 in [-1, 1]."""
    return (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def fit(view: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture [3, H, W] squeezed to size (w, h): [3, h, w].

    Bicubic without antialiasing, neither cropped nor clamped: the models were trained on this.
    """
    return F.interpolate(view[None], size[::-1], mode="bicubic", align_corners=False)[0]


def clip_frames(views: list[Tensor], frames: int, vae: CausalVae) -> Iterator[Tensor]:
    """The given frames in a grey video [1, 3, F, H, W], piece by piece as the VAE takes it (1, 4, 4, ...)."""
    like, step = vae.conv1.weight, vae.config.stride[0]
    yield views[0][None, :, None].to(like)
    grey = torch.zeros_like(views[0])[None, :, None].expand(-1, -1, step, -1, -1)
    for start in range(1, frames, step):
        piece = grey
        if len(views) == 2 and start + step == frames:
            piece = grey.clone()
            piece[:, :, -1] = views[1]
        yield piece.to(like)


def encode_frames(vae: CausalVae, video: Tensor) -> Tensor:
    """Pixels [1, 3, 4n + 1, H, W] -> latents [1, C, n + 1, h, w], piece by piece."""
    video = video.to(vae.conv1.weight)
    rest = torch.split(video[:, :, 1:], vae.config.stride[0], 2) if video.shape[2] > 1 else ()
    return torch.cat(list(vae.encode_chunks(iter((video[:, :, :1], *rest)))), 2)


def given_mask(latent: Tensor, step: int, *, last: bool) -> Tensor:
    """Which pixel frames are given, as channels beside `latent` [1, C, T, h, w]: [1, step, T, h, w] of 0 and 1.

    A latent frame has `step` (4) pixel frames; the first has one, which counts for all four channels.  So the first
    latent frame reads 1, 1, 1, 1, and with a last picture the last one reads 0, 0, 0, 1.
    """
    mask = latent.new_zeros(1, step, *latent.shape[2:])
    mask[:, :, 0] = 1
    if last:
        mask[:, -1, -1] = 1
    return mask
