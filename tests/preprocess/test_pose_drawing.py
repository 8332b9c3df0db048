"""The drawing: which pixels have which colours."""

from __future__ import annotations

import numpy as np
import pytest
import walker

from wanloom.preprocess.drawing import BONES, COLOURS, FINGERS, draw_pose, stroke
from wanloom.preprocess.keypoints import BODY, Person, person_of


def nobody() -> Person:
    return Person(*(np.zeros((count, 3), np.float32) for count in (20, 21, 21)))


def with_body(**joints: tuple[float, float]) -> Person:
    person = nobody()
    for name, place in joints.items():
        person.body[BODY.index(name)] = (*place, 1)
    return person


@pytest.mark.parametrize(
    ("size", "width"), [((1280, 720), 2), ((720, 1280), 2), ((1920, 1080), 4), ((832, 480), 1), ((64, 64), 1)]
)
def test_the_width_grows_with_the_shorter_side(size, width):
    assert stroke(size) == width


def test_nobody_is_black():
    assert not draw_pose(nobody(), (64, 48)).any()


def test_a_bone_is_an_ellipse_of_its_colour_at_60_percent():
    picture = draw_pose(with_body(left_knee=(20, 30), left_ankle=(60, 30)), (720, 720))
    colour = COLOURS[BONES.index((BODY.index("left_knee"), BODY.index("left_ankle")))]
    dark = tuple(int(0.6 * value) for value in colour)
    assert tuple(picture[30, 40]) == dark
    column = (picture[:, 40] == dark).all(1)
    assert np.flatnonzero(column).tolist() == [28, 29, 30, 31, 32]  # twice the stroke of 2, and the middle
    thin = (picture[:, 57] == dark).all(1).sum()
    assert 0 < thin < 5  # an ellipse is thinner at its ends


def test_a_joint_is_a_disc_in_full_colour():
    picture = draw_pose(with_body(right_ear=(30, 40)), (720, 720))
    drawn = np.argwhere(picture.any(2))
    assert tuple(picture[40, 30]) == COLOURS[BODY.index("right_ear")]
    assert {tuple(place - (40, 30)) for place in drawn} == {
        (dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if dx * dx + dy * dy <= 4
    }


def test_the_feet_have_their_own_colours():
    shown = {}
    for side, other in (("left", (255, 0, 85)), ("right", (200, 200, 0))):
        picture = draw_pose(with_body(**{f"{side}_ankle": (20, 20), f"{side}_toe": (20, 60)}), (256, 256))
        shown[side] = tuple(picture[40, 20])
        assert shown[side] == tuple(int(0.6 * value) for value in other)
    assert shown["left"] != shown["right"]


def test_what_is_hardly_seen_is_not_drawn():
    person = with_body(neck=(20, 20), nose=(20, 10), left_hip=(40, 50))
    person.body[BODY.index("left_hip"), 2] = 0.49
    picture = draw_pose(person, (64, 64))
    assert not picture[30:, :].any()
    assert picture[10, 20].any()


def test_hands_are_coloured_fingers_with_blue_joints():
    person = nobody()
    person.left_hand[:, 2] = 1
    for finger in range(5):
        for joint in range(1, 5):
            person.left_hand[4 * finger + joint, :2] = (60 + 20 * (finger - 2), 100 - 20 * joint)
    person.left_hand[0, :2] = (60, 100)
    picture = draw_pose(person, (200, 200))
    assert tuple(picture[100, 60]) == (0, 0, 255)
    assert tuple(picture[80, 60]) == (0, 0, 255)
    assert tuple(picture[70, 60]) == (0, 255, 179)  # hue 9 of 20
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3)} - {(0, 0, 0)}
    assert len(colours) == len(FINGERS) + 1  # a hue for each, and the joints' blue


def test_no_point_of_the_face_is_drawn():
    points = walker.stand(64, 30, 70)
    points[:91, 2] = 0
    points[23:91, 2] = 1
    points[91:, 2] = 0
    assert not draw_pose(person_of(points), (128, 128)).any()


def test_a_person_half_outside_is_drawn_as_far_as_it_is_seen():
    points = walker.stand(0, 30, 70)
    picture = draw_pose(person_of(points), (128, 128))
    assert picture[:, 0].any()
    assert not picture[:, 64:].any()


def test_left_and_right_are_told_apart():
    person = person_of(walker.stand(64, 30, 70))
    picture = draw_pose(person, (128, 128))
    for name in ("left_wrist", "right_wrist", "left_knee", "right_knee"):
        x, y = (int(v) for v in person.body[BODY.index(name), :2])
        near = picture[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).tolist()
        assert list(COLOURS[BODY.index(name)]) in near or "wrist" in name
