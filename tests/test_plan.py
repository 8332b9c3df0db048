"""A Plan decides every number; its JSON keeps every bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wanloom.errors import InputError
from wanloom.plan import (
    FORMAT,
    Input,
    Plan,
    differences,
    expert_spans,
    make_plan,
    request_like,
)
from wanloom.request import MAX_SEED, Request
from wanloom.sampling.schedule import explicit_schedule, make_schedule
from wanloom.sizes import best_area_size, image_area_size
from wanloom.variants import NEGATIVE, VARIANTS, Variant

T2V, I2V, TI2V = VARIANTS["t2v-A14B"], VARIANTS["i2v-A14B"], VARIANTS["ti2v-5B"]
FLF, T2V_SMALL, DEMO = VARIANTS["flf2v-14B"], VARIANTS["t2v-1.3B"], VARIANTS["demo-t2v"]
PICTURE = Input(role="image", name="cat.png", sha256="0" * 64, size=(1280, 720))
LAST = Input(role="last_image", name="dog.png", sha256="1" * 64, size=(64, 64))


def ask(**values: Any) -> Request:
    return Request(**{"prompt": "a ball", "seed": 1, **values})


def code_of(request: Request, variant: Any = T2V, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        make_plan(request, variant, **options)
    assert "\n" not in error.value.message
    return error.value.code


# --- what is decided


def test_a_bare_prompt_gets_the_models_defaults() -> None:
    plan = make_plan(ask(), T2V)
    assert (plan.variant, plan.task, plan.demo) == ("t2v-A14B", "t2v-A14B", False)
    assert (plan.size, plan.frames, plan.fps) == ((1280, 720), 81, 16)
    assert (plan.steps, plan.shift, plan.sampler) == (40, 12.0, "unipc")
    assert plan.latent == (16, 21, 90, 160)
    assert plan.negative_prompt == NEGATIVE
    assert plan.schedule == make_schedule("unipc", 40, 12.0)
    assert plan.guidance == (3.0, 4.0)
    assert plan.noise_device == "cpu"
    assert plan.notes == ()


@pytest.mark.parametrize(
    ("name", "latent"),
    [("t2v-A14B", (16, 21, 90, 160)), ("ti2v-5B", (48, 31, 44, 80)), ("t2v-1.3B", (16, 21, 60, 104))],
)
def test_latent_shapes_of_the_reference(name: str, latent: tuple[int, ...]) -> None:
    assert make_plan(ask(), VARIANTS[name]).latent == latent


def given(role: str, variant: Variant) -> Input:
    """An input such as the task wants it: 5 s of sound, videos of 100 frames."""
    if role == "audio":
        return Input(role=role, name="a.wav", sha256="1" * 64, samples=80_000)
    if role.endswith("_video"):
        return Input(
            role=role, name=f"{role}.mp4", sha256="2" * 64, size=variant.defaults.size, frames=100, rate=(30, 1)
        )
    return replace(PICTURE, role=role)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_row_plans_a_video(name: str) -> None:
    variant = VARIANTS[name]
    inputs = [given(role, variant) for role, _ in variant.inputs]
    request = ask(**{item.role: item.name for item in inputs})
    plan = make_plan(request, variant, inputs=inputs)
    assert plan.latent[0] == variant.vae.z
    assert plan.in_clips == (variant.conditioner in ("speech", "animate"))
    if not plan.in_clips:
        assert plan.frames == (plan.latent[1] - 1) * variant.vae.stride[0] + 1
    assert all(side % variant.multiple == 0 for side in plan.size)
    assert plan.spans[0].start == 0 and plan.spans[-1].stop == plan.steps
    assert Plan.from_json(plan.to_json()) == plan
    assert make_plan(request_like(plan), variant, inputs=inputs, image_size=PICTURE.size, draft=True) == plan


def test_the_published_runs_split_26_14_and_15_25() -> None:
    spans = make_plan(ask(), T2V).spans
    assert [(span.expert, span.start, span.stop, span.guidance) for span in spans] == [
        ("high_noise_model", 0, 26, 4.0),
        ("low_noise_model", 26, 40, 3.0),
    ]
    assert [span.stop for span in make_plan(ask(sampler="dpm++"), T2V).spans] == [26, 40]
    i2v = make_plan(ask(image="cat.png"), I2V, image_size=(1280, 720))
    assert [span.stop for span in i2v.spans] == [15, 40]


def test_one_expert_is_one_span() -> None:
    (span,) = make_plan(ask(), T2V_SMALL).spans
    assert (span.expert, span.start, span.stop, span.guidance) == ("model", 0, 50, 5.0)


def test_an_expert_without_steps_has_no_span() -> None:
    plan = make_plan(ask(sigmas=(0.5, 0.2)), T2V)
    assert [span.expert for span in plan.spans] == ["low_noise_model"]
    assert plan.span_at(1).guidance == 3.0


def test_spans_change_exactly_at_the_boundary() -> None:
    spans = expert_spans(T2V, (876.0, 875.0, 874.999, 0.0), (3.0, 4.0))
    assert [(span.start, span.stop) for span in spans] == [(0, 2), (2, 4)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"guidance": 6}, (6.0, 6.0)),
        ({"guidance": (2.0, 3.0)}, (2.0, 3.0)),
        ({"guidance_high": 7.0}, (3.0, 7.0)),
        ({"guidance_low": 1.0}, (1.0, 4.0)),
        ({"guidance": (2.0, 3.0), "guidance_low": 1.0, "guidance_high": 0}, (1.0, 0.0)),
    ],
)
def test_guidance_is_low_high_and_the_single_options_win(values: dict[str, Any], expected: tuple[float, float]) -> None:
    assert make_plan(ask(**values), T2V).guidance == expected


def test_explicit_sigmas_stand_for_steps_and_shift() -> None:
    plan = make_plan(ask(sigmas=(1.0, 0.9, 0.6)), T2V)
    assert (plan.steps, plan.shift) == (3, None)
    assert plan.schedule == explicit_schedule("unipc", (1.0, 0.9, 0.6))
    assert make_plan(request_like(plan), T2V) == plan


def test_an_empty_negative_prompt_is_the_models_own() -> None:
    assert make_plan(ask(negative_prompt=""), T2V).negative_prompt == NEGATIVE
    assert make_plan(ask(negative_prompt="blur"), T2V).negative_prompt == "blur"
    assert make_plan(ask(negative_prompt=""), DEMO).negative_prompt == ""


def test_a_random_seed_is_decided_here_and_recorded() -> None:
    assert make_plan(ask(seed=-1), T2V, random_seed=lambda: 77).seed == 77
    assert make_plan(ask(seed=None), T2V, random_seed=lambda: 77).segments[0].seed == 77
    seeds = {make_plan(ask(seed=-1), DEMO).seed for _ in range(20)}
    assert len(seeds) == 20  # two of 20 random 32-bit numbers agree once in 2e7 runs


def test_the_next_video_of_num_differs_in_its_seed_only() -> None:
    plan = make_plan(ask(num=3), T2V)
    other = plan.with_seed(3)
    assert differences(plan, other) == ("seed", "segments")
    assert other == make_plan(ask(seed=3), T2V)


def test_the_same_request_makes_the_same_plan() -> None:
    assert make_plan(ask(), T2V) == make_plan(ask(), T2V)


def test_where_and_how_to_run_is_not_part_of_the_plan() -> None:
    elsewhere = ask(device="cuda", dtype="bfloat16", out=Path("x.gif"), preview=True, save_every=1, ckpt_dir=Path("m"))
    assert make_plan(elsewhere, T2V) == make_plan(ask(), T2V)


# --- sizes


@pytest.mark.parametrize(
    ("image", "area", "size"),
    [
        ((832, 480), 399_360, (832, 464)),  # sqrt gives 479.99...: the reference's floor is kept
        ((480, 832), 399_360, (480, 832)),
        ((1280, 720), 399_360, (832, 464)),
        ((1280, 720), 921_600, (1280, 720)),
        ((832, 480), 921_600, (1248, 720)),
        ((1024, 1024), 921_600, (960, 960)),
        ((4000, 3000), 921_600, (1104, 816)),
        ((1920, 1080), 921_600, (1280, 720)),
    ],
)
def test_i2v_takes_the_area_and_the_pictures_aspect(image: Any, area: int, size: Any) -> None:
    assert image_area_size(image, area) == size


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((1280, 704), (1280, 704)),
        ((1280, 720), (1248, 704)),
        ((720, 1280), (704, 1248)),
        ((1024, 1024), (960, 928)),
        ((1920, 1080), (1248, 704)),
        ((4000, 3000), (1088, 800)),
        ((3000, 4000), (800, 1088)),
    ],
)
def test_ti2v_takes_the_better_of_two_roundings(image: Any, size: Any) -> None:
    assert best_area_size(image, 901_120, 32) == size


def test_a_size_with_a_picture_is_an_area() -> None:
    plan = make_plan(ask(image="cat.png", size=(480, 832)), I2V, image_size=(1280, 720))
    assert (plan.asked, plan.size) == ((480, 832), (832, 464))
    plan = make_plan(ask(image="cat.png"), TI2V, inputs=[PICTURE])
    assert (plan.asked, plan.size, plan.latent) == ((1280, 704), (1248, 704), (48, 31, 44, 78))
    assert make_plan(ask(), TI2V).size == (1280, 704)


def test_a_replayed_picture_size_does_not_shrink() -> None:
    plan = make_plan(ask(image="cat.png", size=(832, 480)), I2V, inputs=[replace(PICTURE, size=(832, 480))])
    assert plan.size == (832, 464)
    again = make_plan(replace(request_like(plan), image="cat.png"), I2V, inputs=plan.inputs)
    assert again == plan


def test_a_size_may_be_text_in_python_too() -> None:
    assert make_plan(ask(size="832x480"), T2V) == make_plan(ask(size=(832, 480)), T2V)


def test_other_sizes_than_the_published_work_with_a_note() -> None:
    plan = make_plan(ask(size=(640, 368)), T2V)
    assert plan.latent == (16, 21, 46, 80)
    assert len(plan.notes) == 1 and "640x368" in plan.notes[0] and "\n" not in plan.notes[0]
    assert make_plan(ask(size=(832, 480)), TI2V).notes  # 480p on the 5B: multiples of 32, so it runs
    assert make_plan(ask(size=(832, 480)), T2V).notes == ()


@pytest.mark.parametrize(
    ("size", "code"),
    [
        ((1280, 721), "E2003"),
        ((0, 0), "E2003"),
        ((-64, 64), "E2003"),
        ((10**9, 10**9), "E2003"),
        ((1280.0, 720.0), "E2003"),
        ((True, 16), "E2003"),
        (1280, "E2003"),
        ("720*", "E2003"),
        ((8, 8), "E2003"),
        ((16 * 1025, 16), "E2004"),
        ((16, 16 * 1025), "E2004"),
    ],
)
def test_sizes_that_are_refused(size: Any, code: str) -> None:
    assert code_of(ask(size=size)) == code


def test_the_largest_size_is_1024_positions_an_axis() -> None:
    assert make_plan(ask(size=(16 * 1024, 16)), T2V).latent == (16, 21, 2, 2048)


def test_a_refused_size_names_the_nearest() -> None:
    with pytest.raises(InputError, match="Use 1280x720"):
        make_plan(ask(size=(1280, 721)), T2V)
    with pytest.raises(InputError, match=r"multiples of 32\. Use 1280x704"):
        make_plan(ask(size=(1280, 710)), TI2V)


@pytest.mark.parametrize("variant", [I2V, TI2V], ids=lambda row: row.name)
def test_a_picture_that_fits_no_multiple_is_refused(variant: Any) -> None:
    assert code_of(ask(image="x", size=(64, 64)), variant, image_size=(5000, 1)) == "E2004"


# --- refusals


@pytest.mark.parametrize(
    ("frames", "code"),
    [(82, "E2005"), (0, "E2005"), (-7, "E2005"), (81.0, "E2005"), (True, "E2005"), (100_001, "E2006"), (4097, "E2006")],
)
def test_frames_that_are_refused(frames: Any, code: str) -> None:
    assert code_of(ask(frames=frames)) == code


def test_refused_frames_name_both_neighbours() -> None:
    with pytest.raises(InputError) as error:
        make_plan(ask(frames=82), T2V)
    assert str(error.value) == "error[E2005]: frames: got 82, this model makes 4n+1. Use 81 or 85."


def test_one_frame_and_the_longest_clip_are_made() -> None:
    assert make_plan(ask(frames=1), T2V).latent[1] == 1
    assert make_plan(ask(frames=4093), T2V).latent[1] == 1024


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"task": "i2v-A14B"}, "E2002"),
        ({"steps": 0}, "E2007"),
        ({"steps": -1}, "E2007"),
        ({"steps": 1001}, "E2007"),
        ({"steps": 1.5}, "E2007"),
        ({"guidance": float("nan")}, "E2008"),
        ({"guidance": float("inf")}, "E2008"),
        ({"guidance": (1, 2, 3)}, "E2008"),
        ({"guidance": "5"}, "E2008"),
        ({"guidance": -1}, "E2008"),
        ({"guidance_high": 1e6}, "E2008"),
        ({"shift": 0}, "E2009"),
        ({"shift": -1.0}, "E2009"),
        ({"shift": float("nan")}, "E2009"),
        ({"shift": float("inf")}, "E2009"),
        ({"shift": 1e30}, "E2009"),
        ({"seed": -5}, "E2010"),
        ({"seed": 2**64}, "E2010"),
        ({"seed": 1.0}, "E2010"),
        ({"seed": MAX_SEED, "num": 2}, "E2010"),
        ({"sampler": "eular"}, "E2011"),
        ({"prompt": ""}, "E2012"),
        ({"prompt": " \n\t"}, "E2012"),
        ({"prompt": "x" * 8193}, "E2013"),
        ({"prompt": "x" * 1_000_000}, "E2013"),
        ({"prompt": "\udcff"}, "E2014"),
        ({"negative_prompt": "a\0"}, "E2014"),
        ({"prompt": 5}, "E2014"),
        ({"image": "x.png"}, "E2016"),
        ({"last_image": "x.png"}, "E2016"),
        ({"out": Path("a.exe")}, "E2017"),
        ({"device": "cpu", "noise_device": "cuda"}, "E2023"),
        ({"sigmas": (1.0, 0.5), "steps": 3}, "E2023"),
        ({"sigmas": (1.0, 0.5), "shift": 5.0}, "E2023"),
        ({"device": "mps"}, "E2027"),
        ({"num": 0}, "E2029"),
        ({"save_every": 0}, "E2030"),
        ({"sigmas": (0.5, 0.6)}, "E2031"),
        ({"fps": 0}, "E2032"),
    ],
)
def test_requests_that_are_refused(values: dict[str, Any], code: str) -> None:
    assert code_of(ask(**values)) == code


def test_one_expert_takes_one_guidance() -> None:
    assert code_of(ask(guidance=(3.0, 4.0)), T2V_SMALL) == "E2008"
    assert code_of(ask(guidance_high=4.0), T2V_SMALL) == "E2008"
    assert make_plan(ask(guidance=(4.0, 4.0)), T2V_SMALL).guidance == (4.0, 4.0)


def test_pictures_a_task_needs_and_does_not_get() -> None:
    assert code_of(ask(), I2V) == "E2015"
    assert code_of(ask(image="x"), I2V) == "E2015"  # its size is not known
    assert code_of(ask(image="x"), FLF, image_size=(64, 64)) == "E2015"
    assert code_of(ask(last_image="x"), I2V) == "E2015"
    assert code_of(ask(image="x", last_image="y", frames=1), I2V, inputs=[PICTURE, LAST]) == "E2005"
    assert make_plan(ask(), TI2V).inputs == ()


def test_first_and_last_frame_take_the_size_of_the_first() -> None:
    for variant in (I2V, FLF):
        plan = make_plan(ask(image="a", last_image="b"), variant, inputs=[PICTURE, LAST])
        assert plan.size == (1280, 720)
        assert plan.input("last_image") == LAST
        assert plan.input("audio") is None


def test_a_draft_counts_without_prompt_and_pictures() -> None:
    plan = make_plan(Request(seed=1), I2V, draft=True)
    assert plan.size == (1280, 720)


@pytest.mark.parametrize("text", ["a\nb", "..", '"', "🦊", "\u202eabc"])
def test_odd_prompts_are_kept_word_for_word(text: str) -> None:
    plan = make_plan(ask(prompt=text), T2V)
    assert Plan.from_json(plan.to_json()).prompt == text


# --- JSON


@pytest.fixture
def plan() -> Plan:
    return make_plan(ask(image="cat.png", steps=7, shift=3.3), I2V, inputs=[PICTURE])


def test_json_keeps_every_bit(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json(indent=2).encode()) == plan


def test_json_says_nothing_about_the_machine(plan: Plan) -> None:
    assert "/" not in plan.to_json()


def change(plan: Plan, **values: Any) -> str:
    return json.dumps({**json.loads(plan.to_json()), **values})


@pytest.mark.parametrize(
    "values",
    [
        {"colour": 1},
        {"format": FORMAT + 1},
        {"frames": "81"},
        {"frames": 81.0},
        {"frames": True},
        {"frames": None},
        {"frames": -3},
        {"demo": 0},
        {"prompt": 5},
        {"size": [64]},
        {"size": [64, 64, 64]},
        {"size": {"w": 64}},
        {"size": [64, "64"]},
        {"size": [64, 2**40]},
        {"sigmas": [1.0, 0.0]},
        {"timesteps": []},
        {"steps": 10**9},
        {"spans": []},
        {"spans": [{"expert": "a", "start": -(10**12), "stop": 7, "guidance": 1.0}]},
        {"spans": [{"expert": "a", "start": 0, "stop": 10**12, "guidance": 1.0}]},
        {"spans": [{"expert": "a", "start": 1, "stop": 7, "guidance": 1.0}]},
        {"segments": [{"index": 0, "frames": 81, "latent": [16, 10**9, 8, 8], "seed": 1}]},
        {"segments": [{"index": 0, "frames": 81, "latent": [16, 0, 8, 8], "seed": 1}]},
        {"segments": []},
        {"seed": -1},
        {"inputs": [{"role": "image"}]},
        {"inputs": "cat.png"},
        {"shift": "5"},
    ],
)
def test_json_of_another_shape_is_refused(plan: Plan, values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        Plan.from_json(change(plan, **values))
    assert error.value.code == "E3022"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        '{"format": 1}',
        '{"format": 1, "format": 1}',
        "[" * 100_000,
        '{"format": 1, "shift": NaN}',
        '{"format": 1, "shift": 1e999}',
        b"\xff\xfe\x00",
        "x" * 2_000_000,
    ],
)
def test_text_that_is_no_plan_is_refused(text: str | bytes) -> None:
    with pytest.raises(InputError) as error:
        Plan.from_json(text)
    assert error.value.code == "E3022"


def test_a_missing_field_is_named(plan: Plan) -> None:
    data = json.loads(plan.to_json())
    del data["segments"][0]["seed"]
    with pytest.raises(InputError, match=r"plan\.segments\[0\].*seed"):
        Plan.from_json(json.dumps(data))


def test_an_overflowing_number_is_refused(plan: Plan) -> None:
    with pytest.raises(InputError, match="shift"):
        Plan.from_json(plan.to_json().replace('"shift": 3.3', '"shift": 1e999'))


def test_whole_numbers_are_read_as_floats_where_floats_belong(plan: Plan) -> None:
    assert Plan.from_json(change(plan, shift=5)).shift == 5.0


def test_differences_are_named(plan: Plan) -> None:
    assert differences(plan, plan) == ()
    assert differences(plan, replace(plan, prompt="x", notes=("n",))) == ("prompt",)
