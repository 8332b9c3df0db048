"""Where the parts lie: the published, diffusers' and ComfyUI's directories, and single paths."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from wanloom.checkpoint.convert import convert
from wanloom.checkpoint.find import Files, contents, resolve
from wanloom.checkpoint.shapes import dit_shapes, vae_shapes
from wanloom.errors import InputError
from wanloom.models.config import VAE_21
from wanloom.variants import VARIANTS
from weight_files import hollow

T2V, SMALL, I2V_21, TI2V = (VARIANTS[name] for name in ("t2v-A14B", "t2v-1.3B", "i2v-14B", "ti2v-5B"))


def refused(code: str, call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value.message


@pytest.mark.parametrize("name", tiny.TINY)
def test_the_published_directories_are_found(models: Path, name: str) -> None:
    root = models / name
    variant = VARIANTS[name]
    files = resolve(variant, ckpt_dir=root)
    two = len(variant.experts) == 2
    assert files.experts == ({e: root / e for e in variant.expert_names} if two else {"model": root})
    assert files.vae == root / ("Wan2.2_VAE.pth" if variant.vae.residual else "Wan2.1_VAE.pth")
    assert files.text == root / "models_t5_umt5-xxl-enc-bf16.pth"
    assert files.tokenizer == root / "google" / "umt5-xxl"
    assert (files.clip is not None) == (variant.clip is not None)
    assert files.root == root


@pytest.mark.parametrize("layout", ["official", "diffusers", "comfy"])
@pytest.mark.parametrize("name", ["t2v-A14B", "t2v-1.3B", "i2v-14B", "ti2v-5B"])
def test_every_layout_is_found_and_its_contents_are_the_same(
    models: Path, tmp_path: Path, name: str, layout: str
) -> None:
    root = convert(models / name, tmp_path / "out", to=layout).path
    files = resolve(VARIANTS[name], ckpt_dir=root)
    found = contents(root)
    assert files == Files(
        experts=found.experts,
        vae=found.vae or root,
        text=found.text or root,
        tokenizer=found.tokenizer or root,
        clip=found.clip,
        root=root,
    )


def test_comfyui_folders_are_found_with_and_without_split_files(models: Path, tmp_path: Path) -> None:
    root = convert(models / "t2v-A14B", tmp_path / "out", to="comfy").path
    flat = tmp_path / "flat"
    shutil.copytree(root / "split_files", flat)
    assert list(resolve(T2V, ckpt_dir=flat).experts) == list(T2V.expert_names)


def test_among_many_comfyui_models_the_fitting_one_is_taken(models: Path, tmp_path: Path) -> None:
    root = convert(models / "t2v-A14B", tmp_path / "out", to="comfy").path
    folder = root / "split_files" / "diffusion_models"
    hollow(folder / "wan2.2_i2v_high_noise.safetensors", dit_shapes(VARIANTS["i2v-A14B"].dit))
    hollow(root / "split_files" / "text_encoders" / "t5xxl.safetensors", {"decoder.weight": (1,)})
    hollow(root / "split_files" / "vae" / "ae.safetensors", {"encoder.weight": (1,)})
    files = resolve(T2V, ckpt_dir=root)
    assert files.experts["high_noise_model"].name == "t2v-A14B_high_noise.safetensors"
    shutil.copy(files.experts["low_noise_model"], folder / "another_low_noise.safetensors")
    message = refused("E4001", lambda: resolve(T2V, ckpt_dir=root))
    assert "another_low_noise" in message and "--dit-low" in message


def test_a_single_path_wins_over_the_directory(models: Path, tmp_path: Path) -> None:
    vae = hollow(tmp_path / "vae.safetensors", vae_shapes(VAE_21))
    files = resolve(T2V, ckpt_dir=models / "t2v-A14B", vae=vae, dit_low=models / "t2v-A14B" / "high_noise_model")
    assert files.vae == vae
    assert files.experts["low_noise_model"] == models / "t2v-A14B" / "high_noise_model"
    assert files.experts["high_noise_model"] == models / "t2v-A14B" / "high_noise_model"


def test_parts_alone_are_enough(models: Path) -> None:
    root = models / "i2v-14B"
    clip = root / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    given = {"dit": root, "vae": root / "Wan2.1_VAE.pth", "text_encoder": root / "models_t5_umt5-xxl-enc-bf16.pth"}
    files = resolve(I2V_21, **given, clip=clip, tokenizer=root / "google" / "umt5-xxl" / "tokenizer.json")
    assert files.root is None and files.clip == clip
    assert files.tokenizer.name == "tokenizer.json"
    assert resolve(I2V_21, **given, clip=clip).tokenizer == root / "google" / "umt5-xxl", "near the text encoder"


def test_safetensors_win_over_pickles_of_the_same_stem(tmp_path: Path) -> None:
    root = tiny.checkpoint(tmp_path, "i2v-14B")
    tiny.checkpoint(tmp_path, "i2v-14B", pickles=False)
    files = resolve(I2V_21, ckpt_dir=root)
    assert {files.vae.suffix, files.text.suffix, (files.clip or root).suffix} == {".safetensors"}
    named = resolve(
        I2V_21, ckpt_dir=root, vae=root / "Wan2.1_VAE.pth", clip=root / (files.clip or root).with_suffix(".pth").name
    )
    assert {named.vae.suffix, (named.clip or root).suffix} == {".safetensors"}
    (root / "Wan2.1_VAE.pth").unlink()
    assert resolve(I2V_21, ckpt_dir=root, vae=root / "Wan2.1_VAE.pth").vae.suffix == ".safetensors"


MISSING = {
    "Wan2.1_VAE.pth": ("the VAE", "Wan2.1_VAE.pth (508 MB) of Wan-AI/Wan2.1-I2V-14B-480P", "--vae"),
    "models_t5_umt5-xxl-enc-bf16.pth": ("the text encoder", "(11.4 GB)", "--text-encoder"),
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": ("the CLIP image encoder", "(4.8 GB)", "--clip"),
    "google": ("the tokenizer", "tokenizer.json (17 MB)", "--tokenizer"),
    "diffusion_pytorch_model.safetensors": ("the transformer", "(65.6 GB)", "--dit"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_part_is_named_with_file_size_and_repository(tmp_path: Path, name: str) -> None:
    root = tiny.checkpoint(tmp_path, "i2v-14B")
    path = root / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    message = refused("E4001", lambda: resolve(I2V_21, ckpt_dir=root))
    assert all(word in message for word in MISSING[name])
    assert str(root) in message and "Wan-AI/Wan2.1-I2V-14B-480P or Wan-AI/Wan2.1-I2V-14B-720P" in message


@pytest.mark.parametrize("gone", ["high_noise_model", "low_noise_model"])
def test_b083_one_expert_alone_is_refused(tmp_path: Path, gone: str) -> None:
    root = tiny.checkpoint(tmp_path, "t2v-A14B")
    shutil.rmtree(root / gone)
    message = refused("E4019", lambda: resolve(T2V, ckpt_dir=root))
    assert f"the expert {gone} is missing" in message
    assert ("--dit-high" if gone.startswith("high") else "--dit-low") in message


def test_b083_a_diffusers_directory_without_its_second_expert_is_refused(models: Path, tmp_path: Path) -> None:
    root = convert(models / "t2v-A14B", tmp_path / "two", to="diffusers").path
    shutil.rmtree(root / "transformer_2")
    assert "the expert low_noise_model is missing" in refused("E4019", lambda: resolve(T2V, ckpt_dir=root))
    other = replace(T2V, name="other", experts=VARIANTS["t2v-14B"].experts)
    assert "(two experts), expected other (one transformer)" in refused("E4016", lambda: resolve(other, ckpt_dir=root))


def test_b083_one_expert_given_by_path_is_refused(models: Path) -> None:
    root = models / "t2v-A14B"
    refused("E4019", lambda: resolve(T2V, dit_high=root / "high_noise_model"))
    refused("E4001", lambda: resolve(T2V))


def test_a_directory_of_another_model_is_named(models: Path) -> None:
    message = refused("E4016", lambda: resolve(T2V, ckpt_dir=models / "ti2v-5B"))
    assert "this is ti2v-5B" in message and "expected t2v-A14B" in message
    message = refused("E4016", lambda: resolve(TI2V, ckpt_dir=models / "t2v-A14B"))
    assert "this is t2v-A14B" in message and "expected ti2v-5B" in message
    message = refused("E4016", lambda: resolve(SMALL, ckpt_dir=models / "t2v-A14B"))
    assert "two experts" in message and "one transformer" in message
    message = refused("E4016", lambda: resolve(T2V, ckpt_dir=models / "t2v-1.3B"))
    assert "t2v-1.3B" in message and "(one transformer), expected t2v-A14B (two experts)" in message


def test_diffusers_directories_of_another_model_are_named(models: Path, tmp_path: Path) -> None:
    two = convert(models / "t2v-A14B", tmp_path / "two", to="diffusers").path
    refused("E4016", lambda: resolve(SMALL, ckpt_dir=two))
    one = convert(models / "ti2v-5B", tmp_path / "one", to="diffusers").path
    assert "this is ti2v-5B" in refused("E4016", lambda: resolve(T2V, ckpt_dir=one))


def test_options_that_do_not_fit_the_model_are_refused(models: Path) -> None:
    path = models / "t2v-1.3B"
    assert "--dit-high" in refused("E2022", lambda: resolve(T2V, dit=path))
    assert "--dit" in refused("E2022", lambda: resolve(SMALL, dit_high=path))
    assert "--dit" in refused("E2022", lambda: resolve(SMALL, dit_low=path))


def test_paths_that_are_not_there_are_named(models: Path, tmp_path: Path) -> None:
    root = models / "t2v-1.3B"
    assert "none" in refused("E4001", lambda: resolve(SMALL, ckpt_dir=tmp_path / "none"))
    assert "--dit" in refused("E4001", lambda: resolve(SMALL, ckpt_dir=root / "Wan2.1_VAE.pth"))
    assert "none.safetensors" in refused(
        "E4001", lambda: resolve(SMALL, ckpt_dir=root, vae=tmp_path / "none.safetensors")
    )
    assert "tokenizer.json" in refused("E4001", lambda: resolve(SMALL, ckpt_dir=root, tokenizer=tmp_path))
