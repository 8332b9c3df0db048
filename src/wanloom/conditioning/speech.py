"""Speech to video: a picture that speaks, clip after clip.

Audio features: wav2vec2's hidden states at 50 a second are interpolated to 30, of which each video frame at 16 a second
takes the nearest (official wan/modules/s2v/audio_encoder.py).  Frames behind the end of the sound hear zeros.  A clip
after the first one is given what was shown before it: 73 frames, encoded again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wanloom.clips import AUDIO_RATE, FEATURE_RATE, features_of, in_windows, states_of
from wanloom.conditioning import Conditioning, text
from wanloom.conditioning.image import encode_frames, to_tensor
from wanloom.encoders import encode_audio, normalise
from wanloom.media import Frames, Picture, Sound
from wanloom.media.sound import Wave
from wanloom.models.config import AudioConfig
from wanloom.parts import Parts
from wanloom.plan import Plan, Segment

CONTEXT = 5  # seconds that a window hears on both sides of its own
PICTURES = 6  # frames of a past that is the picture itself (official `init_first_frame`)
HOP = 320  # samples from one hidden state to the next


def condition(parts: Parts, plan: Plan, media: Mapping[str, Any]) -> Conditioning:
    """What all clips share: text, and the latent `reference` [1, C, 1, h, w] of the picture."""
    conditioning = text.condition(parts, plan, media)
    with parts.use("vae") as vae:
        reference, _ = vae.encode(_picture(plan, media).to(vae.conv1.weight))
    shared = {"reference": reference, "group": torch.zeros(plan.latent[1], dtype=torch.long)}
    return Conditioning(
        {**conditioning.cond, **shared}, None if conditioning.uncond is None else {**conditioning.uncond, **shared}
    )


class Clips:
    """What each clip of an s2v video is given; one object for each video."""

    streams = False  # the sound is encoded before the first clip

    def __init__(self, parts: Parts, plan: Plan, media: Mapping[str, Any]) -> None:
        assert plan.speech is not None and parts.variant.dit.speech is not None
        self.parts, self.plan, self.media, self.speech = parts, plan, media, plan.speech
        self.keep = parts.variant.dit.speech.history

    def begin(self) -> Tensor:
        """The past of the first clip, [1, 3, 73, H, W]: grey, or grey and then the picture."""
        width, height = self.plan.size
        past = torch.zeros(1, 3, self.keep, height, width)
        if self.speech.start_from_ref:
            past[:, :, -PICTURES:] = _picture(self.plan, self.media)
        return past

    def given(self) -> Iterator[dict[str, Tensor]]:
        """For each clip what does not depend on the clips before: audio [1, S, A, frames], pose [1, C, F, h, w]."""
        poses = self._poses()
        for audio in self._heard():
            yield {"audio": audio[None], **next(poses)}

    def clip(self, shared: Conditioning, given: Mapping[str, Tensor], segment: Segment, past: Tensor) -> Conditioning:
        """The conditioning of a clip: what is heard, seen, and remembered; without the sound for the other pass."""
        own = dict(given)
        lead = shared.cond["reference"]
        if segment.index > 0 or self.speech.start_from_ref:
            with self.parts.use("vae") as vae:
                lead = own["motion"] = encode_frames(vae, past)
        silent = {**own, "audio": torch.zeros_like(own["audio"])}
        uncond = None if shared.uncond is None else {**shared.uncond, **silent}
        return replace(shared, cond={**shared.cond, **own}, uncond=uncond, lead=lead)

    def _heard(self) -> Iterator[Tensor]:
        """Audio features of each clip, [S, A, frames]; the audio encoder is let go after the last."""
        sound: Sound = self.media["audio"]
        frames, config = self.speech.infer_frames, self.parts.variant.audio
        assert config is not None
        with self.parts.use("audio") as model:
            states = States(model, sound.wave, config, self.speech.window, normed=self.speech.last_state == "normed")
            for segment in self.plan.segments:
                yield features_at(states, self.plan.fps, segment.start, frames)

    def _poses(self) -> Iterator[dict[str, Tensor]]:
        """Pose latents of each clip; nothing when there is no pose video.  Frames behind its end are black."""
        frames = self.speech.infer_frames
        if "pose_video" not in self.media:
            while True:
                yield {}
        with self.media["pose_video"].open(self.plan.fps) as video:
            source = iter(video)
            while True:
                pixels = [
                    to_tensor(fit(frame, self.plan.size)) for _, frame in zip(range(frames), source, strict=False)
                ]
                missing = frames - len(pixels)
                width, height = self.plan.size
                pixels += [torch.full((3, height, width), -1.0)] * missing
                drawn = torch.stack([pixels[0], *pixels], 1)[None]
                with self.parts.use("vae") as vae:
                    yield {"pose": encode_frames(vae, drawn)[:, :, 1:]}


def _picture(plan: Plan, media: Mapping[str, Any]) -> Tensor:
    """The picture as one frame [1, 3, 1, H, W] in [-1, 1]."""
    picture: Picture = media["image"]
    assert plan.speech is not None
    make = fit if plan.speech.resize == "cover" else fit_like_reference
    return to_tensor(make(picture.pixels, plan.size))[None, :, None]


# ---------------------------------------------------------------- pictures


def fit(pixels: Frames, size: tuple[int, int]) -> Frames:
    """The picture scaled (bilinear) until it covers size (w, h), and its centre cut out: [h, w, 3]."""
    height, width = pixels.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    return _centre(pixels, (max(size[0], int(width * scale)), max(size[1], int(height * scale))), size)


def fit_like_reference(pixels: Frames, size: tuple[int, int]) -> Frames:
    """The same as the reference has it: the shorter side becomes the shorter side of `size`; what is missing is black.

    Where the picture is less long than `size` asks for, that leaves strips.
    """
    height, width = pixels.shape[:2]
    short = min(size)
    scaled = (short, short * height // width) if width <= height else (short * width // height, short)
    return _centre(pixels, scaled, size)


def _centre(pixels: Frames, scaled: tuple[int, int], size: tuple[int, int]) -> Frames:
    from PIL import Image

    image = Image.fromarray(pixels).resize(scaled, Image.Resampling.BILINEAR)
    left, top = (_margin(have, want) for have, want in zip(scaled, size, strict=True))
    return np.array(image.crop((left, top, left + size[0], top + size[1])))  # beyond the picture: black


def _margin(have: int, want: int) -> int:
    """Where the middle begins; of an odd strip the smaller half is in front, as torchvision's CenterCrop has it."""
    return round((have - want) / 2) if have > want else -((want - have) // 2)


# ---------------------------------------------------------------- sound


class States:
    """The hidden states of a sound, [S, T, A], looked up by number; a long sound is encoded window by window.

    A window has `window` seconds of its own and 5 more on both sides, to hear in context; its states are those of its
    own part.  Loudness is normalised over the whole sound.  Only the newest window is kept.
    """

    def __init__(self, model: Any, wave: Wave, config: AudioConfig, window: int, *, normed: bool) -> None:
        self.model, self.normed = model, normed
        self.wave = normalise(torch.from_numpy(wave))
        self.count = states_of(len(wave), config)
        self.step = window * AUDIO_RATE // HOP if in_windows(len(wave), window) else self.count
        self.shape = config.layers + 1, config.dim
        self._number, self._states = -1, torch.empty(0)

    def __getitem__(self, number: int) -> Tensor:
        """State set `number`, [S, A]."""
        window, place = divmod(number, self.step)
        if window != self._number:
            self._states = torch.empty(0)  # let go of before the next one is made
            self._number, self._states = window, self._encode(window)
        return self._states[:, place]

    def _encode(self, window: int) -> Tensor:
        first, last = window * self.step, min((window + 1) * self.step, self.count)
        margin = CONTEXT * AUDIO_RATE // HOP
        start = max(0, first - margin)
        stop = len(self.wave) if last + margin >= self.count else (last + margin) * HOP
        states = encode_audio(self.model, self.wave[start * HOP : stop], last_normed=self.normed, normalised=True)
        return states[:, first - start : last - start].to(self.wave).contiguous()


def features_at(states: States, fps: int, start: int, frames: int) -> Tensor:
    """What video frames start, start + 1, ... hear: [S, A, frames], zeros behind the end of the sound.

    The states lie evenly, the first and the last at the first and the last of the features, 30 a second; a frame takes
    the feature nearest to it (of two the even one).
    """
    count = features_of(states.count)
    heard: list[Tensor | None] = []
    for i in range(start, start + frames):
        feature = round(i / fps * FEATURE_RATE)
        if feature >= count:
            heard.append(None)
            continue
        place = feature * (states.count - 1) / max(count - 1, 1)
        low = min(int(place), states.count - 1)
        high = min(low + 1, states.count - 1)
        heard.append(torch.lerp(states[low], states[high], place - low))
    nothing = torch.zeros(states.shape)
    return torch.stack([nothing if there is None else there for there in heard], -1)
