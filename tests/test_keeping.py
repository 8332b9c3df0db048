"""How weights are kept and computed with: the same bits where that is promised, near ones where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanloom import VARIANTS, Pipeline, Request, load
from wanloom.budget import block_bytes, need, part_bytes
from wanloom.checkpoint.weights import EXPERT
from wanloom.errors import InputError
from wanloom.parts import Parts
from wanloom.plan import make_plan
from wanloom.runtime.frozen import FrozenLinear
from wanloom.runtime.quant import METHODS, size_of
from wanloom.runtime.rows import InRows
from wanloom.runtime.streaming import Streamed
from wanloom.runtime.stripes import StripedDecoder, StripedEncoder

PROMPT = "a red circle moves left on sand"


def latents(folder: Path, source: Any = "demo-t2v", **how: Any) -> Tensor:
    path = folder / "t.safetensors"
    pipe = source if isinstance(source, Pipeline) else load(source, task="demo-t2v", device="cpu", **how)
    pipe.run(Request(prompt=PROMPT, steps=3, frames=5, seed=3, save_tensors=path, overwrite=True))
    return load_file(path)["latents"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return latents(tmp_path_factory.mktemp("plain"))


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("count", [0, 2, 99])
def test_blocks_that_come_and_go_give_the_same_bits(count: int, plain: Tensor, tmp_path: Path) -> None:
    assert torch.equal(latents(tmp_path, resident_blocks=count), plain)


def test_rows_and_stripes_give_the_same_video_to_rounding(plain: Tensor, tmp_path: Path) -> None:
    pipe = load("demo-t2v", device="cpu", row_chunks=7, vae_rows=16)
    assert distance(latents(tmp_path, pipe), plain) < 1e-4
    with pipe.parts.use("dit", expert="low_noise_model") as dit, pipe.parts.use("vae") as vae:
        assert all(isinstance(block.forward, InRows) and block.forward.rows == 7 for block in dit.blocks)
        assert isinstance(vae.decoder, StripedDecoder) and isinstance(vae.encoder, StripedEncoder)


def test_rows_and_stripes_are_counted_in_what_a_run_needs() -> None:
    row = VARIANTS["t2v-A14B"]
    plan = make_plan(Request(prompt="x", size="1280x720"), row)
    whole = need(plan, row, "bfloat16", on_gpu=True, resident_blocks=0)
    cut = need(plan, row, "bfloat16", on_gpu=True, resident_blocks=0, row_chunks=4096, vae_rows=64)
    stages = [{stage.name: stage.activations for stage in found.stages} for found in (whole, cut)]
    assert stages[1]["denoise"] < 0.6 * stages[0]["denoise"] and stages[1]["decode"] < 0.2 * stages[0]["decode"]
    assert cut.host > whole.host  # what the VAE remembers waits there


def test_no_more_blocks_are_there_than_stay_and_come(plain: Tensor, tmp_path: Path) -> None:
    pipe = load("demo-t2v", device="cpu", resident_blocks=1)
    with pipe.parts.use("dit", expert="high_noise_model") as dit:
        assert isinstance(dit.trunk, Streamed)
        there = [block for block in dit.blocks if not any(p.is_meta for p in block.parameters())]
        assert len(there) <= 1 + 2 < len(dit.blocks)
    pipe.parts.release()
    assert all(p.is_meta for p in dit.parameters())


def asked(**how: Any) -> Tensor:
    """One answer of an expert to fixed noise."""
    parts = load("demo-t2v", device="cpu", **how).parts
    draw = torch.Generator().manual_seed(0)
    config = parts.variant.dit
    x = torch.randn(1, config.in_channels, 3, 8, 8, generator=draw)
    context = torch.randn(1, config.text_len, config.text_dim, generator=draw)
    with parts.use("dit", expert="low_noise_model") as dit, torch.no_grad():
        return dit(x, torch.full((1, 1), 500.0), context)


@pytest.mark.parametrize(("method", "limit"), [("int8", 0.03), ("fp8", 0.1), ("int8-compute", 0.04)])
def test_weights_in_8_bits_are_near(method: str, limit: float) -> None:
    assert 1e-4 < distance(asked(quantise=method), asked()) < limit


def test_an_attention_kernel_by_name_is_as_good() -> None:
    assert 0 < distance(asked(attention="plain"), asked()) < 2e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_compiled_blocks_are_as_good() -> None:
    assert 0 < distance(asked(compile=True), asked()) < 2e-6


def test_what_decides_the_bits_is_part_of_a_job() -> None:
    def precision(**how: Any) -> dict[str, str]:
        return load("demo-t2v", device="cpu", **how).parts.precision

    asked = precision(quantise="int8", compile=True, attention="plain")
    assert asked == precision() | {"weights": "int8", "compile": "blocks", "attention": "plain"}
    assert precision(resident_blocks=0) == precision()
    assert precision(row_chunks=64, vae_rows=32) == precision() | {"row chunks": "64", "vae rows": "32"}


# ---------------------------------------------------------------- files in few bits


def test_a_file_in_8_bits_stays_in_8_bits_and_gives_what_widening_gives(tmp_path: Path) -> None:
    source = VARIANTS["demo-t2v"]
    home = load("demo-t2v", device="cpu").parts.files
    for name, path in home.experts.items():
        whole = load_file(next(path.glob("*.safetensors")) if path.is_dir() else path)
        cut = {
            key: value.to(torch.float8_e4m3fn) if key.startswith("blocks.") and value.dim() == 2 else value
            for key, value in whole.items()
        }
        save_file(cut, tmp_path / f"{name}.safetensors", {EXPERT: name})
    given = {"dit_high": tmp_path / "high_noise_model.safetensors", "dit_low": tmp_path / "low_noise_model.safetensors"}
    rest = {"vae": home.vae, "text_encoder": home.text, "tokenizer": home.tokenizer}
    pipe = load(task="demo-t2v", device="cpu", **given, **rest)
    kept = latents(tmp_path, pipe)
    with pipe.parts.use("dit", expert="low_noise_model") as dit:
        assert sum(isinstance(m, FrozenLinear) for m in dit.modules()) == 10 * source.dit.layers
        assert set(pipe.parts.stored) == {"dit"} and abs(pipe.parts.stored["dit"] / size_of(dit) - 1) < 0.02
    streamed = load(task="demo-t2v", device="cpu", resident_blocks=0, **given, **rest)  # widened block by block
    assert torch.equal(latents(tmp_path, streamed), kept)


# ---------------------------------------------------------------- how much memory


@pytest.mark.parametrize("method", [None, *(name for name in METHODS if name != "fp8-compute")])
def test_bytes_are_those_of_the_loaded_parts(method: str | None) -> None:
    parts: Parts = load("demo-t2v", device="cpu", dtype="bfloat16", quantise=method).parts
    sizes = part_bytes(parts.variant, "bfloat16", quantise=method)
    for part, expert in (("dit", "low_noise_model"), ("text", None)):
        with parts.use(part, expert=expert) as module:
            assert size_of(module) == sizes[part]


def test_streamed_blocks_are_counted_once() -> None:
    row = VARIANTS["t2v-A14B"]
    whole, none = part_bytes(row, "bfloat16"), part_bytes(row, "bfloat16", resident_blocks=0)
    assert whole["dit"] - none["dit"] == 38 * block_bytes(row.dit, "bfloat16")
    assert part_bytes(row, "bfloat16", resident_blocks=60) == whole
    assert (
        block_bytes(row.dit, "bfloat16") == 702_788_608
    )  # a block of the published model, by hand: 351 394 304 parameters
    plan = make_plan(Request(prompt="x"), row)
    slim = need(plan, row, "bfloat16", on_gpu=True, resident_blocks=0, quantise="fp8")
    assert slim.gpu < need(plan, row, "bfloat16", on_gpu=True, quantise="fp8").gpu
    assert slim.host > need(plan, row, "bfloat16", on_gpu=True, resident_blocks=0).host


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ({"quantise": "fp16"}, "E2039", "Did you mean 'fp8'"),
        ({"quantise": "fp8-compute"}, "E8009", "Use fp8,"),
        ({"attention": "flash-3"}, "E8007", "needs an NVIDIA GPU"),
        ({"resident_blocks": -1}, "E2040", "0 or more"),
        ({"resident_blocks": 0, "quantise": "int8"}, "E2040", "conflicts with quantise"),
        ({"row_chunks": 0}, "E2055", "row-chunks: got 0"),
        ({"vae_rows": -8}, "E2055", "1 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_weights_are_read(how: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        load("demo-t2v", device="cpu", **how)
    assert caught.value.code == code
