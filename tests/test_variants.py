"""The rows of VARIANTS against the official numbers."""

from __future__ import annotations

import hashlib

import pytest

from wanloom.errors import InputError
from wanloom.models.config import VAE_21, VAE_22
from wanloom.variants import NEGATIVE, NEGATIVE_FLF_21, NEGATIVE_I2V_21, TASKS, VARIANTS, Variant, variant_for

ROWS = list(VARIANTS.values())
PUBLISHED = [row for row in ROWS if not row.demo]
DEMO = [row for row in ROWS if row.demo]

# spec/core.md 1.2: task -> fps, frames, steps, shift, (low, high), boundary.
OFFICIAL = {
    "t2v-A14B": (16, 81, 40, 12.0, (3.0, 4.0), 0.875),
    "i2v-A14B": (16, 81, 40, 5.0, (3.5, 3.5), 0.900),
    "ti2v-5B": (24, 121, 50, 5.0, (5.0, 5.0), 0.0),
    "s2v-14B": (16, 80, 40, 3.0, (4.5, 4.5), 0.0),
    "animate-14B": (30, 77, 20, 5.0, (1.0, 1.0), 0.0),
    "t2v-14B": (16, 81, 50, 5.0, (5.0, 5.0), 0.0),
    "t2v-1.3B": (16, 81, 50, 5.0, (5.0, 5.0), 0.0),
    "i2v-14B": (16, 81, 40, 5.0, (5.0, 5.0), 0.0),
    "flf2v-14B": (16, 81, 50, 16.0, (5.0, 5.0), 0.0),
}


def name_of(row: Variant) -> str:
    return row.name


@pytest.mark.parametrize("row", PUBLISHED, ids=name_of)
def test_defaults_are_the_official_ones(row: Variant) -> None:
    defaults = row.defaults
    found = (defaults.fps, defaults.frames, defaults.steps, defaults.shift, defaults.guidance, row.experts[0][1])
    assert found == OFFICIAL[row.name]
    assert defaults.sampler == "unipc"
    assert defaults.quality == 8
    assert defaults.size in row.sizes


def test_every_official_task_of_this_version_has_its_row() -> None:
    assert set(TASKS) == set(OFFICIAL)
    assert all(row.name == row.task for row in PUBLISHED)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_experts_cover_all_timesteps_high_noise_first(row: Variant) -> None:
    starts = [start for _, start in row.experts]
    assert starts == sorted(starts, reverse=True)
    assert starts[-1] == 0
    assert row.expert_at(1000) == row.experts[0][0]
    assert row.expert_at(0) == row.experts[-1][0]


def test_the_boundary_itself_belongs_to_the_high_noise_expert() -> None:
    t2v, i2v = VARIANTS["t2v-A14B"], VARIANTS["i2v-A14B"]
    assert (t2v.expert_at(875), t2v.expert_at(874)) == ("high_noise_model", "low_noise_model")
    assert (i2v.expert_at(900), i2v.expert_at(899)) == ("high_noise_model", "low_noise_model")


def test_the_first_number_of_guidance_is_for_low_noise() -> None:
    t2v = VARIANTS["t2v-A14B"]
    assert t2v.guidance_of(t2v.expert_at(999), t2v.defaults.guidance) == 4.0
    assert t2v.guidance_of(t2v.expert_at(235), t2v.defaults.guidance) == 3.0


def test_the_shift_of_wan21_i2v_follows_the_size() -> None:
    defaults = VARIANTS["i2v-14B"].defaults
    assert defaults.shift_for((832, 480)) == 3.0
    assert defaults.shift_for((480, 832)) == 3.0
    assert defaults.shift_for((1280, 720)) == 5.0
    assert VARIANTS["i2v-A14B"].defaults.shift_for((832, 480)) == 5.0


def test_negative_prompts_are_the_official_texts() -> None:
    assert NEGATIVE.startswith("色调艳丽，过曝，静态") and NEGATIVE.endswith("背景人很多，倒着走")
    digest = "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    assert hashlib.sha256(NEGATIVE.encode()).hexdigest() == digest
    assert NEGATIVE_I2V_21 == "镜头晃动，" + NEGATIVE
    assert NEGATIVE_FLF_21 == "镜头切换，镜头晃动，" + NEGATIVE
    assert VARIANTS["i2v-A14B"].defaults.negative_prompt == NEGATIVE  # unprefixed in Wan2.2
    assert VARIANTS["i2v-14B"].defaults.negative_prompt == NEGATIVE_I2V_21
    assert VARIANTS["flf2v-14B"].defaults.negative_prompt == NEGATIVE_FLF_21


