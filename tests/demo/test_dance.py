"""The world of dancing figures, and the judge of them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from wanloom.demo.dance import SIZE, Dance, cover, draw_room, drive, held_out, perform, portrait, sample_dance
from wanloom.demo.dance_judge import JOINTS, WORN, Seen, Verdict, compare, observe, places
from wanloom.demo.figures import CLOTHES, HAIRS, SKINS

COUNT, FEW, FRAMES = 20, 6, 33
Clip = tuple[Dance, np.ndarray, Seen]


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Dances, their videos and what is seen of them."""
    out = []
    for i in range(COUNT):
        dance = sample_dance(np.random.default_rng(i), FRAMES, split="held_out")
        video = perform(dance)
        out.append((dance, video, observe(video, dance.outfit, draw_room(dance.room))))
    return out


def right(verdict: Verdict) -> bool:
    return verdict.distance <= 0.06 and verdict.movement >= 0.5 and verdict.colours


def look(video: np.ndarray, dance: Dance) -> Verdict:
    return compare(observe(video, dance.outfit, draw_room(dance.room)), dance.pose, dance.outfit)


def blurred(video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As a VAE may leave it: a Gaussian of 0.7 pixels and noise of 6 levels."""
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 0.7**2))
    soft = video.astype(np.float32)
    for axis in (1, 2):
        wide = np.pad(soft, [(3, 3) if i == axis else (0, 0) for i in range(4)], mode="edge")
        soft = sum(k * np.take(wide, range(i, i + SIZE), axis) for i, k in enumerate(kernel / kernel.sum()))
    return np.clip(soft + rng.normal(0, 6, soft.shape), 0, 255).astype(np.uint8)


def test_rendered_dances_are_judged_right(clips: list[Clip]) -> None:
    verdicts = [compare(seen, dance.pose, dance.outfit) for dance, _, seen in clips]
    assert np.mean([verdict.distance for verdict in verdicts]) <= 0.012
    assert all(verdict.distance <= 0.035 and right(verdict) for verdict in verdicts)
    assert all(all(verdict.parts.values()) for verdict in verdicts)


def test_every_joint_is_found_near_its_place(clips: list[Clip]) -> None:
    """Left and right of a walking figure cannot be told, so only what stands in the middle and pairs' middles."""
    gaps = np.concatenate([seen.joints - places(dance.pose) for dance, _, seen in clips])
    middle = np.concatenate((gaps[:, :3], (gaps[:, [3, 4, 7, 8]] + gaps[:, [5, 6, 9, 10]]) / 2), 1)
    assert np.linalg.norm(middle, axis=-1).mean(0).max() < 0.02 * SIZE
    assert np.abs(middle.mean((0, 1))).max() < 0.5


def test_with_another_pose_they_are_not(clips: list[Clip]) -> None:
    verdicts = [
        compare(seen, other.pose, dance.outfit)
        for i, (dance, _, seen) in enumerate(clips)
        for j, (other, _, _) in enumerate(clips)
        if i != j
    ]
    assert np.mean([verdict.distance for verdict in verdicts]) >= 0.15
    assert np.mean([right(verdict) for verdict in verdicts]) < 0.01
    assert abs(np.mean([verdict.movement for verdict in verdicts])) < 0.2


def test_blur_and_noise_cost_little(clips: list[Clip]) -> None:
    rng = np.random.default_rng(0)
    verdicts = [look(blurred(video, rng), dance) for dance, video, _ in clips[:FEW]]
    assert np.mean([verdict.distance for verdict in verdicts]) <= 0.02
    assert all(right(verdict) for verdict in verdicts)


def test_without_the_room_walls_are_guessed(clips: list[Clip]) -> None:
    for dance, video, _ in clips[:3]:
        assert right(compare(observe(video, dance.outfit), dance.pose, dance.outfit))


def test_frozen_and_late_clips_are_wrong(clips: list[Clip]) -> None:
    moving, frozen, late = [], [], []
    for dance, video, seen in clips[:FEW]:
        moving.append(compare(seen, dance.pose, dance.outfit))
        frozen.append(look(np.repeat(video[:1], FRAMES, 0), dance))
        late.append(compare(replace(seen, joints=np.roll(seen.joints, 10, 0)), dance.pose, dance.outfit))
    means = [np.mean([verdict.distance for verdict in group]) for group in (moving, frozen, late)]
    assert means[1] > 4 * means[0] and means[2] > 4 * means[0]
    assert all(verdict.movement == 0 and verdict.colours for verdict in frozen)
    assert not any(right(verdict) for verdict in (*frozen, *late))


def test_no_figure_is_seen_in_black_noise_and_an_empty_room(clips: list[Clip]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    for dance, video, _ in clips[:2]:
        empty = np.repeat(draw_room(dance.room)[None], FRAMES, 0)
        for nothing in (np.zeros_like(video), noise, empty):
            verdict = look(nothing, dance)
            assert verdict.distance == 1.0 and verdict.movement == 0.0
            assert not any(verdict.parts.values()) and not verdict.colours


def test_frames_without_the_figure_count_as_far(clips: list[Clip]) -> None:
    dance, video, _ = clips[0]
    gone = video.copy()
    gone[5:9] = draw_room(dance.room)
    seen = observe(gone, dance.outfit, draw_room(dance.room))
    assert seen.found.tolist() == [not 5 <= i < 9 for i in range(FRAMES)]
    assert compare(seen, dance.pose, dance.outfit).distance > 4 / FRAMES


def test_a_figure_without_legs_is_wrong(clips: list[Clip]) -> None:
    for dance, video, whole in clips[:3]:
        cut, room = video.copy(), draw_room(dance.room)
        for frame, hip in enumerate(dance.pose["hip"][1]):
            line = int(hip) + (10 if dance.outfit.skirt else 3)
            cut[frame, line:] = room[line:]
        seen = observe(cut, dance.outfit, room)
        assert seen.found.all() and not seen.limbs[:, 2:].any() and whole.limbs.mean() > 0.98
        assert compare(seen, dance.pose, dance.outfit).distance > 0.09


def test_other_clothes_are_wrong(clips: list[Clip]) -> None:
    for dance, video, seen in clips[:FEW]:
        palettes = {part: [c for c in palette if c != getattr(dance.outfit, part)] for part, palette in WORN.items()}
        others = {part: max(rest, key=lambda c: math.dist(c, seen.colours[part])) for part, rest in palettes.items()}
        hair, top, bottom, skin, shoes = (others[part] for part in ("hair", "top", "bottom", "skin", "shoes"))
        outfit = replace(dance.outfit, hair=hair, top=top, bottom=bottom, skin=skin, shoes=shoes)
        stranger = replace(dance, outfit=outfit)
        assert not look(video, stranger).colours
        verdict = compare(seen, dance.pose, replace(dance.outfit, top=top, shoes=shoes))
        assert [part for part, fits in verdict.parts.items() if not fits] == ["top", "shoes"]
        assert verdict.colours
    assert set(WORN.values()) == {HAIRS, CLOTHES, SKINS}


def test_what_stays_is_measured_outside_the_cover(clips: list[Clip]) -> None:
    dance, video, seen = clips[0]
    room, mask = np.repeat(draw_room(dance.room)[None], FRAMES, 0), cover(dance)
    kept = compare(seen, dance.pose, dance.outfit, background=room, cover=mask).kept
    assert kept is not None and kept > 38  # edges thinner than what counts as the figure
    off = np.where(mask[..., None] > 0, 0, np.minimum(video.astype(int) + 16, 255)).astype(np.uint8)
    less = compare(replace(seen, video=off), dance.pose, dance.outfit, background=room, cover=mask).kept
    assert less is not None and less < kept - 5
    assert compare(replace(seen, video=room), dance.pose, dance.outfit, background=room, cover=mask).kept == math.inf
    assert compare(seen, dance.pose, dance.outfit).kept is None


def test_wrong_shapes_are_refused(clips: list[Clip]) -> None:
    dance, video, seen = clips[0]
    with pytest.raises(ValueError, match=r"\[frames, 64, 64, 3\]"):
        observe(video[:, :32], dance.outfit)
    with pytest.raises(ValueError, match="a pose of 1 frames"):
        compare(seen, dance.stance, dance.outfit)


# ---------------------------------------------------------------------------------------------------------------- world


def test_dances_are_far_from_each_other_and_inside_the_frame() -> None:
    rng = np.random.default_rng(0)
    dances = [sample_dance(rng, FRAMES) for _ in range(200)]
    gaps, whole = [], np.ones((FRAMES, 4), bool)
    for a, b in pairwise(dances):
        joints = places(a.pose)
        seen = Seen(joints, whole[:, 0], whole, dict.fromkeys(WORN, np.zeros(3)), np.zeros((FRAMES, 1), np.uint8))
        gaps.append(compare(seen, b.pose, a.outfit).distance)
    assert np.mean(gaps) >= 0.17
    joints = np.concatenate([places(pose) for dance in dances for pose in (dance.pose, dance.stance)])
    assert joints.shape[1:] == (len(JOINTS), 2) and joints[..., 0].min() > 2.9 and joints[..., 0].max() < SIZE - 2.9
    assert joints[..., 1].min() > 1.9 and joints[:, 7:, 1].max() < SIZE - 3.9


def test_people_are_split_by_rule_and_drawn_alike() -> None:
    rng = np.random.default_rng(0)
    train, held = ([sample_dance(rng, 1, split=split) for _ in range(40)] for split in ("train", "held_out"))
    assert not any(held_out(dance.outfit) for dance in train) and all(held_out(dance.outfit) for dance in held)
    one, two = (sample_dance(np.random.default_rng(3), FRAMES) for _ in range(2))
    assert np.array_equal(perform(one), perform(two)) and np.array_equal(drive(one), drive(two))
    assert portrait(one).shape == (SIZE, SIZE, 3) and drive(one).shape == perform(one).shape


def test_the_cover_holds_the_figure_and_nothing_across_the_frame(clips: list[Clip]) -> None:
    for dance, video, _ in clips[:FEW]:
        mask = cover(dance)
        changed = np.abs(video.astype(int) - draw_room(dance.room)).max(-1) > 8
        assert mask[changed].all() and mask.mean() < 0.6
        columns, covered = (np.flatnonzero(np.any(area, axis=(0, 1))) for area in (changed, mask))
        assert covered.min() >= columns.min() - 2 - 8 and covered.max() <= columns.max() + 2 + 8
