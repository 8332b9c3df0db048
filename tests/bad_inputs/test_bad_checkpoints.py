"""Bad input: weight files, indexes, configs and tokenizers that are damaged, forged or of another model."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import I2V, I2V_21, SHARD, SHORT, SMALL, T2V, TI2V, check_refusal, edit, entry, safetensors
from safetensors.torch import load_file, save_file

from command_line import run_process


def split(folder: Path, *revisions: str) -> dict[str, str]:
    """The one transformer file of a folder as two shards with an index; the index's map."""
    tensors = load_file(folder / SHARD)
    (folder / SHARD).unlink()
    names = sorted(tensors)
    where = {}
    for number, half in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        mark = {"wanloom.revision": revisions[number - 1]} if revisions else None
        save_file({name: tensors[name] for name in half}, folder / file, metadata=mark)
        where |= dict.fromkeys(half, file)
    write_index(folder, where)
    return where


def write_index(folder: Path, where: Any) -> None:
    document = where if isinstance(where, str) else json.dumps({"metadata": {}, "weight_map": where})
    (folder / f"{SHARD}.index.json").write_text(document)


@pytest.fixture
def rejected(refused) -> Callable[..., str]:
    """`rejected("E4006", folder, "t2v-1.3B", names=file)`: that model is refused; the message names the file."""

    def call(code: str, folder: Path, task: str = SMALL, *words: object, names: str = "") -> str:
        said = refused(code, "--task", task, "--ckpt-dir", folder, *SHORT, "--prompt", "x", *words)
        assert names in said
        return said

    return call


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin"])
def test_b066_a_pickled_transformer_where_safetensors_are_published(suffix, model, rejected):
    folder = model(SMALL)
    torch.save(load_file(folder / SHARD), folder / f"diffusion_pytorch_model{suffix}")
    (folder / SHARD).unlink()
    said = rejected("E4002", folder, names=f"diffusion_pytorch_model{suffix}")
    assert "wanloom convert" in said


