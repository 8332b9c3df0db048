"""One video on 2 and 3 processes: layouts, tokens, guidance and weights cut among them, and the numbers of one.

All processes are started once; `test_parallel_matrix.py` has every variant and layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import parallel_cases as cases
import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import Tensor

from wanloom.errors import InputError
from wanloom.models.layers import Scene
from wanloom.runtime import sequence
from wanloom.runtime.layouts import Layout, choose_layout
from wanloom.runtime.parallel import open_mesh

# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("world", "heads", "want_cfg", "want"),
    [
        (1, 40, True, Layout()),
        (2, 40, True, Layout(2, 1, 1)),
        (2, 40, False, Layout(1, 1, 2)),
        (3, 40, True, Layout(1, 3, 1)),
        (4, 12, True, Layout(2, 1, 2)),
        (8, 40, True, Layout(2, 1, 4)),
        (8, 40, False, Layout(1, 1, 8)),
        (8, 12, False, Layout(1, 2, 4)),
        (16, 40, False, Layout(1, 2, 8)),
    ],
)
def test_guidance_comes_first_then_heads_then_the_ring(world: int, heads: int, want_cfg: bool, want: Layout) -> None:
    assert choose_layout(world, heads, want_cfg) == want


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"ulysses": 8}, Layout(1, 1, 8)),  # the official way: --ulysses_size is the number of processes
        ({"ulysses": 2}, Layout(2, 2, 2)),
        ({"ring": 4}, Layout(2, 4, 1)),
        ({"ring": 8}, Layout(1, 8, 1)),
        ({"cfg": 1}, Layout(1, 1, 8)),
        ({"cfg": 2, "ring": 2, "ulysses": 2}, Layout(2, 2, 2)),
    ],
)
def test_sizes_that_are_given_are_kept(given: dict[str, int], want: Layout) -> None:
    assert choose_layout(8, 40, True, **given) == want


@pytest.mark.parametrize(
    ("world", "heads", "want_cfg", "given", "code", "said"),
    [
        (4, 12, False, {"ulysses": 3}, "E2018", "does not make 4 processes"),
        (4, 12, True, {"ulysses": 8}, "E2018", "guidance 1 x ring 0 x Ulysses 8"),
        (3, 12, True, {"cfg": 2}, "E2018", "does not make 3"),
        (8, 12, False, {"ulysses": 8}, "E2018", "Use one of 1, 2, 4"),
        (4, 12, True, {"cfg": 4}, "E2018", "use 1 or 2"),
        (4, 12, False, {"cfg": 2}, "E2018", "use 1."),
        (4, 12, False, {"ring": 0}, "E2018", "ring_size: got 0"),
        (4, 12, False, {"ring": -2, "ulysses": -2}, "E2018", "from 1 to 4"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    world: int, heads: int, want_cfg: bool, given: dict[str, int], code: str, said: str
) -> None:
    with pytest.raises(InputError, match=said) as error:
        choose_layout(world, heads, want_cfg, **given)
    assert error.value.code == code


# ---------------------------------------------------------------- attention in parts


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scores", [1, 100, 2**26])  # one query at a time, some, all
def test_merged_parts_are_the_whole_and_so_are_their_gradients(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "SCORES", scores)
    q, k, v = (draw(2, 3, length, 8, seed=seed).requires_grad_() for seed, length in ((1, 5), (2, 11), (3, 11)))
    want = F.scaled_dot_product_attention(q, k, v)
    grad = draw(*want.shape, seed=4)
    wanted = torch.autograd.grad(want, (q, k, v), grad)
    with torch.no_grad():
        pieces = [sequence.attend(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 4), slice(4, 11))]
        out, lse = sequence.merge(*pieces[0], *pieces[1])
        inner = (grad * out).sum(-1, keepdim=True)
        got = [
            sequence.attend_backward(grad, inner, lse, q, k[:, :, part], v[:, :, part])
            for part in (slice(0, 4), slice(4, 11))
        ]
    torch.testing.assert_close(out, want.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got[0][0] + got[1][0], wanted[0], rtol=1e-12, atol=1e-13)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat((got[0][i], got[1][i]), 2), wanted[i], rtol=1e-12, atol=1e-13)


def test_every_field_of_the_scene_that_has_a_row_for_each_token_is_cut() -> None:
    """A new field of Scene must be looked at: is it [L]?"""
    same_for_all = {"mod", "context", "image", "kept", "shared", "whole"}
    assert {field.name for field in fields(Scene)} == {*sequence.PER_TOKEN, "tokens", *same_for_all}


# ---------------------------------------------------------------- several processes

FAST = ("s2v-14B", "short", "parts")
Work = Callable[..., dict[str, dict[str, float]]]


def everything_once() -> dict[str, dict[str, dict[str, float]]]:
    """What one process of each world does for this file."""
    work: dict[str, tuple[Work, tuple[str, ...]]] = {"tokens": (cases.cut_tokens, FAST)}
    if torch.distributed.get_world_size() == 2:
        work["guidance"] = cases.cut_guidance, ("ti2v-5B",)
        work["weights"] = cases.cut_weights, ("animate-14B",)
        work["refused"] = refusals, ()
    return {name: function(chosen) if chosen else function() for name, (function, chosen) in work.items()}


def refusals() -> dict[str, dict[str, float]]:
    with pytest.raises(InputError, match="needs 4 processes, 2 were started") as error:
        open_mesh(Layout(2, 1, 2), "cpu")
    assert error.value.code == "E2018"
    dit = cases.sequenced(cases.build("short"), Layout(1, 1, 2))
    attention = dit.blocks[0].self_attn
    q = torch.zeros(1, 3, 12, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="0 of 0"):  # the blocks without the trunk that cuts for them
        attention.kernel(q, q, q, None)
    with pytest.raises(ValueError, match="with a mask"):
        attention.kernel(q, q, q, torch.ones(3, 3, dtype=torch.bool))
    return {}


@pytest.fixture(scope="module")
def found() -> dict[int, list[Any]]:
    return ranks.run(everything_once, (3, 2))


@pytest.mark.parametrize("world", [2, 3])
def test_tokens_cut_among_processes_give_the_numbers_of_one(world: int, found: dict[int, list[Any]]) -> None:
    for rank in range(world):
        cases.check(found[world][rank]["tokens"], 2 * len(FAST))


def test_guidance_on_two_processes_gives_the_bits_of_one_branch_after_the_other(found: dict[int, list[Any]]) -> None:
    for result in found[2]:
        cases.check(result["guidance"], 1)


def test_weights_cut_among_processes_give_the_numbers_of_one(found: dict[int, list[Any]]) -> None:
    for result in found[2]:
        cases.check(result["weights"], 2)


def test_what_cannot_be_cut_is_refused(found: dict[int, list[Any]]) -> None:
    assert "refused" in found[2][0]
