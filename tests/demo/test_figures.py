"""The drawn people that the demo VAE is trained on beside the world."""

from __future__ import annotations

import numpy as np
import pytest

from wanloom.demo import figures


@pytest.mark.parametrize(("size", "frames"), [(64, 17), (128, 9), (64, 1)])
def test_a_figure_clip_has_the_size_asked_for_and_is_not_empty(size: int, frames: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(12):
        video = figures.figure_clip(rng, size, frames)
        assert video.shape == (frames, size, size, 3) and video.dtype == np.uint8
        assert len(np.unique(video[0].reshape(-1, 3), axis=0)) > 20


def test_figures_move_smoothly() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        video = figures.figure_clip(rng).astype(float)
        steps = np.abs(np.diff(video, axis=0)).mean((1, 2, 3))
        assert 0 < steps.max() < 14


def test_the_same_generator_state_draws_the_same_clip_at_twice_the_size() -> None:
    for seed in range(12):
        small = figures.figure_clip(np.random.default_rng(seed), 64).astype(float)
        large = figures.figure_clip(np.random.default_rng(seed), 128).astype(float)
        assert np.abs(large.reshape(17, 64, 2, 64, 2, 3).mean((2, 4)) - small).mean() < 1.5


def test_the_mouth_opens_as_far_as_its_signal_says() -> None:
    rng = np.random.default_rng(2)
    mouth = np.linspace(0, 1, 17, dtype=np.float32)
    for _ in range(8):
        video = figures.talking_head(figures.sample_face(rng), mouth).astype(int)
        dark = (np.abs(video[:, 33:48, 24:40] - (70, 15, 25)).sum(-1) < 30).sum((1, 2))
        assert dark[0] == 0 and np.corrcoef(dark, mouth)[0, 1] > 0.95


def test_blinking_hides_the_white_of_the_eyes() -> None:
    face = figures.sample_face(np.random.default_rng(3))
    blink = np.array([0, 1], np.float32)
    video = figures.talking_head(face, np.zeros(2, np.float32), blink=blink)
    white = (video[:, 22:32, 20:44].min(-1) > 240).sum((1, 2))
    assert white[0] > white[1]


def test_a_stick_figure_is_thin_coloured_lines_on_black_inside_the_picture() -> None:
    rng = np.random.default_rng(4)
    for _ in range(30):
        pose = figures.sample_pose(rng)
        video = figures.stick_figure(pose)
        lit = (video.max(-1) > 60).mean((1, 2))
        assert lit.min() > 0.01 and lit.max() < 0.12
        assert set(pose) == set(figures.JOINTS)
        assert all(v.min() > 0 and v.max() < 64 for point in pose.values() for v in point)


def test_stick_figure_and_dressed_figure_of_one_pose_coincide() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        pose, outfit = figures.sample_pose(rng), figures.sample_outfit(rng)
        sticks = figures.stick_figure(pose).max(-1) > 120
        dressed = figures.dressed_figure(outfit, pose).astype(int)
        ground = dressed == outfit.ground
        if outfit.floor is not None:
            ground = ground | (dressed == outfit.floor)
        body = ~ground.all(-1)
        assert (sticks & body).sum() / sticks.sum() > 0.95


def test_a_wandering_signal_stays_in_its_range_and_moves_slowly() -> None:
    rng = np.random.default_rng(6)
    for _ in range(50):
        signal = figures.wander(rng, 17, 0.0, 1.0, 2.0)
        assert signal.shape == (17,) and signal.min() >= 0 and signal.max() <= 1
        assert np.abs(np.diff(signal)).max() < 0.85
