"""A step waits for nothing: between the latents it is given and those it returns no number comes to the host.

On a GPU the host runs ahead of the device; a single `.item()` within a step makes it wait until all that was asked for
is done.  Here steps are made on the meta device, whose tensors have no values, so whoever asks for one fails, and
`Watch` and `Literals` refuse copies between places, numbers that become tensors, and shapes that depend on values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
from wanloom import Request, load
from wanloom.models.adapters import build_dit
from wanloom.runtime.caching.base import StepCache
from wanloom.runtime.caching.clock import COND, UNCOND, StepClock
from wanloom.runtime.caching.presets import PRESETS, make_cache
from wanloom.sampling.guidance import RECIPES, guide
from wanloom.sampling.samplers import SAMPLERS, Velocity, hold
from wanloom.sampling.schedule import make_schedule
from wanloom.sampling.velocity import conditioned

pytestmark = pytest.mark.filterwarnings("ignore::wanloom.errors.WanloomWarning")

STEPS = 3  # the first, one between, and the last: no sampler has others
aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.masked_select, aten._unique2, aten.equal}


class Waits(AssertionError):
    """A step wanted to know a number."""


class Literals(TorchFunctionMode):
    """Fails where numbers of the host become a tensor: on a GPU a copy that is waited for."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor):
            raise Waits(f"{func}: numbers of the host become a tensor")
        return func(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Fails for an operation that a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in WAITING:
            raise Waits(f"{func} needs a value")
        out = func(*args, **kwargs)
        places = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        if len(places) > 1:
            raise Waits(f"{func} copies between {places}")
        return out


class Count(TorchDispatchMode):
    """How many numbers came to the host."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self.numbers += func.overloadpacket is aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- what is asked


def given(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Conditioning, noise and held latents of a tiny model, on the meta device."""
    config = tiny.TINY[name].dit
    latent = (config.out_channels, 3, 8, 8)
    rows: dict[str, Tensor] = {"context": torch.empty(1, 5, config.text_dim)}
    clean = None
    if config.image_dim is not None:
        rows["image"] = torch.empty(1, 514 if config.image_positions else 257, config.image_dim)
    if config.in_channels > latent[0]:
        rows["y"] = torch.empty(1, config.in_channels - latent[0], *latent[1:])
    if name.startswith("ti2v"):
        rows["group"], clean = torch.empty(3, dtype=torch.long), torch.empty(1, latent[0], 1, 8, 8)
    if (speech := config.speech) is not None:
        rows |= {
            "audio": torch.empty(1, speech.audio_states, speech.audio_dim, 12),
            "reference": torch.empty(1, latent[0], 1, 8, 8),
            "motion": torch.empty(1, latent[0], (speech.history + 3) // 4, 8, 8),
            "group": torch.empty(3, dtype=torch.long),
        }
    if (animate := config.animate) is not None:
        rows |= {
            "pose": torch.empty(1, animate.channels, 2, 8, 8),
            "face": torch.empty(1, 3, 5, animate.face_size, animate.face_size),
        }
    return rows, torch.empty(1, *latent), clean


def a_velocity(dit: Any, rows: dict[str, Tensor], clock: StepClock, mode: str) -> Velocity:
    """Both branches of guidance, with what a clip computes once behind it."""
    cond, uncond = (clock.within(branch, conditioned(dit, dit.once({**rows}))) for branch in (COND, UNCOND))
    return guide(cond, uncond, 5.0, clock, RECIPES[mode])


def walk(
    name: str, sampler: str = "unipc", mode: str = "plain", cache: Callable[[Any, StepClock], Any] | None = None,
    count: int = STEPS,
) -> int:  # fmt: skip
    """Some steps of a run under `Watch`; how many."""
    clock = StepClock(((0, count),))
    with torch.device("meta"), torch.no_grad():
        dit: Any = build_dit(tiny.TINY[name].dit).eval()
        rows, x, clean = given(name)
        if cache is not None:
            dit.trunk = cache(dit.trunk, clock)
        velocity = a_velocity(dit, rows, clock, mode)
    loop = SAMPLERS[sampler] if clean is None else hold(SAMPLERS[sampler], clean)
    steps = loop(velocity, x, make_schedule(sampler, count, 5.0))
    with torch.no_grad(), Watch(), Literals():
        for index in range(count):
            clock.at(index)
            assert next(steps).x.is_meta
    return index + 1


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("name", ["t2v-A14B", "i2v-A14B", "ti2v-5B", "i2v-14B", "flf2v-14B", "s2v-14B", "animate-14B"])
def test_no_model_waits(name: str) -> None:
    assert walk(name) == STEPS


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_waits(sampler: str) -> None:
    assert walk("t2v-1.3B", sampler) == STEPS


@pytest.mark.parametrize("mode", RECIPES)
def test_no_guidance_waits(mode: str) -> None:
    assert walk("t2v-1.3B", "euler", mode) == STEPS


# Those that look at tensors to decide; in `StepCache.agree`, once a call, and as their docstrings say.
ASKING = {"teacache", "easycache", "easycache-fast", "first-block"}


@pytest.mark.parametrize("name", PRESETS)
def test_caches_whose_schedule_is_known_do_not_wait(name: str) -> None:
    def cache(trunk: Any, clock: StepClock) -> StepCache:
        model = "Wan2.1-T2V-1.3B" if name == "teacache" else "Wan2.2-TI2V-5B"
        return make_cache(trunk, clock, name, model=model)

    if name in ASKING:
        with pytest.raises((Waits, RuntimeError, NotImplementedError)):
            walk("t2v-1.3B", cache=cache, count=2 * STEPS)
    else:
        assert walk("t2v-1.3B", cache=cache, count=2 * STEPS) == 2 * STEPS


def test_a_step_of_a_run_is_looked_at_once(models: Path) -> None:
    """The pipeline asks after each step whether the latents are finite; this is where progress becomes true."""
    pipe = load(models / "t2v-1.3B", task="t2v-1.3B", device="cpu")
    request = Request(prompt="a red cat", size="32x32", frames=5, steps=4, seed=1)
    with Count() as count:
        numbers = [count.numbers for event in pipe.stream(request) if event.stage == "denoise"]
    assert [after - before for before, after in pairwise(numbers[1:])] == [1] * 3


# ---------------------------------------------------------------- the watch sees what it must


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.mean().item(),
        lambda x: bool((x > 0).all()),
        lambda x: float(x.sum()),
        lambda x: x.sum() if x.max() > 0 else x,
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x * torch.tensor([2.0], device=x.device),
        lambda x: x + x.new_tensor(3.0),
        lambda x: x + torch.ones(1).to(x.device),
        lambda x: torch.equal(x, x),
    ],
)  # fmt: skip
def test_the_watch_sees_who_waits(wait: Callable[[Tensor], Any]) -> None:
    x = torch.empty(3, device="meta")
    with pytest.raises((Waits, RuntimeError, NotImplementedError)), Watch(), Literals():
        wait(x)
