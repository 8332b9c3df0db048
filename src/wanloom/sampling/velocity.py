"""What a sampler follows: a model under its conditioning, under guidance, under a choice of experts.

Everything here makes a `Velocity`, a function (x, t) -> v, from functions; a forward function is called like
`DiT.forward`: forward(x, t [B, G], **conditioning).  Put together, for a model of two experts:

    def bind(name, forward):
        return guided(conditioned(forward, cond), conditioned(forward, uncond), guidance[name])

    with Experts((("high_noise_model", 0.875), ("low_noise_model", 0.0)), use, bind) as velocity:
        for step in SAMPLERS["unipc"](velocity, noise, schedule): ...

In place of the second velocity, `AtOnce(forward, joined(cond, uncond))` makes both passes in one call of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cache, partial
from types import TracebackType

import torch
from torch import Tensor

from wanloom.sampling.samplers import Velocity

Forward = Callable[..., Tensor]  # (x [B, C, F, H, W], t [B, G], **conditioning) -> v [B, C, F, H, W] float32
Both = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # (x, t) -> v with the prompt, v without it


def conditioned(forward: Forward, conditioning: Mapping[str, Tensor | None]) -> Velocity:
    """The model with everything given but x and t.

    With a `group` in the conditioning the model gets the two timesteps [t, 0], and frames of group 1 are the clean
    ones; without it [t].
    """
    columns = 1 if conditioning.get("group") is None else 2

    def velocity(x: Tensor, t: float) -> Tensor:
        times = x.new_zeros(x.shape[0], columns)
        times[:, 0] = t
        return forward(x, times, **conditioning)

    return velocity


def heard(forward: Forward, said: dict[str, Tensor], *names: str) -> Forward:
    """The same function; what it answers last is put into `said`, cut among the names when there are several."""

    def listen(*args: Tensor, **given: Tensor | None) -> Tensor:
        v = forward(*args, **given)
        said.update(zip(names, v.chunk(len(names)), strict=True))
        return v

    return listen


class AtOnce:
    """Both passes of guidance in one call of the model: (x, t) -> v with the prompt, v without it.

    given: what `forward` takes beside x and t for twice as many samples, those with the prompt first; see `joined`.
    Exact to rounding, as products of more rows may be summed in another order.  The activations are those of two
    passes; weights that come and go do so once.
    """

    def __init__(self, forward: Forward, given: Mapping[str, Tensor | None]) -> None:
        self._velocity = conditioned(forward, given)

    def __call__(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        with_prompt, without = self._velocity(torch.cat((x, x)), t).chunk(2)
        return with_prompt, without


def joined(cond: Mapping[str, Tensor], uncond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two conditionings as one of twice as many samples, those of `cond` first.

    All tensors are [B, ...] but `group` [F], which is of frames and has to be the same in both.  To be called before
    parts of the model compute what they keep for a clip (`DiT.once`), which need not be [B, ...].  Raises ValueError
    for what is in one of them only, or has another shape there.
    """
    for name in {**cond, **uncond}:
        shapes = [list(side[name].shape) if name in side else "absent" for side in (cond, uncond)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"two passes at once: {name} is {shapes[0]} with the prompt and {shapes[1]} without")
    if "group" in cond and not torch.equal(cond["group"], uncond["group"]):
        raise ValueError("two passes at once: the frames have other groups with the prompt than without")
    return {name: value if name == "group" else torch.cat((value, uncond[name])) for name, value in cond.items()}


def later(make: Callable[[], Velocity]) -> Velocity:
    """The velocity that `make` gives, which is called when the first is asked for, and not again."""
    made = cache(make)
    return lambda x, t: made()(x, t)


def guided(cond: Velocity, uncond: Velocity | AtOnce | None, scale: float) -> Velocity:
    """v_uncond + scale * (v_cond - v_uncond).  With scale 1, or nothing to guide away from, `cond` alone is called."""
    if uncond is None or scale == 1:
        return cond
    both = both_of(cond, uncond)

    def velocity(x: Tensor, t: float) -> Tensor:
        with_prompt, without = both(x, t)
        return without + scale * (with_prompt - without)

    return velocity


def both_of(cond: Velocity, uncond: Velocity | AtOnce) -> Both:
    """The two passes one after the other, the one with the prompt first as in the reference; or at once."""
    if isinstance(uncond, AtOnce):
        return uncond
    return lambda x, t: (cond(x, t), uncond(x, t))


def expert_for(experts: Sequence[tuple[str, float]], t: float) -> str:
    """The name of the first expert in ((name, boundary in [0, 1]), ...) with t >= boundary * 1000, in float64.

    `t` is the timestep the model is given (cut to a whole number where the sampler does so), not 1000 * sigma.
    Raises ValueError when no expert covers t.
    """
    for name, boundary in experts:
        if t >= boundary * 1000:
            return name
    raise ValueError(f"no expert takes t = {t}: {tuple(experts)}")


def by_expert(models: Sequence[tuple[Velocity, float]]) -> Velocity:
    """One velocity of several that are all at hand: ((velocity, boundary in [0, 1]), ...), high noise first."""
    table = [(str(i), boundary) for i, (_, boundary) in enumerate(models)]

    def velocity(x: Tensor, t: float) -> Tensor:
        return models[int(expert_for(table, t))][0](x, t)

    return velocity


class Experts:
    """A velocity of experts of which one at a time is in memory: the one in use is closed before the next is opened.

    `use(name)` is a context manager that brings an expert in and gives its forward function; `bind(name, forward)`
    makes the expert's velocity.  `choose(t)` names the expert of a timestep; without it `expert_for` does, by the
    boundaries.  As timesteps fall, each expert is opened at most once in a run.  `take` gives another
    `bind`, for the next clip of a video say, and keeps the expert that is in memory.  Leave the `with` block to close
    the last one.
    """

    def __init__(
        self,
        experts: Sequence[tuple[str, float]],
        use: Callable[[str], AbstractContextManager[Forward]],
        bind: Callable[[str, Forward], Velocity] | None = None,
        *,
        choose: Callable[[float], str] | None = None,
    ) -> None:
        self.experts = tuple(experts)
        self._choose = choose or partial(expert_for, self.experts)
        self.name: str | None = None  # of the expert in use
        self._use, self._bind = use, bind
        self._stack = ExitStack()
        self._forward: Forward | None = None
        self._velocity: Velocity | None = None

    def take(self, bind: Callable[[str, Forward], Velocity]) -> None:
        """From now on the experts' velocities are made by `bind`."""
        self._bind, self._velocity = bind, None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        name = self._choose(t)
        if name != self.name or self._forward is None:
            self.close()
            self._forward = self._stack.enter_context(self._use(name))
            self.name = name
        if self._velocity is None:
            if self._bind is None:
                raise ValueError("these experts were not told how to be asked: call take(bind)")
            self._velocity = self._bind(name, self._forward)
        return self._velocity(x, t)

    def close(self) -> None:
        """Give back the expert in use, if any."""
        self.name = self._forward = self._velocity = None  # first: they hold the model's weights
        self._stack.close()

    def __enter__(self) -> Experts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
