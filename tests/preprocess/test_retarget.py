"""Another body in the same dance, on skeletons whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import walker

from wanloom.preprocess import retarget as rt
from wanloom.preprocess.drawing import BONES
from wanloom.preprocess.keypoints import BODY, person_of

SIZE = (400, 300)


def body_at(x: float = 200, y: float = 50, height: float = 180, **looks: float) -> np.ndarray:
    return person_of(walker.stand(x, y, height, **looks)).body


def bone(start: str, end: str) -> int:
    return BONES.index((BODY.index(start), BODY.index(end)))


def test_the_same_person_is_left_alone():
    body = body_at(phase=0.4)
    change = rt.make_retarget(body, SIZE, body, SIZE)
    person = person_of(walker.stand(150, 60, 180, phase=1.0))
    assert np.allclose(change.apply(person).body, person.body, atol=1e-3)


def test_a_larger_copy_of_the_person_is_a_change_of_scale_and_place():
    """The picture's person is the driving one at twice the size somewhere else: every frame becomes just that."""
    first, wanted = walker.stand(100, 40, 120, phase=0.3), walker.stand(300, 60, 240, phase=0.3)
    change = rt.make_retarget(person_of(first).body, SIZE, person_of(wanted).body, (800, 600))
    assert change.scale == pytest.approx(0.5, abs=1e-3)
    later = person_of(walker.stand(130, 45, 120, phase=1.2))
    made = change.apply(later)
    expected = person_of(walker.stand(300 + 2 * 30, 60 + 2 * 5, 240, phase=1.2))
    assert np.allclose(made.body, expected.body, atol=0.02)
    assert np.allclose(made.left_hand, expected.left_hand, atol=0.05)
    assert np.allclose(made.right_hand, expected.right_hand, atol=0.05)


def test_longer_arms_keep_their_angles():
    driving, wanted = body_at(), body_at(arms=1.5)
    change = rt.make_retarget(driving, SIZE, wanted, SIZE)
    for frame in (body_at(phase=0.7), body_at(phase=-1.1)):
        made = change.apply(replace(person_of(walker.stand(200, 50, 180)), body=frame)).body
        for start, end in (("left_shoulder", "left_elbow"), ("right_elbow", "right_wrist")):
            before = frame[BODY.index(end), :2] - frame[BODY.index(start), :2]
            after = made[BODY.index(end), :2] - made[BODY.index(start), :2]
            assert np.allclose(after, 1.5 * before, atol=0.01)
        assert np.allclose(made[BODY.index("left_hip"), :2] - made[BODY.index("neck"), :2],
                           frame[BODY.index("left_hip"), :2] - frame[BODY.index("neck"), :2], atol=0.01)  # fmt: skip


def test_feet_stay_on_the_pictures_ground():
    driving, wanted = body_at(150, 40, 150), body_at(220, 30, 200, legs=1.2)
    change = rt.make_retarget(driving, SIZE, wanted, SIZE)
    made = change.apply(replace(person_of(walker.stand(150, 40, 150)), body=driving)).body
    feet = [(made[BODY.index(f"{s}_ankle"), 1] + made[BODY.index(f"{s}_toe"), 1]) / 2 for s in ("left", "right")]
    goal = [(wanted[BODY.index(f"{s}_ankle"), 1] + wanted[BODY.index(f"{s}_toe"), 1]) / 2 for s in ("left", "right")]
    assert max(feet) == pytest.approx(max(goal), abs=0.01)
    hips = [BODY.index("left_hip"), BODY.index("right_hip")]
    assert made[hips, 0].mean() == pytest.approx(wanted[hips, 0].mean(), abs=0.01)


def test_half_a_body_is_aligned_by_the_neck():
    driving, wanted = body_at(150, 40, 150), body_at(220, 90, 300)
    for name in ("ankle", "toe", "knee"):
        for side in ("left", "right"):
            wanted[BODY.index(f"{side}_{name}"), 2] = 0.1
    change = rt.make_retarget(driving, SIZE, wanted, SIZE)
    made = change.apply(replace(person_of(walker.stand(150, 40, 150)), body=driving)).body
    assert np.allclose(made[BODY.index("neck"), :2], wanted[BODY.index("neck"), :2], atol=0.01)


def test_the_scale_is_from_nose_to_ankles_to_hips_or_by_area():
    driving, wanted = body_at(height=180), body_at(height=90)
    assert rt.make_retarget(driving, SIZE, wanted, SIZE).scale == pytest.approx(2, abs=1e-3)
    driving[[BODY.index("left_ankle"), BODY.index("right_ankle")], 2] = 0.2
    assert rt.make_retarget(driving, SIZE, wanted, SIZE).scale == pytest.approx(2, abs=1e-3)
    driving[[BODY.index("left_hip"), BODY.index("right_hip")], 2] = 0.2
    assert rt.make_retarget(driving, SIZE, wanted, (200, 150)).scale == pytest.approx(2)


