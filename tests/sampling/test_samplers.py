"""Samplers: the reference's trajectories, a known solution, and a run that stops and goes on after any step."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wanloom.sampling.samplers import SAMPLERS, Step, hold
from wanloom.sampling.schedule import SAMPLER_NAMES, Schedule, explicit_schedule, make_schedule

GOLDEN_TOLERANCE = 1e-5  # rounding gives 1e-7


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(name: str, velocity: Any, x: Tensor, schedule: Schedule) -> list[Step]:
    return list(SAMPLERS[name](velocity, x, schedule))


def crooked(x: Tensor, t: float) -> Tensor:
    return torch.sin(x) * 0.7 + x.flip(-1) * 0.2 + t / 900


# ---------------------------------------------------------------- the reference's numbers


def probe(x: Tensor, t: float) -> Tensor:
    return 0.3 * x + 0.001 * t * torch.tensor([1.0, 2.0, -1.0, 0.5])


PUBLISHED = {  # (sampler, steps, shift) -> the last latents from [1, -0.5, 0.25, 2] (spec core 6.4)
    ("unipc", 4, 5.0): (0.091540, -1.630303, 0.815151, 1.133800),
    ("unipc", 4, 12.0): (-0.060336, -1.909375, 0.954688, 1.043053),
    ("unipc", 8, 5.0): (0.232912, -1.370446, 0.685223, 1.218218),
    ("dpm++", 4, 5.0): (0.083994, -1.644156, 0.822078, 1.129284),
    ("dpm++", 4, 12.0): (-0.063009, -1.914380, 0.957190, 1.041512),
    ("dpm++", 8, 5.0): (0.228570, -1.378366, 0.689183, 1.215589),
}


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_the_last_latents_are_the_published_vector(case: tuple[str, int, float]) -> None:
    name, steps, shift = case
    start = torch.tensor([1.0, -0.5, 0.25, 2.0])
    last = run(name, probe, start, make_schedule(name, steps, shift))[-1].x
    torch.testing.assert_close(last, torch.tensor(PUBLISHED[case]), rtol=0, atol=1.5e-6)


def test_every_step_of_unipc_is_the_published_vector() -> None:
    column = [
        step.x[0].item()
        for step in run("unipc", probe, torch.tensor([1.0, -0.5, 0.25, 2.0]), make_schedule("unipc", 8, 5.0))
    ]
    expected = (0.963896, 0.920687, 0.868, 0.801581, 0.716168, 0.604892, 0.464104, 0.232912)
    assert column == pytest.approx(expected, abs=1.5e-6)


@pytest.mark.parametrize(("name", "key"), [("unipc", "traj_unipc"), ("dpm++", "traj_dpmpp")])
def test_trajectories_are_the_references(name: str, key: str, golden: Path) -> None:
    expected = load_file(golden / "components.safetensors")[key]
    start = torch.linspace(-2, 2, 64).view(1, 4, 4, 4)
    steps = run(name, lambda x, t: 0.3 * x + math.sin(t / 200), start, make_schedule(name, 8, 5.0))
    for got, reference in zip([start, *(step.x for step in steps)], expected, strict=True):
        assert relative(got, reference) <= GOLDEN_TOLERANCE
        assert (got - reference).abs().max() <= 5 * GOLDEN_TOLERANCE * reference.abs().max()


def theirs(name: str, schedule: Schedule, start: Tensor, velocity: Any) -> list[Tensor]:
    """The same run by diffusers, at our noise levels and timesteps."""
    diffusers = pytest.importorskip("diffusers")
    kinds = {"unipc": diffusers.UniPCMultistepScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler}
    solver = kinds[name](prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
    solver.set_timesteps(schedule.steps)
    solver.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
    # It finds its place by the value of t: whole numbers that repeat would lead it astray, so it gets the index.
    solver.timesteps = torch.arange(schedule.steps)
    out, x = [], start
    for i, t in enumerate(schedule.timesteps):
        x = solver.step(velocity(x, t), torch.tensor(i), x, return_dict=False)[0]
        out.append(x)
    return out


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own set_timesteps
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 12, 15, 20])
@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_trajectories_are_diffusers_at_equal_levels(name: str, steps: int, shift: float) -> None:
    schedule, start = make_schedule(name, steps, shift), draw(1, 3, 2, 4, 4)
    got = [step.x for step in run(name, crooked, start, schedule)]
    for ours, expected in zip(got, theirs(name, schedule, start, crooked), strict=True):
        assert relative(ours, expected) <= 1e-6


# ---------------------------------------------------------------- a second way: a solution known in closed form

SPREAD = 0.6  # the data are Gaussian with this standard deviation


def exact_velocity(schedule: Schedule) -> Any:
    sigma_of = dict(zip(schedule.timesteps, schedule.sigmas[:-1], strict=True))

    def velocity(x: Tensor, t: float) -> Tensor:
        sigma = sigma_of[t]
        total = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
        x0 = x * ((1 - sigma) * SPREAD**2 / total)
        return (x - x0) / sigma

    return velocity


def final_error(name: str, steps: int) -> float:
    """The distance from the exact end of the path, x(sigma) = x(1) * sqrt((1 - sigma)^2 s^2 + sigma^2).

    The last level is 0.02 and not 0: the jump to 0 is of first order in all three.
    """
    sigmas = [1 - (1 - 0.02) * i / steps for i in range(steps + 1)]
    schedule = explicit_schedule("euler", sigmas)
    start = torch.full((1,), 1.0, dtype=torch.float64)
    steps_made = run(name, exact_velocity(schedule), start, schedule)
    return abs(steps_made[-2].x.item() - math.sqrt(0.98**2 * SPREAD**2 + 0.02**2))


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 2)])
def test_halving_the_steps_shrinks_the_error_by_the_solvers_order(name: str, order: int) -> None:
    ratio = final_error(name, 64) / final_error(name, 128)
    assert 2**order * 0.75 < ratio < 2 ** (order + 1.6)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_a_single_clean_picture_is_found_in_any_number_of_steps(name: str) -> None:
    picture, start = draw(1, 3, 1, 2, 2, seed=1).double(), draw(1, 3, 1, 2, 2).double()
    for steps in (1, 2, 5):
        schedule = explicit_schedule("euler", [1 - 0.9 * i / steps for i in range(steps)])
        sigma_of = dict(zip(schedule.timesteps, schedule.sigmas[:-1], strict=True))
        made = run(name, lambda x, t, s=sigma_of: (x - picture) / s[t], start, schedule)
        torch.testing.assert_close(made[-1].x, picture, rtol=1e-12, atol=1e-12)
        assert all(torch.allclose(step.x0, picture) for step in made)


# ---------------------------------------------------------------- runs that stop and go on


def digest(step: Step) -> str:
    sha = hashlib.sha256(repr((step.index, step.t, step.sigma)).encode())
    for name, tensor in sorted(
        {"x": step.x, "x0": step.x0, **{f"state.{k}": v for k, v in step.state.items()}}.items()
    ):
        sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_a_run_continued_after_any_step_makes_the_same_bits(name: str, held: bool) -> None:
    start = draw(1, 3, 3, 4, 4)
    sampler = hold(SAMPLERS[name], draw(1, 3, 1, 4, 4, seed=9)) if held else SAMPLERS[name]
    schedule = make_schedule(name, 9, 5.0)
    whole = list(sampler(crooked, start, schedule))
    assert [step.index for step in whole] == list(range(9))
    for last in whole[:-1]:
        state = {key: value.clone() for key, value in last.state.items()}  # as read back from a file
        rest = list(sampler(crooked, last.x.clone(), schedule, start=last.index + 1, state=state))
        assert [digest(step) for step in rest] == [digest(step) for step in whole[last.index + 1 :]]


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_a_step_is_not_changed_by_the_steps_after_it(name: str) -> None:
    seen, digests = [], []
    for step in SAMPLERS[name](crooked, draw(1, 2, 1, 4, 4), make_schedule(name, 6, 3.0)):
        seen.append(step)
        digests.append(digest(step))
    assert [digest(step) for step in seen] == digests


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_any_number_of_steps_works(name: str) -> None:
    # The reference finds its place by whole timesteps and fails where two are equal: shift 12 from 92 steps.
    for steps in (1, 2, 92, 100, 300):
        made = run(name, crooked, draw(1, 2, 1, 4, 4), make_schedule(name, steps, 12.0))
        assert len(made) == steps
        assert made[-1].x.isfinite().all()


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_the_model_is_called_once_a_step_with_the_schedules_timestep(name: str) -> None:
    schedule, told = make_schedule(name, 7, 5.0), []

    def velocity(x: Tensor, t: float) -> Tensor:
        told.append(t)
        return crooked(x, t)

    run(name, velocity, draw(1, 2, 1, 4, 4), schedule)
    assert told == list(schedule.timesteps)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_a_step_waits_for_no_value(name: str) -> None:
    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                waits.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        run(name, lambda x, t: x * 0.5, draw(1, 2, 1, 4, 4), make_schedule(name, 5, 5.0))
    assert waits == []


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_held_frames_stay_and_the_others_do_not_notice(name: str) -> None:
    clean, start, schedule = draw(1, 2, 2, 4, 4, seed=9), draw(1, 2, 5, 4, 4), make_schedule(name, 6, 5.0)
    shown = []

    def velocity(x: Tensor, t: float) -> Tensor:
        shown.append(x[:, :, :2])
        return crooked(x, t)

    free = run(name, crooked, start, schedule)
    held = list(hold(SAMPLERS[name], clean)(velocity, start, schedule))
    assert all(torch.equal(x, clean) for x in shown)
    for one, other in zip(held, free, strict=True):
        assert torch.equal(one.x[:, :, :2], clean)
        assert torch.equal(one.x[:, :, 2:], other.x[:, :, 2:])
        assert torch.equal(one.x0[:, :, 2:], other.x0[:, :, 2:])
