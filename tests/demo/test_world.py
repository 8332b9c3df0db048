"""The demo world: what it draws, what it says, what it holds out."""

from __future__ import annotations

import zlib
from itertools import combinations, product

import numpy as np
import pytest

from wanloom.demo import world
from wanloom.demo.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Clip, Thing


def clips(count: int, objects: int | None = None, split: str = "any", seed: int = 0) -> list[Clip]:
    rng = np.random.default_rng(seed)
    return [world.sample_clip(rng, objects=objects, split=split) for _ in range(count)]


def asked(clip: Clip) -> list[tuple[str | None, str | None, str | None]]:
    return [(ask.shape, ask.colour, ask.motion) for ask in world.wanted(clip).things]


def test_the_world_is_as_large_as_promised() -> None:
    assert len(SHAPES) >= 5 and len(COLOURS) >= 6 and len(BACKGROUNDS) >= 4 and len(MOTIONS) >= 7


def test_all_colours_and_backgrounds_are_well_apart() -> None:
    palette = [np.array(colour, float) for colour in (*COLOURS.values(), *BACKGROUNDS.values())]
    assert min(np.linalg.norm(a - b) for a, b in combinations(palette, 2)) > 90


@pytest.mark.parametrize("size", [64, 96, 128])
def test_a_clip_is_drawn_at_any_size_in_exact_palette_colours(size: int) -> None:
    clip = Clip("sky", (Thing("star", "red", "left", 40, 30, 12, 1.2),))
    video = world.render(clip, size)
    assert video.shape == (17, size, size, 3) and video.dtype == np.uint8
    assert tuple(video[0, 0, 0]) == BACKGROUNDS["sky"]
    assert tuple(video[0, 30 * size // 64, 40 * size // 64]) == COLOURS["red"]


def test_a_larger_picture_shows_the_same_scene() -> None:
    for clip in clips(40):
        small, large = world.render(clip, 64).astype(float), world.render(clip, 128).astype(float)
        halved = large.reshape(17, 64, 2, 64, 2, 3).mean((2, 4))
        assert np.abs(halved - small).mean() < 0.5


def test_things_stay_inside_the_picture() -> None:
    for clip in clips(300):
        video = world.render(clip).astype(int)
        for edge in (video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]):
            # The soft tip of a corner may just tinge the outermost pixel.
            assert np.abs(edge - BACKGROUNDS[clip.background]).max() < 50, clip


def test_two_things_have_two_colours_and_stay_apart() -> None:
    for clip in clips(200, objects=2):
        first, second = clip.things
        assert first.colour != second.colour
        alone = [world.render(Clip(clip.background, (thing,))) for thing in clip.things]
        ground = np.array(BACKGROUNDS[clip.background], np.uint8)
        covered = [(video != ground).any(-1) for video in alone]
        assert not (covered[0] & covered[1]).any(), clip


def test_radius_and_speed_keep_to_what_the_models_can_learn() -> None:
    for clip in clips(500):
        for thing in clip.things:
            x, y, radius = thing.path(world.clock(17))
            assert radius.min() >= 9 - 1e-4
            assert np.hypot(np.diff(x), np.diff(y)).max() <= 1.5 + 1e-4
            assert (thing.speed == 0) == (thing.motion == "still")


@pytest.mark.parametrize(
    ("motion", "middle", "end", "radius"),
    [
        ("left", (-8, 0), (-16, 0), 0),
        ("right", (8, 0), (16, 0), 0),
        ("up", (0, -8), (0, -16), 0),
        ("down", (0, 8), (0, 16), 0),
        ("bounce", (0, 8), (0, 0), 0),
        ("orbit", (0, 16 / np.pi), (0, 0), 0),
        ("still", (0, 0), (0, 0), 0),
        ("grow", (0, 0), (0, 0), 16),
        ("shrink", (0, 0), (0, 0), -16),
    ],
)
def test_each_motion_goes_where_its_word_says(
    motion: str, middle: tuple[float, float], end: tuple[float, float], radius: float
) -> None:
    speed = 0.0 if motion == "still" else 1.0
    x, y, r = Thing("circle", "red", motion, 30, 30, 20, speed).path(world.clock(17))
    assert np.allclose((x[8] - x[0], y[8] - y[0]), middle, atol=1e-4)
    assert np.allclose((x[16] - x[0], y[16] - y[0]), end, atol=1e-4)
    assert r[16] - r[0] == pytest.approx(radius)


def test_fewer_frames_are_the_start_of_the_clip_and_more_end_in_the_same_place() -> None:
    for clip in clips(20):
        video = world.render(clip)
        assert np.array_equal(world.render(clip, frames=5), video[:5])
        assert np.array_equal(world.first_frame(clip), video[0])
        assert np.array_equal(world.render(clip, frames=33)[-1], video[-1])


def test_each_shape_has_its_centre_of_mass_at_its_place() -> None:
    grid = (np.arange(256) + 0.5) / 4
    place, radius = np.full(1, 32, np.float32), np.full(1, 14, np.float32)
    for shape in SHAPES:
        mask = world.ideal_mask(shape, place, place, radius, 256)[0]
        assert mask.sum(0) @ grid / mask.sum() == pytest.approx(32, abs=0.02), shape
        assert mask.sum(1) @ grid / mask.sum() == pytest.approx(32, abs=0.02), shape
        rows, columns = np.nonzero(mask > 0.5)
        reach = (32 - grid[columns.min()], 32 - grid[rows.min()], grid[columns.max()] - 32, grid[rows.max()] - 32)
        assert np.allclose(reach, 14 * np.array(world.EXTENT[shape]), atol=0.5), shape


def test_the_held_out_rule_is_the_crc32_of_the_sorted_words() -> None:
    for shape, colour, motion, background in product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS):
        crc = zlib.crc32(" ".join(sorted((shape, colour, motion, background))).encode())
        pair = zlib.crc32(" ".join(sorted((shape, colour))).encode())
        expected = crc % 5 == 0 or pair % 10 == 1
        assert world.held_out_combination(colour, shape, motion, background) == expected


