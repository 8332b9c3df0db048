"""Few steps at noise levels of one's own, as distilled models take them: the steps that diffusers makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from wanloom.sampling.samplers import SAMPLERS
from wanloom.sampling.schedule import Schedule, explicit_schedule
from wanloom.sampling.velocity import Experts

LEVELS = {
    "four steps of a distilled model": (1.0, 0.9375, 0.8333, 0.625),
    "levels far apart": (0.97, 0.5, 0.02),
    "many close together": tuple(1 - i / 40 for i in range(30)),
    "one step": (1.0,),
}


def draw(seed: int = 0) -> Tensor:
    return torch.randn(1, 3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def crooked(x: Tensor, t: float) -> Tensor:
    return torch.sin(x) * 0.7 + x.flip(-1) * 0.2 + t / 900


def ours(name: str, schedule: Schedule) -> list[Tensor]:
    return [step.x for step in SAMPLERS[name](crooked, draw(), schedule)]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own set_timesteps
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_euler_is_the_flow_matching_solver_of_diffusers(levels: tuple[float, ...]) -> None:
    diffusers = pytest.importorskip("diffusers")
    solver = diffusers.FlowMatchEulerDiscreteScheduler()
    solver.set_timesteps(sigmas=list(levels), device="cpu")
    schedule = explicit_schedule("euler", levels)
    assert solver.sigmas.tolist() == pytest.approx(schedule.sigmas, abs=1e-7)
    assert solver.timesteps.tolist() == pytest.approx(schedule.timesteps, abs=1e-4)
    x = draw()
    for got, t in zip(ours("euler", schedule), solver.timesteps, strict=True):
        x = solver.step(crooked(x, float(t)), t, x, return_dict=False)[0]
        assert (got - x).abs().max() <= 1e-6 * x.abs().max()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_the_other_solvers_take_levels_as_those_of_diffusers_do(name: str, levels: tuple[float, ...]) -> None:
    diffusers = pytest.importorskip("diffusers")
    kinds = {"unipc": diffusers.UniPCMultistepScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler}
    schedule = explicit_schedule(name, levels)
    solver: Any = kinds[name](prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
    solver.set_timesteps(schedule.steps)
    solver.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
    solver.timesteps = torch.arange(schedule.steps)
    x = draw()
    for i, (got, t) in enumerate(zip(ours(name, schedule), schedule.timesteps, strict=True)):
        x = solver.step(crooked(x, t), torch.tensor(i), x, return_dict=False)[0]
        assert bool(got.isfinite().all())
        assert (got - x).norm() <= 2e-6 * x.norm()  # their numbers are float32, ours double


def test_who_chooses_the_expert_may_be_told() -> None:
    opened: list[str] = []
    order = iter(["high", "low", "low"])

    class Use:
        def __init__(self, name: str) -> None:
            opened.append(name)

        def __enter__(self) -> Any:
            return crooked

        def __exit__(self, *_: object) -> None:
            opened.append("gone")

    boundaries = (("high", 0.875), ("low", 0.0))
    with Experts(boundaries, Use, lambda name, forward: forward, choose=lambda t: next(order)) as velocity:
        for _ in range(3):
            velocity(draw(), 1000.0)  # by the boundary all would be the first one's
    assert opened == ["high", "gone", "low", "gone"]
