"""`wanloom calibrate cache`: what it measures is found by later runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wanloom import Request, load
from wanloom.calibrate import calibrate
from wanloom.errors import InputError
from wanloom.runtime.caching.fit import CacheFit

SHORT = ("--task", "demo-t2v", "--steps", "8", "--frames", "5", "--seed", "1", "--device", "cpu")


def test_what_was_measured_is_used(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ("--prompt", "a red circle moves left on sand")
    refused = run("generate", *SHORT, *words, "--cache", "magcache", "--out", "a.mp4")
    assert refused.code == 2 and "wanloom calibrate cache" in refused.err
    measured = run("calibrate", "cache", *SHORT, *words, "--videos", "2")
    assert measured.code == 0, measured.err
    (file,) = (tmp_path / "cache" / "fits").iterdir()
    assert str(file) in measured.err + measured.out
    fit = CacheFit.from_json(file.read_bytes())
    assert fit.steps == 8 and set(fit.ratios) == {"cond", "uncond"} and len(fit.polynomials) == len(fit.spans)
    assert all(0.1 < ratio < 3 for row in fit.ratios.values() for ratio in row)
    made = run("generate", *SHORT, *words, "--cache", "magcache", "--out", "a.mp4")
    assert made.code == 0, made.err
    assert json.loads(run("generate", "--like", "a.mp4", "--dry-run").out)["cache"] == "magcache"
    assert sorted(path.name for path in Path().iterdir()) == ["a.mp4", "cache"]


def test_prompts_are_averaged_and_nothing_is_decoded() -> None:
    pipe = load("demo-t2v", device="cpu")
    ask = [Request(prompt=f"a {colour} circle", steps=4, frames=5, seed=1) for colour in ("red", "blue")]
    stages: list[tuple[int, str]] = []
    both = calibrate(pipe, ask, lambda number, event: stages.append((number, event.stage)))
    one, two = (calibrate(pipe, [request]) for request in ask)
    assert {number for number, stage in stages if stage == "denoise"} == {0, 1}
    for branch, row in both.ratios.items():
        pairs = zip(one.ratios[branch], two.ratios[branch], strict=True)
        assert row == pytest.approx([(a + b) / 2 for a, b in pairs], abs=2e-5)


@pytest.mark.parametrize(
    "requests",
    [
        [Request(prompt="a", steps=2, cache="taylor")],
        [Request(prompt="a", steps=2, num=2)],
        [Request(prompt="a", steps=2, frames=1), Request(prompt="a", steps=3, frames=1)],
    ],
    ids=["cache", "several", "steps"],
)
def test_what_cannot_be_measured_is_refused(requests: list[Request]) -> None:
    with pytest.raises(InputError, match="calibrate") as caught:
        calibrate(load("demo-t2v", device="cpu"), requests)
    assert caught.value.code == "E2023"
