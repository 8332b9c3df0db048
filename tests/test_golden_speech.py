"""Two clips of speech to video against the reference, from the sound to the pixels, put together from our own parts.

The clip loop stands here until the pipeline has one: first clip without a past, its frames encoded again as the past of
the second.  The reference was run with transformers 5, whose last hidden state is not normed (`encode_audio`).
"""

from __future__ import annotations

import json
import wave as wavefile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from wanloom.checkpoint.detect import config_of
from wanloom.checkpoint.load import load_into
from wanloom.checkpoint.weights import open_weights
from wanloom.conditioning.image import to_tensor
from wanloom.conditioning.speech import clip_count, features_at
from wanloom.encoders import Tokenizer, build_umt5, build_wav2vec2, encode_audio, encode_text
from wanloom.models.adapters import build_dit
from wanloom.models.config import DiTConfig, SpeechConfig
from wanloom.models.vae import CausalVae
from wanloom.sampling.samplers import SAMPLERS
from wanloom.sampling.schedule import make_schedule
from wanloom.sampling.velocity import conditioned, guided

# The negative prompt of the published configuration of s2v-14B.
NEGATIVE = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，"
    "畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
FPS, SIDE, HISTORY = 16, 128, 73


@pytest.fixture
def checkpoint(golden_models: Path) -> Path:
    return golden_models / "Wan2.2-S2V-14B"


def ready(module: nn.Module) -> Any:
    return module.eval().requires_grad_(False)


def loaded(path: Path, kind: str, build: Any) -> Any:
    weights = open_weights(path, kind=kind)
    with torch.device("meta"):
        module = build(config_of(weights))
    load_into(module, weights, dtype=torch.float32)
    return ready(module)


def picture(path: Path) -> Tensor:
    """[1, 3, 1, 128, 128]: the shorter side to 128, the middle cut out, as the reference does."""
    image = Image.open(path).convert("RGB")
    image = image.resize((SIDE * image.width // image.height, SIDE), Image.Resampling.BILINEAR)
    left = round((image.width - SIDE) / 2)
    return to_tensor(np.asarray(image.crop((left, 0, left + SIDE, SIDE))))[None, :, None]


def encode(vae: CausalVae, video: Tensor) -> Tensor:
    return torch.cat(
        list(vae.encode_chunks(iter((video[:, :, :1], *video[:, :, 1:].split(4, 2)[: video.shape[2] // 4])))), 2
    )


@pytest.mark.parametrize("name", ["s2v_two_clips", "s2v_from_ref"])
def test_clips_are_those_of_the_reference(golden: Path, checkpoint: Path, name: str) -> None:
    cases = json.loads((golden / "cases_s2v.json").read_text())
    case = next(case for case in cases if case["name"] == name)
    want = load_file(golden / f"{name}.safetensors")
    shards = [load_file(path) for path in sorted(checkpoint.glob("diffusion_pytorch_model-*.safetensors"))]
    dit = build_dit(
        DiTConfig(
            dim=256, ffn_dim=320, heads=2, layers=3, text_dim=48, speech=SpeechConfig(audio_dim=32, layers=(0, 2))
        )
    )
    dit.load_state_dict({name: value for shard in shards for name, value in shard.items()})
    ready(dit)
    vae = loaded(checkpoint / "Wan2.1_VAE.pth", "vae", CausalVae)
    umt5 = loaded(checkpoint / "models_t5_umt5-xxl-enc-bf16.pth", "text", build_umt5)
    wav2vec2 = loaded(checkpoint / "wav2vec2-large-xlsr-53-english", "audio", build_wav2vec2)

    tokenizer, frames = Tokenizer(checkpoint / "google" / "umt5-xxl"), case["infer_frames"]
    context, negative = (encode_text(umt5, tokenizer, [text], 512) for text in (case["prompt"], NEGATIVE))
    with wavefile.open(str(golden / case["audio"])) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    states = encode_audio(wav2vec2, torch.from_numpy(samples), last_normed=False)
    count = clip_count(states.shape[1], FPS, frames)
    heard = features_at(states, FPS, count * frames)
    image = picture(golden / case["image"])
    reference = encode(vae, image)
    past = torch.zeros(1, 3, HISTORY, SIDE, SIDE)
    from_reference = case.get("start_from_ref", False)
    if from_reference:
        past[:, :, -6:] = image
    schedule = make_schedule(case["sample_solver"], case["sample_steps"], case["sample_shift"])
    shown: list[Tensor] = []
    for clip in range(min(count, case["num_clip"])):
        given = {"reference": reference, "group": torch.zeros(frames // 4, dtype=torch.long)}
        first = clip == 0 and not from_reference
        motion = reference if first else encode(vae, past)
        if not first:
            given["motion"] = motion
        audio = heard[None, ..., clip * frames : (clip + 1) * frames]
        cond = dit.once({**given, "context": context, "audio": audio})
        uncond = dit.once({**given, "context": negative, "audio": torch.zeros_like(audio)})
        velocity = guided(conditioned(dit, cond), conditioned(dit, uncond), case["sample_guide_scale"])
        draw = torch.Generator().manual_seed(case["seed"] + clip)
        x = torch.randn(1, 16, frames // 4, SIDE // 8, SIDE // 8, generator=draw)
        with torch.no_grad():
            for step in SAMPLERS[case["sample_solver"]](velocity, x, schedule):
                x = step.x
            latents = torch.cat((motion, x), 2)
            pixels = torch.cat(list(vae.decode_chunks(latents)), 2)[:, :, -frames:]
        target = want[f"decode_latents_{clip}"]
        assert (latents - target).norm() / target.norm() <= 1e-5
        pixels = pixels[:, :, 3:] if first else pixels
        past = torch.cat((past, pixels), 2)[:, :, -HISTORY:]
        shown.append(pixels)
    video = torch.cat(shown, 2)[0]
    assert video.shape == want["video"].shape
    assert (video - want["video"]).norm() / want["video"].norm() <= 3e-5
