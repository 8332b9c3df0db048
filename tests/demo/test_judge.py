"""The judge is proven before it judges: right on what the world draws, at chance on shuffled captions, never fooled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from wanloom.demo import world
from wanloom.demo.judge import Verdict, View, compare, judge, observe
from wanloom.demo.world import BACKGROUNDS, COLOURS, SHAPES, Clip, Pixels, Thing

ATTRIBUTES = ("colour", "shape", "motion", "background")
Shown = tuple[Clip, Pixels, View]


def rate(verdicts: list[Verdict], attribute: str) -> float:
    return float(np.mean([getattr(verdict, attribute) for verdict in verdicts]))


def drawn(count: int, objects: int) -> list[Shown]:
    rng = np.random.default_rng(objects)
    found = []
    for _ in range(count):
        clip = world.sample_clip(rng, objects=objects, split="any")
        video = world.render(clip)
        found.append((clip, video, observe(video)))
    return found


@pytest.fixture(scope="module")
def ones() -> list[Shown]:
    return drawn(500, 1)


@pytest.fixture(scope="module")
def twos() -> list[Shown]:
    return drawn(150, 2)


def blurred(video: Pixels, times: int, noise: float, rng: np.random.Generator) -> Pixels:
    soft = video.astype(np.float32)
    for _ in range(times):
        for axis in (1, 2):
            soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    return np.clip(soft + rng.normal(0, noise, video.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("attribute", [*ATTRIBUTES, "count", "all_right"])
def test_every_attribute_of_500_drawn_clips_is_read_right(ones: list[Shown], attribute: str) -> None:
    verdicts = [compare(view, clip) for clip, _, view in ones]
    assert rate(verdicts, attribute) >= 0.995


@pytest.mark.parametrize("attribute", [*ATTRIBUTES, "count", "all_right"])
def test_every_attribute_of_clips_with_two_things_is_read_right(twos: list[Shown], attribute: str) -> None:
    verdicts = [compare(view, clip) for clip, _, view in twos]
    assert rate(verdicts, attribute) >= 0.995


def test_a_drawn_clip_has_nearly_the_ideal_shape(ones: list[Shown], twos: list[Shown]) -> None:
    for shown in (ones, twos):
        assert np.mean([compare(view, clip).iou for clip, _, view in shown]) > 0.99


@pytest.mark.parametrize("size", [96, 128])
def test_other_picture_sizes_are_judged_alike(ones: list[Shown], size: int) -> None:
    assert all(judge(world.render(clip, size), clip).all_right for clip, _, _ in ones[:60])


def test_blur_and_noise_as_a_vae_leaves_them_change_no_verdict(ones: list[Shown], twos: list[Shown]) -> None:
    rng = np.random.default_rng(0)
    for times, noise in ((1, 4.0), (2, 8.0)):
        verdicts = [judge(blurred(video, times, noise, rng), clip) for clip, video, _ in (*ones[:40], *twos[:20])]
        assert all(verdict.all_right and verdict.count for verdict in verdicts)
        assert np.mean([verdict.iou for verdict in verdicts]) > 0.8


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_with_shuffled_captions_every_attribute_is_at_chance(ones: list[Shown], attribute: str) -> None:
    said = [
        clip.background if attribute == "background" else str(getattr(clip.things[0], attribute)) for clip, _, _ in ones
    ]
    share = np.array([said.count(word) for word in set(said)]) / len(said)
    chance = float((share**2).sum())
    shifts = range(20, 500, 40)
    verdicts = [compare(ones[i][2], ones[(i + shift) % 500][0]) for shift in shifts for i in range(500)]
    assert abs(rate(verdicts, attribute) - chance) <= 0.03


def test_noise_and_black_are_never_right(ones: list[Shown]) -> None:
    rng = np.random.default_rng(3)
    black = np.zeros((17, 64, 64, 3), np.uint8)
    view = observe(black)
    assert rate([compare(view, clip) for clip, _, _ in ones], "all_right") == 0
    noise = [observe(rng.integers(0, 256, black.shape, dtype=np.uint8)) for _ in range(25)]
    assert rate([compare(noise[i % 25], clip) for i, (clip, _, _) in enumerate(ones)], "all_right") <= 0.02


def moving(ones: list[Shown], count: int = 40) -> list[tuple[Clip, Pixels]]:
    return [(clip, video) for clip, video, _ in ones if clip.things[0].motion != "still"][:count]


def test_a_clip_frozen_at_its_first_frame_is_right_only_when_it_should_stand_still(ones: list[Shown]) -> None:
    verdicts = [judge(np.repeat(video[:1], 17, axis=0), clip) for clip, video in moving(ones, 200)]
    assert rate(verdicts, "all_right") <= 0.02
    still = Clip("white", (Thing("heart", "red", "still", 30, 30, 12),))
    assert judge(np.repeat(world.render(still, frames=1), 17, axis=0), still).all_right


def test_a_thing_that_vanishes_for_a_moment_is_wrong(ones: list[Shown]) -> None:
    for clip, video in moving(ones):
        gone = video.copy()
        gone[7:9] = BACKGROUNDS[clip.background]
        verdict = judge(gone, clip)
        assert not verdict.shape and not verdict.motion


def test_a_thing_that_turns_into_another_shape_is_wrong(ones: list[Shown]) -> None:
    for clip, video in moving(ones):
        thing = clip.things[0]
        other = SHAPES[(SHAPES.index(thing.shape) + 1) % len(SHAPES)]
        second = world.render(replace(clip, things=(replace(thing, shape=other),)))
        assert not judge(np.concatenate([video[:9], second[9:]]), clip).shape


def test_a_clip_that_stops_halfway_or_jumps_about_is_wrong(ones: list[Shown]) -> None:
    rng = np.random.default_rng(4)
    for clip, video in moving(ones):
        assert not judge(np.concatenate([video[:9], np.repeat(video[8:9], 8, axis=0)]), clip).motion
        assert not judge(video[rng.permutation(17)], clip).motion


def test_the_clip_played_backwards_shows_the_opposite_motion() -> None:
    opposite = {"left": "right", "up": "down", "grow": "shrink", "right": "left", "down": "up", "shrink": "grow"}
    rng = np.random.default_rng(5)
    for motion, reverse in opposite.items():
        clip = world.compose(rng, "black", [("star", "yellow", motion)])
        assert clip is not None
        (seen,) = observe(world.render(clip)[::-1]).things
        assert seen.motion == reverse


def test_a_second_thing_that_nobody_asked_for_is_counted_and_wrong() -> None:
    one, two = Thing("circle", "red", "down", 16, 16, 10, 1.0), Thing("square", "blue", "still", 46, 46, 10)
    verdict = judge(world.render(Clip("white", (one, two))), Clip("white", (one,)))
    assert verdict.shape and verdict.motion and not verdict.colour and not verdict.count
    twin = replace(two, colour="red")
    assert not judge(world.render(Clip("white", (one, twin))), Clip("white", (one,))).all_right


def test_with_two_things_each_must_have_its_own_colour_shape_and_motion() -> None:
    one, two = Thing("circle", "red", "down", 16, 16, 10, 1.0), Thing("square", "blue", "still", 46, 40, 10)
    view = observe(world.render(Clip("sand", (one, two))))
    assert compare(view, Clip("sand", (two, one))).all_right
    swapped = Clip("sand", (replace(one, colour="blue"), replace(two, colour="red")))
    assert not compare(view, swapped).all_right
    missing = judge(world.render(Clip("sand", (one,))), Clip("sand", (one, two)))
    assert not missing.count and not missing.all_right and missing.iou == pytest.approx(0.5, abs=0.01)


def test_a_colour_between_the_palette_is_no_colour() -> None:
    clip = Clip("white", (Thing("circle", "red", "right", 20, 32, 12, 1.2),))
    video = world.render(clip).astype(np.float32)
    share = (255 - video[..., 1:2]) / (255 - COLOURS["red"][1])
    brown = (255 + share * (np.array((110, 70, 60), np.float32) - 255)).clip(0, 255).astype(np.uint8)
    verdict = judge(brown, clip)
    assert not verdict.colour and verdict.shape and verdict.motion and verdict.background


def test_what_a_prompt_does_not_name_counts_as_met() -> None:
    video = world.render(Clip("sky", (Thing("heart", "purple", "up", 32, 48, 11, 1.4),)))
    assert judge(video, world.parse("a heart")).all_right
    assert judge(video, world.parse("a purple heart moves up")).all_right
    assert not judge(video, world.parse("a purple star")).shape
    assert not judge(video, world.parse("a heart on black")).background


def test_what_is_no_video_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        observe(np.zeros((17, 64, 64), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        observe(np.zeros((17, 64, 64, 3), np.float32))  # type: ignore[arg-type]
