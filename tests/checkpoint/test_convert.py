"""`convert` and `save_official`: the same bits in every layout, files complete or absent, no code run (B067)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from wanloom.checkpoint import manifest
from wanloom.checkpoint.convert import convert, save_official
from wanloom.checkpoint.find import contents, resolve
from wanloom.checkpoint.layouts import LAYOUTS
from wanloom.checkpoint.load import load_into, read_source, survey, survey_dit
from wanloom.checkpoint.shapes import dit_shapes, text_shapes, vae_shapes
from wanloom.checkpoint.weights import open_weights
from wanloom.encoders import build_clip, build_umt5, build_wav2vec2
from wanloom.errors import InputError
from wanloom.models.adapters import build_dit
from wanloom.models.dit import DiT
from wanloom.models.vae import CausalVae
from wanloom.parts import BUILD
from wanloom.variants import VARIANTS
from weight_files import SMALL_DIT, SMALL_TEXT, SMALL_VAE, saved_zip, values_for, zip_with_pickle


def tensors_of(root: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory under its official name."""
    found = contents(root)
    places = {**found.experts, "vae": found.vae, "text": found.text, "clip": found.clip, "audio": found.audio}
    return {
        f"{part}: {name}": read_source(source)
        for part, place in places.items()
        if place is not None
        for name, source in open_weights(place).tensors.items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def refused(code: str, *arguments: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        convert(*arguments, **options)  # type: ignore[arg-type]
    assert caught.value.code == code, caught.value
    return caught.value.message


ADAPTED = ("s2v-14B", "animate-14B")  # with parts that diffusers' layout has no place for
WAYS = [(name, to) for name in tiny.TINY for to in LAYOUTS if name not in ADAPTED or to != "diffusers"]


@pytest.mark.parametrize(("name", "to"), WAYS)
def test_there_and_back_gives_the_same_bits_and_sizes(models: Path, tmp_path: Path, name: str, to: str) -> None:
    there = convert(models / name, tmp_path / "there", to=to).path
    back = convert(there, tmp_path / "back", to="official").path
    expected = tensors_of(models / name)
    assert same(tensors_of(there), expected)
    assert same(tensors_of(back), expected)
    row = VARIANTS[name]
    surveys = [survey(row, resolve(row, ckpt_dir=root)) for root in (there, back)]
    assert surveys[0] == surveys[1]
    assert surveys[0].dit == tiny.TINY[name].dit
    assert surveys[0].audio == tiny.TINY[name].audio


@pytest.mark.parametrize("name", ADAPTED)
def test_what_diffusers_has_no_place_for_is_refused_before_anything_is_written(
    models: Path, tmp_path: Path, name: str
) -> None:
    assert f"this is {name}, which" in refused("E4016", models / name, tmp_path / "out", to="diffusers")
    assert not (tmp_path / "out").exists()


def test_the_keys_of_a_published_s2v_come_back(golden_models: Path, tmp_path: Path) -> None:
    root = golden_models / "Wan2.2-S2V-14B"
    back = convert(root, tmp_path / "out").path
    assert same(tensors_of(back), tensors_of(root))
    said, told = (json.loads((folder / "config.json").read_text()) for folder in (root, back))
    assert told.pop("text_dim") == 48, "left out where it is the published one"
    assert {**told, "_diffusers_version": said["_diffusers_version"]} == said


@pytest.mark.parametrize("to", ["diffusers", "comfy"])
def test_the_golden_checkpoint_comes_back_bit_equal(golden_models: Path, tmp_path: Path, to: str) -> None:
    there = convert(golden_models / "Wan2.2-T2V-A14B", tmp_path / "there", to=to).path
    back = convert(there, tmp_path / "back").path
    assert same(tensors_of(back), tensors_of(golden_models / "Wan2.2-T2V-A14B"))


def test_the_same_source_gives_the_same_bytes(models: Path, tmp_path: Path) -> None:
    first = convert(models / "t2v-A14B", tmp_path / "first", to="diffusers")
    second = convert(models / "t2v-A14B", tmp_path / "second", to="diffusers")
    assert manifest.read(first.files[-1]) == manifest.read(second.files[-1])


def test_every_file_is_in_the_manifest_and_nothing_else_is_left(models: Path, tmp_path: Path) -> None:
    written = convert(models / "i2v-14B", tmp_path / "out", to="diffusers")
    on_disk = {path for path in written.path.rglob("*") if path.is_file()}
    assert on_disk == set(written.files)
    listed = {written.path / name for name in manifest.read(written.path / manifest.NAME)}
    assert listed == on_disk - {written.path / manifest.NAME}
    manifest.verify(listed)


@pytest.mark.parametrize("to", ["official", "diffusers"])
def test_a_large_transformer_becomes_shards_that_the_library_reads(models: Path, tmp_path: Path, to: str) -> None:
    root = convert(models / "ti2v-5B", tmp_path / "out", to=to, shard=100_000).path
    folder = contents(root).experts["model"]
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    loaded: dict[str, Tensor] = {}
    for file in files:
        assert (folder / file).stat().st_size < 250_000
        loaded |= load_file(folder / file)
    assert loaded.keys() == index["weight_map"].keys()
    assert same(tensors_of(root), tensors_of(models / "ti2v-5B"))


@pytest.mark.parametrize(
    ("word", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_a_number_format_may_be_asked_for(models: Path, tmp_path: Path, word: str, dtype: torch.dtype) -> None:
    root = convert(models / "t2v-1.3B", tmp_path / "out", to="diffusers", dtype=word).path
    expected = {name: value.to(dtype) for name, value in tensors_of(models / "t2v-1.3B").items()}
    assert same(tensors_of(root), expected)


def test_scaled_fp8_becomes_bfloat16_unless_asked_otherwise(tmp_path: Path) -> None:
    values = values_for(dit_shapes(SMALL_DIT))
    name = "blocks.0.ffn.0.weight"
    stored = values | {
        name: (values[name] * 2).to(torch.float8_e4m3fn),
        "blocks.0.ffn.0.scale_weight": torch.tensor(0.5),
    }
    source = tmp_path / "src"
    source.mkdir()
    save_file(stored, source / "model.safetensors")
    (source / "config.json").write_text('{"num_heads": 2, "text_len": 7}')
    for word, dtype in ((None, torch.bfloat16), ("fp32", torch.float32)):
        root = convert(source, tmp_path / f"out {word}", dtype=word).path
        found = tensors_of(root)[f"model: {name}"]
        assert torch.equal(found, (stored[name].float() * 0.5).to(dtype))
        assert found.dtype == dtype


def test_one_file_is_converted_alone(models: Path, tmp_path: Path) -> None:
    written = convert(models / "t2v-1.3B" / "Wan2.1_VAE.pth", tmp_path / "vae")
    assert [path.name for path in written.files] == ["Wan2.1_VAE.safetensors", manifest.NAME]
    written = convert(models / "t2v-A14B" / "low_noise_model", tmp_path / "low", to="comfy")
    assert (
        written.files[0].relative_to(written.path).as_posix()
        == "split_files/diffusion_models/low_noise_model.safetensors"
    )


def test_a_pickled_transformer_becomes_safetensors(tmp_path: Path) -> None:
    values = values_for(dit_shapes(VARIANTS["demo-t2v"].dit))
    (tmp_path / "wan.ckpt").write_bytes(saved_zip({"state_dict": values, "epoch": 3}))
    root = convert(tmp_path / "wan.ckpt", tmp_path / "out").path
    assert same(tensors_of(root), {f"model: {name}": value for name, value in values.items()})


def test_b067_a_pickle_with_code_is_refused_and_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Runs:
        def __reduce__(self) -> tuple[object, ...]:
            return exec, (f"open({str(canary)!r}, 'w')",)

    bad = zip_with_pickle(tmp_path / "bad.pth", pickle.dumps({"x": Runs()}))
    assert "exec" in refused("E4003", bad, tmp_path / "out")
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_b074_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    values = values_for(vae_shapes(SMALL_VAE))
    values["conv1.bias"][3] = float("nan")
    save_file(values, tmp_path / "vae.safetensors")
    assert "conv1.bias" in refused("E4010", tmp_path / "vae.safetensors", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_b075_a_damaged_source_is_refused(models: Path, tmp_path: Path) -> None:
    root = convert(models / "t2v-1.3B", tmp_path / "first").path
    file = root / "diffusion_pytorch_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert file.name in refused("E4011", root, tmp_path / "second")


def test_the_experts_are_recorded_and_kept_in_every_layout(models: Path, tmp_path: Path) -> None:
    there = convert(models / "t2v-A14B", tmp_path / "there", to="comfy").path
    back = convert(there, tmp_path / "back").path
    for root in (there, back):
        for expert, place in contents(root).experts.items():
            assert open_weights(place).metadata["wanloom.expert"] == expert


def test_what_shapes_do_not_tell_travels_in_the_file(tmp_path: Path) -> None:
    state = values_for(dit_shapes(SMALL_DIT))
    root = save_official(tmp_path / "out", dits={"model": (state, SMALL_DIT)}).path
    alone = (root / "diffusion_pytorch_model.safetensors").rename(tmp_path / "alone.safetensors")
    assert survey_dit(alone)[1] == SMALL_DIT


def test_a_hostile_header_note_is_refused_like_a_hostile_config(tmp_path: Path) -> None:
    save_file(
        values_for(dit_shapes(SMALL_DIT)), tmp_path / "w.safetensors", metadata={"wanloom.config": '{"num_heads": 0}'}
    )
    with pytest.raises(InputError) as caught:
        survey_dit(tmp_path / "w.safetensors")
    assert caught.value.code == "E4023"


def test_diffusers_gets_its_own_description(models: Path, tmp_path: Path) -> None:
    expected = {
        "t2v-A14B": ("WanPipeline", 0.875, False, 12.0),
        "i2v-A14B": ("WanImageToVideoPipeline", 0.9, False, 5.0),
        "ti2v-5B": ("WanPipeline", None, True, 5.0),
        "flf2v-14B": ("WanImageToVideoPipeline", None, False, 16.0),
    }
    for name, (pipeline, boundary, expand, shift) in expected.items():
        root = convert(models / name, tmp_path / name, to="diffusers").path
        index = json.loads((root / "model_index.json").read_text())
        assert (index["_class_name"], index["boundary_ratio"], index["expand_timesteps"]) == (
            pipeline,
            boundary,
            expand,
        )
        assert (root / "transformer_2").is_dir() == (index["transformer_2"][0] is not None)
        scheduler = json.loads((root / "scheduler" / "scheduler_config.json").read_text())
        assert scheduler["flow_shift"] == shift


def test_comfyui_gets_the_tokenizer_in_its_text_encoder(tmp_path: Path) -> None:
    root = tiny.checkpoint(tmp_path, "t2v-1.3B")
    (root / "google" / "umt5-xxl" / "spiece.model").write_bytes(b"the pieces")
    there = convert(root, tmp_path / "there", to="comfy").path
    with safe_open(there / "split_files" / "text_encoders" / "umt5_xxl.safetensors", "pt") as file:
        assert bytes(file.get_tensor("spiece_model").numpy()) == b"the pieces"
    back = convert(there, tmp_path / "back").path
    assert (back / "google" / "umt5-xxl" / "spiece.model").read_bytes() == b"the pieces"


def test_places_that_would_be_overwritten_are_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    source = models / "t2v-1.3B"
    refused("E5002", source, tmp_path / "full")
    convert(source, tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "x").read_text() == "mine"
    refused("E5001", source, tmp_path / "full" / "x")
    refused("E4001", tmp_path / "none", tmp_path / "out")
    assert "diffusers" in refused("E2022", source, tmp_path / "out", to="difusers")
    assert "bf16" in refused("E2028", source, tmp_path / "out", dtype="int3")


def test_a_trained_model_is_written_and_read_back(tmp_path: Path) -> None:
    row = tiny.TINY["t2v-A14B"]
    torch.manual_seed(0)
    dits = {name: DiT(row.dit) for name in row.expert_names}
    vae, text = CausalVae(row.vae), build_umt5(row.text)
    tiny.write_tokenizer(tmp_path / "tokenizer")
    root = save_official(
        tmp_path / "out",
        dits={name: (dit.state_dict(), row.dit) for name, dit in dits.items()},
        vae=vae.state_dict(),
        vae_config=row.vae,
        text=text.state_dict(),
        tokenizer_dir=tmp_path / "tokenizer",
        dtype=torch.bfloat16,
    ).path
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert names == {
        *(f"{name}/{file}" for name in dits for file in ("config.json", "diffusion_pytorch_model.safetensors")),
        "Wan2.1_VAE.safetensors",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        "google/umt5-xxl/tokenizer.json",
        "wanloom.sha256.json",
    }
    config = json.loads((root / "high_noise_model" / "config.json").read_text())
    assert (config["num_heads"], config["text_len"], config["model_type"]) == (2, 512, "t2v")
    variant = VARIANTS["t2v-A14B"]
    files = resolve(variant, ckpt_dir=root)
    found = survey(variant, files)
    assert (found.dit, found.vae, found.text) == (row.dit, row.vae, row.text)
    with torch.device("meta"):
        loaded = {name: DiT(found.dit) for name in files.experts}
        encoder = build_umt5(found.text)
    load_into(encoder, files.text)
    assert all(torch.equal(v, text.state_dict()[n].bfloat16()) for n, v in encoder.state_dict().items())
    for name, dit in loaded.items():
        load_into(dit, files.experts[name])
        expected = dits[name].state_dict()
        assert all(torch.equal(value, expected[key].bfloat16()) for key, value in dit.state_dict().items())


def test_a_state_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    state = values_for(dit_shapes(SMALL_DIT))
    for change, code in (({"extra": torch.ones(1)}, "E4013"), ({"head.modulation": torch.ones(1, 2, 13)}, "E4007")):
        with pytest.raises(InputError) as caught:
            save_official(tmp_path / code, dits={"model": ({**state, **change}, SMALL_DIT)})
        assert caught.value.code == code
    with pytest.raises(InputError):
        save_official(tmp_path / "out", dits={}, text=values_for(text_shapes(SMALL_TEXT)), vae={"x": torch.ones(1)})


@pytest.mark.parametrize("name", ["demo-s2v", "demo-animate"])
def test_a_trained_model_with_its_encoders_is_written_and_read_back(tmp_path: Path, name: str) -> None:
    row = VARIANTS[name]
    torch.manual_seed(0)
    text, vae, dit = build_umt5(row.text), CausalVae(row.vae), build_dit(row.dit)
    clip = None if row.clip is None else build_clip(row.clip)
    audio = None if row.audio is None else build_wav2vec2(row.audio)
    vocabulary = {**{f"w{i}": i for i in range(row.text.vocab)}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}}))
    root = save_official(
        tmp_path / "out",
        dits={"model": (dit.state_dict(), row.dit)},
        vae=vae.state_dict(),
        vae_config=row.vae,
        text=text.state_dict(),
        clip=None if clip is None else (clip.state_dict(), row.clip),
        audio=None if audio is None else (audio.state_dict(), row.audio),
        tokenizer_dir=tmp_path,
    ).path
    published = {
        "demo-s2v": {f"wav2vec2-large-xlsr-53-english/{file}" for file in ("model.safetensors", "config.json")},
        "demo-animate": {"models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"},
    }
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert names == published[name] | {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "Wan2.1_VAE.safetensors",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        "google/umt5-xxl/tokenizer.json",
        "wanloom.sha256.json",
    }
    official = VARIANTS[row.task]
    files = resolve(official, ckpt_dir=root)
    found = survey(official, files)
    assert (found.dit, found.vae, found.text) == (row.dit, row.vae, row.text)
    assert (found.clip, found.audio) == (row.clip, row.audio)
    for part, module in (("dit", dit), ("clip", clip), ("audio", audio)):
        if module is None:
            continue
        with torch.device("meta"):
            loaded = BUILD[part](found)
        path = files.experts["model"] if part == "dit" else getattr(files, part)
        load_into(loaded, open_weights(path, kind=part))
        state = loaded.state_dict()
        assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())


def test_transformers_reads_the_audio_encoder_that_is_written(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Model

    config = tiny.AUDIO
    torch.manual_seed(0)
    model = build_wav2vec2(config)
    root = save_official(tmp_path / "out", dits={}, audio=(model.state_dict(), config)).path
    theirs = Wav2Vec2Model.from_pretrained(root / "wav2vec2-large-xlsr-53-english").state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(theirs[name], value) for name, value in model.state_dict().items())
