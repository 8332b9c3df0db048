"""Whole runs against the reference implementation: the command line, from options to the tensors it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import wanloom
from command_line import run_here
from wanloom import pipeline
from wanloom.conditioning import image
from wanloom.sampling import schedule
from wanloom.variants import VARIANTS

CASES = ("t2v_unipc", "t2v_dpmpp", "i2v_unipc", "ti2v_t2v", "ti2v_i2v")
LATENTS, VIDEO = 1e-5, 3e-5  # relative; rounding differs with the order of operations (measured: 1.1e-6 and 1.8e-6)
AREAS = {4096: "64*64", 6144: "96*64"}

pytestmark = pytest.mark.filterwarnings("ignore::wanloom.errors.WanloomWarning")


def case(golden: Path, name: str) -> dict[str, Any]:
    return next(row for row in json.loads((golden / "cases.json").read_text()) if row["name"] == name)


def close(mine: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Equal in the norm to `tolerance`, and nowhere off by more than five times that of the largest value."""
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype == torch.float32
    error = (mine - theirs).norm() / theirs.norm()
    worst = (mine - theirs).abs().max() / theirs.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"
    assert worst <= 5 * tolerance, f"largest error {worst:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_command_line_computes_what_the_reference_computes(
    name: str, golden: Path, golden_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = case(golden, name)
    picture = ["--image", golden / row["image"]] if "image" in row else []
    ran = run_here(
        capsys, "generate", "--task", row["task"], "--ckpt_dir", golden_models / row["ckpt"], "--prompt", row["prompt"],
        "--size", row.get("size") or AREAS[row["max_area"]], "--frame_num", row["frame_num"],
        "--sample_shift", row["sample_shift"], "--sample_solver", row["sample_solver"],
        "--sample_steps", row["sample_steps"], "--base_seed", row["seed"], *picture,
        "--device", "cpu", "--save_file", tmp_path / "a.mp4", "--save-tensors", tmp_path / "a.safetensors",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    mine, theirs = load_file(tmp_path / "a.safetensors"), load_file(golden / f"{name}.safetensors")
    close(mine["latents"], theirs["latents"], LATENTS)
    close(mine["video"], theirs["video"], VIDEO)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.safetensors"]


def test_python_face_computes_what_the_reference_computes(golden: Path, golden_models: Path) -> None:
    row = case(golden, "i2v_unipc")
    pipe = wanloom.load(golden_models / row["ckpt"], device="cpu")
    with Image.open(golden / row["image"]) as picture:
        video = pipe(
            row["prompt"], image=picture, size=AREAS[row["max_area"]], frames=row["frame_num"],
            shift=row["sample_shift"], sampler=row["sample_solver"], steps=row["sample_steps"], seed=row["seed"],
        )  # fmt: skip
    theirs = load_file(golden / "i2v_unipc.safetensors")
    close(video.latents, theirs["latents"], LATENTS)
    close(video.tensor, theirs["video"], VIDEO)


# ---------------------------------------------------------------- what must not go unseen


def _guidance_swapped(_: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    fields["guidance"] = (4.0, 3.0)  # the variant has (low 3, high 4)


def _boundary_one_step_late(patch: pytest.MonkeyPatch, _: dict[str, Any]) -> None:
    late = (("high_noise_model", 0.85), ("low_noise_model", 0.0))
    patch.setitem(VARIANTS, "t2v-A14B", replace(VARIANTS["t2v-A14B"], experts=late))


def _timesteps_not_cut(patch: pytest.MonkeyPatch, _: dict[str, Any]) -> None:
    patch.setattr(schedule.math, "trunc", lambda value: value)


def _mask_one_frame_late(patch: pytest.MonkeyPatch, _: dict[str, Any]) -> None:
    right = image.given_mask
    patch.setattr(image, "given_mask", lambda *a, **k: torch.roll(right(*a, **k), 1, dims=2))


def _picture_antialiased(patch: pytest.MonkeyPatch, _: dict[str, Any]) -> None:
    def fit(view: Tensor, size: tuple[int, int]) -> Tensor:
        return torch.nn.functional.interpolate(view[None], size[::-1], mode="bicubic", antialias=True)[0]

    patch.setattr(image, "fit", fit)


def _grey_is_black(patch: pytest.MonkeyPatch, _: dict[str, Any]) -> None:
    right = image.clip_frames

    def black(*given: Any) -> Iterator[Tensor]:
        first, *others = right(*given)
        yield first
        yield from (piece - 1 for piece in others)

    patch.setattr(image, "clip_frames", black)


def _first_frame_told_the_noise_level(patch: pytest.MonkeyPatch, _: dict[str, Any]) -> None:
    right = image.clean_frame

    def without_group(*given: Any) -> Any:
        made = right(*given)
        cond = {name: value for name, value in made.cond.items() if name != "group"}
        uncond = {name: value for name, value in (made.uncond or {}).items() if name != "group"}
        return replace(made, cond=cond, uncond=uncond)

    patch.setitem(pipeline.CONDITIONERS, "clean_frame", without_group)


MUTATIONS = (
    ("t2v_unipc", _guidance_swapped),
    ("t2v_unipc", _boundary_one_step_late),
    ("t2v_unipc", _timesteps_not_cut),
    ("i2v_unipc", _mask_one_frame_late),
    ("i2v_unipc", _picture_antialiased),
    ("i2v_unipc", _grey_is_black),
    ("ti2v_i2v", _first_frame_told_the_noise_level),
)


@pytest.mark.parametrize(("name", "mutate"), MUTATIONS, ids=lambda value: getattr(value, "__name__", value).strip("_"))
def test_a_wrong_step_shows_in_the_latents(
    name: str, mutate: Any, golden: Path, golden_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = case(golden, name)
    fields = {
        "size": row.get("size") or AREAS[row["max_area"]], "frames": row["frame_num"], "shift": row["sample_shift"],
        "sampler": row["sample_solver"], "steps": row["sample_steps"], "seed": row["seed"],
    }  # fmt: skip
    if "image" in row:
        fields["image"] = golden / row["image"]
    mutate(monkeypatch, fields)
    video = wanloom.load(golden_models / row["ckpt"], task=row["task"], device="cpu")(row["prompt"], **fields)
    theirs = load_file(golden / f"{name}.safetensors")["latents"]
    assert (video.latents - theirs).norm() / theirs.norm() > 5 * LATENTS