@pytest.mark.parametrize("row", DEMO, ids=name_of)
def test_demo_models_were_trained_against_the_empty_text(row: Variant) -> None:
    assert row.defaults.negative_prompt == ""


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_sizes_are_multiples_of_what_the_model_needs(row: Variant) -> None:
    assert row.multiple == (32 if row.conditioner == "clean_frame" else 16)
    assert all(side % row.multiple == 0 for size in row.sizes for side in size)
    alone = 0 if row.conditioner == "speech" else 1  # clips of s2v stand behind a frame that is not theirs
    assert (row.defaults.frames - alone) % row.vae.stride[0] == 0


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_the_channels_fit_the_conditioner(row: Variant) -> None:
    mask = row.vae.stride[0]
    extra = mask + row.vae.z if row.conditioner in ("image", "animate") else 0
    assert row.dit.out_channels == row.vae.z
    assert row.dit.in_channels == row.vae.z + extra
    assert row.dit.text_dim == row.text.dim
    assert row.dit.dim % row.dit.heads == 0
    assert (row.clip is not None) == (row.dit.image_dim is not None)
    if row.clip is not None:
        assert row.clip.dim == row.dit.image_dim


@pytest.mark.parametrize("row", PUBLISHED, ids=name_of)
def test_published_rows_say_where_their_files_are(row: Variant) -> None:
    assert row.repos
    encoders = {name for name in ("clip", "audio") if getattr(row, name) is not None}
    assert {file.part for file in row.files} == {"dit", "vae", "text", "tokenizer"} | encoders
    assert [file.expert for file in row.files if file.part == "dit"] == (
        list(row.expert_names) if len(row.experts) > 1 else [None]
    )
    assert row.vae == (VAE_22 if row.name == "ti2v-5B" else VAE_21)
    assert row.dit.head_dim == 128


def test_pictures_each_task_takes() -> None:
    assert not VARIANTS["t2v-A14B"].takes("image")
    assert VARIANTS["i2v-A14B"].needs("image") and VARIANTS["i2v-A14B"].takes("last_image")
    assert not VARIANTS["i2v-A14B"].needs("last_image")
    assert VARIANTS["flf2v-14B"].needs("last_image")
    assert VARIANTS["ti2v-5B"].takes("image") and not VARIANTS["ti2v-5B"].needs("image")
    assert not VARIANTS["i2v-14B"].takes("last_image")


@pytest.mark.parametrize(
    ("task", "demo"),
    [
        ("t2v-A14B", "demo-t2v"),
        ("i2v-A14B", "demo-i2v"),
        ("ti2v-5B", "demo-ti2v"),
        ("s2v-14B", "demo-s2v"),
        ("animate-14B", "demo-animate"),
    ],
)
def test_without_a_checkpoint_the_demo_model_of_the_task_runs(task: str, demo: str) -> None:
    assert variant_for(task).name == task
    assert variant_for(task, demo=True).name == demo
    assert variant_for(demo).name == variant_for(demo, demo=True).name == demo


@pytest.mark.parametrize("task", ["t2v-1.3B", "t2v-14B", "i2v-14B", "flf2v-14B"])
def test_tasks_without_a_demo_model_ask_for_a_checkpoint(task: str) -> None:
    with pytest.raises(InputError, match="--ckpt-dir is required") as error:
        variant_for(task, demo=True)
    assert error.value.code == "E2001"


@pytest.mark.parametrize("task", ["t2v-15B", "", "T2V-A14B"])
def test_an_unknown_task_lists_the_tasks(task: str) -> None:
    with pytest.raises(InputError, match="There are: animate-14B, flf2v-14B, i2v-14B") as error:
        variant_for(task)
    assert error.value.code == "E2002"


def test_a_misspelt_task_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match="Did you mean 'flf2v-14B'"):
        variant_for("flf2v-14")
