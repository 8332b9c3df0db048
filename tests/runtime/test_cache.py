"""Step caches: nothing changes at threshold 0, the right steps are skipped, and nothing is mixed up or lost.

The model is small and random, with tokens appended by an adapter's part and two experts; a run is an Euler loop with
both branches of guidance, which is how the pipeline calls a model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from wanloom.errors import InputError
from wanloom.models.config import DiTConfig
from wanloom.models.dit import DiT, init_for_training
from wanloom.models.layers import Scene, Trunk
from wanloom.runtime.caching import (
    COND,
    PRESETS,
    UNCOND,
    WITH_PICTURE,
    CacheFit,
    EasyCache,
    FirstBlockCache,
    MagCache,
    StepCache,
    StepClock,
    TaylorSeer,
    TeaCache,
    make_cache,
    standing_in,
)
from wanloom.runtime.caching.published import RATIOS
from wanloom.runtime.calibration import Point, Recorder, fit_caches, fit_polynomial
from wanloom.sampling.velocity import conditioned, guided

CONFIG = DiTConfig(dim=48, ffn_dim=64, heads=4, layers=3, in_channels=4, out_channels=4, text_dim=8, text_len=4)
STEPS, SWITCH = 14, 6
SPANS = ((0, SWITCH), (SWITCH, STEPS))
FLAT = {COND: (0.99,) * STEPS, UNCOND: (0.985,) * STEPS}

Make = Callable[[nn.Module, StepClock], StepCache]

# Each method so that it skips in the run below, and so that it never does.
LOOSE: dict[str, Make] = {
    "mag": lambda trunk, clock: MagCache(trunk, clock, ratios=FLAT, threshold=0.05, most=3, retention=0.2),
    "tea": lambda trunk, clock: TeaCache(trunk, clock, coefficients=[(0.2, 0.0)], threshold=0.5),
    "easy": lambda trunk, clock: EasyCache(trunk, clock, threshold=0.2),
    "taylor": lambda trunk, clock: TaylorSeer(trunk, clock, interval=3, order=2),
    "first-block": lambda trunk, clock: FirstBlockCache(trunk, clock, threshold=0.3),
}
STRICT: dict[str, Make] = {
    "mag": lambda trunk, clock: MagCache(trunk, clock, ratios={COND: (1.0,) * STEPS}, threshold=0),
    "tea": lambda trunk, clock: TeaCache(trunk, clock, coefficients=[(-1.0, -1.0)], threshold=0),
    "easy": lambda trunk, clock: EasyCache(trunk, clock, threshold=0),
    "taylor": lambda trunk, clock: TaylorSeer(trunk, clock, interval=1),
    "first-block": lambda trunk, clock: FirstBlockCache(trunk, clock, threshold=0),
}


class Appended(nn.Module):
    """A part that appends five tokens, as s2v's references."""

    def forward(self, x: Tensor, scene: Scene) -> tuple[Tensor, Scene]:
        more = scene.rope[:1].expand(5, -1, -1)
        group, frame = (torch.cat((t, t[:1].expand(5))) for t in (scene.group, scene.frame))
        return torch.cat((x, x[:, :5].cos()), 1), replace(
            scene, rope=torch.cat((scene.rope, more)), group=group, frame=frame
        )


def expert(seed: int) -> DiT:
    torch.manual_seed(seed)
    dit = init_for_training(DiT(CONFIG), torch.Generator().manual_seed(seed))
    nn.init.normal_(dit.head.head.weight, 0, 0.1)
    dit.prepare.append(Appended())
    return dit.requires_grad_(False)


@pytest.fixture(scope="module")
def experts() -> list[DiT]:
    return [expert(0), expert(1)]


