"""The parameters being learned: fp32 masters, the working copy the model computes with, their running average.

The model's own tensors are the working copy (bf16 or fp32).  Gradients of all of them go into one flat fp32 vector, are
averaged over ranks in one message and clipped; the masters are views of another flat vector, so are the averages.
Matrices inside blocks, and the kernels of a VAE, may be stepped by Muon, each rank taking its share of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wanloom.errors import InputError
from wanloom.train.muon import Muon
from wanloom.train.ranks import Ranks
from wanloom.train.recipe import Optim


def learning_rate(step: int, total: int, optim: Optim) -> float:
    """The share of the full rate at `step`: warm-up, flat, then down to zero at the end of the phase."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    start = max(optim.warmup, round(total * optim.flat))
    if step < start:
        return 1.0
    left = (total - step) / max(1, total - start)
    return left if optim.decay == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def _views(flat: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    views, at = [], 0
    for t in like:
        views.append(flat[at : at + t.numel()].view(t.shape))
        at += t.numel()
    return views


class Learner:
    """Masters, averages and optimisers over the named parameters of `modules`."""

    def __init__(
        self, modules: Mapping[str, nn.Module], optim: Optim, ranks: Ranks, only: tuple[str, ...] | None = None
    ) -> None:
        named = [(f"{m}.{n}", p) for m, module in modules.items() for n, p in module.named_parameters()]
        chosen = [(n, p) for n, p in named if only is None or n.startswith(only)]
        for _, p in named:
            p.requires_grad_(False)
        self.names = [n for n, _ in chosen]
        self.working = [p.requires_grad_(True) for _, p in chosen]
        self.optim, self.ranks = optim, ranks
        self.flat = torch.cat([p.detach().float().flatten() for p in self.working])
        self.average = self.flat.clone()
        self.gradient = torch.zeros_like(self.flat)
        # Muon knows matrices only: a kernel is one row for each channel that it makes.
        self.muon_owner = {i: k % ranks.size for k, i in enumerate(self._matrices())}
        self.masters = [nn.Parameter(self._form(i, v)) for i, v in enumerate(_views(self.flat, self.working))]
        for i, (master, g) in enumerate(zip(self.masters, _views(self.gradient, self.working), strict=True)):
            master.grad = self._form(i, g)
        self._build_optimisers()

    def _matrices(self) -> list[int]:
        """The tensors that Muon steps: matrices inside a transformer's blocks, kernels between the ends of a VAE."""
        named = enumerate(zip(self.names, self.working, strict=True))
        inner = (".downsamples.", ".upsamples.", ".middle.")
        return [
            i
            for i, (name, p) in (named if self.optim.muon_lr else ())
            if (p.ndim == 2 and (".blocks." in name or name.startswith("image.encoder.layers.")))
            or (p.ndim >= 4 and p[0].numel() > 1 and any(place in name for place in inner))
        ]

    def _form(self, i: int, view: Tensor) -> Tensor:
        return view.flatten(1) if i in self.muon_owner else view

    def _build_optimisers(self) -> None:
        mine = [self.masters[i] for i, owner in self.muon_owner.items() if owner == self.ranks.rank]
        rest = [self.masters[i] for i in range(len(self.names)) if i not in self.muon_owner]
        self.adam = torch.optim.AdamW(
            rest, lr=self.optim.lr, betas=self.optim.betas, weight_decay=self.optim.weight_decay, fused=True
        )
        self.muon = Muon(mine, lr=self.optim.muon_lr, weight_decay=self.optim.weight_decay) if mine else None

    def step(self, share: float, done: int) -> tuple[float, bool]:
        """One update at `share` of the full rate: (gradient norm, was it finite). A non-finite one changes nothing."""
        for p, master in zip(self.working, self.masters, strict=True):
            assert master.grad is not None
            if p.grad is None:
                master.grad.zero_()
            else:
                master.grad.copy_(p.grad.reshape(master.shape))
                p.grad = None
        self.ranks.mean_(self.gradient)
        norm = float(self.gradient.norm())
        if not math.isfinite(norm):
            return norm, False
        if norm > self.optim.clip:
            self.gradient.mul_(self.optim.clip / norm)
        for optimiser, rate in ((self.adam, self.optim.lr), (self.muon, self.optim.muon_lr)):
            if optimiser is not None:
                for group in optimiser.param_groups:
                    group["lr"] = rate * share
                optimiser.step()
        for owner in range(self.ranks.size) if self.ranks.size > 1 else ():
            self._share_matrices(owner)
        # The average's window grows with the run, so that its beginning is forgotten.
        self.average.lerp_(self.flat, 1 - min(self.optim.ema, (done + 1) / (done + 10)))
        self.show(self.flat)
        return norm, True

    @torch.no_grad()
    def _share_matrices(self, owner: int) -> None:
        theirs = [self.masters[i] for i, o in self.muon_owner.items() if o == owner]
        if not theirs:
            return
        packed = torch.cat([m.flatten() for m in theirs])
        self.ranks.share_(packed, owner)
        for master, values in zip(theirs, _views(packed, theirs), strict=True):
            master.copy_(values)

    @torch.no_grad()
    def show(self, flat: Tensor) -> None:
        """Let the model compute with these values."""
        for p, values in zip(self.working, _views(flat, self.working), strict=True):
            p.copy_(values)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model is its running average."""
        self.show(self.average)
        try:
            yield
        finally:
            self.show(self.flat)

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, by name (this rank's optimiser included)."""
        out = {f"master/{n}": m.detach() for n, m in zip(self.names, self.masters, strict=True)}
        out |= {f"average/{n}": v for n, v in zip(self.names, _views(self.average, self.working), strict=True)}
        for kind, optimiser in (("adam", self.adam), ("muon", self.muon)):
            for i, entry in (optimiser.state_dict()["state"] if optimiser is not None else {}).items():
                out |= {f"{kind}/{i}/{key}": torch.as_tensor(value) for key, value in entry.items()}
        return out

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`; names that do not fit are an error."""
        for prefix, flat in (("master", self.flat), ("average", self.average)):
            for n, view in zip(self.names, _views(flat, self.working), strict=True):
                if f"{prefix}/{n}" not in state:
                    raise InputError("E4013", f"training state: '{prefix}/{n}' is missing; it is of another model")
                view.data.copy_(state[f"{prefix}/{n}"].view(view.shape))
        for kind, optimiser in (("adam", self.adam), ("muon", self.muon)):
            if optimiser is None:
                continue
            entries: dict[int, dict[str, Tensor]] = {}
            for name, value in state.items():
                if name.startswith(f"{kind}/"):
                    _, i, key = name.split("/")
                    entries.setdefault(int(i), {})[key] = value.clone()
            optimiser.load_state_dict({**optimiser.state_dict(), "state": entries})
        self.show(self.flat)
