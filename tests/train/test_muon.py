"""Muon: orthogonal updates, the same as torch's."""

from __future__ import annotations

import pytest
import torch

from wanloom.train.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 20, 20)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.3 and values.max() < 1.25
    one_by_one = torch.cat([orthogonal(m[None]) for m in matrices])
    torch.testing.assert_close(orthogonal(matrices), one_by_one, atol=1e-5, rtol=0)  # rounding


def test_no_gradient_is_no_step() -> None:
    assert torch.equal(orthogonal(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def test_steps_are_those_of_torch() -> None:
    """Within what its iteration in bfloat16 leaves."""
    generator = torch.Generator().manual_seed(2)
    ours = [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((12, 30), (30, 12), (12, 30))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    one, other = Muon(ours, 0.02, weight_decay=0.1), torch.optim.Muon(theirs, 0.02, weight_decay=0.1, momentum=0.95)
    before = [p.detach().clone() for p in ours]
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        one.step()
        other.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        moved, wanted = (p.detach() - start).flatten(), (q.detach() - start).flatten()
        assert torch.cosine_similarity(moved, wanted, 0) > 0.999
        assert float(moved.norm() / wanted.norm()) == pytest.approx(1, abs=0.02)
