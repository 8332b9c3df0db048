"""`wanloom convert`: a checkpoint in another layout, by the command line."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

import tiny

NAME = "t2v-1.3B"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("models"), NAME)


def test_there_and_back_gives_the_same_tensors_and_a_manifest(run, folder, tmp_path):
    there = run("convert", folder, "diffusers", "--to", "diffusers")
    assert there.code == 0, there.err
    assert "Wrote diffusers: " in there.out
    assert (tmp_path / "diffusers" / "model_index.json").is_file()
    back = run("convert", "diffusers", "official", "--to", "official")
    assert back.code == 0, back.err
    shard = "diffusion_pytorch_model.safetensors"
    before, after = load_file(folder / shard), load_file(tmp_path / "official" / shard)
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    manifest = json.loads((tmp_path / "official" / "wanloom.sha256.json").read_text())
    assert shard in manifest["files"]


def test_a_number_format_can_be_chosen(run, folder, tmp_path):
    import torch

    assert run("convert", folder, "small", "--dtype", "bf16").code == 0
    values = load_file(tmp_path / "small" / "diffusion_pytorch_model.safetensors").values()
    assert {value.dtype for value in values} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["absent", "out"], "E4001"),
        (["{folder}", "out", "--to", "gguf"], "E2022"),
        (["{folder}", "full"], "E5002"),
        (["{folder}", "full/file"], "E5001"),
        (["{folder}"], "E2022"),
    ],
)
def test_what_cannot_be_converted_is_one_line(run, folder, tmp_path, words, code):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    ran = run("convert", *(word.format(folder=folder) for word in words))
    assert ran.err.startswith(f"error[{code}]: ")
    assert ran.code == int(code[1])
    assert (tmp_path / "full" / "file").read_text() == "mine"
