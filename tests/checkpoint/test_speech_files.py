"""The files of s2v: the transformer's parts told from shapes, and wav2vec2 under its old names and its new ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanloom.checkpoint.detect import config_of
from wanloom.checkpoint.load import load_into
from wanloom.checkpoint.shapes import audio_shapes, dit_shapes
from wanloom.checkpoint.weights import open_weights
from wanloom.encoders import build_wav2vec2, encode_audio
from wanloom.errors import InputError
from wanloom.models.config import AudioConfig
from weight_files import hollow, values_for

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
    with pytest.raises(InputError, match="one layout only"):
        convert(tmp_path / "model.safetensors", tmp_path / "out", to="diffusers")


def test_strides_must_be_as_many_as_convolutions(tmp_path: Path) -> None:
    hollow(tmp_path / "model.safetensors", audio_shapes(SMALL))
    config_json(tmp_path, SMALL, conv_stride=[5, 2])
    with pytest.raises(InputError, match="conv_stride has 2"):
        config_of(open_weights(tmp_path))


def test_a_transformer_of_s2v_is_named_as_what_this_version_does_not_run(tmp_path: Path) -> None:
    from wanloom.models.config import SpeechConfig
    from weight_files import SMALL_DIT

    sizes = replace(SMALL_DIT, speech=SpeechConfig(audio_dim=4, audio_states=2, layers=(0,)))
    hollow(tmp_path / "model.safetensors", dit_shapes(sizes))
    with pytest.raises(InputError, match="s2v-14B"):
        config_of(open_weights(tmp_path))


def test_its_sizes_are_told_from_shapes_and_where_it_hears_from_config_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the refusal above stands in front of."""
    from wanloom.checkpoint.detect import FOREIGN_MODELS
    from wanloom.models.config import SpeechConfig
    from weight_files import SMALL_DIT

    for sign in ("casual_audio_encoder.", "audio_injector."):
        monkeypatch.delitem(FOREIGN_MODELS, sign)
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
