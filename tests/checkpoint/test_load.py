"""Survey and loading: nothing half loaded, nothing wrong accepted. B074, B075, B082, B084, B095, B096 and parity."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from wanloom.checkpoint import load, manifest
from wanloom.checkpoint.convert import convert
from wanloom.checkpoint.find import Files, resolve
from wanloom.checkpoint.load import load_into, survey, survey_clip, survey_dit, survey_text, survey_vae
from wanloom.checkpoint.shapes import clip_shapes, dit_shapes, text_shapes, vae_shapes
from wanloom.encoders import build_clip, build_umt5
from wanloom.errors import InputError, WanloomWarning
from wanloom.models.dit import DiT
from wanloom.models.vae import CausalVae
from wanloom.variants import VARIANTS
from weight_files import SMALL_CLIP, SMALL_DIT, SMALL_TEXT, SMALL_VAE, hollow, values_for

T2V = VARIANTS["t2v-A14B"]


def refused(code: str, call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value.message


def quietly(call: Callable[[], object]) -> object:
    """Without W4018, which small checkpoints without records earn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WanloomWarning)
        return call()


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@pytest.fixture
def dit_file(tmp_path: Path) -> Path:
    """A small transformer and its config."""
    folder = tmp_path / "dit"
    folder.mkdir()
    save_file(values_for(dit_shapes(SMALL_DIT)), folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_heads": 2, "text_len": 7}')
    return folder / "model.safetensors"


# ---------------------------------------------------------------- loading


def test_every_tensor_arrives_as_it_was(dit_file: Path) -> None:
    module = on_meta(lambda: DiT(SMALL_DIT))
    load_into(module, dit_file)
    state = module.state_dict()
    values = values_for(dit_shapes(SMALL_DIT))
    assert state.keys() == values.keys()
    assert all(torch.equal(state[name], value) for name, value in values.items())
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


PARTS: dict[str, tuple[dict[str, tuple[int, ...]], Callable[[], nn.Module]]] = {
    "vae": (vae_shapes(SMALL_VAE), lambda: CausalVae(SMALL_VAE)),
    "text": (text_shapes(SMALL_TEXT), lambda: build_umt5(SMALL_TEXT)),
    "clip": (clip_shapes(SMALL_CLIP), lambda: build_clip(SMALL_CLIP)),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_every_part_loads_in_the_dtype_that_is_asked_for(tmp_path: Path, part: str, dtype: torch.dtype | None) -> None:
    shapes, build = PARTS[part]
    save_file(values_for(shapes, dtype=torch.float16), tmp_path / "w.safetensors")
    module = on_meta(build)
    load_into(module, tmp_path / "w.safetensors", dtype=dtype)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {dtype or torch.float16}
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def test_a_function_may_choose_the_dtype_of_each_tensor(dit_file: Path) -> None:
    module = on_meta(lambda: DiT(SMALL_DIT))
    load_into(module, dit_file, dtype=lambda name: torch.float32 if "modulation" in name else torch.bfloat16)
    dtypes = {"modulation" in name: tensor.dtype for name, tensor in module.state_dict().items()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_an_error_leaves_the_module_as_it_was(dit_file: Path) -> None:
    module = on_meta(lambda: DiT(replace(SMALL_DIT, layers=2)))
    assert "missing" in refused("E4013", lambda: load_into(module, dit_file))
    assert all(tensor.is_meta for tensor in module.parameters())
    module = on_meta(lambda: DiT(replace(SMALL_DIT, ffn_dim=9)))
    refused("E4007", lambda: load_into(module, dit_file))
    module = on_meta(lambda: CausalVae(SMALL_VAE))
    refused("E4016", lambda: load_into(module, dit_file))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_b074_values_that_are_not_finite_are_named_by_tensor(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    values = values_for(vae_shapes(SMALL_VAE), dtype=dtype)
    values["decoder.head.2.weight"].view(-1)[-1] = value
    save_file(values, tmp_path / "w.safetensors")
    module = on_meta(lambda: CausalVae(SMALL_VAE))
    message = refused("E4010", lambda: load_into(module, tmp_path / "w.safetensors", dtype=torch.float32))
    assert "tensor decoder.head.2.weight: 1 of" in message and "w.safetensors" in message


def test_b074_large_values_whose_sum_overflows_are_no_error(tmp_path: Path) -> None:
    values = values_for(vae_shapes(SMALL_VAE))
    values["decoder.head.2.weight"].fill_(3e38)
    save_file(values, tmp_path / "w.safetensors")
    load_into(on_meta(lambda: CausalVae(SMALL_VAE)), tmp_path / "w.safetensors")


def test_b074_values_that_a_narrow_dtype_cannot_hold_are_named(tmp_path: Path) -> None:
    values = values_for(vae_shapes(SMALL_VAE))
    values["conv1.bias"][0] = 1e6
    save_file(values, tmp_path / "w.safetensors")
    module = on_meta(lambda: CausalVae(SMALL_VAE))
    message = refused("E4010", lambda: load_into(module, tmp_path / "w.safetensors", dtype=torch.float16))
    assert "conv1.bias" in message and "float16" in message


def test_loading_holds_the_model_and_one_tensor(tmp_path: Path) -> None:
    config = replace(SMALL_DIT, dim=512, ffn_dim=2048, layers=8)
    path = hollow(tmp_path / "w.safetensors", dit_shapes(config))
    size = path.stat().st_size
    program = (
        "import resource, sys, torch\nfrom pathlib import Path\n"
        "from wanloom.checkpoint.load import load_into, survey_dit\nfrom wanloom.models.dit import DiT\n"
        "def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "weights, config = survey_dit(Path(sys.argv[1]))\n"
        "with torch.device('meta'): dit = DiT(config)\n"
        "torch.ones(4).bfloat16().sum()\nbefore = peak()\n"
        "load_into(dit, weights, dtype=torch.bfloat16)\nprint(peak() - before)"
    )
    source = str(Path(load.__file__).parents[2])
    command = [sys.executable, "-c", program, str(path)]
    environment = {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert size > 130e6
    assert int(done.stdout) < 0.75 * size, "half of the file's float32 bytes, and one tensor"


# ---------------------------------------------------------------- changing files (B096) and hashes (B075)


def test_b096_a_file_removed_after_the_survey_is_named(dit_file: Path) -> None:
    weights, config = survey_dit(dit_file)
    dit_file.unlink()
    refused("E4001", lambda: load_into(on_meta(lambda: DiT(config)), weights))


@pytest.mark.parametrize("change", ["truncate", "swap", "touch"])
def test_b096_a_file_changed_while_it_is_loaded_is_refused(
    dit_file: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = load.read_entry, []

    def interfere(entry: load.Entry) -> Tensor:
        reads.append(entry)
        if len(reads) == 5:
            if change == "truncate":
                with dit_file.open("r+b") as file:
                    file.truncate(dit_file.stat().st_size // 3)
            elif change == "swap":
                shutil.copy(dit_file, dit_file.with_suffix(".new"))
                dit_file.with_suffix(".new").rename(dit_file)
            else:
                dit_file.touch()
        return read(entry)

    monkeypatch.setattr(load, "read_entry", interfere)
    module = on_meta(lambda: DiT(SMALL_DIT))
    refused("E4006" if change == "truncate" else "E4011", lambda: load_into(module, dit_file))
    assert all(tensor.is_meta for tensor in module.parameters())


def test_b096_truncating_a_file_that_is_being_loaded_never_ends_the_process(dit_file: Path) -> None:
    whole = dit_file.read_bytes()
    stop = threading.Event()

    def shake() -> None:
        while not stop.is_set():
            with dit_file.open("r+b") as file:
                file.truncate(len(whole) // 2)
            dit_file.write_bytes(whole)

    thread = threading.Thread(target=shake)
    thread.start()
    outcomes = set()
    try:
        for _ in range(40):
            try:
                load_into(on_meta(lambda: DiT(SMALL_DIT)), dit_file)
                outcomes.add("loaded")
            except InputError as error:
                outcomes.add(error.code)
    finally:
        stop.set()
        thread.join()
    assert outcomes <= {"loaded", "E4001", "E4004", "E4005", "E4006", "E4007", "E4011"}


@pytest.mark.parametrize("place", ["first value", "last value", "header"])
def test_b075_one_flipped_bit_is_refused_where_a_hash_is_recorded(dit_file: Path, place: str) -> None:
    module = on_meta(lambda: DiT(SMALL_DIT))
    manifest.write(dit_file.parent, [dit_file])
    load_into(module, dit_file)
    raw = bytearray(dit_file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[{"first value": start, "last value": len(raw) - 1, "header": start - 1}[place]] ^= 1
    dit_file.write_bytes(raw)
    message = refused(
        "E4011" if place != "header" else "E4005", lambda: load_into(on_meta(lambda: DiT(SMALL_DIT)), dit_file)
    )
    assert dit_file.name in message


def test_a_good_file_is_hashed_once_in_a_process(dit_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest.write(dit_file.parent, [dit_file])
    load_into(on_meta(lambda: DiT(SMALL_DIT)), dit_file)

    def hashing(path: Path) -> str:
        pytest.fail(f"{path} was hashed again")

    monkeypatch.setattr(manifest, "sha256_file", hashing)
    load_into(on_meta(lambda: DiT(SMALL_DIT)), dit_file)


# ---------------------------------------------------------------- survey


@pytest.mark.parametrize("name", tiny.TINY)
def test_the_survey_finds_the_sizes_of_every_released_model(models: Path, name: str) -> None:
    variant = VARIANTS[name]
    found = quietly(lambda: survey(variant, resolve(variant, ckpt_dir=models / name)))
    row = tiny.TINY[name]
    assert found == replace(variant, dit=row.dit, vae=row.vae, text=row.text, clip=row.clip, audio=row.audio)


def test_the_survey_reads_no_tensor_and_no_torch(models: Path) -> None:
    program = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from wanloom.checkpoint.find import resolve\nfrom wanloom.checkpoint.load import survey\n"
        "from wanloom.variants import VARIANTS\nrow = VARIANTS['t2v-A14B']\n"
        "survey(row, resolve(row, ckpt_dir=sys.argv[1]))\n"
        "print(*({'torch', 'numpy', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    )
    source = str(Path(load.__file__).parents[2])
    command = [sys.executable, "-c", program, str(models / "t2v-A14B")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": source})
    assert done.stdout.strip() == ""


def test_the_survey_of_published_sizes_takes_a_moment(tmp_path: Path) -> None:
    root = published(tmp_path)
    started = time.process_time()
    found = quietly(lambda: survey(T2V, resolve(T2V, ckpt_dir=root)))
    assert time.process_time() - started < 2
    assert found == T2V


def published(folder: Path) -> Path:
    """Wan2.2-T2V-A14B in its real sizes and shards without the data, and a tokenizer as large as the real one."""
    shapes = dit_shapes(T2V.dit)
    names = list(shapes)
    for expert in T2V.expert_names:
        where = {}
        for i in range(6):
            file = f"diffusion_pytorch_model-{i + 1:05d}-of-00006.safetensors"
            part = {name: shapes[name] for name in names[i::6]}
            hollow(folder / expert / file, part)
            where |= dict.fromkeys(part, file)
        index = folder / expert / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    hollow(folder / "Wan2.1_VAE.safetensors", vae_shapes(T2V.vae))
    hollow(folder / "models_t5_umt5-xxl-enc-bf16.safetensors", text_shapes(T2V.text), "BF16")
    tokens = [[f"token number {i} of many", -float(i)] for i in range(256_300)]
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "Unigram", "vocab": tokens}})
    )
    return folder


@pytest.fixture
def recorded(models: Path, tmp_path: Path) -> Path:
    """A checkpoint whose files say which expert they are."""
    return convert(models / "t2v-A14B", tmp_path / "recorded").path


def test_b082_swapped_experts_are_refused_where_it_is_recorded(recorded: Path) -> None:
    survey(T2V, resolve(T2V, ckpt_dir=recorded))
    high, low = recorded / "high_noise_model", recorded / "low_noise_model"
    message = refused("E4018", lambda: survey(T2V, resolve(T2V, ckpt_dir=recorded, dit_high=low, dit_low=high)))
    assert "this is the expert low_noise_model, used as high_noise_model" in message
    high.rename(recorded / "x")
    low.rename(high)
    (recorded / "x").rename(low)
    refused("E4018", lambda: survey(T2V, resolve(T2V, ckpt_dir=recorded)))


def test_b082_the_same_expert_twice_is_refused_where_it_is_recorded(recorded: Path) -> None:
    low = recorded / "low_noise_model"
    refused("E4018", lambda: survey(T2V, resolve(T2V, ckpt_dir=recorded, dit_high=low)))


def test_b082_unknown_origin_is_a_warning(models: Path) -> None:
    root = models / "t2v-A14B"
    with pytest.warns(WanloomWarning, match=r"W4018.*nothing in the files records which expert is which"):
        survey(T2V, resolve(T2V, ckpt_dir=root))
    swapped = resolve(T2V, ckpt_dir=root, dit_high=root / "low_noise_model", dit_low=root / "high_noise_model")
    with pytest.warns(WanloomWarning, match=r"W4018.*its name says low_noise_model"):
        survey(T2V, swapped)


def test_one_transformer_is_no_reason_to_warn(models: Path) -> None:
    row = VARIANTS["t2v-1.3B"]
    survey(row, resolve(row, ckpt_dir=models / "t2v-1.3B"))


def edited(models: Path, **changes: Path) -> Files:
    row = VARIANTS["t2v-1.3B"]
    return replace(resolve(row, ckpt_dir=models / "t2v-1.3B"), **changes)


def test_b084_a_tokenizer_of_another_encoder_is_refused(models: Path, tmp_path: Path) -> None:
    row = VARIANTS["t2v-1.3B"]
    for tokens in (tiny.TEXT.vocab + 1, 5000):
        vocabulary = {f"w{i}": i for i in range(tokens)}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}}))
        message = refused("E4020", lambda: survey(row, edited(models, tokenizer=tmp_path)))
        assert f"{tokens} tokens" in message


DAMAGED = {
    "empty": "",
    "half": '{"model": {"vocab": {"a": 0',
    "list": "[]",
    "no vocabulary": '{"model": {}}',
    "numbers": '{"model": {"vocab": 5}}',
    "words as ids": '{"model": {"vocab": {"a": "b"}}}',
    "empty vocabulary": '{"model": {"vocab": {}}}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_b095_a_damaged_tokenizer_is_named(models: Path, tmp_path: Path, name: str) -> None:
    row = VARIANTS["t2v-1.3B"]
    (tmp_path / "tokenizer.json").write_text(DAMAGED[name])
    message = refused("E4030", lambda: survey(row, edited(models, tokenizer=tmp_path)))
    assert "tokenizer.json" in message


def test_b095_a_tokenizer_of_a_gigabyte_is_refused_unread(models: Path, tmp_path: Path) -> None:
    row = VARIANTS["t2v-1.3B"]
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(10**9)
    started = time.process_time()
    refused("E4030", lambda: survey(row, edited(models, tokenizer=tmp_path)))
    assert time.process_time() - started < 1


def test_experts_of_two_sizes_are_refused(models: Path, tmp_path: Path) -> None:
    low = tmp_path / "low_noise_model"
    hollow(low / "model.safetensors", dit_shapes(replace(tiny.TINY["t2v-A14B"].dit, layers=3)))
    (low / "config.json").write_text('{"num_heads": 2}')
    files = resolve(T2V, ckpt_dir=models / "t2v-A14B", dit_low=low)
    assert "different sizes" in refused("E4016", lambda: quietly(lambda: survey(T2V, files)))


# ---------------------------------------------------------------- against others


def test_a_loaded_vae_is_the_file_of_the_reference(golden_models: Path) -> None:
    weights, config = survey_vae(golden_models / "Wan2.2-TI2V-5B" / "Wan2.2_VAE.pth")
    vae = on_meta(lambda: CausalVae(config))
    load_into(vae, weights)
    theirs = torch.load(golden_models / "Wan2.2-TI2V-5B" / "Wan2.2_VAE.pth", weights_only=True)
    assert all(torch.equal(value, theirs[name]) for name, value in vae.state_dict().items())


def test_the_golden_text_is_encoded_by_the_loaded_encoder(golden: Path, golden_models: Path) -> None:
    from wanloom.encoders import Tokenizer, encode_text

    root = golden_models / "Wan2.2-T2V-A14B"
    weights, config = survey_text(root / "models_t5_umt5-xxl-enc-bf16.pth")
    model = on_meta(lambda: build_umt5(config))
    load_into(model, weights, dtype=torch.float32)
    expected = load_file(golden / "components.safetensors")["t5_context"]
    found = encode_text(model, Tokenizer(root / "google" / "umt5-xxl"), ["a white cat runs , quickly . 猫"], 512)[0]
    found = found[: len(expected)]
    assert (found - expected).norm() / expected.norm() < 1e-5


def filled(kind: Any, folder: Path) -> Any:
    """diffusers' own model from our config.json and our file, nothing missing and nothing left over."""
    model = kind.from_config(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=True)
    return model.eval()


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_diffusers_computes_the_same_from_our_conversion(models: Path, tmp_path: Path, part: str) -> None:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    root = convert(models / "t2v-1.3B", tmp_path / "out", to="diffusers").path
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if part == "vae":
            theirs = filled(AutoencoderKLWan, root / "vae")
            weights, config = survey_vae(models / "t2v-1.3B" / "Wan2.1_VAE.pth")
            mine = on_meta(lambda: CausalVae(config))
            load_into(mine, weights)
            video = torch.rand(1, 3, 5, 16, 16, generator=generator) * 2 - 1
            expected = theirs.encode(video).latent_dist.mean
            found = mine.moments(video)[0]  # type: ignore[operator]
        else:
            other = filled(WanTransformer3DModel, root / "transformer")
            weights, dit_config = survey_dit(models / "t2v-1.3B")
            dit = on_meta(lambda: DiT(dit_config))
            load_into(dit, weights)
            x = torch.randn(1, 16, 2, 4, 4, generator=generator)
            context = torch.randn(1, 512, tiny.TEXT.dim, generator=generator)
            expected = other(x, torch.tensor([437]), context).sample
            found = dit(x, torch.tensor([[437.0]]), context)
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("part", ["text_encoder", "image_encoder"])
def test_transformers_loads_our_conversion_and_has_the_same_tensors(models: Path, tmp_path: Path, part: str) -> None:
    from transformers import CLIPVisionModel, UMT5EncoderModel

    root = convert(models / "i2v-14B", tmp_path / "out", to="diffusers").path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = (UMT5EncoderModel if part == "text_encoder" else CLIPVisionModel).from_pretrained(root / part)
    if part == "text_encoder":
        text_weights, text_config = survey_text(root / part)
        module = on_meta(lambda: build_umt5(text_config))
        load_into(module, text_weights)
    else:
        clip_weights, clip_config = survey_clip(root / part)
        module = on_meta(lambda: build_clip(clip_config))
        load_into(module, clip_weights)
    state = theirs.state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])
