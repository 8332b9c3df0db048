"""Sizes from shapes and config.json, and which model that is: B080, B081, B084 to B087."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from wanloom.checkpoint.detect import (
    Config,
    candidates,
    check_audio,
    check_clip,
    check_dit,
    check_text,
    check_vae,
    config_of,
    expert_hint,
)
from wanloom.checkpoint.shapes import audio_shapes, clip_shapes, dit_shapes, text_shapes, vae_shapes
from wanloom.checkpoint.weights import open_weights
from wanloom.errors import InputError, WanloomWarning
from wanloom.models.config import (
    VAE_21,
    VAE_22,
    AnimateConfig,
    AudioConfig,
    ClipConfig,
    DiTConfig,
    SpeechConfig,
    TextConfig,
    VaeConfig,
)
from wanloom.variants import VARIANTS
from weight_files import SMALL_CLIP, SMALL_DIT, SMALL_TEXT, SMALL_VAE, hollow

RELEASED = {name: row for name, row in VARIANTS.items() if not row.demo}
SHAPES: dict[type, Callable[[Any], dict[str, tuple[int, ...]]]] = {
    DiTConfig: dit_shapes,
    VaeConfig: vae_shapes,
    TextConfig: text_shapes,
    ClipConfig: clip_shapes,
    AudioConfig: audio_shapes,
}


def told(folder: Path, config: Config, document: object = None) -> Config:
    """What is told of a file with the tensors of `config`."""
    hollow(folder / "model.safetensors", SHAPES[type(config)](config))
    if document is not None:
        text = document if isinstance(document, str) else json.dumps(document)
        (folder / "config.json").write_text(text)
    return config_of(open_weights(folder))


def refused(code: str, call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert caught.value.code == code, caught.value
    return caught.value.message


# ---------------------------------------------------------------- sizes


CONFIGS: dict[str, Config] = {
    **{f"dit {name}": row.dit for name, row in RELEASED.items()},
    **{f"vae {name}": row.vae for name, row in VARIANTS.items()},
    **{f"tiny {name}": row.vae for name, row in tiny.TINY.items()},
    "text": TextConfig(),
    "clip": ClipConfig(),
    "audio": AudioConfig(),
    "small vae": SMALL_VAE,
    "small text": SMALL_TEXT,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_come_from_shapes_alone(tmp_path: Path, name: str) -> None:
    assert told(tmp_path, CONFIGS[name]) == CONFIGS[name]


def test_what_shapes_do_not_tell_comes_from_config_json(tmp_path: Path) -> None:
    given = {"num_heads": 2, "text_len": 7, "eps": 1e-6}
    assert told(tmp_path, SMALL_DIT, given) == SMALL_DIT
    config = replace(SMALL_CLIP, eps=1e-4)
    assert told(tmp_path / "clip", config, {"num_attention_heads": 2, "layer_norm_eps": 1e-4}) == config


@pytest.mark.parametrize(
    "gone", ["patch_embedding.weight", "head.head.weight", "blocks.0.ffn.0.weight", "blocks.0.norm3.bias"]
)
def test_a_missing_tensor_is_named(tmp_path: Path, gone: str) -> None:
    shapes = dit_shapes(VARIANTS["demo-t2v"].dit)
    del shapes[gone]
    hollow(tmp_path / "model.safetensors", shapes)
    with pytest.raises(InputError) as caught:
        config_of(open_weights(tmp_path))
    assert caught.value.code in ("E4013", "E4016")
    assert gone in caught.value.message or caught.value.code == "E4016"


def test_a_tensor_too_many_or_of_another_shape_is_named(tmp_path: Path) -> None:
    shapes = vae_shapes(SMALL_VAE)
    hollow(tmp_path / "a" / "model.safetensors", shapes | {"decoder.extra": (3,)})
    assert "decoder.extra" in refused("E4013", config_of, open_weights(tmp_path / "a"))
    hollow(tmp_path / "b" / "model.safetensors", shapes | {"decoder.head.2.bias": (5,)})
    assert "decoder.head.2.bias" in refused("E4007", config_of, open_weights(tmp_path / "b"))


def test_a_layer_left_out_of_the_middle_is_noticed(tmp_path: Path) -> None:
    shapes = dit_shapes(replace(SMALL_DIT, layers=4))
    kept = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.2.")}
    hollow(tmp_path / "model.safetensors", kept)
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    assert "blocks.3" in refused("E4013", config_of, open_weights(tmp_path))


FOREIGN = {
    "MultiTalk": "audio_proj.proj1.weight",
    "VACE": "vace_blocks.0.modulation",
    "camera": "control_adapter.conv.weight",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_other_members_of_the_family_are_named(tmp_path: Path, what: str) -> None:
    shapes = dit_shapes(VARIANTS["demo-t2v"].dit) | {FOREIGN[what]: (1,)}
    hollow(tmp_path / "model.safetensors", shapes)
    assert what in refused("E4016", config_of, open_weights(tmp_path))


# A transformer with a single tensor of another's parts is neither.
ALONE = (
    "casual_audio_encoder.weights",
    "audio_injector.injector.0.q.weight",
    "face_adapter.fuser_blocks.0.q_norm.weight",
    "pose_patch_embedding.weight",
)


@pytest.mark.parametrize("name", ALONE)
def test_half_of_an_adapter_is_refused(tmp_path: Path, name: str) -> None:
    hollow(tmp_path / "model.safetensors", dit_shapes(VARIANTS["t2v-1.3B"].dit) | {name: (1, 1)})
    assert "a tensor that tells its sizes is missing" in refused("E4013", config_of, open_weights(tmp_path))


@pytest.mark.parametrize("name", ["s2v-14B", "animate-14B", "demo-s2v", "demo-animate"])
def test_one_tensor_less_of_an_adapter_is_refused(tmp_path: Path, name: str) -> None:
    from wanloom.checkpoint.layouts import official_config

    row = replace(VARIANTS[name].dit, layers=min(VARIANTS[name].dit.layers, 40))
    whole = dit_shapes(row)
    own = [key for key in whole if key not in dit_shapes(replace(row, speech=None, animate=None))]
    document = official_config(row)
    assert told(tmp_path / "whole", row, document) == row
    for i, gone in enumerate(own[:: max(1, len(own) // 12)]):
        folder = tmp_path / str(i)
        hollow(folder / "model.safetensors", {key: shape for key, shape in whole.items() if key != gone})
        (folder / "config.json").write_text(json.dumps(document))
        with pytest.raises(InputError) as caught:
            config_of(open_weights(folder))
        assert caught.value.code in ("E4013", "E4021", "E4007"), gone


LOOKS = AnimateConfig(layers=(0, 2), face_dim=6, motion_dim=10, directions=3, widths=(2, 4, 4))
SAID = {"num_heads": 2, "text_len": 7}


def test_where_animate_looks_at_the_face_is_every_fifth_block_or_told(tmp_path: Path) -> None:
    rule = replace(SMALL_DIT, layers=6, animate=replace(LOOKS, layers=(0, 5)))
    assert told(tmp_path / "rule", rule, SAID) == rule
    other = replace(SMALL_DIT, layers=6, animate=LOOKS)
    assert told(tmp_path / "other", other, {**SAID, "face_adapter_layers": [0, 2]}) == other
    for layers in ([0], [0, 6], [2, 2], [0, True], ["0", "2"]):
        folder = tmp_path / str(layers)
        message = refused("E4021", told, folder, other, {**SAID, "face_adapter_layers": layers})
        assert "2 of 6 blocks look at the face" in message
    message = refused("E4021", told, tmp_path / "three", replace(other, layers=12), SAID)
    assert "face_adapter_layers is [0, 5, 10]" in message


CONTRADICTIONS = {
    "audio_dim": 7, "cond_dim": 17, "num_audio_token": 5, "motion_frames": 72, "motion_encoder_dim": 7,
    "use_img_emb": False, "enable_adain": False, "enable_motioner": True,
}  # fmt: skip


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_an_adapters_config_may_not_contradict_its_tensors(tmp_path: Path, key: str) -> None:
    speech = SpeechConfig(audio_dim=4, audio_states=2, layers=(0,))
    sizes = replace(SMALL_DIT, **({"animate": LOOKS} if key[:3] in ("mot", "use") else {"speech": speech}), layers=3)
    said = {**SAID, "audio_inject_layers": [0], "face_adapter_layers": [0, 2]}
    if key == "motion_frames":
        sizes = replace(sizes, speech=speech, animate=None)
    assert told(tmp_path / "good", sizes, said) == sizes
    refused("E4021", told, tmp_path / "bad", sizes, {**said, key: CONTRADICTIONS[key]})


# ---------------------------------------------------------------- config.json


BAD_CONFIGS = {
    "wrong type": ('{"eps": "1e-6"}', "eps"),
    "true as a number": ('{"num_heads": true}', "num_heads"),
    "float as a count": ('{"num_layers": 1.5}', "num_layers"),
    "null": ('{"dim": null}', "dim"),
    "infinite": ('{"eps": 1e999}', "1e999"),
    "minus infinite": ('{"eps": -1e999}', "1e999"),
    "NaN": ('{"eps": NaN}', "NaN"),
    "Infinity": ('{"eps": Infinity}', "Infinity"),
    "duplicate": ('{"eps": 1e-6, "eps": 1e-5}', "eps"),
    "duplicate, nested": ('{"quantization": {"a": 1, "a": 2}}', "a"),
    "depth 33": ('{"x": ' + "[" * 33 + "]" * 33 + "}", "deeper than 32"),
    "depth 10000": ('{"x": ' + "[" * 10_000 + "]" * 10_000 + "}", "deeper than 32"),
    "open depth": ("[" * 100_000, "deeper than 32"),
    "not JSON": ('{"eps": 1e-6,}', "line 1"),
    "not an object": ("[]", "object"),
    "not text": ("\ud800", "JSON"),
    "contradicts the tensors": ('{"dim": 24, "num_heads": 2}', "dim"),
    "another form": ('{"qk_norm": false}', "qk_norm"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_b085_a_bad_config_names_the_key(tmp_path: Path, name: str) -> None:
    text, word = BAD_CONFIGS[name]
    hollow(tmp_path / "model.safetensors", dit_shapes(SMALL_DIT))
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    message = refused("E4021", config_of, open_weights(tmp_path))
    assert word in message
    assert "config.json" in message


def test_b085_an_unknown_key_is_one_warning_and_no_error(tmp_path: Path) -> None:
    with pytest.warns(WanloomWarning, match="config.json: colour: unknown key") as caught:
        assert told(tmp_path, SMALL_DIT, {"colour": "red", "num_heads": 2, "text_len": 7}) == SMALL_DIT
    assert len(caught) == 1


def test_a_byte_order_mark_and_windows_line_ends_are_no_error(tmp_path: Path) -> None:
    text = "\ufeff" + json.dumps({"num_heads": 2, "text_len": 7}, indent=1).replace("\n", "\r\n")
    assert told(tmp_path, SMALL_DIT, text) == SMALL_DIT


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code", "_attn_implementation_internal"])
@pytest.mark.parametrize("nested", [False, True])
def test_b086_keys_that_load_code_are_refused(tmp_path: Path, key: str, nested: bool) -> None:
    value = {key: {"AutoModel": "modeling.Model"}}
    document = {"num_heads": 2, "text_config": value} if nested else {"num_heads": 2, **value}
    assert f"refused key {key}" in refused("E4022", told, tmp_path, SMALL_DIT, document)


IMPOSSIBLE = {
    "layers": {"num_layers": 10**9},
    "zero": {"dim": 0},
    "negative": {"ffn_dim": -8},
    "huge": {"dim": 2**40},
    "heads": {"dim": 12, "num_heads": 5},
    "no heads": {"num_heads": 0},
    "text length": {"text_len": 10**12},
    "eps": {"eps": 0.0},
    "negative eps": {"eps": -1e-6},
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_b087_impossible_sizes_are_refused_before_anything_is_built(tmp_path: Path, name: str) -> None:
    refused("E4023", told, tmp_path, SMALL_DIT, IMPOSSIBLE[name])


def test_b087_heads_that_cannot_be_told_are_asked_for(tmp_path: Path) -> None:
    assert "num_heads" in refused("E4023", told, tmp_path, SMALL_DIT)


ADAPTED = (
    replace(SMALL_DIT, speech=SpeechConfig(audio_dim=4, audio_states=2, layers=(0,))),
    replace(SMALL_DIT, layers=3, animate=LOOKS),
    replace(SMALL_DIT, layers=6, animate=replace(LOOKS, layers=(0, 5))),
)


def test_the_configs_of_all_projects_are_known(tmp_path: Path) -> None:
    from wanloom.checkpoint.layouts import config_json

    for number, (layout, config) in enumerate(
        (layout, config)
        for layout in ("official", "diffusers")
        for config in (SMALL_DIT, SMALL_VAE, SMALL_TEXT, SMALL_CLIP, VAE_22, tiny.AUDIO, *ADAPTED)
        if layout == "official" or config not in (tiny.AUDIO, *ADAPTED)
    ):
        document = config_json(layout, config)
        if document is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = told(tmp_path / str(number), config, document)
        expected = replace(config, text_len=512) if isinstance(config, DiTConfig) and layout == "diffusers" else config
        assert found == expected


# ---------------------------------------------------------------- which model


def test_candidates_are_all_releases_of_one_form() -> None:
    assert candidates(VARIANTS["t2v-14B"].dit) == ["t2v-A14B", "t2v-14B"]
    assert candidates(VARIANTS["t2v-1.3B"].dit) == ["t2v-1.3B"]
    assert candidates(VARIANTS["t2v-14B"].dit, experts=1) == ["t2v-14B"]
    assert candidates(VARIANTS["i2v-A14B"].dit) == ["i2v-A14B"]
    assert candidates(tiny.TINY["t2v-1.3B"].dit) == ["t2v-A14B", "t2v-1.3B", "t2v-14B"]
    assert candidates(VARIANTS["s2v-14B"].dit) == candidates(VARIANTS["demo-s2v"].dit) == ["s2v-14B"]
    assert candidates(VARIANTS["animate-14B"].dit) == candidates(VARIANTS["demo-animate"].dit) == ["animate-14B"]
    assert candidates(VARIANTS["i2v-14B"].dit) == ["i2v-14B"]
    assert candidates(replace(SMALL_DIT, in_channels=17)) == []


@pytest.mark.parametrize("expected", RELEASED)
@pytest.mark.parametrize("given", RELEASED)
@pytest.mark.parametrize("size", ["published", "small"])
def test_b080_every_model_in_every_other_place_is_named(given: str, expected: str, size: str) -> None:
    rows = RELEASED if size == "published" else tiny.TINY
    config, variant = rows[given].dit, RELEASED[expected]
    same = replace(config, dim=1, ffn_dim=1, heads=1, layers=1) == replace(
        rows[expected].dit, dim=1, ffn_dim=1, heads=1, layers=1
    )
    if same and (size == "small" or config == variant.dit):
        check_dit(Path("w"), config, variant)
        return
    message = refused("E4016", check_dit, Path("w"), config, variant)
    assert f"expected {expected} (" in message
    names = message.split("this is ")[1].split(" (")[0].split(" or ")
    assert given in names or size == "small"


def test_b080_the_message_says_what_differs() -> None:
    i2v, t2v = VARIANTS["i2v-A14B"], VARIANTS["t2v-A14B"]
    message = refused("E4016", check_dit, Path("w"), i2v.dit, t2v)
    assert message == "w: this is i2v-A14B (36 input channels), expected t2v-A14B (16)."
    message = refused("E4016", check_dit, Path("w"), VARIANTS["s2v-14B"].dit, t2v)
    assert message == "w: this is s2v-14B (parts for speech), expected t2v-A14B (no parts for speech)."
    message = refused("E4016", check_dit, Path("w"), VARIANTS["i2v-14B"].dit, VARIANTS["animate-14B"])
    assert message == "w: this is i2v-14B (no parts for pose and face), expected animate-14B (parts for pose and face)."
    message = refused("E4016", check_dit, Path("w"), VARIANTS["t2v-1.3B"].dit, t2v)
    assert message == "w: this is t2v-1.3B (30 layers of 1536), expected t2v-A14B (40 layers of 5120)."


@pytest.mark.parametrize("size", ["published", "small"])
def test_b081_the_vae_of_the_other_generation_is_named(size: str) -> None:
    rows = RELEASED if size == "published" else tiny.TINY
    for name, row in RELEASED.items():
        for other in rows.values():
            if (other.vae.z == 48) == (row.vae.z == 48):
                check_vae(Path("w"), other.vae, row)
            else:
                message = refused("E4017", check_vae, Path("w"), other.vae, row)
                assert name in message and "Wan2.1" in message and "Wan2.2" in message


def test_b084_a_text_encoder_of_another_width_or_kind_is_refused(tmp_path: Path) -> None:
    refused("E4020", check_text, Path("w"), TextConfig(dim=1024), VARIANTS["t2v-A14B"].dit)
    shapes = text_shapes(SMALL_TEXT)
    del shapes["blocks.1.pos_embedding.embedding.weight"]
    hollow(tmp_path / "model.safetensors", shapes)
    message = refused("E4020", config_of, open_weights(tmp_path))
    assert "T5" in message and "UMT5" in message


def test_a_clip_of_another_width_is_refused() -> None:
    refused("E4016", check_clip, Path("w"), SMALL_CLIP, VARIANTS["i2v-14B"].dit)


def test_an_audio_encoder_of_another_size_is_refused() -> None:
    s2v = VARIANTS["s2v-14B"]
    check_audio(Path("w"), AudioConfig(), s2v.dit)
    for other in (AudioConfig(dim=768), AudioConfig(layers=12)):
        assert "the transformer hears 25 of width 1024" in refused("E4016", check_audio, Path("w"), other, s2v.dit)


def test_a_vae_of_unknown_latents_is_refused(tmp_path: Path) -> None:
    refused("E4017", told, tmp_path, replace(SMALL_VAE, z=12, mean=(0.0,) * 12, std=(1.0,) * 12))


HINTS = {
    "a/high_noise_model": "high_noise_model",
    "a/high_noise_model/diffusion_pytorch_model.safetensors": "high_noise_model",
    "a/wan2.2_t2v_low_noise_14B_fp16.safetensors": "low_noise_model",
    "a/Wan2_2-T2V-A14B-HIGH_fp8.safetensors": "high_noise_model",
    "a/transformer_2": "low_noise_model",
    "a/transformer": "high_noise_model",
    "high_quality/a/b.safetensors": None,
    "a/highway.safetensors": None,
    "a/high_low.safetensors": None,
    "high/low.safetensors": "low_noise_model",
}


@pytest.mark.parametrize("path", HINTS)
def test_names_hint_at_an_expert(path: str) -> None:
    assert expert_hint(Path(path), ("high_noise_model", "low_noise_model")) == HINTS[path]


def test_tables_agree_with_the_published_vaes() -> None:
    assert VAE_21.stride == (4, 8, 8) and VAE_22.stride == (4, 16, 16)