def test_a_limb_that_is_not_seen_is_as_long_as_the_other_side():
    body = body_at()
    whole = rt.lengths(body)
    body[BODY.index("left_wrist"), 2] = 0.1
    lengths = rt.lengths(body)
    assert lengths[bone("left_elbow", "left_wrist")] == whole[bone("right_elbow", "right_wrist")]


def test_limbs_not_seen_on_either_side_are_measured_by_the_torso():
    body = body_at()
    torso = rt.lengths(body)[bone("neck", "left_hip")]
    for side in ("left", "right"):
        for name in ("wrist", "ankle", "toe"):
            body[BODY.index(f"{side}_{name}"), 2] = 0
    lengths = rt.lengths(body)
    assert lengths[bone("left_elbow", "left_wrist")] == pytest.approx(torso / 2)
    assert lengths[bone("right_knee", "right_ankle")] == pytest.approx(torso)
    assert lengths[bone("right_ankle", "right_toe")] == pytest.approx(torso / 5)


def test_a_foreshortened_arm_does_not_shrink_the_arms():
    """Both sides take the larger ratio: an arm that points at the camera looks short."""
    driving, wanted = body_at(), body_at()
    elbow, wrist = BODY.index("left_elbow"), BODY.index("left_wrist")
    wanted[wrist, :2] = 0.7 * wanted[elbow, :2] + 0.3 * wanted[wrist, :2]
    ratios = rt.bone_ratios(rt.lengths(driving), rt.lengths(wanted))
    assert ratios[bone("left_elbow", "left_wrist")] == ratios[bone("right_elbow", "right_wrist")] == pytest.approx(1)


def test_eyes_and_ears_are_averaged():
    driving, wanted = body_at(), body_at()
    nose, eye = BODY.index("nose"), BODY.index("left_eye")
    wanted[eye, :2] = wanted[nose, :2] + 2 * (wanted[eye, :2] - wanted[nose, :2])
    ratios = rt.bone_ratios(rt.lengths(driving), rt.lengths(wanted))
    assert ratios[bone("nose", "left_eye")] == ratios[bone("nose", "right_eye")] == pytest.approx(1.5)


def test_unknown_bones_follow_the_shoulders():
    driving, wanted = body_at(), body_at(height=360)
    for body in (driving, wanted):
        body[[BODY.index("left_ear"), BODY.index("right_ear")], 2] = 0
    ratios = rt.bone_ratios(rt.lengths(driving), rt.lengths(wanted))
    assert ratios[bone("left_eye", "left_ear")] == pytest.approx(2, abs=1e-3)


def test_a_foot_is_at_most_half_the_calf():
    body = body_at()
    ratios = np.ones(len(BONES))
    ratios[bone("left_ankle", "left_toe")] = 100
    made = rt.rebuild(body, ratios)
    foot = np.hypot(*(made[BODY.index("left_toe"), :2] - made[BODY.index("left_ankle"), :2]))
    calf = np.hypot(*(made[BODY.index("left_ankle"), :2] - made[BODY.index("left_knee"), :2]))
    assert foot == pytest.approx(calf / 2)


def test_hands_hang_on_the_new_wrists_and_grow_with_the_shoulders():
    driving, wanted = body_at(), body_at(arms=1.4)
    wanted[[BODY.index("left_shoulder"), BODY.index("right_shoulder")], 0] = 200 + 1.3 * (
        wanted[[BODY.index("left_shoulder"), BODY.index("right_shoulder")], 0] - 200
    )
    change = rt.make_retarget(driving, SIZE, wanted, SIZE)
    person = person_of(walker.stand(200, 50, 180, phase=0.5))
    made = change.apply(person)
    assert np.allclose(made.left_hand[0, :2], made.body[BODY.index("left_wrist"), :2], atol=1e-3)
    assert np.allclose(made.right_hand[0, :2], made.body[BODY.index("right_wrist"), :2], atol=1e-3)
    grown = np.hypot(*(made.left_hand[8, :2] - made.left_hand[0, :2]))
    before = np.hypot(*(person.left_hand[8, :2] - person.left_hand[0, :2]))
    shoulder = change.ratios[bone("neck", "left_shoulder")] / change.scale
    assert grown / before == pytest.approx(shoulder, abs=1e-3)


def test_scores_stay_and_nothing_given_is_changed():
    person = person_of(walker.stand(200, 50, 180))
    person.body[3, 2] = 0.123
    before = person.body.copy()
    made = rt.make_retarget(person.body, SIZE, body_at(height=100), SIZE).apply(person)
    assert np.allclose(made.body[:, 2], before[:, 2])
    assert (person.body == before).all()


@pytest.mark.parametrize("missing", ["driving", "picture", "both"])
def test_a_person_who_is_not_seen_at_all_gives_finite_numbers(missing):
    driving, wanted = body_at(), body_at()
    if missing in ("driving", "both"):
        driving[:] = 0
    if missing in ("picture", "both"):
        wanted[:] = 0
    made = rt.make_retarget(driving, SIZE, wanted, SIZE).apply(person_of(walker.stand(200, 50, 180)))
    assert np.isfinite(made.body).all()
    assert np.isfinite(made.left_hand).all()
