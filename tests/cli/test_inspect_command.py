"""`wanloom inspect`: what a path is, by the command line."""

from __future__ import annotations

import json

import pytest

import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("models"), "t2v-A14B")


def test_a_directory_is_named_with_its_parts(run, folder):
    ran = run("inspect", folder)
    assert ran.code == 0, ran.err
    first, *parts = ran.out.splitlines()
    assert "t2v-A14B" in first
    assert sum("transformer of 2 layers" in line for line in parts) == 2
    assert any("16 latent channels" in line for line in parts)


def test_a_single_expert_lists_all_it_can_be(run, folder):
    shard = folder / "high_noise_model" / "diffusion_pytorch_model.safetensors"
    report = json.loads(run("inspect", shard, "--json").out)
    found = {candidate["variant"] for candidate in report["candidates"]}
    assert {"t2v-A14B", "t2v-14B"} <= found


def test_a_manifest_has_the_tensors_of_our_module(run):
    tensors = json.loads(run("inspect", "--manifest", "wan2.1-vae", "--json").out)["tensors"]
    assert tensors["conv2.weight"] == [16, 16, 1, 1, 1]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["absent"], "E4001"),
        (["--manifest", "wan2.1-vea"], "E2022"),
        ([], "E2023"),
        (["a", "--manifest", "b"], "E2023"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(run, words, code):
    ran = run("inspect", *words)
    assert ran.err.startswith(f"error[{code}]: ")
    assert ran.code == int(code[1])
