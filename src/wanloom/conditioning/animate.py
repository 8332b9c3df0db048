"""Animation: a character in a picture moves as a driving video does, clip after clip.

Beside the noise the transformer reads 4 channels that say which frames are given and 16 of a latent video: the picture
as a first latent frame of its own, then the frames that are given.  Animated where it stands, these are the last frames
of the clip before, and grey; put into a scene (replacement), the scene without the person, and a mask of where it was.
The drawn pose is added to the tokens, the driver's face is read by the face adapter, CLIP sees the picture.

Source: official wan/animate.py.  Masks are cut at one half, where the reference divides by 255 what a lossy video left;
a picture that is scaled down is averaged, where the reference leaves out pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wanloom.clips import ping_pong
from wanloom.conditioning import Conditioning, text
from wanloom.conditioning.image import encode_frames, to_tensor
from wanloom.encoders import encode_image
from wanloom.errors import InputError
from wanloom.inputs import INSIDE, VideoFile
from wanloom.media import Frames, Picture
from wanloom.parts import Parts
from wanloom.plan import Plan, Segment
from wanloom.preprocess.crops import letterbox


def condition(parts: Parts, plan: Plan, media: Mapping[str, Any]) -> Conditioning:
    """What all clips share: text, CLIP's view `image` of the picture, and its latent `reference` [1, C, 1, h, w]."""
    conditioning = text.condition(parts, plan, media)
    picture: Picture = media["image"]
    view = to_tensor(letterbox(picture.size, plan.size).image(picture.pixels))[None]
    with parts.use("clip") as tower:
        seen = encode_image(tower, view.to(tower.embeddings.patch_embedding.weight))
    with parts.use("vae") as vae:
        reference, _ = vae.encode(view[:, :, None].to(vae.conv1.weight))
    shared = {"image": seen, "reference": reference}
    return Conditioning(
        {**conditioning.cond, **shared}, None if conditioning.uncond is None else {**conditioning.uncond, **shared}
    )


class Clips:
    """What each clip of an animated video is given; one object for each video."""

    streams = True  # what a clip is given comes from videos that are read along with the clips

    def __init__(self, parts: Parts, plan: Plan, media: Mapping[str, Any]) -> None:
        assert plan.animation is not None and parts.variant.dit.animate is not None
        self.parts, self.plan, self.media, self.animation = parts, plan, media, plan.animation
        self.keep = self.animation.shared
        self.frames = 4 * (plan.latent[1] - 2) + 1  # of a clip
        self.face_size = parts.variant.dit.animate.face_size

    def begin(self) -> Tensor:
        """Nothing is before the first clip: [1, 3, 0, H, W]."""
        width, height = self.plan.size
        return torch.zeros(1, 3, 0, height, width)

    def given(self) -> Iterator[dict[str, Tensor]]:
        """For each clip its frames of the driving videos.

        drawn, scene [1, 3, frames, H, W] in [-1, 1], face [1, 3, frames, face_size, face_size] in [-1, 1], mask
        [1, 1, frames, h, w] of 0 and 1 on the latents' grid; scene and mask only for replacement.
        """
        width, height = self.plan.size
        drawn = self._frames("pose_video", (width, height))
        face = self._frames("face_video", (self.face_size, self.face_size))
        if not self.animation.replace:
            yield from ({"drawn": pose, "face": seen} for pose, seen in zip(drawn, face, strict=True))
            return
        scene, mask = self._frames("background_video", (width, height)), self._masks()
        for pose, seen, behind, where in zip(drawn, face, scene, mask, strict=True):
            yield {"drawn": pose, "face": seen, "scene": behind, "mask": where}

    def clip(self, shared: Conditioning, given: Mapping[str, Tensor], segment: Segment, past: Tensor) -> Conditioning:
        """The conditioning of a clip; the other pass of guidance sees a face that is nothing."""
        scene = given.get("scene")
        video = torch.zeros_like(given["drawn"]) if scene is None else scene.clone()
        known = past.shape[2]
        video[:, :, :known] = past
        with self.parts.use("vae") as vae:
            pose, behind = encode_frames(vae, given["drawn"]), encode_frames(vae, video)
        reference = shared.cond["reference"]
        free = given.get("mask", torch.ones(1, 1, self.frames, *behind.shape[3:]))  # 1: to be made
        mask = 1 - free
        mask[:, :, :known] = 1
        y = torch.cat((with_mask(reference, torch.ones_like(mask[:, :, :1])), with_mask(behind, mask)), 2)
        own = {"y": y, "pose": pose, "face": given["face"]}
        kept = {name: value for name, value in shared.cond.items() if name != "reference"}
        uncond = None
        if shared.uncond is not None:
            rest = {name: value for name, value in shared.uncond.items() if name != "reference"}
            uncond = {**rest, **own, "face": torch.full_like(given["face"], -1.0)}
        return replace(shared, cond={**kept, **own}, uncond=uncond, drop=1)

    def _frames(self, role: str, size: tuple[int, int]) -> Iterator[Tensor]:
        """The frames of a driving video for each clip, [1, 3, frames, H, W] in [-1, 1]."""
        for frames in self._windows(self.media[role]):
            yield torch.stack([to_tensor(squeeze(frame, size)) for frame in frames], 1)[None]

    def _masks(self) -> Iterator[Tensor]:
        """Where the character is put, for each clip: [1, 1, frames, h, w] of 0 and 1."""
        for frames in self._windows(self.media["mask_video"]):
            masks = torch.stack([torch.from_numpy(frame[..., 0] >= INSIDE) for frame in frames]).float()[None, None]
            yield F.interpolate(masks, (self.frames, *self.plan.latent[2:]), mode="nearest")

    def _windows(self, video: VideoFile) -> Iterator[list[Frames]]:
        """For each clip the frames it is made from; the video is read once, and only what may come again is kept.

        Error: E3009 when fewer frames can be decoded than the file says it has.
        """
        count = self.plan.input("pose_video").frames  # type: ignore[union-attr]  # animate has one
        kept: dict[int, Frames] = {}
        with video.open() as opened:
            source = enumerate(opened)
            for segment in self.plan.segments:
                wanted = [ping_pong(segment.start + i, count) for i in range(self.frames)]
                while max(wanted) not in kept:
                    number, frame = next(source, (count, None))
                    if frame is None:
                        said = f"{video.role}: {video.name} ends before frame {max(wanted) + 1} of {count}."
                        raise InputError("E3009", f"{said} Save it again.")
                    kept[number] = frame
                yield [kept[i] for i in wanted]
                # The next clip has a frame that this one has not, so its way back from the end stops after what this
                # one shares with the clip before.
                oldest = segment.start + min(self.keep, self.frames - self.keep)
                for i in [i for i in kept if i < oldest]:
                    del kept[i]


def with_mask(latents: Tensor, mask: Tensor) -> Tensor:
    """latents [1, C, T, h, w] behind a mask [1, 1, 4T - 3, h, w] of pixel frames, four of which become channels.

    The first frame counts for all four of the first latent frame: [1, 4 + C, T, h, w].
    """
    first = mask[:, :, :1].expand(-1, -1, 4, -1, -1)
    whole = torch.cat((first, mask[:, :, 1:]), 2)
    folded = whole.view(1, latents.shape[2], 4, *mask.shape[3:]).transpose(1, 2)
    return torch.cat((folded.to(latents), latents), 1)


def squeeze(frame: Frames, size: tuple[int, int]) -> Frames:
    """A frame in this size (w, h), as it is where it has it."""
    if (frame.shape[1], frame.shape[0]) == size:
        return frame
    from PIL import Image

    return np.array(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))
