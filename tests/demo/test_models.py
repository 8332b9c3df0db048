"""The models that ship with the package: what their cards say is of these files, meets the floors, and can be seen."""

from __future__ import annotations

import pytest

import wanloom
from wanloom import demo
from wanloom.demo.judge import judge
from wanloom.demo.world import examples
from wanloom.durable import sha256_file
from wanloom.train.card import CEILINGS, FLOORS_ALL, FLOORS_IMAGE, FLOORS_TEXT, shortfalls
from wanloom.train.people_card import FLOORS_DANCE, FLOORS_SPEECH
from wanloom.variants import VARIANTS

MODELS = tuple(demo.available())


@pytest.mark.parametrize("name", MODELS)
def test_the_card_is_of_these_files_and_meets_every_floor(name: str) -> None:
    card, folder = demo.card(name), demo.path_of(name)
    weights = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*.safetensors")}
    assert card["sha256"] == {place: sha256_file(path) for place, path in weights.items()}
    assert card["weights_bytes"] == sum(path.stat().st_size for path in weights.values())
    variant = VARIANTS[name]
    people = {"speech": FLOORS_SPEECH, "animate": FLOORS_DANCE}.get(variant.conditioner)
    floors = people or FLOORS_ALL | (FLOORS_TEXT if variant.conditioner != "image" else {})
    floors |= FLOORS_IMAGE if variant.inputs and people is None else {}
    assert shortfalls(card["figures"], card["weights_bytes"], floors, CEILINGS.get(name)) == card["missed"] == []
    assert card["status"] == "demo" and not demo.is_smoke_test(name)
    cases = 200 if people is None else 100
    assert all(card["figures"][figure]["of"] == cases // (2 if figure == "kept_db" else 1) for figure in floors)


def test_all_models_together_are_small() -> None:
    assert sum(demo.size_of(name) for name in MODELS) <= 50_000_000


def test_the_models_that_are_trained_are_in_the_package() -> None:
    assert {"demo-t2v", "demo-i2v", "demo-ti2v", "demo-s2v"} == set(MODELS)


def test_held_out_prompts_become_what_they_say() -> None:
    pipe = wanloom.load("demo-t2v")
    verdicts = [judge(pipe(prompt=text, seed=i).frames, clip) for i, (clip, text) in enumerate(examples(5))]
    assert sum(verdict.colour and verdict.background for verdict in verdicts) >= 4
    assert sum(verdict.all_right for verdict in verdicts) >= 3
