"""Runs whose parts are placed by what is free: they do as planned, and give the bits of a run with room for all."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from wanloom.parts import Parts
from wanloom.pipeline import Pipeline, load
from wanloom.placement import RESIDENT, STREAMED, SWAPPED, MemoryPlan, Wishes
from wanloom.request import Request
from wanloom.runtime import machine
from wanloom.runtime.streaming import Streamed, StreamedLayers

SHORT: dict[str, Any] = {"size": (64, 64), "frames": 5, "steps": 2, "shift": 1.0, "seed": 7}
PLENTY = 2**50

pytestmark = pytest.mark.filterwarnings("ignore:W2004", "ignore:warning.W4018")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A model whose transformer and text encoder are larger than what they compute with."""
    row = tiny.TINY["t2v-A14B"]
    text = replace(row.text, layers=8, dim=256, ffn_dim=512)
    patch = pytest.MonkeyPatch()
    dit = replace(row.dit, layers=8, dim=256, ffn_dim=512, text_dim=256)
    patch.setitem(tiny.TINY, "t2v-A14B", replace(row, dit=dit, text=text))
    folder = tiny.checkpoint(tmp_path_factory.mktemp("model"), "t2v-A14B")
    patch.undo()
    yield load(folder, task="t2v-A14B", device="cpu")


@pytest.fixture(scope="module")
def latents(pipe: Pipeline) -> torch.Tensor:
    return pipe("a red cat", **SHORT).latents


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`free(n)`: a machine with n bytes free for this process."""

    def set_free(count: int) -> None:
        monkeypatch.setattr(machine, "memory", lambda: (PLENTY, count))
        monkeypatch.setattr(machine, "own_memory", lambda: 0)

    return set_free


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bool]]:
    """What was brought in: part, expert, whether it is streamed."""
    found: list[tuple[str, str, bool]] = []
    right = Parts._load

    def loading(parts: Parts, part: str, expert: str | None) -> nn.Module:
        module = right(parts, part, expert)
        streamed = any(isinstance(child, Streamed | StreamedLayers) for child in module.modules())
        found.append((part, expert or "", streamed))
        return module

    monkeypatch.setattr(Parts, "_load", loading)
    return found


def planned(pipe: Pipeline) -> MemoryPlan:
    return pipe.place(pipe.prepare(Request(prompt="a red cat", **SHORT)))


@pytest.mark.matrix
def test_what_does_not_fit_is_streamed_by_itself_with_the_same_bits(
    pipe: Pipeline, latents: torch.Tensor, free: Any, brought: list[tuple[str, str, bool]]
) -> None:
    free(PLENTY)
    assert planned(pipe).keeps
    pipe.wishes = Wishes(offload=True)
    whole = planned(pipe).need.host
    pipe.wishes = Wishes()
    seen = set()
    for less in (0, 1, 6_000_000, 11_000_000):
        free(whole - less)
        memory = planned(pipe)
        assert memory.need.host <= whole - less
        seen.add((memory.modes["text"], memory.modes["dit"], memory.resident_blocks))
        brought.clear()
        assert torch.equal(pipe("a red cat", **SHORT).latents, latents)
        dit, text = (memory.modes[part] == STREAMED for part in ("dit", "text"))
        assert brought == [
            ("text", "", text), ("dit", "high_noise_model", dit), ("dit", "low_noise_model", dit), ("vae", "", False)
        ]  # fmt: skip
        assert not pipe.parts._loaded, "what does not stay for the next run is gone"
    assert {(SWAPPED, SWAPPED, None)} < seen
    assert {STREAMED} <= {text for text, _, _ in seen} and len({stay for _, _, stay in seen}) >= 3


@pytest.mark.parametrize(
    ("offload", "stays"), [(True, set()), (False, {"text", "high_noise_model", "low_noise_model", "vae"})]
)
def test_offload_model_lets_parts_go_after_their_use_or_keeps_them_all(
    pipe: Pipeline, latents: torch.Tensor, free: Any, offload: bool, stays: set[str]
) -> None:
    free(PLENTY)
    pipe.wishes = Wishes(offload=offload)
    assert torch.equal(pipe("a red cat", **SHORT).latents, latents)
    assert {expert or part for part, expert in pipe.parts._loaded} == stays
    pipe.wishes = Wishes()
    pipe.parts.release()


def test_a_plan_that_was_made_before_is_followed(
    pipe: Pipeline, latents: torch.Tensor, free: Any, brought: list[tuple[str, str, bool]]
) -> None:
    free(PLENTY)
    memory = planned(pipe)
    pipe.memory = replace(
        memory, modes={"text": STREAMED, "dit": STREAMED, "vae": RESIDENT}, resident_blocks=3, keeps=False
    )
    assert torch.equal(pipe("a red cat", **SHORT).latents, latents)
    pipe.memory = None
    assert [streamed for _, _, streamed in brought] == [True, True, True, False]


def silence(path: Path) -> Path:
    """1.1 seconds of a sound: two clips of 8 frames and a third one."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(2 * 17_600))
    return path


@pytest.mark.parametrize("dit", [SWAPPED, STREAMED, RESIDENT])
def test_the_transformer_of_clips_leaves_before_a_clip_is_decoded_or_stays(
    models: Path, tmp_path: Path, free: Any, brought: list[tuple[str, str, bool]], dit: str
) -> None:
    free(PLENTY)
    pipe = load(models / "s2v-14B", task="s2v-14B", device="cpu")
    wanted = Request(
        prompt="a cat", image=tiny.picture(tmp_path / "face.png", (64, 64)), audio=silence(tmp_path / "a.wav"),
        size=(64, 64), infer_frames=8, steps=1, guidance=1.0, seed=3,
    )  # fmt: skip
    expected = pipe.run(wanted).videos[0]
    memory = pipe.place(pipe.prepare(wanted))
    modes, blocks = {**dict.fromkeys(memory.modes, SWAPPED), "dit": dit}, 0 if dit == STREAMED else None
    pipe.memory = replace(memory, modes=modes, resident_blocks=blocks, keeps=False)
    brought.clear()
    made = pipe.run(wanted).videos[0]
    assert torch.equal(made.tensor, expected.tensor)
    clips = len(made.plan.segments)
    assert clips > 1
    assert [part for part, _, _ in brought].count("dit") == (1 if dit == RESIDENT else clips)
    assert not pipe.parts._loaded
