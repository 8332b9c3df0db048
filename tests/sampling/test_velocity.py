"""Conditioning, guidance and experts; at the end whole runs of the reference, from noise to latents."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wanloom.encoders import Tokenizer, build_umt5, encode_text
from wanloom.models.config import DiTConfig, TextConfig
from wanloom.models.dit import DiT
from wanloom.sampling.samplers import SAMPLERS, Velocity, hold
from wanloom.sampling.schedule import Schedule, make_schedule
from wanloom.sampling.velocity import AtOnce, Experts, by_expert, conditioned, expert_for, guided, heard, joined, later
from wanloom.variants import VARIANTS, Variant

TWO = (("high", 0.875), ("low", 0.0))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---------------------------------------------------------------- conditioning and guidance


def test_the_model_gets_t_alone_or_t_and_zero_when_frames_have_groups() -> None:
    seen: list[dict[str, Any]] = []

    def forward(x: Tensor, t: Tensor, context: Tensor, group: Tensor | None = None) -> Tensor:
        seen.append({"t": t, "context": context, "group": group})
        return x

    x, context, group = torch.ones(2, 1, 3, 2, 2), torch.zeros(2, 1, 4), torch.tensor([1, 0, 0])
    conditioned(forward, {"context": context})(x, 937.0)
    conditioned(forward, {"context": context, "group": None})(x, 937.0)
    conditioned(forward, {"context": context, "group": group})(x, 937.0)
    assert [s["t"].tolist() for s in seen] == [[[937.0]] * 2, [[937.0]] * 2, [[937.0, 0.0]] * 2]
    assert seen[2]["group"] is group
    assert all(s["context"] is context for s in seen)


def test_guidance_leaves_the_unconditional_side_by_its_scale() -> None:
    calls = []

    def side(name: str, value: float) -> Velocity:
        def velocity(x: Tensor, t: float) -> Tensor:
            calls.append(name)
            return torch.full_like(x, value)

        return velocity

    x = torch.zeros(1, 1, 1, 1, 1)
    assert guided(side("cond", 3.0), side("uncond", 1.0), 4.0)(x, 1.0).item() == 1.0 + 4.0 * 2.0
    assert calls == ["cond", "uncond"]  # in this order: so does the reference
    assert guided(side("cond", 3.0), side("uncond", 1.0), 0.0)(x, 1.0).item() == 1.0


@pytest.mark.parametrize("uncond_given", [True, False])
def test_without_guidance_the_second_pass_is_not_made(uncond_given: bool) -> None:
    def never(x: Tensor, t: float) -> Tensor:
        raise AssertionError("the unconditional side was called")

    def cond(x: Tensor, t: float) -> Tensor:
        return x + 1

    velocity = guided(cond, never, 1.0) if uncond_given else guided(cond, None, 5.0)
    assert velocity(torch.zeros(1), 1.0).item() == 1.0


def test_both_passes_at_once_ask_the_model_once_the_one_with_the_prompt_first() -> None:
    asked: list[tuple[int, list[list[float]]]] = []
    said: dict[str, Tensor] = {}

    def forward(x: Tensor, t: Tensor, context: Tensor, group: Tensor) -> Tensor:
        asked.append((len(x), t.tolist()))
        return x + context[:, :, None, None, None]

    group = torch.tensor([1, 0])
    given = joined(
        {"context": torch.tensor([[3.0]]), "group": group}, {"context": torch.tensor([[1.0]]), "group": group}
    )
    assert given["group"] is group
    both = AtOnce(heard(forward, said, "with", "without"), given)
    velocity = guided(later(lambda: pytest.fail("asked")), both, 4.0)
    assert velocity(torch.zeros(1, 1, 1, 1, 1), 937.0).item() == 1.0 + 4.0 * 2.0
    assert asked == [(2, [[937.0, 0.0]] * 2)]
    assert (said["with"].item(), said["without"].item()) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("uncond", "said"),
    [
        ({"y": torch.zeros(1, 2), "group": torch.zeros(2)}, r"context is \[1, 3, 4\] with the prompt and absent"),
        ({"context": torch.zeros(1, 2, 4), "group": torch.zeros(2)}, r"and \[1, 2, 4\] without"),
        ({"context": torch.zeros(1, 3, 4), "group": torch.ones(2)}, "other groups"),
        ({"context": torch.zeros(1, 3, 4), "group": torch.zeros(2), "y": torch.zeros(1)}, "y is absent with"),
    ],
    ids=str,
)
def test_passes_that_read_other_things_cannot_be_made_at_once(uncond: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        joined({"context": torch.zeros(1, 3, 4), "group": torch.zeros(2)}, uncond)


def test_a_velocity_that_comes_later_is_made_once_and_only_if_asked() -> None:
    made: list[int] = []

    def make() -> Velocity:
        made.append(1)
        return lambda x, t: x * t

    velocity = later(make)
    assert made == []
    assert [velocity(torch.ones(1), t).item() for t in (2.0, 3.0)] == [2.0, 3.0]
    assert made == [1]


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize(
    ("boundary", "t", "name"),
    [
        (0.875, 875.0, "high"),
        (0.875, 874.0, "low"),
        (0.9, 900.0, "high"),
        (0.9, 899.999999, "low"),
        (0.875, 0.0, "low"),
    ],
)
def test_the_boundary_itself_belongs_to_the_first_expert(boundary: float, t: float, name: str) -> None:
    experts = (("high", boundary), ("low", 0.0))
    assert expert_for(experts, t) == name
    velocity = by_expert([(lambda x, t: x + 1, boundary), (lambda x, t: x, 0.0)])
    assert velocity(torch.zeros(1), t).item() == (1.0 if name == "high" else 0.0)


def test_a_timestep_that_no_expert_takes_is_an_error() -> None:
    with pytest.raises(ValueError, match="no expert takes t = 100"):
        expert_for((("high", 0.875),), 100.0)


@pytest.mark.parametrize(
    ("sampler", "steps", "shift", "boundary", "high"),
    [
        ("unipc", 40, 12.0, 0.875, 26),
        ("dpm++", 40, 12.0, 0.875, 26),
        ("unipc", 40, 5.0, 0.9, 15),
        ("dpm++", 40, 5.0, 0.9, 15),
    ],
)
def test_experts_share_the_published_schedules_as_the_reference(
    sampler: str, steps: int, shift: float, boundary: float, high: int
) -> None:
    names = [expert_for((("high", boundary), ("low", 0.0)), t) for t in make_schedule(sampler, steps, shift).timesteps]
    assert names == ["high"] * high + ["low"] * (steps - high)


class Weights:
    """A store of experts that notes what is brought in and given back."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.open: set[str] = set()

    @contextmanager
    def use(self, name: str) -> Iterator[Callable[..., Tensor]]:
        assert not self.open, "two experts in memory at once"
        self.open.add(name)
        self.events.append(f"+{name}")
        try:
            yield lambda x, t: x * (2 if name == "high" else 3)
        finally:
            self.open.remove(name)
            self.events.append(f"-{name}")


