"""The closed formulas against the published counts and against the models themselves, built without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wanloom.budget import (
    Have,
    Need,
    clip_parameters,
    decode_flops,
    dit_activations,
    dit_flops,
    dit_parameters,
    encode_flops,
    fits,
    flops,
    need,
    parameters,
    part_bytes,
    text_flops,
    text_parameters,
    tokens,
    vae_activations,
    vae_parameters,
)
from wanloom.encoders import build_clip, build_umt5
from wanloom.models.config import VAE_21, VAE_22, ClipConfig, DiTConfig, TextConfig
from wanloom.models.dit import DiT
from wanloom.models.vae import CausalVae
from wanloom.plan import Input, Plan, make_plan
from wanloom.request import Request
from wanloom.variants import VARIANTS, Variant

ROWS = list(VARIANTS.values())

# spec/core.md 1.1, counted on the official modules.
PUBLISHED = {
    "t2v-A14B": 14_288_491_584,
    "i2v-A14B": 14_288_901_184,
    "ti2v-5B": 4_999_787_712,
    "t2v-1.3B": 1_418_996_800,
    "t2v-14B": 14_288_491_584,
    "i2v-14B": 16_394_878_784,
    "flf2v-14B": 16_395_536_704,
}


def name_of(row: Variant) -> str:
    return row.name


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False) as counter:
        yield counter


def a_plan(row: Variant, **values: Any) -> Plan:
    return make_plan(Request(seed=1, **values), row, draft=True)


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_transformers_have_the_published_parameters(name: str, published: int) -> None:
    assert dit_parameters(VARIANTS[name].dit) == published


def test_vaes_and_encoders_have_the_published_parameters() -> None:
    assert vae_parameters(VAE_21) == 126_892_531
    assert vae_parameters(VAE_22) == 704_688_668
    assert text_parameters(TextConfig()) == 5_680_910_336
    assert clip_parameters(ClipConfig()) == 632_076_800


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_every_row_counts_what_its_modules_have(row: Variant) -> None:
    with torch.device("meta"):
        modules = {"dit": DiT(row.dit), "vae": CausalVae(row.vae), "text": build_umt5(row.text)}
        if row.clip is not None:
            modules["clip"] = build_clip(row.clip)
    counts = {part: count(module) for part, module in modules.items()}
    if row.clip is not None:
        counts["clip"] += row.clip.dim * row.clip.projection  # in the file, not in our tower
    assert parameters(row) == counts


@pytest.mark.parametrize("row", [row for row in ROWS if not row.demo], ids=name_of)
def test_published_files_are_as_large_as_their_parameters(row: Variant) -> None:
    counts = {**parameters(row), "clip": 1_193_014_785, "tokenizer": 16_837_417 // 4}  # CLIP's file has its text half
    width = {"text": 2}
    for file in row.files:
        assert file.bytes == pytest.approx(counts[file.part] * width.get(file.part, 4), rel=1e-3)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_part_bytes_follow_the_dtype_and_the_vae_stays_float32(row: Variant) -> None:
    wide, narrow = part_bytes(row, "float32"), part_bytes(row, "bfloat16")
    assert wide["vae"] == narrow["vae"] == 4 * parameters(row)["vae"]
    assert wide["dit"] == 2 * narrow["dit"] == 4 * parameters(row)["dit"]


@pytest.mark.parametrize(
    ("name", "size", "tera"),
    [
        ("t2v-A14B", (832, 480), 1678),
        ("t2v-A14B", (1280, 720), 6523),
        ("ti2v-5B", (1280, 704), 517),
        ("t2v-1.3B", (832, 480), 283),
    ],
)
def test_a_forward_costs_what_the_study_says(name: str, size: tuple[int, int], tera: int) -> None:
    row = VARIANTS[name]
    length = tokens(a_plan(row, size=size).latent, row.dit.patch)
    assert dit_flops(row.dit, length) / 1e12 == pytest.approx(tera, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "frames", "size", "encode", "decode"),
    [
        (VAE_21, 81, (832, 480), 164, 275),
        (VAE_21, 81, (1280, 720), 382, 639),
        (VAE_22, 121, (1280, 704), 383, 2011),
    ],
)
def test_the_vae_costs_what_was_counted_on_the_official_code(
    config: Any, frames: int, size: tuple[int, int], encode: int, decode: int
) -> None:
    assert encode_flops(config, frames, size) / 1e12 == pytest.approx(encode, rel=3e-3)
    assert decode_flops(config, frames, size) / 1e12 == pytest.approx(decode, rel=3e-3)


@pytest.mark.parametrize("image", [None, 257, 514])
def test_a_forward_costs_what_torch_counts(image: int | None) -> None:
    config = DiTConfig(
        dim=64, ffn_dim=160, heads=2, layers=3, in_channels=36, text_dim=40, text_len=24,
        image_dim=None if image is None else 48, image_positions=image if image == 514 else None,
    )  # fmt: skip
    with torch.device("meta"):
        dit = DiT(config)
        inputs = torch.empty(1, 36, 3, 8, 12), torch.empty(1, 1), torch.empty(1, 5, 40)
        seen = None if image is None else torch.empty(1, image, 48)
        with counted() as counter, torch.no_grad():
            dit(*inputs, image=seen)
    assert dit_flops(config, 3 * 4 * 6) == counter.get_total_flops()


@pytest.mark.parametrize("row", [VARIANTS["demo-t2v"], VARIANTS["demo-ti2v"]], ids=name_of)
def test_the_vae_costs_what_torch_counts(row: Variant) -> None:
    frames, size = 9, (64, 96)
    with torch.device("meta"):
        vae = CausalVae(row.vae)
        with counted() as encoding:  # with gradients: without, upsampling is done in 4/9 of the multiplications
            z, _ = vae.encode(torch.empty(1, 3, frames, size[1], size[0]))
        with counted() as decoding:
            vae.decode(z)
    assert encode_flops(row.vae, frames, size) == encoding.get_total_flops()
    assert decode_flops(row.vae, frames, size) == decoding.get_total_flops()


def test_the_text_encoder_costs_what_torch_counts() -> None:
    config = TextConfig(dim=96, ffn_dim=256, heads=4, head_dim=24, layers=2, vocab=128)
    with torch.device("meta"):
        model = build_umt5(config)
        with counted() as counter, torch.no_grad():
            model(input_ids=torch.zeros(1, 24, dtype=torch.long))
    assert text_flops(config, 24) == counter.get_total_flops()


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_every_row_has_a_need_and_stages_in_their_order(row: Variant) -> None:
    for dtype in ("float32", "bfloat16"):
        needed = need(a_plan(row), row, dtype)
        names = [stage.name for stage in needed.stages]
        assert names == (["text", "image"] if row.conditioner == "image" else ["text"]) + ["denoise", "decode"]
        assert needed.gpu == 0 < needed.disk
        assert needed.host > max(stage.bytes for stage in needed.stages)
        assert needed.flops == sum(flops(a_plan(row), row).values())
        on_gpu = need(a_plan(row), row, dtype, on_gpu=True)
        assert on_gpu.gpu > max(stage.bytes for stage in needed.stages)


def test_guidance_1_halves_the_denoising() -> None:
    row = VARIANTS["t2v-A14B"]
    both, one, half = (flops(a_plan(row, guidance=g), row) for g in (5.0, 1.0, (1.0, 5.0)))
    assert both["denoise"] == 2 * one["denoise"]
    assert both["text"] == 2 * one["text"]
    assert half["denoise"] * 40 == one["denoise"] * (2 * 26 + 14)


def test_a_picture_for_ti2v_encodes_one_frame() -> None:
    row = VARIANTS["ti2v-5B"]
    picture = Input(role="image", name="a.png", sha256="0" * 64, size=(1280, 704))
    plan = make_plan(Request(prompt="a", seed=1, image="a.png"), row, inputs=[picture])
    assert flops(plan, row)["image"] == encode_flops(VAE_22, 1, (1280, 704))
    assert flops(a_plan(row), row)["image"] == 0


def test_memory_of_a_decode_does_not_grow_with_the_frames() -> None:
    row = VARIANTS["t2v-1.3B"]
    short, long = (need(a_plan(row, frames=frames), row, "bfloat16", on_gpu=True) for frames in (17, 81))
    assert short.stages[-1].activations == long.stages[-1].activations


def test_activations_grow_with_tokens_and_pixels() -> None:
    config = VARIANTS["t2v-1.3B"].dit
    small, large = (dit_activations(config, (16, t, 60, 104), "bfloat16") for t in (10, 20))
    assert large == pytest.approx(2 * small, rel=1e-6)
    areas = [vae_activations(VAE_21, (side, side), decode=True) for side in (128, 256)]
    assert areas[1] == pytest.approx(4 * areas[0], rel=1e-6)


def test_the_text_encoder_on_the_cpu_moves_its_bytes_to_the_host() -> None:
    row = VARIANTS["t2v-1.3B"]
    both = [need(a_plan(row, size=(64, 64)), row, "bfloat16", on_gpu=True, t5_cpu=here) for here in (False, True)]
    text = part_bytes(row, "bfloat16")["text"]
    assert both[0].gpu > text > both[1].gpu
    assert both[1].host > text


def test_what_does_not_suffice_is_named_with_both_numbers() -> None:
    needed = Need(disk=10, host=20, gpu=30, stages=())
    assert fits(needed, Have(disk=10, host=20, gpu=30)) == ()
    short = fits(needed, Have(disk=9, host=20, gpu=None))
    assert [(item.what, item.need, item.have) for item in short] == [("disk", 10, 9), ("gpu", 30, 0)]
    assert fits(Need(disk=1, host=1, gpu=0, stages=()), Have(disk=1, host=1)) == ()


def test_a_demo_model_needs_little() -> None:
    row = VARIANTS["demo-t2v"]
    needed = need(a_plan(row), row, "float32")
    assert needed.host < 2**30
    assert needed.disk < 2**22
