"""Sizes, letterboxes, crops."""

from __future__ import annotations

import numpy as np
import pytest

from wanloom.errors import InputError
from wanloom.preprocess import crops
from wanloom.preprocess.keypoints import COUNT

AREA = 1280 * 720


@pytest.mark.parametrize(
    ("source", "area", "size"),
    [
        ((1920, 1080), AREA, (1280, 720)),
        ((1080, 1920), AREA, (720, 1280)),  # with widths in 64s, as by the official mistake, 704x1296
        ((640, 360), AREA, (1280, 720)),  # small ones grow
        ((500, 500), AREA, (960, 960)),
        ((1080, 1920), 832 * 480, (480, 832)),
    ],
)
def test_sizes(source, area, size):
    assert crops.best_size(source, area) == size


@pytest.mark.parametrize("source", [(1920, 800), (333, 1000), (1000, 333), (17, 160), (4000, 3001)])
def test_every_size_is_a_multiple_of_16_within_the_area_and_about_as_wide(source):
    width, height = crops.best_size(source, AREA)
    assert width % 16 == height % 16 == 0
    assert 0.9 * AREA < width * height <= AREA
    assert abs(width / height / (source[0] / source[1]) - 1) < 16 / min(width, height)


def test_an_area_too_small_for_anything_is_refused():
    with pytest.raises(InputError) as caught:
        crops.best_size((100, 100), 200)
    assert caught.value.code == "E2003"


def test_a_letterbox_is_black_on_two_sides():
    fit = crops.letterbox((100, 50), (64, 64))
    assert (fit.inner, fit.corner) == ((64, 32), (0, 16))
    image = fit.image(np.full((50, 100, 3), 200, np.uint8))
    assert image.shape == (64, 64, 3)
    assert not image[:16].any()
    assert not image[48:].any()
    assert (image[16:48] == 200).all()


def test_points_frames_and_masks_stay_on_top_of_each_other():
    source, target = (160, 90), (96, 128)
    frame = np.zeros((90, 160, 3), np.uint8)
    mask = np.zeros((90, 160), np.bool_)
    frame[40:60, 100:120] = 255
    mask[40:60, 100:120] = True
    fit = crops.letterbox(source, target)
    (x, y, score) = fit.points(np.array([110.0, 50.0, 0.7], np.float32))
    for shown in (fit.image(frame)[..., 0] > 127, fit.mask(mask)):
        rows, columns = np.nonzero(shown)
        assert abs((columns.min() + columns.max() + 1) / 2 - x) <= 0.6
        assert abs((rows.min() + rows.max() + 1) / 2 - y) <= 0.6
    assert score == np.float32(0.7)


def test_shrinking_is_the_mean_of_the_area():
    frame = np.random.default_rng(0).integers(0, 256, (30, 45, 3), np.uint8)
    halves = frame.repeat(2, 0).repeat(2, 1)  # 60 x 90 to 20 x 30: each pixel is 1.5 x 1.5 of the frame
    exact = halves.reshape(20, 3, 30, 3, 3).mean((1, 3))
    assert np.abs(crops.shrink(frame, (30, 20)) - exact).max() <= 0.5 + 1e-3


def test_shrinking_to_the_same_size_changes_nothing():
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    assert (crops.shrink(frame, (30, 20)) == frame).all()


def face(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    points = np.zeros((COUNT, 3), np.float32)
    points[23:91] = (left, top, 0.9)
    points[24:57, :2] = (right, bottom)
    return points


def test_the_face_box_grows_to_13_tenths_of_its_area_more_above_than_below():
    left, top, right, bottom = crops.face_box(face(1000, 1000, 1400, 1200), (4000, 4000))
    grown = 1.3**0.5 - 1
    assert left == int(1000 - 200 * grown)
    assert right == int(1400 + 200 * grown)
    assert top == int(1000 - 150 * grown)
    assert bottom == int(1200 + 50 * grown)
    assert abs((right - left) * (bottom - top) / (400 * 200) - 1.3) < 0.02


def test_the_face_box_is_cut_at_the_edges():
    assert crops.face_box(face(-20, -10, 100, 60), (90, 50)) == (0, 0, 90, 50)


@pytest.mark.parametrize("points", [np.zeros((COUNT, 3), np.float32), face(50, 50, 50, 50), face(-90, 10, -50, 40)])
def test_no_face_is_no_box(points):
    assert crops.face_box(points, (200, 200)) is None


def test_a_frame_without_a_face_has_the_box_of_the_frame_before():
    empty, first, second = np.zeros((COUNT, 3), np.float32), face(10, 10, 50, 50), face(60, 60, 90, 90)
    boxes = crops.face_boxes(np.stack([empty, first, empty, second]), (100, 100))
    assert boxes[0] == boxes[1] == boxes[2] == crops.face_box(first, (100, 100))
    assert boxes[3] == crops.face_box(second, (100, 100))


def test_a_clip_without_a_face_has_the_middle():
    assert crops.face_boxes(np.zeros((2, COUNT, 3), np.float32), (200, 100)) == [(50, 0, 150, 100)] * 2


def test_the_face_crop_is_512_squared_whatever_its_proportions():
    frame = np.zeros((80, 120, 3), np.uint8)
    frame[20:40, 30:70] = (9, 99, 199)
    crop = crops.crop_face(frame, (30, 20, 70, 40))
    assert crop.shape == (512, 512, 3)
    assert (crop == (9, 99, 199)).all()  # nothing of what lies around the box


def test_sampling_is_linear_and_black_outside():
    ramp = np.tile(np.arange(10, 20, dtype=np.uint8)[None, :, None], (6, 1, 3))
    sampled = crops.sample(ramp, (-2, 1, 8, 4), (16, 4))
    assert sampled.shape == (4, 16, 3)
    assert (sampled[:, :2] == 0).all()
    assert np.allclose(sampled[0, 4:, 0], 10 + np.arange(12) / 2)
    whole = crops.sample(ramp, (0, 0, 10, 6), (10, 6))
    assert (whole == ramp).all()
