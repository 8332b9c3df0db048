"""Speech to video: a picture that speaks, clip after clip.

Audio features: wav2vec2's hidden states at 50 a second are interpolated to 30, of which each video frame at 16 a second
takes the nearest (official wan/modules/s2v/audio_encoder.py).  Frames behind the end of the sound hear zeros.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

STATES_RATE = 50  # hidden states of wav2vec2 a second, as the reference counts them (16000 / 320)
FEATURE_RATE = 30  # to which they are interpolated


def features_at(states: Tensor, fps: int, frames: int) -> Tensor:
    """Hidden states [S, T, A] -> one set for each of `frames` video frames: [S, A, frames], zeros behind the end."""
    count = int(states.shape[1] / STATES_RATE * FEATURE_RATE)
    there = F.interpolate(states.transpose(1, 2), count, mode="linear", align_corners=True)  # [S, A, count]
    wanted = [round(i / fps * FEATURE_RATE) for i in range(frames)]  # halves go to the even number
    heard = sum(i < count for i in wanted)
    return F.pad(there[..., wanted[:heard]], (0, frames - heard))


def clip_count(states: int, fps: int, frames: int) -> int:
    """How many clips of `frames` the sound fills, the last one perhaps in part; `states` is its length at 50 a second.

    A sound that ends with a clip gets one clip more, as in the reference.
    """
    return int(int(states / STATES_RATE * FEATURE_RATE) / (frames * FEATURE_RATE / fps)) + 1