def bind(name: str, forward: Callable[..., Tensor]) -> Velocity:
    return lambda x, t: forward(x, t)


def test_experts_are_swapped_once_and_the_last_is_given_back() -> None:
    store = Weights()
    with Experts(TWO, store.use, bind) as velocity:
        assert store.events == []  # nothing is loaded before it is needed
        values = [velocity(torch.ones(1), t).item() for t in (999.0, 900.0, 875.0, 874.0, 10.0)]
        assert values == [2, 2, 2, 3, 3]
        assert velocity.name == "low"
    assert store.events == ["+high", "-high", "+low", "-low"]


def test_a_run_continued_below_the_boundary_loads_only_the_low_expert() -> None:
    store = Weights()
    with Experts(TWO, store.use, bind) as velocity:
        velocity(torch.ones(1), 500.0)
    assert store.events == ["+low", "-low"]


def test_an_error_in_a_step_gives_the_expert_back() -> None:
    store = Weights()
    with pytest.raises(RuntimeError), Experts(TWO, store.use, bind) as velocity:
        velocity(torch.ones(1), 999.0)
        raise RuntimeError
    assert store.events == ["+high", "-high"]
    assert velocity.name is None


# ---------------------------------------------------------------- whole runs of the reference


def umt5_name(name: str) -> str:
    """official -> transformers (spec core 2.7)."""
    attention, dense = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    for pattern, target in (
        (r"^token_embedding\.", "shared."),
        (r"^norm\.", "encoder.final_layer_norm."),
        (r"^blocks\.(\d+)\.attn\.", rf"encoder.block.\1.{attention}."),
        (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", rf"encoder.block.\1.{attention}.relative_attention_bias."),
        (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
        (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
        (r"^blocks\.(\d+)\.ffn\.gate\.0\.", rf"encoder.block.\1.{dense}.wi_0."),
        (r"^blocks\.(\d+)\.ffn\.fc1\.", rf"encoder.block.\1.{dense}.wi_1."),
        (r"^blocks\.(\d+)\.ffn\.fc2\.", rf"encoder.block.\1.{dense}.wo."),
    ):
        name = re.sub(pattern, target, name)
    return name


class Golden:
    """One golden case: the small checkpoint made anew, the request, and what the reference made of it."""

    def __init__(self, folder: Path, case: str) -> None:
        spec = importlib.util.spec_from_file_location("materialize", folder / "materialize.py")
        assert spec is not None and spec.loader is not None
        self._materialize: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._materialize)
        self.request = next(c for c in json.loads((folder / "cases.json").read_text()) if c["name"] == case)
        self._files = json.loads((folder / "checkpoints.json").read_text())[self.request["ckpt"]]
        self.latents = load_file(folder / f"{case}.safetensors")["latents"][None]
        self.variant: Variant = next(v for v in VARIANTS.values() if v.task == self.request["task"] and not v.demo)
        self._folder = folder

    def _weights(self, file: str) -> dict[str, Tensor]:
        entry = self._files[file]
        weights: dict[str, Tensor] = self._materialize.state_dict(entry["tensors"], entry["salt"])
        return weights

    def text(self) -> tuple[Tensor, Tensor]:
        weights = {umt5_name(k): v for k, v in self._weights("models_t5_umt5-xxl-enc-bf16.pth").items()}
        with torch.device("meta"):
            model = build_umt5(TextConfig(dim=48, ffn_dim=96, heads=3, head_dim=16, layers=3, vocab=34))
        model.load_state_dict(weights, assign=True)
        tokenizer = Tokenizer(self._folder / "tokenizer")
        prompts = [self.request["prompt"], self.variant.defaults.negative_prompt]
        cond, uncond = encode_text(model, tokenizer, prompts, 512)
        return cond[None], uncond[None]

    def dit(self, name: str) -> DiT:
        entry = self._files["." if name == "model" else name]
        c, weights = entry["config"], self._weights("." if name == "model" else name)
        config = DiTConfig(
            dim=c["dim"], ffn_dim=c["ffn_dim"], heads=c["num_heads"], layers=c["num_layers"],
            in_channels=c["in_dim"], out_channels=c["out_dim"], text_dim=48,
        )  # fmt: skip
        with torch.device("meta"):
            dit = DiT(config)
        dit.load_state_dict(weights, assign=True)
        return dit

    def schedule(self) -> Schedule:
        r = self.request
        return make_schedule(r["sample_solver"], r["sample_steps"], r["sample_shift"])

    @torch.no_grad()
    def run(
        self,
        *,
        experts: tuple[tuple[str, float], ...] | None = None,
        schedule: Schedule | None = None,
        guidance: tuple[float, float] | None = None,
        clean: Tensor | None = None,
    ) -> Tensor:
        experts = experts or self.variant.experts
        low, high = guidance or self.variant.defaults.guidance
        scales = {name: low if i else high for i, (name, _) in enumerate(experts)}
        cond, uncond = ({"context": context} for context in self.text())
        if clean is not None:
            group = torch.tensor([1] + [0] * (self.latents.shape[2] - 1))
            cond, uncond = cond | {"group": group}, uncond | {"group": group}

        @contextmanager
        def use(name: str) -> Iterator[Callable[..., Tensor]]:
            yield self.dit(name)

        def bind(name: str, forward: Callable[..., Tensor]) -> Velocity:
            return guided(conditioned(forward, cond), conditioned(forward, uncond), scales[name])

        generator = torch.Generator().manual_seed(self.request["seed"])
        noise = torch.randn(self.latents.shape[1:], generator=generator)[None]
        sampler = SAMPLERS[self.request["sample_solver"]]
        if clean is not None:
            sampler = hold(sampler, clean)
        with Experts(experts, use, bind) as velocity:
            return list(sampler(velocity, noise, schedule or self.schedule()))[-1].x


TOLERANCE = 1e-5


@pytest.mark.parametrize("case", ["t2v_unipc", "t2v_dpmpp", "ti2v_t2v"])
def test_latents_of_a_whole_run_are_the_references(case: str, golden: Path) -> None:
    reference = Golden(golden, case)
    got = reference.run()
    assert relative(got, reference.latents) <= TOLERANCE
    assert (got - reference.latents).abs().max() <= 5 * TOLERANCE * reference.latents.abs().max()


def test_a_run_with_a_held_first_frame_is_the_references(golden: Path) -> None:
    reference = Golden(golden, "ti2v_i2v")
    clean = reference.latents[:, :, :1]  # the reference puts the picture's latents here after every step
    got = reference.run(clean=clean)
    assert torch.equal(got[:, :, :1], clean)
    assert relative(got[:, :, 1:], reference.latents[:, :, 1:]) <= TOLERANCE


def test_details_of_a_run_that_are_wrong_exceed_the_tolerance(golden: Path) -> None:
    reference = Golden(golden, "t2v_unipc")
    schedule = reference.schedule()
    assert len({expert_for(reference.variant.experts, t) for t in schedule.timesteps}) == 2
    last_high = min(t for t in schedule.timesteps if t >= 875)
    off_by_one = tuple(
        (name, (last_high + 1) / 1000 if boundary else 0.0) for name, boundary in reference.variant.experts
    )
    exact_t = Schedule(schedule.sigmas, tuple(1000 * sigma for sigma in schedule.sigmas[:-1]))
    low, high = reference.variant.defaults.guidance
    for name, wrong in {
        "a step on the other side of the boundary": {"experts": off_by_one},
        "timesteps not cut to whole numbers": {"schedule": exact_t},
        "guidance in the other order": {"guidance": (high, low)},
    }.items():
        assert relative(reference.run(**wrong), reference.latents) > TOLERANCE, name
