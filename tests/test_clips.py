"""How a video is cut into clips, what each clip shows, and the sizes of s2v, against the numbers of the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from wanloom.clips import (
    animate_cuts,
    clip_count,
    features_of,
    ping_pong,
    speech_cuts,
    speech_of,
    states_of,
)
from wanloom.errors import InputError
from wanloom.models.config import AudioConfig
from wanloom.plan import Input, Plan, make_plan, request_like
from wanloom.request import Request
from wanloom.sizes import speech_size
from wanloom.variants import VARIANTS

S2V, ANIMATE = VARIANTS["s2v-14B"], VARIANTS["animate-14B"]
PICTURE = Input(role="image", name="a.png", sha256="0" * 64, size=(1920, 1080))


def sound(samples: int) -> Input:
    return Input(role="audio", name="a.wav", sha256="1" * 64, samples=samples)


def video(role: str, frames: int, size: tuple[int, int] = (320, 192), rate: tuple[int, int] = (25, 1)) -> Input:
    return Input(role=role, name=f"{role}.mp4", sha256="2" * 64, size=size, frames=frames, rate=rate)


def spoken(seconds: float = 12.0, **fields: Any) -> Plan:
    request = Request(prompt="a", seed=7, image="a.png", audio="a.wav", **fields)
    return make_plan(request, S2V, inputs=[PICTURE, sound(int(16000 * seconds))])


def danced(count: int, extra: tuple[str, ...] = (), **fields: Any) -> Plan:
    roles = ("pose_video", "face_video", *extra)
    request = Request(prompt="a", seed=7, image="a.png", **{role: f"{role}.mp4" for role in roles}, **fields)
    return make_plan(request, ANIMATE, inputs=[PICTURE, *(video(role, count) for role in roles)])


# ---------------------------------------------------------------- s2v


@pytest.mark.parametrize(
    ("picture", "size"),
    [((1920, 1080), (1088, 640)), ((1024, 1024), (832, 832)), ((832, 480), (832, 512)), ((3000, 2000), (1024, 704))],
)
def test_sizes_of_s2v_are_those_of_the_reference(picture: tuple[int, int], size: tuple[int, int]) -> None:
    assert speech_size(picture, 1024 * 704) == size


def test_sizes_of_s2v_fit_the_area_whatever_the_picture() -> None:
    rng = np.random.default_rng(0)
    for width, height in rng.integers(64, 4000, (200, 2)).tolist():
        made = speech_size((width, height), 1024 * 704)
        if made != (0, 0):
            assert made[0] * made[1] <= 1024 * 704 and made[0] % 64 == made[1] % 64 == 0
    assert speech_size((40, 40_000), 64 * 64) == (0, 0)
    assert speech_size((640, 480), 32 * 32) == (0, 0)


def test_a_picture_that_fits_no_size_is_refused() -> None:
    with pytest.raises(InputError) as error:
        make_plan(
            Request(prompt="a", image="a.png", audio="a.wav", size=(64, 64)), S2V,
            inputs=[replace(PICTURE, size=(40, 40_000)), sound(16000)],
        )  # fmt: skip
    assert error.value.code == "E2004"


def test_states_are_counted_as_the_convolutions_make_them() -> None:
    assert [states_of(n, AudioConfig()) for n in (399, 400, 719, 720, 16_000)] == [0, 1, 1, 2, 49]
    assert features_of(249) == 149


@pytest.mark.parametrize(("states", "count"), [(249, 1), (250, 2), (251, 2), (499, 2), (500, 3)])
def test_a_sound_that_ends_with_a_clip_gets_one_more(states: int, count: int) -> None:
    assert clip_count(states, 16, 80) == count


def test_the_first_clip_shows_77_frames_and_later_ones_80() -> None:
    plan = spoken()
    assert [part.frames for part in plan.segments] == [77, 80, 80]
    assert [part.skip for part in plan.segments] == [4, 73, 73]
    assert [part.seed for part in plan.segments] == [7, 8, 9]
    assert {part.latent for part in plan.segments} == {(16, 20, 80, 136)}
    assert plan.frames == 189 and plan.fps == 16 and plan.size == (1088, 640)  # 12 s without the first three frames
    assert plan.speech is not None and plan.speech.trim == 3 / 16


def test_with_the_picture_as_past_nothing_is_dropped() -> None:
    plan = spoken(start_from_ref=True)
    assert [part.frames for part in plan.segments] == [80, 80, 80] and plan.segments[0].skip == 73
    assert plan.speech is not None and plan.speech.trim == 0
    timing = spoken(reference_timing=True)
    assert timing.speech is not None and timing.speech.trim == 0 and timing.segments[0].frames == 77


def test_clips_can_be_fewer_than_the_sound_fills_but_not_more() -> None:
    assert len(spoken(num_clips=2).segments) == 2
    assert len(spoken(num_clips=50).segments) == 3
    assert len(spoken(0.5).segments) == 1


def test_without_a_sound_a_draft_counts_the_clips_that_are_asked_for() -> None:
    speech = speech_of(Request(num_clips=4), S2V)
    assert speech is not None
    assert len(speech_cuts(4, S2V, speech, None)) == 4


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"num_clips": 0}, "E2024"), ({"infer_frames": 82}, "E2005"), ({"infer_frames": 124}, "E2005"),
        ({"infer_frames": 0}, "E2005"), ({"frames": 81}, "E2005"), ({"fps": 25}, "E2032"),
        ({"audio_window": 3}, "E2035"), ({"resize": "crop"}, "E2035"), ({"last_audio_state": "x"}, "E2035"),
        ({"refert_num": 1}, "E2016"), ({"replace_flag": True}, "E2016"), ({"face_video": "f.mp4"}, "E2016"),
    ],
)  # fmt: skip
def test_bad_wishes_for_speech_are_refused(fields: dict[str, Any], code: str) -> None:
    with pytest.raises(InputError) as error:
        spoken(**fields)
    assert error.value.code == code


def test_speech_needs_a_sound() -> None:
    with pytest.raises(InputError, match="--audio FILE") as error:
        make_plan(Request(prompt="a", image="a.png"), S2V, inputs=[PICTURE])
    assert error.value.code == "E2024"


def test_options_of_clips_are_refused_where_there_are_none() -> None:
    with pytest.raises(InputError) as error:
        make_plan(Request(prompt="a", num_clips=2), VARIANTS["t2v-A14B"])
    assert error.value.code == "E2016"


# ---------------------------------------------------------------- animate


def restated(length: int, shared: int, clip: int = 77) -> tuple[list[list[int]], list[int]]:
    """The reference's windows, restated: frame numbers of each, and how many frames it keeps in the end."""
    step = clip - shared
    extra = (step - (length - shared) % step) % step
    frames, order, forward, at = [], list(range(length)), True, 0
    while len(frames) < length + extra:
        frames.append(order[at])
        if length > 1:
            if at == length - 1:
                forward = False
            if at == 0:
                forward = True
            at += 1 if forward else -1
    windows, start = [], 0
    while start + shared < length + extra:
        windows.append(frames[start : start + clip])
        start += step
    kept = [clip if i == 0 else clip - shared for i in range(len(windows))]
    kept[-1] -= sum(kept) - length
    return windows, kept


