"""The VAE on 2 and 3 processes gives the numbers of one, whatever rows each has."""

from __future__ import annotations

import pytest
import ranks
import torch
from small_vaes import SMALL, a_vae, both_ways, distance
from torch import Tensor

from wanloom.runtime.neighbours import Shared, deal, deal_out

HEIGHTS = (6, 5, 3, 2)  # even; uneven; one row each, whose neighbours' rows do not do; one process has none
Cases = list[tuple[str, int, int | None, str]]  # VAE, rows of latents, rows of pixels in a stripe, dtype


def work(cases: Cases) -> list[Tensor]:
    """What the first process got, both ways of each case; the parts of the others."""
    return [
        made
        for name, height, rows, dtype in cases
        for made in both_ways(deal_out(a_vae(SMALL[name], getattr(torch, dtype)), rows=rows), height)
    ]


def check(worlds: tuple[int, ...], cases: Cases) -> None:
    found = ranks.run(work, worlds, cases)
    want = [
        made
        for name, height, _, dtype in cases
        for made in both_ways(a_vae(SMALL[name], getattr(torch, dtype)), height)
    ]
    for world in worlds:
        for made, alone, case in zip(found[world][0], want, [case for case in cases for _ in range(2)], strict=True):
            assert made.shape == alone.shape
            assert distance(made, alone) <= (1e-12 if case[3] == "float64" else 1e-5), (world, case)


def test_processes_give_the_numbers_of_one() -> None:
    check((3, 2), [(name, 5, None, "float64") for name in SMALL])


@pytest.mark.matrix
def test_any_rows_do() -> None:
    check((4, 3, 2), [(name, height, None, "float64") for name in SMALL for height in HEIGHTS])
    check((3, 2), [(name, 6, rows, dtype) for name in SMALL for rows in (None, 16) for dtype in ("float32", "float64")])


def with_fewer_rows() -> list[Tensor]:
    vae = deal_out(a_vae(SMALL["2.2"], torch.float64))
    for layer in vae.modules():
        if isinstance(layer, Shared):
            layer.section.halo -= layer.section.down
    return list(both_ways(vae, 4))


@pytest.mark.matrix
def test_with_fewer_rows_of_the_neighbours_it_would_not() -> None:
    got = ranks.run(with_fewer_rows, (2,))[2][0]
    want = both_ways(a_vae(SMALL["2.2"], torch.float64), 4)
    assert min(map(distance, got, want)) > 1e-6


@pytest.mark.parametrize(
    ("rows", "processes", "want"),
    [
        (6, 2, [(0, 3), (3, 6)]),
        (5, 3, [(0, 2), (2, 4), (4, 5)]),
        (2, 4, [(0, 1), (1, 2), (2, 2), (2, 2)]),
    ],
)
def test_rows_are_dealt_as_evenly_as_they_go(rows: int, processes: int, want: list[tuple[int, int]]) -> None:
    assert deal(rows, processes) == want
