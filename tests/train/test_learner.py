from __future__ import annotations

import pytest
import torch
from torch import nn

from wanloom.train.learner import Learner, learning_rate
from wanloom.train.ranks import Ranks
from wanloom.train.recipe import Optim


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.out = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.out(x)


class Coder(nn.Module):
    """As a VAE: kernels between two ends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv3d(1, 4, 1)
        self.downsamples = nn.ModuleList([nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)])
        self.head = nn.Conv3d(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        for layer in self.downsamples:
            x = layer(x).tanh()
        return self.head(x)


def learn_to_code(learner: Learner, model: Coder, steps: range) -> None:
    for step in steps:
        x = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        (model(x) - x).square().mean().backward()
        learner.step(1.0, step)


def learn(learner: Learner, model: Toy, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        (model(x.to(model.out.weight.dtype)).float() - x[:, :1]).square().mean().backward()
        learner.step(1.0, step)


def test_rate_rises_stays_and_ends_at_zero() -> None:
    optim = Optim(warmup=10, flat=0.5)
    rates = [learning_rate(i, 100, optim) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:50] == [1.0] * 41
    assert rates[75] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.03
    cosine = [learning_rate(i, 100, Optim(warmup=0, flat=0.0, decay="cosine")) for i in range(101)]
    assert cosine[50] == pytest.approx(0.5)
    assert cosine[100] == pytest.approx(0.0)


@pytest.mark.parametrize("muon", [0.0, 0.01])
def test_saved_and_loaded_it_goes_on_bit_for_bit(muon: float) -> None:
    optim = Optim(lr=1e-2, muon_lr=muon, warmup=0)
    straight = Toy().bfloat16()
    learner = Learner({"dit": straight}, optim, Ranks())
    learn(learner, straight, range(12))
    expected = learner.state()

    model = Toy().bfloat16()
    first = Learner({"dit": model}, optim, Ranks())
    learn(first, model, range(5))
    kept = {k: v.clone() for k, v in first.state().items()}
    other = Toy().bfloat16()
    second = Learner({"dit": other}, optim, Ranks())
    second.load(kept)
    learn(second, other, range(5, 12))
    got = second.state()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[k], got[k]) for k in expected)


def test_kernels_between_the_ends_are_stepped_as_matrices() -> None:
    model = Coder().to(memory_format=torch.channels_last_3d)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learn_to_code(Learner({"vae": model}, Optim(lr=1e-9, muon_lr=0.1, warmup=0), Ranks()), model, range(1))
    moved = {n: (p.detach() - before[n]) for n, p in model.named_parameters()}
    for name in ("conv1.weight", "head.weight", "downsamples.0.bias"):  # AdamW's, whose rate is next to nothing
        assert moved[name].abs().max() < 1e-7
    for name in ("downsamples.0.weight", "downsamples.1.weight"):
        values = torch.linalg.svdvals(moved[name].flatten(1))  # Muon: all directions go equally far
        assert values.min() > 0.5 * values.max() > 0.01


def test_a_kernel_learned_as_a_matrix_goes_on_bit_for_bit() -> None:
    optim = Optim(lr=1e-2, muon_lr=0.01, warmup=0)
    straight = Coder()
    learner = Learner({"vae": straight}, optim, Ranks())
    learn_to_code(learner, straight, range(8))
    model = Coder()
    first = Learner({"vae": model}, optim, Ranks())
    learn_to_code(first, model, range(3))
    second = Learner({"vae": (other := Coder())}, optim, Ranks())
    second.load({k: v.clone() for k, v in first.state().items()})
    learn_to_code(second, other, range(3, 8))
    expected, got = learner.state(), second.state()
    assert all(torch.equal(expected[k], got[k]) for k in expected)


def test_masters_keep_what_bf16_would_round_away() -> None:
    model = Toy().bfloat16()
    learner = Learner({"dit": model}, Optim(lr=1e-6, warmup=0), Ranks())
    before = learner.flat.clone()
    learn(learner, model, range(3))
    assert (learner.flat - before).abs().max() > 0
    rounded = learner.flat.bfloat16().float()
    working = torch.cat([p.detach().float().flatten() for p in learner.working])
    assert torch.equal(rounded, working)


def test_a_non_finite_gradient_changes_nothing() -> None:
    model = Toy()
    learner = Learner({"dit": model}, Optim(warmup=0), Ranks())
    before = learner.flat.clone()
    (model(torch.full((1, 6), float("nan")))).sum().backward()
    norm, finite = learner.step(1.0, 0)
    assert not finite
    assert norm != norm
    assert torch.equal(learner.flat, before)


def test_inside_averaged_the_model_is_its_average_and_afterwards_itself() -> None:
    model = Toy()
    learner = Learner({"dit": model}, Optim(lr=0.05, warmup=0, ema=0.9), Ranks())
    learn(learner, model, range(6))
    own = learner.flat.clone()
    with learner.averaged():
        inside = torch.cat([p.detach().flatten() for p in learner.working])
    after = torch.cat([p.detach().flatten() for p in learner.working])
    assert torch.equal(inside, learner.average)
    assert not torch.equal(inside, own)
    assert torch.equal(after, own)


def test_only_the_chosen_parameters_learn() -> None:
    model = Toy()
    frozen = model.out.weight.detach().clone()
    learner = Learner({"dit": model}, Optim(lr=0.05, warmup=0), Ranks(), only=("dit.blocks.",))
    learn(learner, model, range(3))
    assert torch.equal(model.out.weight, frozen)
    assert not model.out.weight.requires_grad