@pytest.mark.parametrize("shared", [1, 5])
@pytest.mark.parametrize("length", [6, 30, 76, 77, 78, 100, 153, 154, 300])
def test_windows_of_animate_are_those_of_the_reference(length: int, shared: int) -> None:
    windows, kept = restated(length, shared)
    cuts = animate_cuts(length, 77, shared)
    assert [[ping_pong(cut.start + i, length) for i in range(77)] for cut in cuts] == windows[: len(cuts)]
    assert [cut.frames for cut in cuts] == kept[: len(cuts)]
    assert sum(cut.frames for cut in cuts) == length
    assert len(windows) - len(cuts) in (0, 1) and sum(kept[len(cuts) :]) <= 0


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_driving_video_shorter_than_what_clips_share_makes_one_clip(length: int) -> None:
    (cut,) = animate_cuts(length, 77, 5)
    assert cut.frames == length and cut.latents == 20
    assert {ping_pong(i, length) for i in range(77)} == set(range(length))


def test_clips_of_animate_share_frames_and_one_stream_of_noise() -> None:
    plan = danced(100, refert_num=5)
    assert [part.frames for part in plan.segments] == [77, 23]
    assert [(part.seed, part.draw, part.skip, part.start) for part in plan.segments] == [(7, 0, 0, 0), (7, 1, 5, 72)]
    assert plan.size == (320, 192) and plan.frames == 100 and plan.fps == 25
    assert plan.latent == (16, 21, 24, 40)
    assert danced(100, fps=12).rate == 12


def test_a_rate_that_is_no_whole_number_is_kept() -> None:
    request = Request(prompt="a", seed=1, image="a", pose_video="p", face_video="f")
    drivers = [video(role, 90, rate=(30000, 1001)) for role in ("pose_video", "face_video")]
    plan = make_plan(request, ANIMATE, inputs=[PICTURE, *drivers])
    assert plan.rate.numerator == 30000 and plan.rate.denominator == 1001
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("inputs", "code"),
    [
        ([video("pose_video", 90), video("face_video", 80)], "E3021"),
        ([video("pose_video", 90, (321, 192)), video("face_video", 90)], "E3019"),
        (
            [video("pose_video", 90), video("face_video", 90), video("background_video", 90, (64, 64)),
             video("mask_video", 90)],
            "E3019",
        ),
    ],
)  # fmt: skip
def test_videos_that_do_not_go_together_are_refused(inputs: list[Input], code: str) -> None:
    fields: dict[str, Any] = {item.role: item.name for item in inputs}
    with pytest.raises(InputError) as error:
        make_plan(Request(prompt="a", image="a", **fields), ANIMATE, inputs=[PICTURE, *inputs])
    assert error.value.code == code


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"refert_num": 77}, "E2035"), ({"replace_flag": True}, "E2015"), ({"background_video": "b.mp4"}, "E2015"),
        ({"mask_video": "m.mp4"}, "E2015"), ({"frames": 76}, "E2005"), ({"size": (64, 64)}, "E2003"),
        ({"num_clips": 2}, "E2016"),
    ],
)  # fmt: skip
def test_bad_wishes_for_animation_are_refused(fields: dict[str, Any], code: str) -> None:
    with pytest.raises(InputError) as error:
        danced(90, **fields)
    assert error.value.code == code


@pytest.mark.parametrize(
    "plan",
    [
        spoken(num_clips=2, infer_frames=48, resize="reference", reference_timing=True, last_audio_state="raw"),
        spoken(start_from_ref=True, audio_window=0),
        danced(100, refert_num=5),
        danced(50, ("background_video", "mask_video"), replace_flag=True, use_relighting_lora=True, fps=10),
    ],
)
def test_the_request_like_a_plan_plans_it_again(plan: Plan) -> None:
    variant = VARIANTS[plan.variant]
    request = replace(request_like(plan), **{item.role: item.name for item in plan.inputs})
    assert make_plan(request, variant, inputs=plan.inputs) == plan
