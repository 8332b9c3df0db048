"""One model in files: shards and their index (B077 to B079), number formats (B073), other projects' spellings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wanloom.checkpoint.load import read_source
from wanloom.checkpoint.names import OPERATIONS, get_format
from wanloom.checkpoint.shapes import clip_shapes, dit_shapes, text_shapes, vae_shapes
from wanloom.checkpoint.weights import open_weights
from wanloom.errors import InputError
from weight_files import SMALL_CLIP, SMALL_DIT, SMALL_TEXT, SMALL_VAE, hollow, saved_zip, values_for

DIT = dit_shapes(SMALL_DIT)
STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"


def refused(path: Path, code: str, *, kind: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        open_weights(path, kind=kind)
    assert caught.value.code == code, caught.value
    return caught.value.message


def sharded(folder: Path, count: int = 3, *, index: bool = True) -> Path:
    """The small transformer in shards."""
    folder.mkdir(exist_ok=True)
    values = values_for(DIT)
    names = list(values)
    where = {}
    for i in range(count):
        file = f"{STEM}-{i + 1:05d}-of-{count:05d}.safetensors"
        part = names[i::count]
        save_file({name: values[name] for name in part}, folder / file, metadata={"wanloom.revision": "r1"})
        where |= dict.fromkeys(part, file)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    document = json.loads((folder / INDEX).read_text())
    change(document["weight_map"])
    (folder / INDEX).write_text(json.dumps(document))


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_one_model(tmp_path: Path, index: bool) -> None:
    weights = open_weights(sharded(tmp_path / "m", index=index), kind="dit")
    assert weights.shapes == DIT
    assert len(weights.headers) == 3
    values = values_for(DIT)
    assert all(torch.equal(read_source(source), values[name]) for name, source in weights.tensors.items())


def test_an_index_may_be_named_itself(tmp_path: Path) -> None:
    assert open_weights(sharded(tmp_path / "m") / INDEX).shapes == DIT


@pytest.mark.parametrize("index", [True, False])
def test_b077_a_missing_shard_is_named(tmp_path: Path, index: bool) -> None:
    folder = sharded(tmp_path / "m", index=index)
    (folder / f"{STEM}-00002-of-00003.safetensors").unlink()
    assert "00002-of-00003" in refused(folder, "E4013")


def test_b077_a_shard_that_is_not_listed_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / f"{STEM}-00004-of-00004.safetensors").write_bytes(b"")
    assert "00004-of-00004" in refused(folder, "E4013")


def test_b077_a_whole_file_beside_shards_is_one_too_many(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    save_file(values_for(DIT), folder / f"{STEM}.safetensors")
    assert f"{STEM}.safetensors" in refused(folder, "E4013")


def test_b077_shards_of_two_counts_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", 3, index=False)
    sharded(folder, 2, index=False)
    refused(folder, "E4013")


def test_b077_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    first = folder / f"{STEM}-00001-of-00003.safetensors"
    (folder / f"{STEM}-00002-of-00003.safetensors").write_bytes(first.read_bytes())
    refused(folder, "E4013")
    (folder / INDEX).unlink()
    assert "also in" in refused(folder, "E4013")


def test_b077_a_tensor_listed_in_another_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    document = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(file for file in document.values() if file != document["head.modulation"])
    edit_index(folder, lambda where: where.update({"head.modulation": other}))
    assert "tensor head.modulation, which the index puts in" in refused(folder, "E4013")


def test_b077_a_tensor_that_is_nowhere_or_unlisted_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    edit_index(folder, lambda where: where.pop("head.modulation"))
    assert "head.modulation" in refused(folder, "E4013")
    folder = sharded(tmp_path / "n")
    edit_index(folder, lambda where: where.update({"ghost": where["head.modulation"]}))
    assert "ghost" in refused(folder, "E4013")


BAD_INDEXES = {
    "not JSON": "{",
    "empty": "",
    "list": "[]",
    "no map": "{}",
    "empty map": '{"weight_map": {}}',
    "numbers": '{"weight_map": {"a": 1}}',
    "twice": '{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}',
    "deep": "[" * 1000,
    **{
        f"name {name}": json.dumps({"weight_map": {"a": name}})
        for name in (
            "../../etc/passwd", "../x.safetensors", "/etc/passwd", "/tmp/x.safetensors", "a/b.safetensors",
            "..\\x.safetensors", "x.safetensors\0", "x.pth", "", ".", "a..b.safetensors", "x.safetensors\n",
            "\u202ex.safetensors", "-x.safetensors", "C:x.safetensors", "a" * 5000 + ".safetensors",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_b078_a_bad_index_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(BAD_INDEXES[name])
    assert INDEX in refused(tmp_path, "E4014")


def test_b078_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    shard = folder / f"{STEM}-00002-of-00003.safetensors"
    shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    assert "leads out" in refused(folder, "E4014")


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    home = tmp_path / "models--x--y"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    folder = sharded(home / "snapshots" / "abc")
    for number, shard in enumerate(sorted(folder.glob("*.safetensors"))):
        shard.rename(home / "blobs" / f"hash{number}")
        shard.symlink_to(Path("..") / ".." / "blobs" / f"hash{number}")
    assert open_weights(folder).shapes == DIT


def test_b079_shards_of_two_revisions_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    shard = folder / f"{STEM}-00002-of-00003.safetensors"
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    mine = {name: value for name, value in values_for(DIT, seed=1).items() if names[name] == shard.name}
    save_file(mine, shard, metadata={"wanloom.revision": "r2"})
    assert "two revisions" in refused(folder, "E4015")


# ---------------------------------------------------------------- which file


def test_b066_a_pickled_transformer_is_sent_to_convert(tmp_path: Path) -> None:
    for name in (f"{STEM}.pth", f"{STEM}.bin", "model.pt", "model.ckpt"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(saved_zip(values_for(DIT)))
        assert "wanloom convert" in refused(folder, "E4002", kind="dit")
        assert "wanloom convert" in refused(folder / name, "E4002", kind="dit")
        assert open_weights(folder / name, pickles=True).shapes == DIT


def test_safetensors_are_taken_before_a_pickle_of_the_same_stem(tmp_path: Path) -> None:
    (tmp_path / "vae.pth").write_bytes(b"cos\nsystem\n")
    save_file(values_for(vae_shapes(SMALL_VAE)), tmp_path / "vae.safetensors")
    assert open_weights(tmp_path / "vae.pth", kind="vae").headers[0].path.suffix == ".safetensors"


def test_a_directory_with_several_models_asks_for_one(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        save_file(values_for(DIT), tmp_path / name)
    message = refused(tmp_path, "E4013")
    assert "one.safetensors" in message and "two.safetensors" in message


def test_an_empty_directory_and_a_stranger_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "E4001")
    save_file({"unet.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "unet.weight" in refused(tmp_path, "E4016")


KINDS = {"dit": DIT, "vae": vae_shapes(SMALL_VAE), "text": text_shapes(SMALL_TEXT), "clip": clip_shapes(SMALL_CLIP)}


@pytest.mark.parametrize("given", KINDS)
@pytest.mark.parametrize("expected", KINDS)
def test_a_model_of_another_kind_is_named(tmp_path: Path, given: str, expected: str) -> None:
    path = hollow(tmp_path / "x.safetensors", KINDS[given])
    if given == expected:
        assert open_weights(path, kind=expected).kind == given
    else:
        code = {"vae": "E4017", "text": "E4020"}.get(expected, "E4016")
        assert "this is a" in refused(path, code, kind=expected)


@pytest.mark.parametrize("name", ["model.py", "setup.py", "modeling_wan.py", "__init__.py"])
def test_b094_python_files_in_a_model_directory_are_ignored(tmp_path: Path, name: str) -> None:
    folder = sharded(tmp_path / "m")
    (folder / name).write_text("raise SystemExit(3)")
    assert open_weights(folder).shapes == DIT


# ---------------------------------------------------------------- ComfyUI's files and number formats


def test_a_prefix_is_taken_off_and_other_models_in_the_file_are_left(tmp_path: Path) -> None:
    values = {f"model.diffusion_model.{name}": value for name, value in values_for(DIT).items()}
    values |= {f"first_stage_model.{name}": value for name, value in values_for(vae_shapes(SMALL_VAE)).items()}
    save_file(values, tmp_path / "merged.safetensors")
    assert open_weights(tmp_path / "merged.safetensors", kind="dit").shapes == DIT


def fp8(values: dict[str, Tensor], spelling: str, marker: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The file of a quantised transformer, and the values it stands for."""
    stored, meant = {}, {}
    for name, value in values.items():
        if value.dim() == 2 and name.endswith(".weight"):
            scale = value.abs().max() / 448
            stored[name] = (value / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + spelling] = scale
            meant[name] = stored[name].float() * scale
            stored[name.removesuffix("weight") + {"scale_weight": "scale_input"}.get(spelling, "input_scale")] = (
                torch.ones(())
            )
        else:
            stored[name] = meant[name] = value
    if marker:
        stored["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return stored, meant


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_scaled_fp8_weights_are_dequantised(tmp_path: Path, spelling: str) -> None:
    stored, meant = fp8(values_for(DIT), spelling, marker=spelling == "scale_weight")
    if spelling == "weight_scale":
        stored["blocks.0.ffn.0.comfy_quant"] = torch.zeros(8, dtype=torch.uint8)
    save_file(stored, tmp_path / "w.safetensors")
    weights = open_weights(tmp_path / "w.safetensors", kind="dit")
    assert weights.shapes == DIT and weights.scaled
    for name, source in weights.tensors.items():
        assert torch.equal(read_source(source).float(), meant[name])


def test_fp8_without_scales_is_read_as_it_stands(tmp_path: Path) -> None:
    values = {
        name: value.to(torch.float8_e5m2 if "norm" in name else torch.float8_e4m3fn)
        for name, value in values_for(DIT).items()
    }
    save_file(values, tmp_path / "w.safetensors")
    weights = open_weights(tmp_path / "w.safetensors")
    assert all(
        torch.equal(read_source(source).float(), values[name].float()) for name, source in weights.tensors.items()
    )


def test_int8_with_a_scale_for_each_row_is_dequantised(tmp_path: Path) -> None:
    values = values_for(DIT)
    name = "blocks.0.ffn.0.weight"
    scale = values[name].abs().amax(1) / 127
    stored = values | {
        name: (values[name] / scale[:, None]).round().to(torch.int8),
        "blocks.0.ffn.0.weight_scale": scale,
    }
    save_file(stored, tmp_path / "w.safetensors")
    weights = open_weights(tmp_path / "w.safetensors")
    expected = stored[name].float() * scale[:, None]
    assert torch.equal(read_source(weights.tensors[name]), expected)


BAD_NUMBERS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "int8 without scale": lambda v: {"blocks.0.ffn.0.weight": torch.zeros(8, 12, dtype=torch.int8)},
    "uint8": lambda v: {"blocks.0.ffn.0.weight": torch.zeros(8, 12, dtype=torch.uint8)},
    "int64": lambda v: {"head.modulation": torch.zeros(1, 2, 12, dtype=torch.int64)},
    "bool": lambda v: {"head.modulation": torch.zeros(1, 2, 12, dtype=torch.bool)},
    "4 bits": lambda v: {
        "blocks.0.ffn.0.weight": torch.zeros(8, 6, dtype=torch.uint8),
        "blocks.0.ffn.0.weight_scale_2": torch.ones(()),
    },
    "scale of blocks": lambda v: {"blocks.0.ffn.0.weight_scale": torch.ones(8, 3)},
    "scale of another format": lambda v: {"blocks.0.ffn.0.weight_scale": torch.ones(8, 1, dtype=torch.uint8)},
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_b073_number_formats_that_cannot_be_dequantised_are_refused(tmp_path: Path, name: str) -> None:
    values = values_for(DIT)
    save_file(values | BAD_NUMBERS[name](values), tmp_path / "w.safetensors")
    assert "tensor " in refused(tmp_path / "w.safetensors", "E4009")


def transformers_names(kind: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    form = get_format(kind, "transformers")
    out: dict[str, Tensor] = {}
    for name, value in values.items():
        found = form.foreign(name)
        assert found is not None
        out |= {k: v.contiguous() for k, v in zip(found[0], OPERATIONS[found[1]].out(value), strict=True)}
    return out


def test_the_text_encoder_of_comfyui_is_read(tmp_path: Path) -> None:
    values = values_for(text_shapes(SMALL_TEXT), dtype=torch.float16)
    stored = transformers_names("text", values) | {"spiece_model": torch.arange(9, dtype=torch.uint8)}
    save_file(stored, tmp_path / "umt5.safetensors")
    weights = open_weights(tmp_path / "umt5.safetensors", kind="text")
    assert weights.ignored == ("spiece_model",)
    assert all(torch.equal(read_source(source), values[name]) for name, source in weights.tensors.items())


@pytest.mark.parametrize("names", ["both", "second"])
def test_the_second_name_of_the_embedding_is_no_second_tensor(tmp_path: Path, names: str) -> None:
    values = values_for(text_shapes(SMALL_TEXT))
    stored = transformers_names("text", values)
    stored["encoder.embed_tokens.weight"] = stored["shared.weight"].clone()
    if names == "second":
        del stored["shared.weight"]
    save_file(stored, tmp_path / "umt5.safetensors")
    weights = open_weights(tmp_path / "umt5.safetensors", kind="text")
    assert torch.equal(read_source(weights.tensors["token_embedding.weight"]), values["token_embedding.weight"])


def test_clip_of_transformers_is_put_together(tmp_path: Path) -> None:
    values = values_for(clip_shapes(SMALL_CLIP))
    stored = {
        name if name.startswith("visual_") else f"vision_model.{name}": value
        for name, value in transformers_names("clip", values).items()
    }
    stored["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(stored, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path / "model.safetensors", kind="clip")
    assert weights.shapes == clip_shapes(SMALL_CLIP)
    assert all(torch.equal(read_source(source), values[name]) for name, source in weights.tensors.items())


def test_the_text_half_of_the_published_clip_is_left_out(tmp_path: Path) -> None:
    values = values_for(clip_shapes(SMALL_CLIP)) | {
        "log_scale": torch.ones(()),
        "textual.head.0.weight": torch.ones(3, 3),
    }
    (tmp_path / "clip.pth").write_bytes(saved_zip(values))
    weights = open_weights(tmp_path / "clip.pth", kind="clip")
    assert weights.shapes == clip_shapes(SMALL_CLIP)
    assert set(weights.ignored) == {"log_scale", "textual.head.0.weight"}


def test_a_third_of_q_k_and_v_is_not_enough(tmp_path: Path) -> None:
    stored = transformers_names("clip", values_for(clip_shapes(SMALL_CLIP)))
    del stored["encoder.layers.1.self_attn.k_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    assert "companions" in refused(tmp_path / "model.safetensors", "E4013")
