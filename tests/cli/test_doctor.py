"""`wanloom doctor`: facts about this machine, found without torch."""

from __future__ import annotations

import json
import re
import tomllib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from wanloom.cli import doctor
from wanloom.rates import read_rates

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))


def test_versions_shown_are_those_of_the_imported_packages(run):
    import torch

    facts = json.loads(run("doctor", "--json").out)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["problems"] == []


def test_oldest_versions_are_those_of_pyproject():
    stated = dict(re.match(r"([a-z]+)>=([\d.]+)", line).groups() for line in PROJECT["project"]["dependencies"])
    assert {name: stated.get(name) for name in doctor.PACKAGES} == doctor.PACKAGES


@pytest.mark.parametrize(
    ("found", "said"), [(None, "torch is missing"), ("2.9.1+cpu", "torch 2.9.1+cpu is older than 2.10")]
)
def test_a_missing_or_old_package_is_named_and_exits_8(run, monkeypatch, found, said):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: found if name == "torch" else real(name))
    ran = run("doctor")
    assert ran.code == 8
    assert said in ran.out


def test_a_gpu_beside_a_cpu_build_of_torch_is_remarked(run, monkeypatch):
    card = doctor.machine.Gpu(0, "Test GPU", 24 * 10**9, 20 * 10**9, (8, 9))
    monkeypatch.setattr(doctor.machine, "gpus", lambda: (card,))
    monkeypatch.setattr(doctor, "_torch_build", lambda version: "cpu")
    ran = run("doctor")
    assert "Test GPU, 20.0 GB free of 24.0 GB, compute capability 8.9" in ran.out
    assert "CPU build" in ran.out


@pytest.mark.parametrize(("there", "said"), [("3.7.1", "3.7.1; --fused can be had"), (None, "missing; --fused needs")])
def test_triton_and_what_it_is_for_are_listed(run, monkeypatch, there, said):
    card = doctor.machine.Gpu(0, "Test GPU", 24 * 10**9, 20 * 10**9, (8, 9))
    real = doctor._version
    monkeypatch.setattr(doctor.machine, "gpus", lambda: (card,))
    monkeypatch.setattr(doctor, "_torch_build", lambda version: "cuda 13.0")
    monkeypatch.setattr(doctor, "_version", lambda name: there if name == "triton" else real(name))
    missing = partial(doctor.FUSED_FACTS.missing, there=lambda module: there is not None)
    monkeypatch.setattr(doctor, "FUSED_FACTS", SimpleNamespace(missing=missing))
    assert said in run("doctor").out


@pytest.mark.parametrize(("version", "build"), [("2.13.0+cpu", "cpu"), ("2.13.0+cu130", "cuda 13.0"), (None, "no")])
def test_the_build_of_torch_is_read_from_its_version(version, build):
    assert doctor._torch_build(version) == build


def test_full_also_computes_and_tries_every_encoder(run):
    tried = json.loads(run("doctor", "--full", "--json").out)["tried"]
    assert re.fullmatch(r"\d+ GFLOP/s in float32 on the CPU", tried["matrix product"])
    assert {suffix: tried[suffix] for suffix in doctor.SUFFIXES} == dict.fromkeys(doctor.SUFFIXES, "works")


def test_the_cache_is_shown_and_cleared(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANLOOM_CACHE", str(tmp_path))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "ab.safetensors").write_bytes(bytes(3000))
    shown = run("doctor", "--cache", "--json")
    assert json.loads(shown.out) == {
        "directory": str(tmp_path), "freed": 0,
        "kinds": {
            "prompts": {"files": 1, "bytes": 3000}, "fits": {"files": 0, "bytes": 0},
            "weights": {"files": 0, "bytes": 0},
            "rates": {"files": 0, "bytes": 0}, "runs": {"files": 0, "bytes": 0},
        },
    }  # fmt: skip
    cleared = run("doctor", "--cache", "clear")
    assert "freed" in cleared.out and not (tmp_path / "prompts").exists()


def test_attention_kernels_are_listed_and_timed(run):
    found = json.loads(run("doctor", "--measure", "--json").out)
    assert found["attention"]["sdpa"] is None and "NVIDIA" in found["attention"]["flash-3"]
    assert "NVIDIA" in found["attention"]["int8"] and "NVIDIA" in found["fused"]
    here = {name for name, reason in found["attention"].items() if reason is None}
    assert set(found["measured"]) == here
    assert all(row["seconds"] > 0 and 1e-4 < row["error"] < 2e-2 for row in found["measured"].values())


def test_calibrating_measures_and_keeps_what_later_estimates_use(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANLOOM_CACHE", str(tmp_path / "cache"))
    ran = run("doctor", "--calibrate", "--calibrate-share", 0.001, "--device", "cpu")
    assert ran.code == 0, ran.err
    names = [line.split("  ")[0] for line in ran.out.splitlines()[:-1]]
    wanted = [f"{kind} {dtype}" for dtype in ("float32", "bfloat16") for kind in ("matrix", "attention")]
    assert names == [*wanted, "conv", "copy", "disk", "call"]
    rates = read_rates("cpu")
    assert rates.measured and 1e6 < rates.matrix["float32"] < 1e15 and 1e-8 < rates.call < 1e-2
    (kept,) = (tmp_path / "cache" / "rates").iterdir()
    assert ran.out.splitlines()[-1] == f"kept for cpu: {kept}"
    assert "(calibrated)" in run("plan", "demo-t2v").out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--device", "cpu"], 2, "E2023"), (["--calibrate", "--device", "cuda:99"], 8, "E8002"),
        (["--calibrate", "--device", "gpu"], 2, "E2027"),
    ],
)  # fmt: skip
def test_a_device_that_cannot_be_calibrated_is_refused(run, words, code, said):
    ran = run("doctor", *words)
    assert ran.code == code and f"error[{said}]" in ran.err
