"""Blocks that take their tokens in rows give the numbers of the whole, in less memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from meter import peak_of
from torch import Tensor, nn

from wanloom.budget import dit_activations
from wanloom.models.config import DiTConfig
from wanloom.models.dit import DiT
from wanloom.models.layers import Scene
from wanloom.runtime.attention import use_kernel
from wanloom.runtime.rows import use_rows

WIDE = DiTConfig(dim=256, ffn_dim=1024, heads=2, layers=1, text_dim=16, text_len=4)
CONFIG = DiTConfig(dim=64, ffn_dim=512, heads=4, layers=2, text_dim=16, text_len=4, image_dim=32)


class Lift(nn.Module):
    """A part of an adapter that wants all tokens."""

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        return x + 0.1 * x.mean(1, keepdim=True)


def a_dit(dtype: torch.dtype = torch.float64, *, parts: bool = False) -> DiT:
    dit, generator = DiT(CONFIG).requires_grad_(False), torch.Generator().manual_seed(0)
    for p in dit.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) / (p[0].numel() ** 0.5 if p.dim() > 1 else 5))
    if parts:
        dit.blocks[0].after_cross.append(Lift())
        dit.blocks[1].after.append(Lift())
    return dit.to(dtype)


@torch.no_grad()
def answer(dit: DiT, *, two: bool = False) -> Tensor:
    """The velocity of 48 tokens; two: with another timestep for the first frame."""
    draw = torch.Generator().manual_seed(1)
    given: dict[str, Any] = {"image": torch.randn(1, 257, 32, generator=draw).to(dit.dtype)}
    x, context = torch.randn(1, 16, 3, 8, 8, generator=draw), torch.randn(1, 4, 16, generator=draw)
    t = torch.tensor([[500.0, 0.0]] if two else [[500.0]])
    if two:
        given["group"] = torch.tensor([1, 0, 0])
    return dit(x.to(dit.dtype), t, context.to(dit.dtype), **given)


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("parts", [False, True])
def test_rows_give_the_numbers_of_the_whole(two: bool, parts: bool) -> None:
    want = answer(a_dit(parts=parts), two=two)
    for rows in (7, 16, 1000):
        dit = a_dit(parts=parts)
        use_rows(dit, rows)
        assert (answer(dit, two=two) - want).norm() <= 1e-12 * want.norm()


def test_rows_are_exact_to_rounding_in_float32() -> None:
    dit, want = a_dit(torch.float32), answer(a_dit(torch.float32))
    use_rows(dit, 7)
    assert (answer(dit) - want).norm() <= 1e-5 * want.norm()


def test_a_kernel_sees_rows_of_queries_and_all_keys() -> None:
    dit, seen = a_dit(), set()
    use_rows(dit, 20)
    plain = dit.blocks[0].self_attn.kernel

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen.add((q.shape[1], k.shape[1]))
        return plain(q, k, v, mask)

    dit.blocks[0].self_attn.kernel = kernel
    answer(dit)
    assert seen == {(20, 48), (8, 48)}


def test_rows_take_less_memory_and_the_estimate_says_so() -> None:
    latent = (16, 5, 64, 64)
    peaks = []
    for rows in (None, 256):
        with torch.device("meta"):
            dit = DiT(WIDE).requires_grad_(False)
            use_kernel(dit, lambda q, k, v, mask: torch.empty_like(q))  # none that holds the scores of all
            if rows is not None:
                use_rows(dit, rows)
            given = torch.zeros(1, *latent), torch.zeros(1, 1), torch.zeros(1, 4, 16)
            peaks.append(peak_of(partial(dit, *given)))
    estimates = [dit_activations(WIDE, latent, "float32", rows=rows) for rows in (None, 256)]
    assert peaks[1] < 0.6 * peaks[0]
    assert estimates[1] < 0.6 * estimates[0]
    assert all(0.75 < one / other < 1.25 for one, other in zip(estimates, peaks, strict=True)), (estimates, peaks)


def test_training_in_rows_is_refused() -> None:
    dit = a_dit(torch.float32).requires_grad_(True)
    use_rows(dit, 16)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="train without them"):
        dit(torch.zeros(1, 16, 1, 4, 4), torch.zeros(1, 1), torch.zeros(1, 4, 16), image=torch.zeros(1, 257, 32))
