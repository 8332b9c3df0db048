"""Decoding in bfloat16: near, asked for, and never what encodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from wanloom import VARIANTS, Request, load
from wanloom.budget import need, part_bytes, vae_activations
from wanloom.demo import world
from wanloom.errors import InputError, WanloomWarning
from wanloom.plan import make_plan
from wanloom.runtime import machine
from wanloom.runtime.kernels import require_vae_dtype


@pytest.fixture(autouse=True)
def has_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has bfloat16 products, whatever is here."""
    monkeypatch.setattr(machine, "cpu", lambda: machine.Cpu("a", 1, ("AVX2", "AVX512-BF16")))


pytestmark = pytest.mark.filterwarnings("ignore::wanloom.errors.WanloomWarning")


@pytest.mark.parametrize("name", ["demo-t2v", "demo-ti2v"])
def test_frames_differ_by_less_than_is_seen_and_latents_by_nothing(name: str) -> None:
    exact, near = (load(name, device="cpu", vae_dtype=dtype).parts for dtype in ("float32", "bfloat16"))
    clip, _ = world.examples(1)[0]
    video = torch.from_numpy(np.ascontiguousarray(world.render(clip))).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad(), exact.use("vae") as vae, near.use("vae") as encoder, near.use("decoder") as decoder:
        z, same = vae.encode(video)[0], encoder.encode(video)[0]
        one, two = (torch.cat(list(part.decode_chunks(z)), 2) for part in (vae, decoder))
    assert torch.equal(z, same)
    error = one - two
    psnr = float(10 * torch.log10(4 / error.square().mean()))
    # Measured: 61.7 and 63.1 dB, at most 0.027 of 2. A picture of 8 bits is rounded at 59 dB.
    assert 50 < psnr < 90 and 0 < float(error.abs().max()) < 0.1
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16} and decoder is not encoder
    with exact.use("decoder") as plain:
        assert plain is vae  # one module serves both where they are the same


def test_a_run_has_the_latents_of_float32_and_says_how_it_decoded(models: Path, tmp_path: Path) -> None:
    found = {}
    for dtype in ("float32", "bfloat16"):
        pipe = load(models / "t2v-A14B", device="cpu", vae_dtype=dtype)
        path = tmp_path / f"{dtype}.safetensors"
        pipe.run(Request(prompt="a red cat", size="32x32", frames=5, steps=2, seed=3, save_tensors=path))
        found[dtype] = load_file(path)
        assert pipe.parts.precision["vae"] == ("float32" if dtype == "float32" else "float32, decoding bfloat16")
    exact, near = found.values()
    assert torch.equal(exact["latents"], near["latents"])
    assert 0 < float((exact["video"] - near["video"]).abs().mean()) < 0.01


def test_the_budget_halves_the_decoding_and_nothing_else() -> None:
    row = VARIANTS["t2v-A14B"]
    plan = make_plan(Request(prompt="a cat"), row)
    exact, near = (need(plan, row, "bfloat16", on_gpu=True, vae_dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert exact == need(plan, row, "bfloat16", on_gpu=True)
    assert exact.stages[:-1] == near.stages[:-1]
    assert near.stages[-1].weights == part_bytes(row, "bfloat16")["vae"] // 2
    assert near.stages[-1].activations == exact.stages[-1].activations // 2
    assert vae_activations(row.vae, plan.size, decode=True) == exact.stages[-1].activations


@pytest.mark.parametrize("value", ["float16", "fp8", ""])
def test_another_dtype_is_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"vae-dtype: .* is not known") as caught:
        load("demo-t2v", device="cpu", vae_dtype=value or "bf")
    assert caught.value.code == "E2028"


def test_a_gpu_without_it_is_refused_and_a_cpu_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"7\.5, bfloat16 convolutions need 8\.0\. Use float32") as caught:
        require_vae_dtype("bfloat16", (7, 5))
    assert caught.value.code == "E8010"
    require_vae_dtype("bfloat16", (8, 0))
    require_vae_dtype("float32", (7, 5))
    how: dict[str, Any] = {"device": "cpu", "vae_dtype": "bfloat16"}
    load("demo-t2v", **how)
    monkeypatch.setattr(machine, "cpu", lambda: machine.Cpu("a", 1, ("AVX2",)))
    with pytest.warns(WanloomWarning, match="W8010: vae-dtype: this CPU has no bfloat16 products"):
        load("demo-t2v", **how)
    load("demo-t2v", device="cpu")
