"""The files of s2v: the transformer's parts told from shapes, and wav2vec2 under its old names and its new ones."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from wanloom.checkpoint.detect import config_of
from wanloom.checkpoint.find import resolve
from wanloom.checkpoint.load import load_into, survey
from wanloom.checkpoint.shapes import audio_shapes, dit_shapes
from wanloom.checkpoint.weights import open_weights
from wanloom.encoders import build_wav2vec2, encode_audio
from wanloom.errors import InputError
from wanloom.models.config import AudioConfig, DiTConfig, SpeechConfig
from wanloom.parts import Parts
from wanloom.variants import VARIANTS
from weight_files import SMALL_DIT, hollow, values_for, zip_with_pickle

SMALL = AudioConfig(
    dim=32, ffn_dim=48, heads=2, layers=3, conv_dim=(16,) * 7, conv_kernel=(10, 3, 3, 3, 3, 2, 2), positions=8, groups=4
)
HALVES = {"original0": "weight_g", "original1": "weight_v"}


def config_json(folder: Path, config: AudioConfig, **more: object) -> None:
    said = {"num_attention_heads": config.heads, "do_stable_layer_norm": True, "feat_extract_norm": "layer", **more}
    (folder / "config.json").write_text(json.dumps(said))


def published(name: str) -> str:
    """As the file of 2021 calls a tensor."""
    half = name.rpartition(".")[2]
    place = "encoder.pos_conv_embed.conv."
    return "wav2vec2." + (place + HALVES[half] if half in HALVES else name)


@pytest.mark.parametrize("old", [False, True])
def test_wav2vec2_is_read_under_both_names(tmp_path: Path, old: bool) -> None:
    values = values_for(audio_shapes(SMALL))
    file = {(published(name) if old else f"wav2vec2.{name}"): value for name, value in values.items()}
    extra = {"lm_head.weight": torch.zeros(33, 32), "lm_head.bias": torch.zeros(33)}
    save_file({**file, **extra, "wav2vec2.masked_spec_embed": torch.zeros(32)}, tmp_path / "model.safetensors")
    config_json(tmp_path, SMALL)
    weights = open_weights(tmp_path, kind="audio")
    assert config_of(weights) == SMALL
    with torch.device("meta"):
        model = build_wav2vec2(SMALL)
    load_into(model, weights)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in values.items())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_hidden_states_are_those_of_the_model_on_a_normalised_wave() -> None:
    from transformers import Wav2Vec2FeatureExtractor

    torch.manual_seed(0)
    model = build_wav2vec2(SMALL)
    wave = 0.3 + 0.1 * torch.randn(16_000)
    given = Wav2Vec2FeatureExtractor(do_normalize=True)(wave.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        want = model(given.input_values, output_hidden_states=True)
    states = encode_audio(model, wave)
    assert states.shape == (SMALL.layers + 1, 49, SMALL.dim)
    torch.testing.assert_close(states[-1], want.last_hidden_state[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[1], want.hidden_states[1][0], rtol=1e-5, atol=1e-5)
    plain = encode_audio(model, wave, last_normed=False)
    assert torch.equal(plain[:-1], states[:-1])
    with torch.no_grad():
        assert torch.equal(model.encoder.layer_norm(plain[-1]), states[-1])


@pytest.mark.parametrize(("key", "value"), [("do_stable_layer_norm", False), ("feat_extract_norm", "group")])
def test_another_kind_of_wav2vec2_is_refused(tmp_path: Path, key: str, value: object) -> None:
    hollow(tmp_path / "model.safetensors", audio_shapes(SMALL))
    config_json(tmp_path, SMALL, **{key: value})
    with pytest.raises(InputError, match=key) as error:
        config_of(open_weights(tmp_path))
    assert error.value.code == "E4021"


def test_another_model_in_the_place_of_wav2vec2_is_named(tmp_path: Path) -> None:
    from wanloom.checkpoint.shapes import clip_shapes
    from weight_files import SMALL_CLIP

    hollow(tmp_path / "model.safetensors", clip_shapes(SMALL_CLIP))
    with pytest.raises(InputError, match="CLIP image encoder, expected a wav2vec2"):
        open_weights(tmp_path, kind="audio")


def test_the_published_sizes_are_the_defaults() -> None:
    count = sum(torch.Size(shape).numel() for shape in audio_shapes(AudioConfig()).values())
    assert count == 315_437_696  # of 315,438,720 with the embedding for masked frames, which training alone uses


def test_converting_wav2vec2_is_refused_with_a_reason(tmp_path: Path) -> None:
    from wanloom.checkpoint.convert import convert

    hollow(tmp_path / "model.safetensors", audio_shapes(SMALL))
    config_json(tmp_path, SMALL)
    with pytest.raises(InputError, match="this is a wav2vec2 audio encoder, which diffusers"):
        convert(tmp_path / "model.safetensors", tmp_path / "out", to="diffusers")
    assert not (tmp_path / "out").exists()


def test_strides_must_be_as_many_as_convolutions(tmp_path: Path) -> None:
    hollow(tmp_path / "model.safetensors", audio_shapes(SMALL))
    config_json(tmp_path, SMALL, conv_stride=[5, 2])
    with pytest.raises(InputError, match="conv_stride has 2"):
        config_of(open_weights(tmp_path))


def test_sizes_are_told_from_shapes_and_where_it_hears_from_config_json(tmp_path: Path) -> None:
    sizes = replace(SMALL_DIT, layers=3, speech=SpeechConfig(audio_dim=4, audio_states=2, layers=(0, 2)))
    hollow(tmp_path / "model.safetensors", dit_shapes(sizes))
    said = {"num_heads": sizes.heads, "text_len": sizes.text_len, "audio_inject_layers": [0, 2], "enable_adain": True}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert config_of(open_weights(tmp_path)) == sizes
    for layers in ([0], [0, 3], [2, 2]):
        (tmp_path / "config.json").write_text(json.dumps({**said, "audio_inject_layers": layers}))
        with pytest.raises(InputError, match="2 of 3 blocks hear"):
            config_of(open_weights(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**said, "enable_adain": False}))
    with pytest.raises(InputError, match="enable_adain"):
        config_of(open_weights(tmp_path))


# ---------------------------------------------------------------- the directory


S2V = VARIANTS["s2v-14B"]
HOME = "wav2vec2-large-xlsr-53-english"


def test_the_golden_s2v_is_surveyed(golden_models: Path) -> None:
    root = golden_models / "Wan2.2-S2V-14B"
    files = resolve(S2V, ckpt_dir=root)
    assert (files.experts, files.audio, files.clip) == ({"model": root}, root / HOME, None)
    found = survey(S2V, files)
    assert found.dit == DiTConfig(
        dim=256, ffn_dim=320, heads=2, layers=3, text_dim=48, speech=SpeechConfig(audio_dim=32, layers=(0, 2))
    )
    assert found.audio == AudioConfig(
        dim=32, ffn_dim=64, heads=2, layers=24, conv_dim=(32,) * 7, positions=16, groups=4
    )


@pytest.fixture
def root(models: Path, tmp_path: Path) -> Path:
    """The small s2v, to be changed."""
    return Path(shutil.copytree(models / "s2v-14B", tmp_path / "s2v"))


def test_a_missing_audio_encoder_is_named_with_file_size_and_repository(root: Path) -> None:
    (root / HOME / "model.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        resolve(S2V, ckpt_dir=root)
    assert caught.value.code == "E4001"
    words = (f"{HOME}/model.safetensors (1.3 GB)", "the audio encoder", "Wan-AI/Wan2.2-S2V-14B", "--audio-encoder")
    assert all(word in caught.value.message for word in words)


@pytest.mark.parametrize("named", [False, True])
def test_the_audio_encoder_may_be_a_pickle(root: Path, named: bool) -> None:
    file = root / HOME / "model.safetensors"
    values = load_file(file)
    file.unlink()
    pickled = file.with_name("pytorch_model.bin")
    torch.save(values, pickled)
    files = resolve(S2V, ckpt_dir=root, audio_encoder=pickled if named else None)
    variant = survey(S2V, files)
    assert files.audio == (pickled if named else root / HOME)
    assert variant.audio is not None and variant.audio.heads == 2
    with Parts(variant, files).use("audio") as model:
        assert all(torch.equal(value, values[f"wav2vec2.{name}"]) for name, value in model.state_dict().items())


def test_a_pickled_audio_encoder_with_code_is_refused(root: Path) -> None:
    (root / HOME / "model.safetensors").unlink()
    zip_with_pickle(root / HOME / "pytorch_model.bin", pickle.dumps({"x": print}))
    with pytest.raises(InputError, match="print") as caught:
        survey(S2V, resolve(S2V, ckpt_dir=root))
    assert caught.value.code == "E4003"


def test_a_pickled_transformer_stays_refused(root: Path) -> None:
    torch.save({"x": torch.zeros(1)}, root / "diffusion_pytorch_model.bin")
    (root / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        survey(S2V, resolve(S2V, ckpt_dir=root))
    assert caught.value.code == "E4002"


def test_an_audio_encoder_that_the_transformer_cannot_hear_is_refused(root: Path, tmp_path: Path) -> None:
    other = replace(tiny.AUDIO, layers=3)
    folder = tmp_path / "other"
    hollow(folder / "model.safetensors", {f"wav2vec2.{name}": shape for name, shape in audio_shapes(other).items()})
    config_json(folder, other)
    with pytest.raises(InputError, match="4 states of width 32, the transformer hears 3 of width 32") as caught:
        survey(S2V, resolve(S2V, ckpt_dir=root, audio_encoder=folder))
    assert caught.value.code == "E4016"


@pytest.mark.parametrize(("name", "given"), [("t2v-1.3B", "audio_encoder"), ("s2v-14B", "clip"), ("ti2v-5B", "clip")])
def test_a_part_the_model_has_no_use_for_is_refused(models: Path, name: str, given: str) -> None:
    with pytest.raises(InputError, match=f"{name} has no use for") as caught:
        resolve(VARIANTS[name], ckpt_dir=models / name, **{given: models / name})
    assert caught.value.code == "E2022"


@pytest.mark.parametrize("task", ["t2v-14B", "animate-14B", "i2v-14B"])
def test_the_directory_of_s2v_for_another_task_is_named(models: Path, task: str) -> None:
    with pytest.raises(InputError, match=f"this is s2v-14B .*expected {task}") as caught:
        survey(VARIANTS[task], resolve(VARIANTS[task], ckpt_dir=models / "s2v-14B"))
    assert caught.value.code == "E4016"


@pytest.mark.parametrize("task", ["s2v-14B", "animate-14B"])
@pytest.mark.parametrize("name", ["i2v-14B", "t2v-A14B", "ti2v-5B"])
def test_the_directory_of_another_model_is_named(models: Path, name: str, task: str) -> None:
    with pytest.raises(InputError, match=f"this is .*{name}.* expected {task}") as caught:
        survey(VARIANTS[task], resolve(VARIANTS[task], ckpt_dir=models / name))
    assert caught.value.code == "E4016"