class Payload:
    """What runs when somebody unpickles it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def test_b067_a_pickle_with_code_is_not_executed(model, rejected, run, here, tmp_path):
    folder, canary = model(SMALL), tmp_path / "canary"
    for file in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        good = (folder / file).read_bytes()
        torch.save({"weight": Payload(canary)}, folder / file)
        assert "mkdir" in rejected("E4003", folder, names=file)
        ran = run("convert", folder / file, here / "out", "--to", "official")
        check_refusal(ran, "E4003")
        (folder / file).write_bytes(good)
    assert not canary.exists()


@pytest.mark.parametrize("data", [b"", b"1234567"])
def test_b068_a_file_of_no_or_seven_bytes(data, model, rejected):
    folder = model(SMALL)
    (folder / SHARD).write_bytes(data)
    assert "truncated header" in rejected("E4004", folder, names=SHARD)


@pytest.mark.parametrize("length", [2**63, 9 * 2**20])
def test_b069_a_header_too_long(length, model, rejected):
    folder = model(SMALL)
    (folder / SHARD).write_bytes(struct.pack("<Q", length) + b" " * min(length, 10 * 2**20))
    assert SHARD in rejected("E4005", folder)


@pytest.mark.parametrize("change", [-1, 1], ids=["truncated", "trailing bytes"])
def test_b070_data_that_is_too_short_or_too_long(change, model, rejected):
    folder = model(SMALL)
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-1] if change < 0 else data + b"\0")
    assert f"expected {len(data)} bytes, found {len(data) + change}" in rejected("E4006", folder, names=SHARD)


@pytest.mark.parametrize(
    ("table", "tensor"),
    [
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, "b"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 6, 10)}, "b"),
        ({"a": entry("F32", [1], -4, 0)}, "a"),
        ({"a": entry("F32", [2**62, 2**62], 0, 8)}, "a"),
        ({"a": entry("F32", [-1], 0, 4)}, "a"),
        ({"a": entry("F32", [3], 0, 8)}, "a"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "a"),
    ],
    ids=["overlap", "gap", "negative offset", "overflow", "negative shape", "wrong size", "no offsets"],
)
def test_b071_tensors_that_do_not_lie_end_to_end(table, tensor, model, rejected):
    folder = model(SMALL)
    (folder / SHARD).write_bytes(safetensors(table, bytes(16)))
    assert f"tensor {tensor}" in rejected("E4007", folder, names=SHARD)


def test_b072_a_tensor_listed_twice(model, rejected):
    folder = model(SMALL)
    one = json.dumps(entry("F32", [1], 0, 4))
    (folder / SHARD).write_bytes(safetensors(f'{{"a": {one}, "a": {one}}}'.encode(), bytes(4)))
    assert "twice" in rejected("E4008", folder, names=SHARD)


def test_b073_numbers_that_cannot_be_read(model, rejected):
    folder = model(SMALL)
    (folder / SHARD).write_bytes(safetensors({"a": entry("F6_E3M2", [4], 0, 3)}, bytes(3)))
    assert "unknown dtype" in rejected("E4009", folder, names=SHARD)
    folder = shutil.copytree(folder.parent / SMALL, folder.parent / "int8")
    shutil.copy(model(T2V) / "low_noise_model" / SHARD, folder / SHARD)

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.0.self_attn.q.weight"] = tensors["blocks.0.self_attn.q.weight"].to(torch.int8)

    edit(folder / SHARD, quantise)
    assert "int8 without a scale" in rejected("E4009", folder, names=SHARD)


def test_b076_files_that_are_no_weights(model, rejected):
    looks = {
        "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    }
    folder = model(SMALL)
    for data in looks.values():
        (folder / SHARD).write_bytes(data)
        assert "not a weight file (looks like " in rejected("E4012", folder, names=SHARD)
    part = folder / "half.part"
    part.write_bytes(b"x" * 100)
    said = rejected("E4012", folder, SMALL, "--dit", part)
    assert "unfinished download" in said


def test_b077_shards_missing_listed_twice_or_too_many(model, rejected):
    folder = model(SMALL)
    where = split(folder)
    second = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    kept = second.read_bytes()
    second.unlink()
    assert second.name in rejected("E4013", folder)
    second.write_bytes(kept)
    extra = folder / "diffusion_pytorch_model-00003-of-00003.safetensors"
    extra.write_bytes(kept)
    assert extra.name in rejected("E4013", folder)
    extra.unlink()
    write_index(folder, dict.fromkeys(where, "diffusion_pytorch_model-00001-of-00002.safetensors"))
    assert "diffusion_pytorch_model" in rejected("E4013", folder)
    first = folder / "diffusion_pytorch_model-00001-of-00002.safetensors"
    write_index(folder, where)
    edit(first, lambda tensors: tensors.update(load_file(second)))
    assert first.name in rejected("E4013", folder)


@pytest.mark.parametrize("kind", ["no JSON", "no map", "parent", "absolute", "link out"])
def test_b078_an_index_that_is_invalid_or_leads_out_of_the_folder(kind, model, rejected, tmp_path):
    folder = model(SMALL)
    where = split(folder)
    shard = "diffusion_pytorch_model-00002-of-00002.safetensors"
    bad = {"parent": "../../x.safetensors", "absolute": str(folder / shard)}
    if kind == "no JSON":
        write_index(folder, "{not json")
    elif kind == "no map":
        write_index(folder, "[]")
    elif kind == "link out":
        shutil.move(folder / shard, tmp_path / "outside.safetensors")
        (folder / shard).symlink_to(tmp_path / "outside.safetensors")
    else:
        write_index(folder, {name: bad[kind] if file == shard else file for name, file in where.items()})
    assert "diffusion_pytorch_model" in rejected("E4014", folder)


def test_b079_shards_of_two_revisions(model, rejected):
    folder = model(SMALL)
    split(folder, "first", "second")
    assert "two revisions" in rejected("E4015", folder)


@pytest.mark.parametrize(
    ("has", "asked", "said"),
    [
        (T2V, I2V, "this is t2v-A14B (16 input channels), expected i2v-A14B (36)"),
        (I2V, T2V, "this is i2v-A14B (36 input channels), expected t2v-A14B (16)"),
        (TI2V, SMALL, "this is ti2v-5B"),
        (SMALL, TI2V, "expected ti2v-5B"),
        (I2V_21, SMALL, "this is i2v-14B"),
        (SMALL, T2V, "expected t2v-A14B"),
    ],
)
def test_b080_the_model_of_another_task(has, asked, said, models, picture, rejected):
    image = ("--image", picture) if asked == I2V else ()
    assert said in rejected("E4016", models / has, asked, *image, names=asked)


def test_b081_the_vae_of_the_other_generation(models, rejected):
    assert "48 latent channels" in rejected("E4017", models / SMALL, SMALL, "--vae", models / TI2V / "Wan2.2_VAE.pth")
    assert "16 latent channels" in rejected("E4017", models / TI2V, TI2V, "--vae", models / SMALL / "Wan2.1_VAE.pth")


def test_b082_swapped_experts_are_refused_where_recorded_else_remarked(model, run, rejected):
    folder = model(T2V)
    swapped = ("--dit-high", folder / "low_noise_model", "--dit-low", folder / "high_noise_model")
    ran = run("generate", "--ckpt-dir", folder, *SHORT, "--prompt", "x", *swapped, "--dry-run")
    assert ran.code == 0
    assert "warning[W4018]: " in ran.err
    for name in ("high_noise_model", "low_noise_model"):
        edit(folder / name / SHARD, lambda tensors: None, **{"wanloom.expert": name})
    assert "Swap --dit-high and --dit-low" in rejected("E4018", folder, T2V, *swapped)


def test_b083_only_one_of_two_experts(model, rejected):
    folder = model(T2V)
    shutil.rmtree(folder / "low_noise_model")
    assert "the expert low_noise_model is missing" in rejected("E4019", folder, T2V)


def test_b084_another_text_encoder(model, rejected):
    folder = model(SMALL)
    file = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    weights = torch.load(file, weights_only=True)
    kept = dict(weights)
    positions = [name for name in weights if "pos_embedding" in name and not name.startswith("blocks.0.")]
    torch.save({name: value for name, value in weights.items() if name not in positions}, file)
    assert "this is a T5 encoder" in rejected("E4020", folder)
    kept["token_embedding.weight"] = torch.zeros(2000, kept["token_embedding.weight"].shape[1])
    torch.save(kept, file)
    assert "do not belong together" in rejected("E4020", folder)


def write_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    "text",
    ['{"dim": "64"}', '{"eps": 1e999}', '{"dim": 64, "dim": 64}', '{"a":' * 40 + "1" + "}" * 40, '{"eps": NaN}', "[]"],
    ids=["wrong type", "infinite", "twice", "deep", "not a number", "no object"],
)
def test_b085_a_config_that_is_wrong(text, model, rejected):
    folder = model(SMALL)
    write_config(folder, text)
    assert "config.json" in rejected("E4021", folder)


def test_b085_an_unknown_key_is_a_warning(model, run):
    folder = model(SMALL)
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, json.dumps({**config, "colour_of_the_sky": "blue"}))
    ran = run("generate", "--task", SMALL, "--ckpt-dir", folder, *SHORT, "--prompt", "x", "--dry-run")
    assert ran.code == 0
    assert ran.err.count("colour_of_the_sky") == 1
    assert "warning[W4021]" in ran.err


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code", "_attn_implementation_internal"])
def test_b086_a_config_that_names_code(key, model, rejected):
    folder = model(SMALL)
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, json.dumps({**config, key: {"AutoModel": "evil.Model"}}))
    assert key in rejected("E4022", folder, names="config.json")


@pytest.mark.parametrize("change", [{"num_layers": 10**9}, {"dim": 0}, {"num_heads": 7}])
def test_b087_sizes_that_no_model_has(change, model, rejected):
    folder = model(SMALL)
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, json.dumps(config | change))
    assert "config.json" in rejected("E4023", folder)


def test_b094_python_files_in_a_model_folder_are_never_run(model, here):
    folder = model(SMALL)
    for name in ("setup.py", "modeling_wan.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(f"import os; os.mkdir({str(here / 'canary')!r})\n")
    hook = (
        "import sys; seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event in ('import', 'exec') else None)\n"
        "from wanloom.cli import main\n"
        f"code = main({['generate', '--task', SMALL, '--ckpt-dir', str(folder), *SHORT, '--prompt=x', '--dry-run']})\n"
        f"print([name for name in seen if {str(folder)!r} in name or 'modeling_wan' in name], file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    ran = run_process(here, "-c", hook, program=())
    assert ran.code == 0
    assert ran.err.splitlines()[-1] == "[]"
    assert not (here / "canary").exists()


@pytest.mark.parametrize("kind", ["damaged", "no vocabulary", "too large"])
def test_b095_a_tokenizer_that_is_damaged_or_huge(kind, model, rejected):
    folder = model(SMALL)
    file = folder / "google" / "umt5-xxl" / "tokenizer.json"
    if kind == "too large":
        with file.open("r+b") as handle:
            handle.truncate(10**9)
    else:
        file.write_text("{" if kind == "damaged" else '{"model": {}}')
    assert "tokenizer.json" in rejected("E4030", folder)
