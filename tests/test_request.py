"""What is typed becomes typed values, with the code of its field when it cannot."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from wanloom.errors import InputError
from wanloom.request import (
    OPTIONS,
    SUFFIXES,
    UNAVAILABLE,
    Request,
    Unavailable,
    check_out,
    check_prompt,
    check_unavailable,
    parse_guidance,
    parse_size,
    parse_switch,
    request_from_text,
)

BY_NAME = {option.name: option for option in OPTIONS}

# Option -> the official command's spelling (spec/core.md 8.1).
OFFICIAL = {
    "frames": "--frame_num",
    "steps": "--sample_steps",
    "shift": "--sample_shift",
    "guidance": "--sample_guide_scale",
    "sampler": "--sample_solver",
    "seed": "--base_seed",
    "out": "--save_file",
    "ckpt_dir": "--ckpt_dir",
    "image": "--first_frame",
    "last_image": "--last_frame",
    "t5_cpu": "--t5_cpu",
    "convert_model_dtype": "--convert_model_dtype",
    "task": "--task",
    "size": "--size",
    "prompt": "--prompt",
}


@pytest.mark.parametrize(("name", "spelling"), OFFICIAL.items())
def test_the_official_spelling_is_an_alias(name: str, spelling: str) -> None:
    assert spelling in BY_NAME[name].flags


def test_every_field_is_an_option_with_one_documented_name_in_dashes() -> None:
    assert [option.name for option in OPTIONS] == [entry.name for entry in fields(Request)]
    for option in OPTIONS:
        assert option.flags[0] == "--" + option.name.replace("_", "-")
        assert option.help
        assert option.group in ("video", "model", "run")


def test_every_dash_may_be_an_underscore_and_no_flag_has_two_meanings() -> None:
    flags = [flag for option in OPTIONS for flag in option.flags]
    flags += [flag for option in UNAVAILABLE for flag in option.flags]
    assert len(flags) == len(set(flags))
    assert {"--" + flag[2:].replace("-", "_") for flag in flags} <= set(flags)


def test_a_request_needs_only_a_prompt_and_never_changes() -> None:
    request = Request(prompt="a red ball")
    assert request.frames is None
    with pytest.raises(FrozenInstanceError):
        request.prompt = "a blue ball"  # type: ignore[misc]


def test_texts_become_the_values_python_would_give() -> None:
    typed = request_from_text(
        {
            "prompt": "a ball",
            "size": "832*480",
            "frames": "81",
            "shift": "5",
            "guidance": "3.0,4.0",
            "guidance_high": "4",
            "sampler": "dpm++",
            "seed": "-1",
            "sigmas": "1,0.5",
            "out": "a.mp4",
            "preview": True,
            "overwrite": "yes",
            "device": "cuda:1",
            "image": "x.png",
        }
    )
    assert typed == Request(
        prompt="a ball",
        size=(832, 480),
        frames=81,
        shift=5.0,
        guidance=(3.0, 4.0),
        guidance_high=4.0,
        sampler="dpm++",
        seed=-1,
        sigmas=(1.0, 0.5),
        out=Path("a.mp4"),
        preview=True,
        overwrite=True,
        device="cuda:1",
        image=Path("x.png"),
    )


@pytest.mark.parametrize("text", ["1280*720", "1280x720", "1280X720", " 1280×720 "])
def test_a_size_may_be_written_with_a_star_or_a_cross(text: str) -> None:
    assert parse_size(text) == (1280, 720)


@pytest.mark.parametrize(("text", "value"), [("5", 5.0), ("3.0,4.0", (3.0, 4.0)), (" 1e0 , 2", (1.0, 2.0))])
def test_guidance_is_one_number_or_low_and_high(text: str, value: Any) -> None:
    assert parse_guidance(text) == value


# B004, B006, B007-B014, B026 of the bad-input catalogue: field, text, code.
BAD = [
    ("size", "720*", "E2003"),
    ("size", "abc", "E2003"),
    ("size", "-64x64", "E2003"),
    ("size", "1000000000", "E2003"),
    ("size", "64x64x64", "E2003"),
    ("size", "", "E2003"),
    ("frames", "8.0", "E2005"),
    ("frames", "many", "E2005"),
    ("frames", "9" * 50, "E2005"),
    ("steps", "1.5", "E2007"),
    ("steps", "1e9", "E2007"),
    ("steps", "0x10", "E2007"),
    ("steps", "٤", "E2007"),  # an Arabic digit, which int() would take
    ("guidance", "nan", "E2008"),
    ("guidance", "inf", "E2008"),
    ("guidance", "abc", "E2008"),
    ("guidance", "1,2,3", "E2008"),
    ("guidance", "", "E2008"),
    ("guidance_high", "nan", "E2008"),
    ("guidance_low", "1,2", "E2008"),
    ("shift", "nan", "E2009"),
    ("shift", "x", "E2009"),
    ("seed", "1.0", "E2010"),
    ("seed", "", "E2010"),
    ("sampler", "eular", "E2011"),
    ("out", "x.exe", "E2017"),
    ("out", "x", "E2017"),
    ("out", ".mp4", "E2017"),
    ("device", "mps", "E2027"),
    ("device", "tpu", "E2027"),
    ("device", "cuda:x", "E2027"),
    ("noise_device", "mps:0", "E2027"),
    ("dtype", "float8", "E2028"),
    ("num", "two", "E2029"),
    ("save_every", "1.5", "E2030"),
    ("sigmas", "1,,0.5", "E2031"),
    ("fps", "23.976", "E2032"),
    ("overwrite", "perhaps", "E2022"),
    ("colour", "red", "E2022"),
]


@pytest.mark.parametrize(("name", "text", "code"), BAD)
def test_what_cannot_be_read_is_refused_with_the_fields_code(name: str, text: str, code: str) -> None:
    with pytest.raises(InputError) as error:
        request_from_text({name: text})
    assert error.value.code == code
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


def test_a_slip_of_the_pen_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match="Did you mean 'euler'"):
        request_from_text({"sampler": "eular"})
    with pytest.raises(InputError, match="Did you mean 'frames'"):
        request_from_text({"frame": "81"})


def test_apple_gpus_are_refused_with_a_sentence() -> None:
    with pytest.raises(InputError, match=r"Apple GPUs \(mps\) are not available in this version"):
        request_from_text({"device": "mps"})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_five_output_formats_are_accepted_in_any_case(suffix: str) -> None:
    assert check_out(Path(f"a{suffix}")) == Path(f"a{suffix}")
    check_out(Path(f"a{suffix.upper()}"))


@pytest.mark.parametrize("text", ["a\nb", "../../etc", "\"quoted\" 'too'", "🦊 fox", "\u202eabc", "猫", "x" * 8192])
def test_odd_but_honest_prompts_are_accepted(text: str) -> None:
    assert check_prompt(text) == text


@pytest.mark.parametrize(("text", "code"), [("x" * 8193, "E2013"), ("a\0b", "E2014"), ("a\udc80", "E2014")])
def test_prompts_that_cannot_be_encoded_are_refused(text: str, code: str) -> None:
    with pytest.raises(InputError) as error:
        check_prompt(text)
    assert error.value.code == code


@pytest.mark.parametrize("option", UNAVAILABLE, ids=lambda option: option.flags[0])
def test_options_of_later_versions_are_refused_unless_they_change_nothing(option: Unavailable) -> None:
    for value in ("dashscope", "anything") if option.harmless is None else option.harmless:
        check_unavailable(option, value)
        check_unavailable(option, value.upper())
    if option.harmless is not None:
        with pytest.raises(InputError, match="not available in this") as error:
            check_unavailable(option, "8" if "size" in option.flags[0] else "True")
        assert error.value.exit_code == 2


@pytest.mark.parametrize(("text", "value"), [("Yes", True), ("t", True), ("1", True), ("False", False), ("n", False)])
def test_switches_read_the_official_words(text: str, value: bool) -> None:
    assert parse_switch(text) is value
