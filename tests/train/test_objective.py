from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wanloom.train.objective import FlowBatch, flow_loss, sample_sigmas
from wanloom.train.recipe import Flow


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("shift", "boundary", "share"), [(1, 0.875, 0.125), (5, 0.875, 0.417), (5, 0.9, 0.357), (12, 0.9, 0.571)]
)
def test_share_of_samples_above_the_boundary(shift: float, boundary: float, share: float) -> None:
    sigma = sample_sigmas(20_000, Flow(shift=shift), generator())
    assert (sigma >= boundary).float().mean().item() == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize(("low", "high"), [(0.875, 1.0), (0.0, 0.875), (0.3, 0.6)])
def test_samples_stay_in_the_experts_range_and_follow_its_density(low: float, high: float) -> None:
    inside = sample_sigmas(50_000, Flow(low=low, high=high), generator(1)).sort().values
    whole = sample_sigmas(400_000, Flow(), generator(2))
    reference = whole[(whole >= low) & (whole <= high)].sort().values
    assert inside.min() >= low - 1e-6
    assert inside.max() <= high + 1e-6
    quantiles = torch.linspace(0.01, 0.99, 50)
    torch.testing.assert_close(inside.quantile(quantiles), reference[: 10**6].quantile(quantiles), atol=0.004, rtol=0)


def test_loss_of_the_true_velocity_is_zero() -> None:
    x0, noise = torch.randn(3, 4, 2, 4, 4), torch.randn(3, 4, 2, 4, 4)
    sigma = torch.tensor([0.2, 0.5, 1.0])
    seen: dict[str, Tensor] = {}

    def forward(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        seen.update(x=x, t=t)
        return noise - x0

    loss, each = flow_loss(forward, FlowBatch(x0, torch.zeros(3, 1, 1)), sigma, noise)
    assert loss == 0
    assert each.tolist() == [0, 0, 0]
    s = sigma.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(seen["x"], (1 - s) * x0 + s * noise)
    torch.testing.assert_close(seen["t"], 1000 * sigma[:, None])


def test_a_given_first_frame_is_clean_at_time_zero_and_has_no_gradient() -> None:
    x0, noise = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4)
    held = torch.tensor([True, False])
    v = torch.zeros_like(x0, requires_grad=True)

    def forward(x: Tensor, t: Tensor, context: Tensor, *, group: Tensor) -> Tensor:
        assert group.tolist() == [1, 0, 0]
        assert t.tolist() == [[700.0, 0.0], [700.0, 700.0]]
        torch.testing.assert_close(x[0, :, 0], x0[0, :, 0])
        assert not torch.equal(x[1, :, 0], x0[1, :, 0])
        return v

    loss, each = flow_loss(forward, FlowBatch(x0, torch.zeros(2, 1, 1), held=held), torch.full((2,), 0.7), noise)
    loss.backward()
    assert v.grad is not None
    assert v.grad[0, :, 0].abs().max() == 0
    assert v.grad[1, :, 0].abs().min() > 0
    target = (noise - x0).square()
    assert each[0].item() == pytest.approx(target[0, :, 1:].mean().item(), rel=1e-5)
    assert each[1].item() == pytest.approx(target[1].mean().item(), rel=1e-5)


def test_channels_that_carry_nothing_are_left_out_of_the_loss() -> None:
    x0, noise = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4)
    live = torch.tensor([True, False, True, False])
    v = torch.zeros_like(x0, requires_grad=True)
    batch = FlowBatch(x0, torch.zeros(2, 1, 1), live=live)
    loss, each = flow_loss(lambda x, t, context: v, batch, torch.full((2,), 0.7), noise)
    loss.backward()
    assert v.grad is not None
    assert v.grad[:, ~live].abs().max() == 0 < v.grad[:, live].abs().min()
    target = (noise - x0)[:, live].square()
    torch.testing.assert_close(each, target.mean((1, 2, 3, 4)))
