from __future__ import annotations

from pathlib import Path

import pytest

from wanloom.errors import InputError
from wanloom.train.recipe import Phase, Stage, read_recipe

GOOD = """
name = "x"
variant = "demo-t2v"
kind = "vae"
[[phases]]
name = "a"
trains = ["vae"]
stages = [{ steps = 3, batch = 1 }, { steps = 2, batch = 4 }]
"""
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_reads(path: Path) -> None:
    assert read_recipe(path).name == path.stem


def test_a_phase_knows_its_stage_at_each_step(tmp_path: Path) -> None:
    phase = read_recipe(written(tmp_path, GOOD)).phases[0]
    assert [phase.stage_at(i).batch for i in range(phase.steps)] == [1, 1, 1, 4, 4]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('kind = "vae"', 'kind = "vae"\nstepz = 3'), "stepz"),
        (("steps = 3", "steps = 0"), "greater than 0"),
        (('trains = ["vae"]', 'trains = ["dit"]'), "a vae recipe trains"),
        (('name = "a"', 'name = "a"\ninit = "b"'), "no earlier phase"),
        (('name = "a"', 'name = "a"\ninit = "start:vae"'), "names it in `start`"),
        (("steps = 3", "steps = = 3"), "line 8"),
    ],
)
def test_a_bad_recipe_is_refused_with_the_place(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        read_recipe(written(tmp_path, GOOD.replace(*change)))
    assert caught.value.code == "E4032"


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file") as caught:
        read_recipe(tmp_path / "none.toml")
    assert caught.value.code == "E4001"


def test_what_is_watched_does_not_change_what_is_trained(tmp_path: Path) -> None:
    a = read_recipe(written(tmp_path, GOOD))
    b = read_recipe(written(tmp_path, GOOD.replace("[[phases]]", "[watch]\nlog = 1\n[[phases]]", 1)))
    c = read_recipe(written(tmp_path, GOOD.replace('name = "x"', 'name = "x"\nseed = 2')))
    assert a.digest == b.digest != c.digest


def test_steps_of_a_phase_are_those_of_its_stages() -> None:
    assert Phase(name="p", stages=(Stage(steps=2, batch=1), Stage(steps=5, batch=1))).steps == 7
