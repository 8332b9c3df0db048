"""Attention with 8-bit scores: how far off it may be, at any length; without a GPU by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wanloom.models.layers import sdpa
from wanloom.runtime import int8_attention as module
from wanloom.runtime.attention import KERNELS
from wanloom.runtime.int8_attention import attend, int8_attention, int8_fp8_attention
from wanloom.runtime.kernels import KERNEL_FACTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the result's norm, for normally distributed inputs; what is found is 0.009 to 0.011, and 0.032 to 0.038.
BOUNDS = {False: 0.02, True: 0.05}
narrow_or_not = pytest.mark.parametrize("narrow", [False, True], ids=["16-bit", "fp8"])

kernel = pytest.mark.triton


def heads(queries: int, keys: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q [2, L, 3, D], k and v [2, M, 3, D]."""
    generator = torch.Generator().manual_seed(queries + keys + width)
    q, k, v = (torch.randn(2, length, 3, width, generator=generator) for length in (queries, keys, keys))
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype)


def off(q: Tensor, k: Tensor, v: Tensor, narrow: bool) -> float:
    """Relative error of the result, in norm, to attention in float64."""
    exact, out = sdpa(q.double(), k.double(), v.double()), attend(q, k, v, narrow)
    assert out.shape == q.shape and out.dtype == q.dtype
    return float((out.double() - exact).norm() / exact.norm())


@kernel
@narrow_or_not
@pytest.mark.parametrize(
    ("queries", "keys", "width", "dtype"),
    [
        (64, 64, 32, torch.float32),
        (130, 65, 64, torch.float16),
        (3, 130, 64, torch.bfloat16),
        (70, 127, 128, torch.float16),
        (65, 128, 48, torch.float32),  # a width that is no power of two
    ],
)
def test_it_is_off_by_a_few_in_a_hundred_at_most(
    queries: int, keys: int, width: int, dtype: torch.dtype, narrow: bool
) -> None:
    assert 0.001 < off(*heads(queries, keys, width, dtype), narrow) < BOUNDS[narrow]


@kernel
def test_eight_bits_for_values_are_less_than_sixteen() -> None:
    assert off(*heads(64, 130, 64), True) > 1.5 * off(*heads(64, 130, 64), False)


@kernel
@narrow_or_not
def test_what_all_keys_have_in_common_does_not_matter(narrow: bool) -> None:
    """Keys whose channels have means ten times as large as their differences, as transformers have them."""
    q, k, v = heads(64, 100, 32)
    assert (
        off(q, k + 10 * torch.randn(32, generator=torch.Generator().manual_seed(5)).to(DEVICE), v, narrow)
        < BOUNDS[narrow]
    )


@kernel
def test_what_all_values_have_in_common_costs_nothing() -> None:
    """A mean ten times as large as what values differ by, and channels of very different sizes."""
    q, k, v = heads(64, 100, 32)
    generator = torch.Generator().manual_seed(5)
    common = 10 * torch.randn(32, generator=generator).to(DEVICE)
    sizes = torch.logspace(-2, 2, 32).to(DEVICE)
    exact = sdpa(q.double(), k.double(), v.double())
    out = (attend(q, k, (v + common) * sizes, True).double() / sizes) - common
    assert (out - exact).norm() / exact.norm() < BOUNDS[True]


@kernel
@narrow_or_not
def test_a_query_far_larger_than_the_others_spoils_none_of_them(narrow: bool) -> None:
    q, k, v = heads(64, 70, 32)
    q[:, 5] *= 100
    rest = [token for token in range(64) if token != 5]
    exact = sdpa(q.double(), k.double(), v.double())[:, rest]
    assert (attend(q, k, v, narrow)[:, rest] - exact).norm() / exact.norm() < BOUNDS[narrow]


@kernel
@narrow_or_not
def test_one_key_gives_its_value(narrow: bool) -> None:
    """On a GPU rounded to bfloat16."""
    q, k, v = heads(5, 1, 64)
    torch.testing.assert_close(attend(q, k, v, narrow), v.expand(-1, 5, -1, -1), rtol=2**-8, atol=0)


@kernel
@narrow_or_not
def test_it_reads_tensors_that_lie_otherwise(narrow: bool) -> None:
    """Heads before tokens, and parts of one tensor: the same bits as of copies."""
    q, k, v = heads(9, 70, 32)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    both = torch.stack((k, v), -1).unbind(-1)
    wanted = attend(q, k, v, narrow)
    assert torch.equal(attend(*turned, narrow), wanted) and torch.equal(attend(q, *both, narrow), wanted)


@kernel
@narrow_or_not
def test_torch_finds_no_fault_with_the_operation(narrow: bool) -> None:
    found = torch.library.opcheck(attend, (*heads(4, 5, 16), narrow))
    assert set(found.values()) == {"SUCCESS"} and len(found) >= 3


def test_what_is_small_wide_masked_or_learned_goes_through_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "attend", lambda q, k, v, narrow: calls.append((k.shape[1], narrow)) or q)
    monkeypatch.setattr(module, "LEAST_KEYS", 8)
    q, k, v = heads(4, 9, 16)
    mask = torch.ones(4, 9, dtype=torch.bool, device=DEVICE)
    assert torch.equal(int8_attention(q, k, v, mask), sdpa(q, k, v, mask))
    assert torch.equal(int8_attention(q, k[:, :7], v[:, :7]), sdpa(q, k[:, :7], v[:, :7]))
    wide = heads(4, 9, 160)
    assert torch.equal(int8_attention(*wide), sdpa(*wide))
    assert int8_attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert int8_attention(q.clone().requires_grad_(), k, v).requires_grad and calls == []
    assert int8_attention(q, k, v) is q and int8_fp8_attention(q, k, v) is q and calls == [(9, False), (9, True)]


@pytest.mark.parametrize(
    ("capability", "there", "reason"),
    [
        (None, True, "needs an NVIDIA GPU"),
        ((7, 5), True, "needs compute capability 8.0, this GPU has 7.5"),
        ((9, 0), False, "needs the package triton"),
        ((9, 0), True, None),
    ],
)
def test_it_is_in_the_table_and_says_what_it_needs(
    capability: tuple[int, int] | None, there: bool, reason: str | None
) -> None:
    assert KERNELS["int8"] is int8_attention and not KERNEL_FACTS["int8"].exact
    assert KERNEL_FACTS["int8"].missing(capability, lambda name: there) == reason


def test_eight_bit_values_need_an_ada() -> None:
    facts = KERNEL_FACTS["int8-fp8"]
    assert KERNELS["int8-fp8"] is int8_fp8_attention and not facts.exact
    assert facts.missing((8, 6), lambda name: True) == "needs compute capability 8.9, this GPU has 8.6"
    assert facts.missing((8, 9), lambda name: True) is None
