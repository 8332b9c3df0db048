"""Guidance that is reused, left out or rescaled: what is asked of the model, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from wanloom.sampling.guidance import RECIPES, Guidance, Recipe, guide, nearest_to
from wanloom.sampling.samplers import Velocity
from wanloom.sampling.velocity import AtOnce, guided

STEPS = 8


@dataclass
class Here:
    """A place in a run."""

    step: int = 0
    steps: int = STEPS
    video: int = 0


class Model:
    """Two velocities that differ in each step, and who was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def side(self, name: str, place: Here) -> Velocity:
        def velocity(x: Tensor, t: float) -> Tensor:
            self.asked.append(f"{name}{place.step}")
            return (x * (1.3 if name == "c" else 0.7) + 0.1 * place.step).sin()

        return velocity


def run(recipe: Recipe, *, videos: int = 1, scale: float = 3.0) -> tuple[list[Tensor], list[str]]:
    """The latents of some videos that take turns, and who was asked."""
    place, model = Here(), Model()
    velocity = guide(model.side("c", place), model.side("u", place), scale, place, recipe)
    xs = [torch.randn(2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(videos)]
    for place.step in range(STEPS):
        for place.video in range(videos):
            xs[place.video] = xs[place.video] - velocity(xs[place.video], 500.0) / STEPS
    return xs, model.asked


def asked_without(recipe: Recipe) -> list[int]:
    """The steps in which the unconditional side was asked."""
    return [int(name[1:]) for name in run(recipe)[1] if name[0] == "u"]


@pytest.mark.parametrize("name", RECIPES)
def test_at_once_a_recipe_makes_the_same_and_asks_the_second_pass_no_oftener(name: str) -> None:
    place, model, recipe = Here(), Model(), RECIPES[name]
    (want,), asked = run(recipe)
    cond, uncond = model.side("c", place), model.side("u", place)

    def forward(x: Tensor, t: Tensor) -> Tensor:
        first, second = x.chunk(2)
        return torch.cat((cond(first, 0.0), uncond(second, 0.0)))

    velocity = guide(cond, AtOnce(forward, {}), 3.0, place, recipe)
    x = torch.randn(2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    for place.step in range(STEPS):
        x = x - velocity(x, 500.0) / STEPS
    assert torch.equal(x, want) and model.asked == asked


def test_switched_off_it_is_the_plain_guidance_itself() -> None:
    place, model = Here(), Model()
    cond, uncond = model.side("c", place), model.side("u", place)
    x = torch.randn(1, 2, 1, 2, 2)
    for recipe in (Recipe(), Recipe(every=0), Recipe(off=True)):
        velocity = guide(cond, uncond, 4.0, place, recipe)
        assert not isinstance(velocity, Guidance)
        assert torch.equal(velocity(x, 1.0), guided(cond, uncond, 4.0)(x, 1.0))
    for recipe in RECIPES.values():
        if recipe.zero == 0:
            assert guide(cond, uncond, 1.0, place, recipe) is cond
            assert guide(cond, None, 4.0, place, recipe) is cond


def test_before_its_share_of_the_steps_late_guidance_changes_no_bit() -> None:
    place, model = Here(), Model()
    cond, uncond = model.side("c", place), model.side("u", place)
    velocity, x = guide(cond, uncond, 4.0, place, RECIPES["late"]), torch.randn(1, 2, 1, 2, 2)
    for place.step in range(STEPS // 2):
        assert torch.equal(velocity(x, 1.0), guided(cond, uncond, 4.0)(x, 1.0))
    place.step = STEPS // 2
    assert not torch.equal(velocity(x, 1.0), guided(cond, uncond, 4.0)(x, 1.0))


def test_the_unconditional_side_is_asked_as_the_recipe_says() -> None:
    assert asked_without(Recipe(late=0.5)) == [0, 1, 2, 3, 5, 7]
    assert asked_without(Recipe(late=0.5, every=3)) == [0, 1, 2, 3, 6]
    assert asked_without(Recipe(late=0.5, every=0)) == [0, 1, 2, 3]
    assert asked_without(Recipe(late=0.5, off=True)) == [0, 1, 2, 3]
    assert asked_without(Recipe(late=0.0)) == [0, 2, 4, 6]  # nothing to reuse in the first step
    assert asked_without(Recipe(late=0.3)) == [0, 1, 2, 4, 6]
    assert asked_without(Recipe(optimised=True, zero=2)) == [2, 3, 4, 5, 6, 7]


def test_a_reused_direction_is_that_of_the_last_full_step() -> None:
    """v_cond + (scale - 1) * direction, the published form."""
    place, model = Here(step=3), Model()
    cond, uncond = model.side("c", place), model.side("u", place)
    velocity, x = guide(cond, uncond, 4.0, place, Recipe(late=0.5, every=0)), torch.randn(1, 2, 1, 2, 2)
    velocity(x, 1.0)
    direction = cond(x, 1.0) - uncond(x, 1.0)
    for place.step in (4, 7):
        torch.testing.assert_close(velocity(2 * x, 1.0), cond(2 * x, 1.0) + 3 * direction)


def test_without_guidance_the_end_of_a_run_is_conditional() -> None:
    place, model = Here(step=6), Model()
    cond = model.side("c", place)
    velocity, x = guide(cond, model.side("u", place), 4.0, place, RECIPES["late-off"]), torch.randn(1, 2, 1, 2, 2)
    assert torch.equal(velocity(x, 1.0), cond(x, 1.0))


@pytest.mark.parametrize("name", RECIPES)
def test_videos_that_take_turns_do_not_mix(name: str) -> None:
    together, _ = run(RECIPES[name], videos=2)
    assert torch.equal(run(RECIPES[name])[0][0], together[0])


def test_a_second_run_with_the_same_velocity_begins_anew() -> None:
    place, model = Here(), Model()
    velocity = guide(model.side("c", place), model.side("u", place), 4.0, place, Recipe(late=0.0, every=0))
    for place.step in (0, 1, 2, 0, 1):
        velocity(torch.ones(1, 1, 1, 1, 1), 1.0)
    assert [name for name in model.asked if name[0] == "u"] == ["u0", "u0"]


@pytest.mark.parametrize("every", [0, 2, 3])
@pytest.mark.parametrize("done", [3, 5, 6])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(every: int, done: int) -> None:
    recipe, place, model = Recipe(late=0.5, every=every, optimised=True), Here(video=1), Model()

    def fresh() -> Guidance:
        velocity = guide(model.side("c", place), model.side("u", place), 3.0, place, recipe)
        assert isinstance(velocity, Guidance)
        return velocity

    x = torch.randn(1, 2, 1, 2, 2)
    ends = []
    for broken in (False, True):
        velocity, here = fresh(), x
        for place.step in range(STEPS):
            if broken and place.step == done:
                state = velocity.state(1)
                assert velocity.state(0) == {} and len(state) == 2
                velocity = fresh()
                velocity.load(state, 1)
            here = here - velocity(here, 1.0) / STEPS
        ends.append(here)
    assert torch.equal(*ends)


def test_the_optimised_scale_projects_each_sample() -> None:
    wanted, v = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    v[1] = 2 * wanted[1]
    out = nearest_to(wanted, v)
    torch.testing.assert_close(out[1], wanted[1])
    rest = (wanted - out).flatten(1)
    assert ((rest * v.flatten(1)).sum(1).abs() < 1e-4).all()  # what is left is at right angles
    assert torch.equal(nearest_to(wanted, torch.zeros_like(v)), torch.zeros_like(v))


def test_cfg_zero_star_is_the_published_formula() -> None:
    place, model = Here(step=1), Model()
    cond, uncond = model.side("c", place), model.side("u", place)
    velocity, x = guide(cond, uncond, 5.0, place, RECIPES["zero-star"]), torch.randn(2, 3, 2, 4, 4)
    c, u = cond(x, 1.0), uncond(x, 1.0)
    factor = torch.stack([(a * b).sum() / (b * b).sum() for a, b in zip(c, u, strict=True)]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(velocity(x, 1.0), u * factor + 5 * (c - u * factor))
    place.step, model.asked = 0, []
    assert torch.equal(velocity(x, 1.0), torch.zeros_like(x)) and model.asked == []
    without = guide(cond, None, 1.0, place, RECIPES["zero-star"])
    assert torch.equal(without(x, 1.0), torch.zeros_like(x))
    place.step = 1
    assert torch.equal(without(x, 1.0), cond(x, 1.0))


@pytest.mark.parametrize("wrong", [{"late": 1.1}, {"late": -0.1}, {"every": 1}, {"every": -1}, {"zero": -1}])
def test_a_recipe_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="late is a share"):
        Recipe(**wrong)
