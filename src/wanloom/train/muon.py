"""Muon: steps of matrices whose singular values are all about one.

The running mean of the gradient is made nearly orthogonal by five Newton-Schulz iterations, which need matrix products
only.  The same update as `torch.optim.Muon`, which iterates in bfloat16 one matrix after the other: on a processor
without bfloat16 that took longer than the gradients.  Here matrices of one form go together, in the faster format.
Source: Keller Jordan and others, 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from wanloom.runtime.machine import fast_bfloat16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of a x + b x^3 + c x^5: steepest at zero, near one after five turns
TURNS = 5
EPS = 1e-7  # below which a gradient counts as none


def orthogonal(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """matrices [N, A, B] -> the same with singular values between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(TURNS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Steps matrices [A, B]; with Nesterov's momentum, and a rate that grows as sqrt(A / B) for tall ones."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = torch.bfloat16 if fast_bfloat16() else torch.float32

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step along the gradients that are there; `closure` is not used."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for shape, params in alike.items():
                rate = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
                updates = orthogonal(torch.stack([self._ahead(p, group["momentum"]) for p in params]), self.dtype)
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)

    def _ahead(self, p: Tensor, momentum: float) -> Tensor:
        """The gradient's running mean, looked at one step ahead."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        mean: Tensor = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum)