def start(video: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The noise of a video, and what each branch reads."""
    generator = torch.Generator().manual_seed(100 + video)
    x = torch.randn(1, 4, 2, 4, 4, generator=generator)
    return x, {branch: torch.randn(1, 3, 8, generator=generator) for branch in (COND, UNCOND)}


@contextmanager
def cached(experts: Sequence[DiT], clock: StepClock, make: Make) -> Iterator[list[StepCache]]:
    with ExitStack() as stack:
        yield [stack.enter_context(standing_in(dit, lambda trunk: make(trunk, clock))) for dit in experts]


@torch.no_grad()
def one_step(
    experts: Sequence[DiT], clock: StepClock, x: Tensor, context: dict[str, Tensor], order: Sequence[str]
) -> Tensor:
    """An Euler step of one video under guidance; the branches are called in `order`."""
    dit, t = experts[clock.expert], 1000 * (1 - clock.step / STEPS)
    v = {name: clock.within(name, conditioned(dit, {"context": context[name]}))(x, t) for name in order}
    return x - (v[UNCOND] + 2 * (v[COND] - v[UNCOND])) / STEPS


def run(
    experts: Sequence[DiT],
    clock: StepClock,
    videos: Sequence[int] = (0,),
    *,
    order: Sequence[str] = (COND, UNCOND),
    steps: range = range(STEPS),
    xs: dict[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """The latents of several videos that take turns within a step."""
    xs = {video: start(video)[0] for video in videos} if xs is None else dict(xs)
    for step in steps:
        for video in videos:
            clock.at(step, video)
            xs[video] = one_step(experts, clock, xs[video], start(video)[1], order)
    return xs


# ---------------------------------------------------------------- what every method keeps


@pytest.mark.parametrize("method", STRICT)
def test_a_cache_with_zero_threshold_changes_no_bit(method: str, experts: list[DiT]) -> None:
    clock = StepClock(SPANS)
    plain = run(experts, clock)[0]
    with cached(experts, clock, STRICT[method]) as caches:
        assert torch.equal(run(experts, clock)[0], plain)
    assert [(cache.ran, cache.skipped) for cache in caches] == [(2 * SWITCH, 0), (2 * (STEPS - SWITCH), 0)]
    assert all(isinstance(dit.trunk, Trunk) for dit in experts)  # put back


@pytest.mark.parametrize("method", LOOSE)
def test_skipping_happens_and_stays_near(method: str, experts: list[DiT]) -> None:
    clock = StepClock(SPANS)
    plain = run(experts, clock)[0]
    with cached(experts, clock, LOOSE[method]) as caches:
        out = run(experts, clock)[0]
    assert all(cache.skipped >= 4 and cache.ran >= 4 for cache in caches)
    assert all(cache.ran + cache.skipped == 2 * (b - a) for cache, (a, b) in zip(caches, SPANS, strict=True))
    distance = ((out - plain).norm() / plain.norm()).item()
    assert 0 < distance < 0.05  # measured: 0.003 to 0.013


@pytest.mark.parametrize("method", LOOSE)
def test_the_order_of_the_branches_does_not_matter(method: str, experts: list[DiT]) -> None:
    clock = StepClock(SPANS)
    with cached(experts, clock, LOOSE[method]):
        forth = run(experts, clock)[0]
        back = run(experts, clock, order=(UNCOND, COND))[0]
    assert torch.equal(forth, back)


@pytest.mark.parametrize("method", LOOSE)
def test_videos_that_take_turns_are_as_one_after_another(method: str, experts: list[DiT]) -> None:
    clock = StepClock(SPANS)
    with cached(experts, clock, LOOSE[method]):
        together = run(experts, clock, (0, 1, 2))
    for video in (2, 0, 1):  # with one cache: each of them begins anew
        with cached(experts, clock, LOOSE[method]):
            run(experts, clock, (2 - video,), steps=range(3))  # left in the middle
            assert torch.equal(run(experts, clock, (video,))[video], together[video])


@pytest.mark.parametrize("method", LOOSE)
def test_a_second_clip_begins_anew(method: str, experts: list[DiT]) -> None:
    clock = StepClock(SPANS)
    with cached(experts, clock, LOOSE[method]):
        first = run(experts, clock)[0]
        run(experts, clock, steps=range(SWITCH - 1))
        assert torch.equal(run(experts, clock)[0], first)


@pytest.mark.parametrize("method", LOOSE)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(method: str, experts: list[DiT]) -> None:
    clock = StepClock(SPANS)
    with cached(experts, clock, LOOSE[method]):
        unbroken = run(experts, clock, (0, 1))
    for done in (2, 3, SWITCH, SWITCH + 4):
        with cached(experts, clock, LOOSE[method]) as caches:
            xs = run(experts, clock, (0, 1), steps=range(done))
            states = {video: save(caches[clock.expert].state(video)) for video in (0, 1)}  # as bytes of a file
        with cached(experts, clock, LOOSE[method]) as caches:
            clock.at(done)
            for video, state in states.items():
                caches[clock.expert].load(load(state), video)
            resumed = run(experts, clock, (0, 1), steps=range(done, STEPS), xs=xs)
        assert all(torch.equal(resumed[video], unbroken[video]) for video in (0, 1)), done


@pytest.mark.parametrize("method", LOOSE)
def test_memory_is_what_is_said_and_given_back(method: str, experts: list[DiT]) -> None:
    clock = StepClock(SPANS)
    sizes: list[int] = []
    with cached(experts, clock, LOOSE[method]) as caches:
        xs = None
        for step in range(STEPS):
            xs = run(experts, clock, steps=range(step, step + 1), xs=xs)
            state = caches[clock.expert].state()
            whole = [t for name, t in state.items() if t.shape == (1, 13, CONFIG.dim) and name.startswith(COND)]
            assert all(t.dtype == torch.float32 for t in whole)
            sizes.append(len(whole))
    assert sizes[SWITCH - 1] == sizes[STEPS - 1] == 0  # behind an expert's last step nothing is kept
    assert max(sizes) == {"mag": 1, "tea": 1, "easy": 3, "taylor": 3, "first-block": 2}[method]


@pytest.mark.parametrize("method", LOOSE)
def test_an_expert_begins_with_its_own_pass(method: str, experts: list[DiT]) -> None:
    """With one model for both experts there is only the clock that tells them apart."""
    clock, dit = StepClock(SPANS), experts[0]
    with cached([dit], clock, LOOSE[method]) as (cache,):
        ran, xs = [], None
        for step in range(STEPS):
            before = cache.ran
            xs = run([dit, dit], clock, steps=range(step, step + 1), xs=xs)
            ran.append(cache.ran - before)
    assert ran[0] == ran[SWITCH] == 2 and 0 in ran


def test_a_state_of_another_method_is_refused(experts: list[DiT]) -> None:
    clock = StepClock(SPANS)
    with cached(experts, clock, LOOSE["mag"]) as caches:
        run(experts, clock, steps=range(2))
        state = caches[0].state()
    with cached(experts, clock, LOOSE["easy"]) as caches:
        with pytest.raises(ValueError, match="numbers"):
            caches[0].load(state)
        with pytest.raises(ValueError, match="branch"):
            caches[0].load({"cond/added": torch.zeros(1)})


# ---------------------------------------------------------------- which steps are skipped


class Grow(nn.Module):
    """A block that adds a multiple of its tokens, told from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.by = 0.1

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        return x.add_(self.by * x)


def scene_at(value: float) -> Scene:
    """A scene in which the noisy row of the modulation is `value` and the clean one is far off."""
    none, mod = torch.zeros(0), torch.full((1, 2, 6, 4), value)
    mod[:, 1] = 1e6
    return Scene(rope=none, group=none, frame=none, mod=mod, context=none)


def steps_run(cache: StepCache, feed: Callable[[int], tuple[Tensor, Scene]], branch: str = COND) -> list[int]:
    """Over a whole run: the steps in which the trunk ran."""
    ran = []
    for step in range(cache.clock.steps):
        cache.clock.at(step)
        before = cache.ran
        cache.clock.within(branch, cache)(*feed(step))
        ran += [step] if cache.ran > before else []
    return ran


def published_schedule(row: Sequence[float], steps: int, split: int | None, retention: float, image: bool) -> set[int]:
    """The passes (2 a step) that MagCache4Wan2.2 skips, by its own rule: one counter over both branches."""
    passes, threshold, most = 2 * steps, 0.06, 2
    ratio, error, idle, skipped = [1.0, 1.0], [0.0, 0.0], [0, 0], set()
    for count in range(passes):
        if split is None:
            kept = count < int(passes * retention)
        elif image:
            kept = count < int(2 * split + (passes - 2 * split) * retention)
        else:
            kept = count < int(2 * split * retention)
            kept |= 2 * split <= count <= (passes - 2 * split) * retention + 2 * split
        if kept:
            continue
        side = count % 2
        ratio[side] *= row[count]
        idle[side] += 1
        error[side] += abs(1 - ratio[side])
        if error[side] < threshold and idle[side] <= most:
            skipped.add(count)
        else:
            ratio[side], error[side], idle[side] = 1.0, 0.0, 0
    return skipped


@pytest.mark.parametrize(
    ("model", "split", "retention"),
    [("Wan2.2-T2V-A14B", 26, 0.4), ("Wan2.2-TI2V-5B", None, 0.2), ("Wan2.2-TI2V-5B" + WITH_PICTURE, None, 0.2)],
)
def test_magcache_skips_the_published_steps(model: str, split: int | None, retention: float) -> None:
    fit = RATIOS[model]
    row = [ratio for pair in zip(fit.ratios[COND], fit.ratios[UNCOND], strict=True) for ratio in pair]
    expected = published_schedule(row, fit.steps, split, retention, image=False)
    found = set()
    for side, branch in enumerate((COND, UNCOND)):
        cache = make_cache(Trunk(nn.ModuleList()), StepClock(fit.spans), "magcache", model=model)
        ran = steps_run(cache, lambda _: (torch.ones(1, 2, 4), scene_at(0)), branch)
        found |= {2 * step + side for step in range(fit.steps) if step not in ran}
    assert found == expected
    assert len(found) > 0.2 * 2 * fit.steps


def test_magcache_skips_i2v_as_published_but_for_one_pass() -> None:
    """0.1 of 25 steps and 50 passes: the published rule keeps 3 steps with the prompt and 2 without, ours 3 and 3."""
    fit = RATIOS["Wan2.2-I2V-A14B"]
    cache = make_cache(Trunk(nn.ModuleList()), StepClock(fit.spans), "magcache", model="Wan2.2-I2V-A14B")
    ran = steps_run(cache, lambda _: (torch.ones(1, 2, 4), scene_at(0)))
    row = [ratio for pair in zip(fit.ratios[COND], fit.ratios[UNCOND], strict=True) for ratio in pair]
    skipped = published_schedule(row, 40, 15, 0.1, image=True)
    assert ran == [step for step in range(40) if 2 * step not in skipped]
    assert ran[:18] == list(range(18)) and 40 - len(ran) >= 10


def test_magcache_sums_the_error_of_skipped_steps() -> None:
    """0.9, 0.81: errors 0.1 and 0.29.  The threshold between lets one step through, `most` nothing more."""
    feed = lambda _: (torch.ones(1, 2, 4), scene_at(0))  # noqa: E731
    for threshold, most, expected in (
        (0.09, 9, [0, 1, 2, 3, 4, 5]),
        (0.2, 9, [0, 2, 4]),
        (0.3, 9, [0, 3]),
        (9, 1, [0, 2, 4]),
    ):
        cache = MagCache(
            Trunk(nn.ModuleList()), StepClock(((0, 6),)), ratios={COND: (0.9,) * 6}, threshold=threshold, most=most
        )
        assert steps_run(cache, feed) == expected


def test_a_branch_that_is_not_called_each_time_counts_all_steps_between() -> None:
    cache = MagCache(Trunk(nn.ModuleList()), StepClock(((0, 8),)), ratios={COND: (0.9,) * 8}, threshold=0.15, most=9)
    ran = []
    for step in (0, 1, 2, 4, 6):
        cache.clock.at(step)
        before = cache.ran
        cache(torch.ones(1, 2, 4), scene_at(0))
        ran.append(cache.ran > before)
    assert ran == [True, False, True, True, True]  # 0.9^2 is off by more than the threshold at once


def test_teacache_sums_the_rescaled_movement_of_the_noisy_row() -> None:
    """The row moves by a tenth of itself; twice that is 0.2 a step, and each expert has its polynomial."""
    clock = StepClock(((0, 5), (5, 10)))
    cache = TeaCache(Trunk(nn.ModuleList()), clock, coefficients=[(2.0, 0.0), (4.0, 0.0)], threshold=0.5, retention=0.2)
    assert steps_run(cache, lambda step: (torch.ones(1, 2, 4), scene_at(1.1**step))) == [0, 3, 5, 7, 9]


def test_easycache_predicts_by_the_last_rate() -> None:
    """The trunk multiplies by 1.1, tokens grow by a tenth of the first a step: the prediction is exact and relative."""
    grow = Grow()
    cache = EasyCache(Trunk(nn.ModuleList([grow])), StepClock(((0, 8),)), threshold=0.25, last=1)
    feed = lambda step: (torch.full((1, 2, 4), 1 + 0.1 * step), scene_at(0))  # noqa: E731
    # The rate is known after steps 0 and 1.  Then 0.1 / 1.1 a step, relative to the output of step 1: two are below
    # 0.25, the third is not; behind step 4 it is 0.1 / 1.4, and the last step runs in any case.
    assert steps_run(cache, feed) == [0, 1, 4, 7]


def test_taylor_extrapolates_polynomials_exactly() -> None:
    for order in (0, 1, 2):
        clock = StepClock(((0, 12),))

        class Curve(nn.Module):
            def forward(self, x: Tensor, scene: Scene, clock: StepClock = clock, order: int = order) -> Tensor:
                return x + sum((1 + clock.step) ** power for power in range(order + 1))

        cache = TaylorSeer(Curve(), clock, interval=3, order=order).double()
        x = torch.zeros(1, 2, 4, dtype=torch.float64)
        worst = 0.0
        for step in range(12):
            clock.at(step)
            error = (cache(x, scene_at(0)) - Curve()(x, scene_at(0))).abs().max().item()
            worst = max(worst, error if step > 3 * order else 0)
        assert cache.ran == 4
        # A difference is the slope in the middle of its interval: of a parabola it is off, by what is known.
        assert worst < 1e-9 if order < 2 else worst > 0


def test_first_block_compares_with_the_last_pass() -> None:
    first, second = Grow(), Grow()
    cache = FirstBlockCache(
        Trunk(nn.ModuleList([first, second])), StepClock(((0, 6),)), threshold=0.25, most=None, retention=0.3
    )

    def feed(step: int) -> tuple[Tensor, Scene]:
        first.by = 0.1 * 1.1**step
        return torch.ones(1, 2, 4), scene_at(0)

    assert steps_run(cache, feed) == [0, 1, 4]  # 1.1^2 is near, 1.1^3 is not: nothing is summed
    cache.clock.at(0)
    x = torch.ones(1, 2, 4)
    first.by = 0.1
    assert torch.allclose(cache(x, scene_at(0)), x * 1.1 * 1.1) and torch.equal(x, torch.ones(1, 2, 4))


def test_what_is_added_is_of_the_step_that_ran() -> None:
    grow = Grow()
    cache = MagCache(Trunk(nn.ModuleList([grow])), StepClock(((0, 4),)), ratios={COND: (1.0,) * 4}, most=1)
    x = torch.ones(1, 2, 4)
    cache(x, scene_at(0))
    grow.by = 0.7
    cache.clock.at(1)
    torch.testing.assert_close(cache(5 * x, scene_at(0)), 5 * x + 0.1)
    cache.clock.at(2)
    torch.testing.assert_close(cache(x, scene_at(0)), 1.7 * x)


@pytest.mark.parametrize("method", ["tea", "easy", "first-block"])
def test_ranks_with_uneven_shares_decide_alike(method: str) -> None:
    """Two threads stand for two ranks; what they have seen differs so much that alone they would not agree."""
    clocks, barrier, sums = [StepClock(SPANS) for _ in range(3)], threading.Barrier(2, timeout=20), {}

    def reduce_of(rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(t: Tensor) -> Tensor:
            sums[rank] = t
            barrier.wait()
            both = sums[0] + sums[1]
            barrier.wait()
            return both

        return reduce

    def feed(step: int, part: slice) -> tuple[Tensor, Scene]:
        tokens = torch.tensor([1.0, 1.0, 3.0, -5.0]) + step * torch.tensor([0.05, 0.2, -0.3, 0.9])
        return tokens[None, part, None].expand(1, -1, 4).contiguous(), scene_at(1.8**step)

    def share(rank: int, part: slice, alone: bool = False) -> None:
        cache = LOOSE[method](Trunk(nn.ModuleList([Grow(), Grow()])), clocks[rank])
        cache.reduce = None if alone else reduce_of(rank)
        found[rank] = steps_run(cache, lambda step: feed(step, part))

    found: dict[int, list[int]] = {}
    share(2, slice(0, 4), alone=True)
    threads = [
        threading.Thread(target=share, args=(0, slice(0, 1))),
        threading.Thread(target=share, args=(1, slice(1, 4))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert 2 < len(found[2]) < STEPS


# ---------------------------------------------------------------- clock, presets, fits


def test_the_clock_says_branch_and_expert() -> None:
    clock = StepClock(((0, 2), (2, 3)))
    assert clock.steps == 3
    said = clock.within(UNCOND, lambda: clock.branch)
    assert (said(), clock.branch) == (UNCOND, COND)
    clock.at(2, video=4)
    assert (clock.expert, clock.span, clock.video) == (1, (2, 3), 4)
    clock.at(3)
    with pytest.raises(ValueError, match="step 3"):
        _ = clock.expert
    for spans in ((), ((1, 2),), ((0, 2), (3, 4)), ((0, 0),)):
        with pytest.raises(ValueError, match="spans"):
            StepClock(spans)


def test_every_preset_makes_a_cache_that_runs(experts: list[DiT]) -> None:
    fit = CacheFit(spans=SPANS, ratios=FLAT, polynomials=((1.0, 0.0),) * 2)
    clock = StepClock(SPANS)
    for name, preset in PRESETS.items():
        assert preset.loss == "lossy" and preset.about and preset.source
        with cached(experts, clock, lambda trunk, clock, name=name: make_cache(trunk, clock, name, fit=fit)) as caches:
            run(experts, clock)
        assert sum(cache.ran + cache.skipped for cache in caches) == 2 * STEPS
        for model in preset.fits or ():
            assert isinstance(make_cache(Trunk(nn.ModuleList()), clock, name, model=model), preset.method)


def test_what_a_preset_cannot_be_is_said() -> None:
    trunk, clock = Trunk(nn.ModuleList()), StepClock(SPANS)
    for code, name, more in (
        ("E2046", "magcash", {}),
        ("E2046", "easycache", {"threshold": -1.0}),
        ("E2046", "easycache", {"threshold": float("nan")}),
        ("E2046", "taylor", {"threshold": 0.1}),
        ("E2047", "magcache", {"model": "Wan2.2-S2V-14B"}),
        ("E2047", "teacache", {"model": "Wan2.2-T2V-A14B"}),
        ("E2047", "teacache", {"fit": CacheFit(spans=SPANS, ratios=FLAT)}),
    ):
        with pytest.raises(InputError) as caught:
            make_cache(trunk, clock, name, **more)
        assert caught.value.code == code, name
    with pytest.raises(InputError, match="around Grow"):
        make_cache(Grow(), clock, "first-block")
    with pytest.raises(ValueError, match="ratios"):
        MagCache(trunk, clock, ratios={COND: (1.0,)})


def test_ratios_are_stretched_expert_by_expert() -> None:
    fit = RATIOS["Wan2.2-T2V-A14B"]
    assert fit.ratios_for(fit.spans) == fit.ratios
    assert fit.ratios[COND][26] == 0.65523 and fit.ratios[UNCOND][13] == 0.99694  # as in the source's list
    for spans in (((0, 13), (13, 20)), ((0, 3), (3, 60))):
        row = fit.ratios_for(spans)[COND]
        assert len(row) == spans[-1][1]
        assert [step for step, ratio in enumerate(row) if ratio == 0.65523] == [spans[1][0]]
        assert row[-1] == 0.80263
    whole = fit.ratios_for(((0, 20),))[UNCOND]  # one expert made all steps
    assert whole == tuple(fit.ratios[UNCOND][step and 1 + round((step - 1) * 38 / 18)] for step in range(20))
    assert len(fit.ratios_for(((0, 1), (1, 2)))[COND]) == 2


def test_a_fit_is_read_strictly() -> None:
    fit = CacheFit(spans=((0, 1), (1, 3)), ratios={COND: (1.0, 1.0, 0.5)}, polynomials=((1.0, 0.0), (2.0,)), about="ä")
    text = fit.to_json()
    assert CacheFit.from_json(text) == fit == CacheFit.from_json(text.encode())
    for old, new in (
        ('"format": 1', '"format": 2'), ("0.5", "NaN"), ("0.5", '"0.5"'), ("0.5", "-0.5"), ("0.5", "true"),
        ('"about"', '"aboud"'), ("}", ""), ('"cond"', '"con"'), ('"ratios": {', '"ratios": ["'), ("2.0", ""),
    ):  # fmt: skip
        assert old in text
        with pytest.raises(InputError, match="cache fit"):
            CacheFit.from_json(text.replace(old, new))
    for damaged in (b"\xff", "[]", "[" * 100_000, '{"a": 1}', text.replace("3", "2", 1), text + " " * (1 << 22)):
        with pytest.raises(InputError, match="cache fit"):
            CacheFit.from_json(damaged)


# ---------------------------------------------------------------- calibration


def test_the_recorder_changes_nothing_and_measures_what_it_sees(experts: list[DiT]) -> None:
    clock, points = StepClock(SPANS), list[Point]()
    plain = run(experts, clock, (0, 1))
    with cached(experts, clock, lambda trunk, clock: Recorder(trunk, clock, points)):
        out = run(experts, clock, (0, 1))
    assert all(torch.equal(out[video], plain[video]) for video in (0, 1))
    fit = fit_caches(points, SPANS)
    assert set(fit.ratios) == {COND, UNCOND} and fit.ratios[COND][SWITCH] == fit.ratios[COND][0] == 1.0
    assert len(points) == 2 * 2 * (STEPS - 2) and [len(p) for p in fit.polynomials] == [5, 5]
    assert CacheFit.from_json(fit.to_json()) == fit
    with cached(experts, clock, lambda trunk, clock: make_cache(trunk, clock, "magcache-fast", fit=fit)) as caches:
        run(experts, clock)
    assert sum(cache.skipped for cache in caches) > 4
    with pytest.raises(InputError, match="step 3 of 14"):
        fit_caches([point for point in points if point.step != 2], SPANS)


def test_ratios_are_the_mean_over_tokens_of_lengths() -> None:
    grow, clock, points = Grow(), StepClock(((0, 3),)), list[Point]()
    recorder = Recorder(Trunk(nn.ModuleList([grow])), clock, points)
    x = torch.ones(1, 2, 4)
    x[0, 1] = 10
    for step, scale in enumerate(((1, 1), (0.5, 0.9), (0.5, 0.9))):
        clock.at(step)
        recorder(x * torch.tensor(scale)[:, None], scene_at(1.0 + step))
    fit = fit_caches(points, clock.spans)
    assert fit.ratios == {COND: (1.0, 0.7, 1.0)}
    assert [point.moved for point in points] == [1.0, 0.5]
    assert points[0].changed == pytest.approx((0.05 + 0.1) / 1.1, rel=1e-5) and points[1].changed == 0


def test_a_polynomial_is_found_again() -> None:
    wanted = (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525)
    xs = [0.01 + 0.004 * i for i in range(12)]
    found = fit_polynomial([(x, sum(c * x ** (4 - i) for i, c in enumerate(wanted))) for x in xs])
    assert found == pytest.approx(wanted, rel=1e-6)
    assert fit_polynomial([(0.1, 0.3), (0.2, 0.5)]) == pytest.approx((2.0, 0.1))
    assert fit_polynomial([(0.1, 0.3)]) == (1.0, 0.0)


# ---------------------------------------------------------------- the demo model


def test_on_the_demo_model_steps_are_skipped_and_the_latents_stay_near() -> None:
    import wanloom
    from wanloom.conditioning import text
    from wanloom.plan import Plan
    from wanloom.request import Request
    from wanloom.sampling.samplers import SAMPLERS
    from wanloom.sampling.velocity import Experts

    pipe = wanloom.load("demo-t2v", device="cpu")
    plan: Plan = pipe.prepare(Request(prompt="a red circle moves left", seed=1, steps=20)).plan
    given = text.condition(pipe.parts, plan, {})
    spans = tuple((span.start, span.stop) for span in plan.spans)

    @torch.no_grad()
    def video(make: Make | None, clock: StepClock, seed: int = 1) -> tuple[Tensor, list[StepCache]]:
        caches: list[StepCache] = []

        @contextmanager
        def use(name: str) -> Iterator[Any]:
            with pipe.parts.use("dit", expert=name) as dit, ExitStack() as stack:
                if make is not None:
                    caches.append(stack.enter_context(standing_in(dit, lambda trunk: make(trunk, clock))))
                yield dit

        def bind(name: str, dit: Any) -> Any:
            scale = {span.expert: span.guidance for span in plan.spans}[name]
            cond, uncond = conditioned(dit, given.cond), conditioned(dit, given.uncond)
            return guided(clock.within(COND, cond), clock.within(UNCOND, uncond), scale)

        with Experts(pipe.variant.experts, use, bind) as velocity:
            x = torch.randn(1, *plan.latent, generator=torch.Generator().manual_seed(seed))
            steps = SAMPLERS[plan.sampler](velocity, x, plan.schedule)
            for index in range(plan.steps):
                clock.at(index)
                x = next(steps).x
        return x, caches

    clock, points = StepClock(spans), list[Point]()
    plain, _ = video(lambda trunk, clock: Recorder(trunk, clock, points), clock)
    fit = fit_caches(points, spans)
    assert torch.equal(video(None, clock)[0], plain)
    other = (video(None, clock, seed=2)[0] - plain).norm()
    for name, threshold in (("magcache", 0.06), ("easycache", 0.1)):
        same, _ = video(lambda trunk, clock, name=name: make_cache(trunk, clock, name, fit=fit, threshold=0), clock)
        assert torch.equal(same, plain)

        def make(trunk: nn.Module, clock: StepClock, name: str = name, threshold: float = threshold) -> StepCache:
            return make_cache(trunk, clock, name, fit=fit, threshold=threshold)

        near, caches = video(make, clock)
        assert sum(cache.skipped for cache in caches) >= 3, name
        assert 0 < (near - plain).norm() < 0.6 * other, name