def test_one_pair_in_ten_is_held_out_and_training_still_sees_every_word() -> None:
    pairs = [(c, s) for c, s in product(COLOURS, SHAPES) if world.held_out_pair(c, s)]
    assert len(pairs) == 3
    assert len({c for c, _ in pairs}) == len({s for _, s in pairs}) == 3


def test_training_never_draws_what_is_held_out() -> None:
    assert not any(world.held_out(clip) for clip in clips(2000, split="train"))
    assert all(world.held_out(clip) for clip in clips(500, split="held_out"))
    share = np.mean([world.held_out(clip) for clip in clips(2000, objects=1, split="any")])
    assert 0.23 < share < 0.33


def test_training_draws_every_combination_that_is_not_held_out() -> None:
    seen = {(c.background, *asked(c)[0]) for c in clips(12000, objects=1, split="train")}
    every = product(BACKGROUNDS, SHAPES, COLOURS, MOTIONS)
    assert seen == {(b, s, c, m) for b, s, c, m in every if not world.held_out_combination(c, s, m, b)}


def test_a_wrong_split_or_count_is_refused() -> None:
    with pytest.raises(ValueError, match="split"):
        clips(1, split="test")
    with pytest.raises(ValueError, match="objects"):
        clips(1, objects=3)


def test_a_caption_says_what_the_clip_shows_in_known_words_and_few_tokens() -> None:
    rng = np.random.default_rng(1)
    used: set[str] = set()
    for clip in clips(4000):
        text = world.caption(clip, rng)
        read = world.parse(text)
        assert read.background == clip.background, text
        assert [(ask.shape, ask.colour, ask.motion) for ask in read.things] == asked(clip), text
        assert all(ask.size in (None, thing.size) for ask, thing in zip(read.things, clip.things, strict=True)), text
        assert len(world.words(text)) <= 23 and not world.unknown_words(text), text
        used.update(world.words(text))
    assert used == set(world.VOCABULARY)


def test_a_clip_has_several_captions() -> None:
    rng = np.random.default_rng(2)
    clip = Clip("gray", (Thing("heart", "orange", "grow", 30, 30, 9, 0.4),))
    captions = {world.caption(clip, rng) for _ in range(200)}
    assert len(captions) >= 15
    assert any("grey" in text for text in captions) and not any("a orange" in text for text in captions)


def test_words_outside_the_vocabulary_are_named_once_in_order() -> None:
    assert world.unknown_words("A Dog chases a red circle, a dog!") == ["dog", "chases"]
    assert world.unknown_words("A red circle moves left on a white background.") == []


def test_a_prompt_that_leaves_things_open_asks_for_nothing_there() -> None:
    read = world.parse("a circle and a big red star that grows")
    assert read.background is None
    assert [(a.shape, a.colour, a.motion, a.size) for a in read.things] == [
        ("circle", None, None, None),
        ("star", "red", "grow", "big"),
    ]
    assert world.parse("nothing at all").things == ()


def test_example_prompts_are_deterministic_held_out_and_all_different() -> None:
    prompts = world.example_prompts(300)
    assert prompts[:2] == [
        "a little orange circle moving right on a sand background",
        "on white, a little orange square circles around",
    ]
    assert prompts == world.example_prompts(300) and prompts[:50] == world.example_prompts(50)
    assert prompts != world.example_prompts(300, seed=1)
    combinations_asked = set()
    for prompt in prompts:
        read = world.parse(prompt)
        (ask,) = read.things
        assert ask.colour and ask.shape and ask.motion and read.background
        assert world.held_out_combination(ask.colour, ask.shape, ask.motion, read.background), prompt
        combinations_asked.add((ask, read.background))
    assert len(combinations_asked) == 300


@pytest.mark.parametrize("held_out", [True, False])
def test_example_prompts_of_two_things_are_held_out_when_one_thing_is(held_out: bool) -> None:
    for prompt in world.example_prompts(50, held_out, objects=2):
        read = world.parse(prompt)
        assert len(read.things) == 2 and read.background
        unseen = [
            world.held_out_combination(str(a.colour), str(a.shape), str(a.motion), read.background) for a in read.things
        ]
        assert any(unseen) == held_out, prompt
