"""Damaged checkpoints: a sample in every test run, 500 of each by `make faults`."""

from __future__ import annotations

import pytest
from damage import damage_run

SAMPLE = 60
FULL = pytest.param(500, marks=pytest.mark.faults)


@pytest.mark.parametrize("count", [SAMPLE, FULL])
def test_no_truncated_file_is_accepted(count: int) -> None:
    outcome = damage_run(count, "truncate")
    assert not {"accepted", "same", "unchanged"} & outcome.keys(), outcome


@pytest.mark.parametrize("count", [SAMPLE, FULL])
def test_a_changed_header_is_refused_or_gives_the_same_tensors(count: int) -> None:
    outcome = damage_run(count, "mutate", seed=1)
    assert "accepted" not in outcome, outcome
    assert sum(n for code, n in outcome.items() if code.startswith("E4")) > 0.7 * count


@pytest.mark.parametrize(
    ("how", "count"),
    [("mutate", SAMPLE), *(pytest.param(how, 500, marks=pytest.mark.faults) for how in ("truncate", "mutate"))],
)
def test_with_recorded_hashes_no_change_is_accepted(how: str, count: int) -> None:
    outcome = damage_run(count, how, manifest=True, seed=2)
    assert not {"accepted", "same"} & outcome.keys(), outcome
