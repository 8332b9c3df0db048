"""Another body in the same dance: the driving person's movements with the bone lengths of the person in the picture.

Bone lengths are compared once, between the first driving frame and the picture; every frame is then rebuilt from the
neck outwards with its own angles and the new lengths, and laid so that the first frame stands where the picture's
person stands: on the same ground when both are seen with their feet, else with the same neck.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wanloom.preprocess.crops import Size
from wanloom.preprocess.drawing import BONES
from wanloom.preprocess.keypoints import BODY, Person, Points

Lengths = NDArray[np.float64]  # [19], one for each bone; nan where it is not seen

SEEN = 0.4  # the score from which a point counts as seen
SURE = 0.5  # the same for the points that give the scale
FOOT_OF_CALF = 0.5  # a foot is at most this part of the calf

NOSE, NECK = BODY.index("nose"), BODY.index("neck")
WRISTS = BODY.index("left_wrist"), BODY.index("right_wrist")
HIPS = [BODY.index("right_hip"), BODY.index("left_hip")]
ANKLES = [BODY.index("right_ankle"), BODY.index("left_ankle")]
TOES = [BODY.index("right_toe"), BODY.index("left_toe")]


def _bone(end: str) -> int:
    return next(i for i, (_, last) in enumerate(BONES) if last == BODY.index(end))


PAIRS = [
    (_bone(f"right_{end}"), _bone(f"left_{end}"))
    for end in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle", "toe")
]
HEAD_PAIRS = [(_bone("right_eye"), _bone("left_eye")), (_bone("right_ear"), _bone("left_ear"))]
# What a limb measures in lengths from neck to hip, where neither side of it is seen.
OF_TORSO = {"elbow": 0.5, "wrist": 0.5, "knee": 1.0, "ankle": 1.0, "toe": 0.2}


@dataclass(frozen=True)
class Retarget:
    """The change from the driving person to that of the picture: a ratio for each bone, then (x - shift) / scale."""

    ratios: Lengths
    shift: NDArray[np.float64]  # [2], in pixels of the driving video
    scale: float

    def apply(self, person: Person) -> Person:
        """A person of the driving video (its pixels) as one of the output (its pixels)."""
        rebuilt = rebuild(person.body, self.ratios)
        rebuilt[:, :2] = (rebuilt[:, :2] - self.shift) / self.scale
        body = rebuilt.astype(np.float32)
        grown = max(self.ratios[PAIRS[0][0]], self.ratios[PAIRS[0][1]]) / self.scale
        left, right = (body[wrist] for wrist in WRISTS)
        return Person(body, _hand(person.left_hand, left, grown), _hand(person.right_hand, right, grown))


def make_retarget(driving: Points, driving_size: Size, picture: Points, picture_size: Size) -> Retarget:
    """What turns bodies like `driving` [20, 3] (the first frame) into ones like `picture` [20, 3] (output pixels)."""
    scale = _scale(driving, driving_size, picture, picture_size)
    wanted = picture.astype(np.float64)
    wanted[:, :2] *= scale
    ratios = bone_ratios(lengths(driving), lengths(wanted))
    rebuilt = rebuild(driving, ratios)
    return Retarget(ratios, _shift(driving, rebuilt, picture, wanted), scale)


def lengths(body: Points | NDArray[np.float64]) -> Lengths:
    """The length of each bone of a body [20, 3]; a limb that is not seen is as long as the one on the other side."""
    result = np.full(len(BONES), np.nan)
    for index, (start, end) in enumerate(BONES):
        if min(body[start, 2], body[end, 2]) >= SEEN:
            result[index] = np.hypot(*(body[end, :2] - body[start, :2]))
    torso = np.nanmax([*result[[_bone("right_hip"), _bone("left_hip")]], 0.0])
    for name, part in OF_TORSO.items():
        right, left = _bone(f"right_{name}"), _bone(f"left_{name}")
        for one, other in ((right, left), (left, right)):
            if np.isnan(result[one]) and not np.isnan(result[other]):
                result[one] = result[other]
        if np.isnan(result[right]) and torso > 0:
            result[[right, left]] = part * torso
    return result


def bone_ratios(driving: Lengths, wanted: Lengths) -> Lengths:
    """What each driving bone is multiplied by; both sides of the body alike, unknown ones as the shoulders."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(driving > 0, wanted / driving, np.nan)
    shoulders = ratios[list(PAIRS[0])]
    ratios[np.isnan(ratios)] = np.mean(shoulders) if np.isfinite(shoulders).all() else 1.0
    for pair in PAIRS:  # a foreshortened limb looks short: the longer one is nearer to the truth
        ratios[list(pair)] = ratios[list(pair)].max()
    for pair in HEAD_PAIRS:
        ratios[list(pair)] = ratios[list(pair)].mean()
    return ratios


def rebuild(body: Points, ratios: Lengths) -> NDArray[np.float64]:
    """A body [20, 3] with each bone multiplied by its ratio: the neck stays, angles stay, feet stay below a limit."""
    old = body.astype(np.float64)
    bones = {index: (old[end, :2] - old[start, :2]) * ratios[index] for index, (start, end) in enumerate(BONES)}
    for side in ("right", "left"):
        foot, calf = _bone(f"{side}_toe"), _bone(f"{side}_ankle")
        length, limit = np.hypot(*bones[foot]), FOOT_OF_CALF * np.hypot(*bones[calf])
        if length > limit:
            bones[foot] *= limit / length
    new = old.copy()
    for index, (start, end) in enumerate(BONES):
        new[end, :2] = new[start, :2] + bones[index]
    return new


def _scale(driving: Points, driving_size: Size, picture: Points, picture_size: Size) -> float:
    """How many pixels of the driving video are one of the output: from nose to ankles, to hips, or by the area."""
    for lower in (ANKLES, HIPS):
        if min(body[[NOSE, *lower], 2].min() for body in (driving, picture)) > SURE:
            heights = [abs(body[lower, 1].mean() - body[NOSE, 1]) for body in (driving, picture)]
            if min(heights) >= 1:
                return float(heights[0] / heights[1])
    return float(np.sqrt(driving_size[0] * driving_size[1] / (picture_size[0] * picture_size[1])))


def _shift(driving: Points, rebuilt: NDArray[np.float64], picture: Points, wanted: NDArray[np.float64]) -> Lengths:
    """What is subtracted so that the rebuilt first frame stands where the (scaled) picture's person stands."""
    if min(body[[*HIPS, *ANKLES], 2].min() for body in (driving, picture)) >= SEEN:
        feet = all(body[TOES, 2].min() >= SEEN for body in (driving, picture))
        across = rebuilt[HIPS, 0].mean() - wanted[HIPS, 0].mean()
        return np.array([across, _ground(rebuilt, feet) - _ground(wanted, feet)])
    shift: Lengths = rebuilt[NECK, :2] - wanted[NECK, :2]
    return shift


def _ground(body: NDArray[np.float64], feet: bool) -> float:
    """Where the lower foot stands: the middle of it, or its ankle."""
    heights = (body[ANKLES, 1] + body[TOES, 1]) / 2 if feet else body[ANKLES, 1]
    return float(heights.max())


def _hand(hand: Points, wrist: Points, grown: float) -> Points:
    """A hand [21, 3] at another wrist, larger or smaller by a factor."""
    moved = hand.copy()
    moved[:, :2] = wrist[:2] + (hand[:, :2] - hand[0, :2]) * grown
    return moved
