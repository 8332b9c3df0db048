"""`inspect`: what files and directories are said to be."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from wanloom.checkpoint.convert import convert
from wanloom.checkpoint.inspect import MANIFESTS, inspect, manifest
from wanloom.checkpoint.shapes import dit_shapes
from wanloom.errors import InputError
from wanloom.variants import VARIANTS
from weight_files import hollow


def names(report: object) -> list[str]:
    return [str(candidate) for candidate in report.candidates]  # type: ignore[attr-defined]


def test_an_expert_of_published_size_can_be_any_of_its_form(tmp_path: Path) -> None:
    hollow(tmp_path / "x.safetensors", dit_shapes(VARIANTS["t2v-14B"].dit), "BF16")
    report = inspect(tmp_path / "x.safetensors")
    assert names(report) == ["t2v-A14B (high_noise_model)", "t2v-A14B (low_noise_model)", "t2v-14B"]
    part = report.parts[0]
    assert part.parameters == 14_288_491_584
    assert part.dtypes == {"BF16": 14_288_491_584}
    assert part.bytes == pytest.approx(2 * 14_288_491_584, rel=1e-4)


def test_a_recorded_expert_is_the_only_candidate(models: Path, tmp_path: Path) -> None:
    root = convert(models / "i2v-A14B", tmp_path / "out", to="comfy").path
    file = root / "split_files" / "diffusion_models" / "i2v-A14B_low_noise.safetensors"
    renamed = file.rename(tmp_path / "x.safetensors")
    assert names(inspect(renamed)) == ["i2v-A14B (low_noise_model)"]


@pytest.mark.parametrize("name", tiny.TINY)
@pytest.mark.parametrize("layout", ["official", "diffusers", "comfy"])
def test_a_directory_is_named_with_its_layout(models: Path, tmp_path: Path, name: str, layout: str) -> None:
    if layout == "diffusers" and (VARIANTS[name].dit.speech or VARIANTS[name].dit.animate):
        pytest.skip("diffusers' layout has no place for it")
    root = models / name if layout == "official" else convert(models / name, tmp_path / "out", to=layout).path
    report = inspect(root)
    assert report.layout == layout
    assert name in names(report)
    assert report.tokenizer is not None
    kinds = [part.part for part in report.parts]
    assert kinds == ["transformer"] * len(VARIANTS[name].experts) + ["VAE", "text encoder"] + (
        ["CLIP image encoder"] if VARIANTS[name].clip else ["wav2vec2 audio encoder"] if VARIANTS[name].audio else []
    )
    assert json.loads(json.dumps(report.to_json()))["layout"] == layout
    assert all("\n" not in line for line in report.lines())


@pytest.mark.parametrize("name", ["s2v-14B", "animate-14B"])
def test_published_transformers_with_parts_are_named(tmp_path: Path, name: str) -> None:
    hollow(tmp_path / "x.safetensors", dit_shapes(VARIANTS[name].dit))
    report = inspect(tmp_path / "x.safetensors")
    assert names(report) == [name]
    words = {"s2v-14B": "16 input channels, parts for speech", "animate-14B": "branch, parts for pose and face"}
    assert words[name] in report.lines()[1]


def test_an_audio_encoder_is_named(models: Path) -> None:
    report = inspect(models / "s2v-14B" / "wav2vec2-large-xlsr-53-english")
    assert [part.part for part in report.parts] == ["wav2vec2 audio encoder"]
    assert "of 2 layers, width 32" in report.lines()[1]


def test_a_pickle_is_named_as_one(models: Path) -> None:
    report = inspect(models / "t2v-1.3B" / "Wan2.1_VAE.pth")
    assert report.parts[0].container == "pickle"
    assert "Wan2.1 VAE, 16 latent channels" in report.lines()[1]


def test_damage_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.safetensors", b""), ("b.pth", b"abc")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            inspect(tmp_path / name)
        assert caught.value.exit_code == 4
    with pytest.raises(InputError, match="no such file"):
        inspect(tmp_path / "none")


def test_a_published_directory_is_surveyed_in_a_moment_without_torch(tmp_path: Path) -> None:
    for expert in ("high_noise_model", "low_noise_model"):
        hollow(tmp_path / expert / "diffusion_pytorch_model.safetensors", dit_shapes(VARIANTS["t2v-A14B"].dit))
    started = time.process_time()
    assert names(inspect(tmp_path)) == ["t2v-A14B"]
    assert time.process_time() - started < 2
    program = (
        "import sys; from wanloom.checkpoint.inspect import inspect; "
        "from wanloom.checkpoint import load, convert; inspect(sys.argv[1]); "
        "print(*({'torch', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": source},
    )
    assert done.stdout.strip() == ""


def test_manifests_are_listed_and_others_refused() -> None:
    assert len(MANIFESTS) == 13
    with pytest.raises(InputError, match=r"wan2\.2-t2v-a14b-dit"):
        manifest("wan2.2-t2v-a14b")
