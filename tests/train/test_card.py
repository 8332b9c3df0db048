from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from wanloom.train.card import FLOORS_ALL, FLOORS_TEXT, Table, make_card, shortfalls, wilson


def test_wilson_interval_of_known_cases() -> None:
    assert wilson(200, 200) == pytest.approx((0.9812, 1.0), abs=1e-4)
    assert wilson(100, 200) == pytest.approx((0.4314, 0.5686), abs=1e-4)
    assert wilson(0, 200)[0] == 0.0


def test_a_table_tells_proportions_from_numbers() -> None:
    table = Table()
    for mark, db in ((True, 30.0), (True, 34.0), (False, 32.0)):
        table.add(shape=mark, vae_db=db)
    summary = table.summary()
    assert summary["shape"]["mean"] == pytest.approx(0.6667, abs=1e-4)
    assert summary["shape"]["low"] == round(wilson(2, 3)[0], 4)
    assert summary["vae_db"] == {"mean": 32.0, "low": 30.1521, "high": 33.8479, "of": 3}


def test_every_missed_floor_is_named() -> None:
    floors = {**FLOORS_ALL, **FLOORS_TEXT}
    good = {name: {"mean": aim} for name, (_, aim) in floors.items()} | {"seconds": {"mean": 0.5}}
    assert shortfalls(good, 8_000_000, floors) == []
    poor = good | {"shape": {"mean": 0.92}, "seconds": {"mean": 3.5}}
    missed = shortfalls(poor, 16_000_000, floors)
    assert [entry.split()[0] for entry in missed] == ["shape", "seconds", "size"]


@pytest.mark.filterwarnings("ignore:warning.W4018")  # random experts do not say which is which
def test_a_random_model_gets_the_card_of_a_smoke_test(tmp_path: Path) -> None:
    checkpoint = tiny.checkpoint(tmp_path, "t2v-A14B", pickles=False)
    run = tmp_path / "some-run"
    run.mkdir()
    (run / "log.jsonl").write_text(
        '{"phase": "a", "seconds": 10}\n{"phase": "a", "seconds": 30}\n{"phase": "b", "seconds": 5}\n'
    )
    make_card(checkpoint, "demo-t2v", [run], count=2)
    card = json.loads((checkpoint / "card.json").read_text())
    assert card["status"] == "smoke-test"
    assert any(entry.startswith("colour") for entry in card["missed"])
    assert card["training_seconds"] == {"some-run": 35}
    assert card["figures"]["shape"]["of"] == 2
    assert card["figures"]["two_all_right"]["of"] == 2
    page = (checkpoint / "README.md").read_text()
    assert "smoke-test model" in page
    assert "| vae_db |" in page
    assert sorted(p.name for p in (checkpoint / "sheets").iterdir()) == ["text.webp", "two.webp"]
