"""Tensor names: every rule one to one, both ways, against the projects whose names they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wanloom.checkpoint.names import FORMATS, OPERATIONS, Format, by_official_name, format_of, get_format
from wanloom.checkpoint.shapes import audio_shapes, clip_shapes, dit_shapes, text_shapes, vae_shapes
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
from weight_files import SMALL_CLIP, SMALL_DIT, SMALL_TEXT, SMALL_VAE, values_for

Shapes = dict[str, tuple[int, ...]]

# The parts of s2v and animate have no names in other projects' formats.
PLAIN = {name: row for name, row in VARIANTS.items() if row.dit.speech is None and row.dit.animate is None}
MODELS: dict[str, tuple[str, Shapes, VaeConfig | None]] = {
    **{f"dit {name}": ("dit", dit_shapes(row.dit), None) for name, row in PLAIN.items()},
    **{f"vae {name}": ("vae", vae_shapes(row.vae), row.vae) for name, row in VARIANTS.items()},
    "text": ("text", text_shapes(TextConfig()), None),
    "clip": ("clip", clip_shapes(ClipConfig()), None),
    "small dit": ("dit", dit_shapes(SMALL_DIT), None),
    "small vae": ("vae", vae_shapes(SMALL_VAE), SMALL_VAE),
    "small text": ("text", text_shapes(SMALL_TEXT), None),
    "small clip": ("clip", clip_shapes(SMALL_CLIP), None),
}


def foreign_format(kind: str, vae: VaeConfig | None) -> Format:
    name = "diffusers" if kind in ("dit", "vae") else "transformers"
    return get_format(kind, name, blocks=vae.blocks, residual=vae.residual) if vae else get_format(kind, name)


def renamed(shapes: Shapes, form: Format) -> Shapes:
    """All tensors under the names of a format."""
    out: Shapes = {}
    for official, shape in shapes.items():
        found = form.foreign(official)
        assert found is not None, official
        for name, foreign in zip(found[0], OPERATIONS[found[1]].out_shapes(shape), strict=True):
            assert name not in out, f"{name} stands for two tensors"
            out[name] = foreign
    return out


@pytest.mark.parametrize("model", MODELS)
def test_names_go_out_and_come_back(model: str) -> None:
    kind, shapes, vae = MODELS[model]
    form = foreign_format(kind, vae)
    foreign = renamed(shapes, form)
    back = by_official_name(form, foreign)
    assert back.keys() == shapes.keys()
    for official, (names, operation) in back.items():
        assert OPERATIONS[operation].into_shape([foreign[name] for name in names]) == shapes[official]


@pytest.mark.parametrize("model", MODELS)
def test_a_format_is_told_by_its_names(model: str) -> None:
    kind, shapes, vae = MODELS[model]
    own = format_of(shapes)
    assert own is not None and (own[0].kind, own[0].name) == (kind, "official")
    form = foreign_format(kind, vae)
    told = format_of(renamed(shapes, form))
    assert told is not None and (told[0].kind, told[0].name) == (kind, form.name)
    assert told[0].rules == form.rules, "the rules of this very model: a VAE's depend on its blocks"


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.kind} {form.name}")
def test_rules_do_not_accept_names_that_only_resemble_theirs(form: Format) -> None:
    if form.rules:
        for name in ("", "blocks", "x.blocks.0.attn1.to_q.weight", "blocks.00.attn1.to_q.weight", "shared.weight.1"):
            assert form.official(name) is None
    assert form.prefix_of([]) is None


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_undo_themselves(operation: str) -> None:
    step = OPERATIONS[operation]
    shape = {"drop_two": (1, 1, 6), "drop_one": (1, 5, 6), "transpose": (4, 6)}.get(operation, (6, 4))
    value = values_for({"x": shape})["x"]
    parts = step.out(value)
    assert [tuple(part.shape) for part in parts] == step.out_shapes(shape)
    assert step.into_shape([tuple(part.shape) for part in parts]) == shape
    assert torch.equal(step.into(parts), value)


@pytest.mark.parametrize("name", [name for name, row in PLAIN.items() if not row.demo])
def test_transformer_names_are_those_of_diffusers(name: str) -> None:
    from diffusers import WanTransformer3DModel

    from wanloom.checkpoint.layouts import diffusers_dit

    row = VARIANTS[name].dit
    config = {key: value for key, value in diffusers_dit(row).items() if not key.startswith("_")} | {"num_layers": 2}
    with torch.device("meta"):
        theirs = WanTransformer3DModel.from_config(config).state_dict()
    mine = renamed(dit_shapes(row), get_format("dit", "diffusers"))
    mine = {key: shape for key, shape in mine.items() if not key.startswith("blocks.") or int(key.split(".")[1]) < 2}
    assert mine == {key: tuple(value.shape) for key, value in theirs.items()}


@pytest.mark.parametrize(
    "config", [VAE_21, VAE_22, VARIANTS["demo-t2v"].vae, replace(VAE_22, dim=8, decoder_dim=8, blocks=1)]
)
def test_vae_names_are_those_of_diffusers(config: VaeConfig) -> None:
    from diffusers import AutoencoderKLWan

    from wanloom.checkpoint.layouts import diffusers_vae

    given = {key: value for key, value in diffusers_vae(config).items() if not key.startswith("_")}
    with torch.device("meta"):
        theirs = AutoencoderKLWan.from_config(given).state_dict()
    mine = renamed(vae_shapes(config), foreign_format("vae", config))
    assert mine == {key: tuple(value.shape) for key, value in theirs.items()}


def test_encoder_names_are_those_of_transformers() -> None:
    from wanloom.encoders import build_clip, build_umt5, build_wav2vec2

    with torch.device("meta"):
        text, clip = build_umt5(TextConfig(layers=2)), build_clip(ClipConfig(layers=2))
        audio = build_wav2vec2(AudioConfig(layers=2))
    assert audio_shapes(AudioConfig(layers=2)) == {k: tuple(v.shape) for k, v in audio.state_dict().items()}
    mine = renamed(text_shapes(TextConfig(layers=2)), get_format("text", "transformers"))
    assert mine == {key: tuple(value.shape) for key, value in text.state_dict().items()}
    mine = renamed(clip_shapes(ClipConfig(layers=2)), get_format("clip", "transformers"))
    assert mine.pop("visual_projection.weight") == (1024, 1280)
    assert mine == {key: tuple(value.shape) for key, value in clip.state_dict().items()}


MANIFESTS = {
    "wan2.2-t2v-a14b-dit": dit_shapes(VARIANTS["t2v-A14B"].dit),
    "wan2.2-i2v-a14b-dit": dit_shapes(VARIANTS["i2v-A14B"].dit),
    "wan2.2-ti2v-5b-dit": dit_shapes(VARIANTS["ti2v-5B"].dit),
    "wan2.1-t2v-1.3b-dit": dit_shapes(VARIANTS["t2v-1.3B"].dit),
    "wan2.1-t2v-14b-dit": dit_shapes(VARIANTS["t2v-14B"].dit),
    "wan2.1-i2v-14b-dit": dit_shapes(VARIANTS["i2v-14B"].dit),
    "wan2.1-flf2v-14b-dit": dit_shapes(VARIANTS["flf2v-14B"].dit),
    "wan2.2-s2v-14b-dit": dit_shapes(DiTConfig(speech=SpeechConfig())),
    "wan2.2-animate-14b-dit": dit_shapes(DiTConfig(in_channels=36, image_dim=1280, animate=AnimateConfig())),
    "wan2.1-vae": vae_shapes(VAE_21),
    "wan2.2-vae": vae_shapes(VAE_22),
    "umt5-xxl-encoder": text_shapes(TextConfig()),
    "clip-xlm-roberta-vit-h14": clip_shapes(ClipConfig()),
}


def published(folder: Path, name: str) -> dict[str, list[int]]:
    """A published manifest; of CLIP the visual tower."""
    tensors: dict[str, list[int]] = json.loads((folder / f"{name}.json").read_text())["tensors"]
    return {key: shape for key, shape in tensors.items() if "clip" not in name or key.startswith("visual.")}


@pytest.mark.parametrize("name", MANIFESTS)
def test_shape_tables_are_the_published_manifests(manifests: Path, name: str) -> None:
    assert {key: list(shape) for key, shape in MANIFESTS[name].items()} == published(manifests, name)


@pytest.mark.parametrize("name", MANIFESTS)
def test_our_modules_have_the_published_tensors(manifests: Path, name: str) -> None:
    from wanloom.checkpoint.inspect import manifest

    assert manifest(name)["tensors"] == published(manifests, name)


@pytest.mark.parametrize("name", VARIANTS)
def test_shape_tables_are_those_of_our_modules(name: str) -> None:
    from wanloom.models.adapters import build_dit
    from wanloom.models.vae import CausalVae

    row = VARIANTS[name]
    with torch.device("meta"):
        vae, dit = CausalVae(row.vae).state_dict(), build_dit(row.dit).state_dict()
    assert {key: tuple(value.shape) for key, value in vae.items()} == vae_shapes(row.vae)
    assert {key: tuple(value.shape) for key, value in dit.items()} == dit_shapes(row.dit)
