"""Steps skipped and guidance reused in whole runs: nothing changes unasked, and an interrupted run ends the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wanloom import Pipeline, Request, load, shortcuts
from wanloom.errors import InputError
from wanloom.plan import Plan, request_like
from wanloom.request import CACHE_NAMES, GUIDANCE_MODES
from wanloom.runtime.caching.fit import CacheFit
from wanloom.runtime.caching.presets import PRESETS
from wanloom.sampling.guidance import RECIPES
from wanloom.store import Store

STEPS = 10
PROMPT = "a red circle moves left on sand"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return load("demo-t2v", device="cpu")


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANLOOM_CACHE", str(tmp_path / "cache"))


def request(**fields: Any) -> Request:
    return Request(**{"prompt": PROMPT, "steps": STEPS, "frames": 5, "seed": 3, **fields})


def latents(pipe: Pipeline, folder: Path, **fields: Any) -> Tensor:
    path = folder / "t.safetensors"
    pipe.run(request(save_tensors=path, overwrite=True, **fields))
    return load_file(path)["latents"]


def fit_of(steps: int, ratio: float = 0.999) -> CacheFit:
    row = (1.0, *[ratio] * (steps - 1))
    return CacheFit(spans=((0, 6), (6, steps)), ratios={"cond": row, "uncond": row}, polynomials=((1.0, 0.0),) * 2)


def test_the_names_are_those_of_the_tables() -> None:
    assert tuple(PRESETS) == CACHE_NAMES and tuple(RECIPES) == GUIDANCE_MODES


def test_with_a_threshold_of_zero_nothing_changes(pipe: Pipeline, tmp_path: Path) -> None:
    plain = latents(pipe, tmp_path)
    assert torch.equal(latents(pipe, tmp_path, cache="easycache", cache_threshold=0.0), plain)
    assert torch.equal(latents(pipe, tmp_path, guidance_mode="plain"), plain)


@pytest.mark.parametrize(
    "fields", [{"cache": "taylor"}, {"cache": "easycache", "cache_threshold": 0.3}, {"guidance_mode": "late"}], ids=str
)
def test_a_shortcut_is_taken_and_stays_near(fields: dict[str, Any], pipe: Pipeline, tmp_path: Path) -> None:
    plain, short = latents(pipe, tmp_path), latents(pipe, tmp_path, **fields)
    distance = float((short - plain).norm() / plain.norm())
    assert 1e-4 < distance < 0.6


@pytest.mark.parametrize("fields", [{"cache": "taylor"}, {"guidance_mode": "late"}], ids=str)
@pytest.mark.parametrize("stop", [5, 8])
def test_an_interrupted_run_ends_with_the_same_bits(
    fields: dict[str, Any], stop: int, pipe: Pipeline, tmp_path: Path
) -> None:
    whole = latents(pipe, tmp_path, num=1, **fields)
    path = tmp_path / "b.safetensors"
    stream = pipe.stream(request(save_every=1, save_tensors=path, **fields), out=tmp_path / "a.mp4")
    for event in stream:
        if event.stage == "denoise" and event.step == stop:
            break
    stream.close()
    result = pipe.run(request(save_tensors=path, **fields), resume=tmp_path / "a.job")
    assert result.began_at == stop
    assert torch.equal(load_file(path)["latents"], whole)


def test_videos_that_take_turns_do_not_mix(pipe: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    pipe.run(request(cache="taylor", num=2, save_tensors=path))
    for seed in (3, 4):
        together = load_file(tmp_path / f"t_{seed}.safetensors")["latents"]
        (tmp_path / "alone").mkdir(exist_ok=True)
        assert torch.equal(together, latents(pipe, tmp_path / "alone", cache="taylor", seed=seed))


def test_a_video_carries_its_shortcuts(pipe: Pipeline) -> None:
    asked = request(cache="taylor", guidance_mode="late")
    plan = Plan.from_json(pipe.prepare(asked).plan.to_json())
    again = request_like(plan)
    assert (again.cache, again.cache_threshold, again.guidance_mode) == ("taylor", None, "late")


def test_the_models_stay_as_they_were(pipe: Pipeline, tmp_path: Path) -> None:
    before = latents(pipe, tmp_path)
    latents(pipe, tmp_path, cache="taylor")
    assert torch.equal(latents(pipe, tmp_path), before)


# ---------------------------------------------------------------- figures of the model


def test_without_figures_a_cache_that_needs_them_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="easycache") as caught:
        pipe.run(request(cache="magcache"))
    assert caught.value.code == "E2047"


@pytest.mark.parametrize("place", ["store", "beside"])
def test_a_measured_fit_is_found(place: str, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, kept = shortcuts.fit_files(pipe.parts.files)
    assert beside.parent.name == "demo-t2v" and kept.parent.name == "fits"
    if place == "beside":
        kept = tmp_path / shortcuts.BESIDE
        monkeypatch.setattr(shortcuts, "fit_files", lambda files: (kept, tmp_path / "none.json"))
    else:
        Store("fits", 1).open()
    kept.write_text(fit_of(STEPS).to_json())
    plain = latents(pipe, tmp_path)
    assert not torch.equal(latents(pipe, tmp_path, cache="magcache"), plain)


def test_a_damaged_fit_is_named(pipe: Pipeline) -> None:
    _, kept = shortcuts.fit_files(pipe.parts.files)
    Store("fits", 1).open()
    kept.write_text("{")
    with pytest.raises(InputError, match="wanloom calibrate cache") as caught:
        pipe.run(request(cache="magcache"))
    assert caught.value.code == "E4036"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"cache": "teacup"}, "E2046"),
        ({"cache_threshold": 0.1}, "E2046"),
        ({"cache": "taylor", "cache_threshold": -1.0}, "E2046"),
        ({"cache": "taylor", "cache_threshold": 0.1}, "E2046"),
        ({"guidance_mode": "later"}, "E2048"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], code: str, pipe: Pipeline) -> None:
    with pytest.raises(InputError) as caught:
        pipe.run(request(**fields))
    assert caught.value.code == code
