"""The points of a person and the file they come in."""

from __future__ import annotations

import json

import numpy as np
import pytest
import walker

from wanloom.errors import InputError
from wanloom.preprocess.keypoints import BODY, COUNT, person_of, read_keypoints


def test_the_file_gives_the_points_back(tmp_path):
    points = walker.walk(3, (64, 48)).round(2)
    recorded = read_keypoints(walker.write_points(tmp_path / "p.json", points, (64, 48)), "keypoints")
    assert recorded.size == (64, 48)
    assert np.allclose(recorded.points, points, atol=1e-4)


def test_points_of_another_frame_size_are_scaled(tmp_path):
    points = walker.walk(1, (64, 48))
    recorded = read_keypoints(walker.write_points(tmp_path / "p.json", points, (64, 48)), "keypoints")
    larger = recorded.in_pixels_of((128, 96))
    assert np.allclose(larger[..., :2], 2 * recorded.points[..., :2])
    assert (larger[..., 2] == recorded.points[..., 2]).all()


def test_null_is_a_frame_without_a_person(tmp_path):
    frame = walker.walk(1, (64, 48))[0].tolist()
    (tmp_path / "p.json").write_text(json.dumps({"size": [64, 48], "frames": [frame, None]}))
    assert not read_keypoints(tmp_path / "p.json", "keypoints").points[1].any()


def test_neck_and_toes_are_means_of_two_points():
    points = np.zeros((COUNT, 3), np.float32)
    points[5], points[6] = (10, 20, 1.0), (30, 40, 0.5)
    points[17], points[18] = (1, 2, 1), (3, 4, 1)
    body = person_of(points).body
    assert body[BODY.index("neck")].tolist() == [20, 30, 0.75]
    assert body[BODY.index("left_toe")].tolist() == [2, 3, 1]


def test_every_drawn_point_comes_from_its_place():
    """Each point of the body is put where its name says in the list of COCO-WholeBody."""
    for name, places in walker.PLACE.items():
        points = np.zeros((COUNT, 3), np.float32)
        points[list(places)] = (7, 8, 1)
        assert person_of(points).body[BODY.index(name)].tolist() == [7, 8, 1], name


def test_hands_are_left_then_right():
    points = np.zeros((COUNT, 3), np.float32)
    points[:, 0] = np.arange(COUNT)
    person = person_of(points)
    assert (person.left_hand[0, 0], person.left_hand[-1, 0]) == (91, 111)
    assert (person.right_hand[0, 0], person.right_hand[-1, 0]) == (112, 132)


GOOD = [[1.0, 2.0, 0.5]] * COUNT


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("[1, 2", "no JSON"),
        ("[]", "expected"),
        (json.dumps({"size": [4, 4], "frames": []}), "expected"),
        (json.dumps({"size": [4], "frames": [GOOD]}), "size"),
        (json.dumps({"size": [4, -4], "frames": [GOOD]}), "size"),
        (json.dumps({"size": [True, 4], "frames": [GOOD]}), "size"),
        (json.dumps({"size": [4, 4], "frames": [GOOD, GOOD[:132]]}), "frame 1: expected 133"),
        (json.dumps({"size": [4, 4], "frames": [[["a", 1, 1]] * COUNT]}), "frame 0: expected 133"),
        (json.dumps({"size": [4, 4], "frames": [[[1, 2]] * COUNT]}), "expected 133"),
        (json.dumps({"size": [4, 4], "frames": [[[float("nan"), 1, 1]] * COUNT]}), "no finite pixels"),
        (json.dumps({"size": [4, 4], "frames": [[[1e9, 1, 1]] * COUNT]}), "no finite pixels"),
        (json.dumps({"size": [4, 4], "frames": [[[1, 1, 95.0]] * COUNT]}), "scores from 95 to 95"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, document, words):
    (tmp_path / "p.json").write_text(document)
    with pytest.raises(InputError, match=words) as caught:
        read_keypoints(tmp_path / "p.json", "keypoints")
    assert caught.value.code == "E3028"
