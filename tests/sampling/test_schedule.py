"""Noise levels and timesteps, against the reference's."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path

import pytest

from wanloom.errors import InputError
from wanloom.sampling.schedule import SAMPLER_NAMES, SIGMA_MAX, Schedule, explicit_schedule, make_schedule

GOLDEN_KEYS = {"unipc": "unipc", "dpm++": "dpmpp"}

# The official 40 and 50 step schedules (spec/core.md 6.1): t2v-A14B and i2v-A14B and ti2v-5B.
T2V_40_12 = (
    "999 997 995 993 990 988 985 982 979 976 972 969 965 961 956 952 947 941 936 929 922 915 907 898 888 877 "
    "865 852 837 819 799 776 749 717 678 631 571 492 386 235"
)
I2V_40_5 = (
    "999 994 989 983 978 972 965 959 952 944 937 929 920 911 902 892 882 870 859 846 833 818 803 786 768 749 728 706 "
    "681 654 624 591 555 514 468 416 356 288 208 113"
)
TI2V_50_5 = (
    "999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890 882 873 863 854 843 833 821 809 "
    "796 783 768 753 737 720 701 681 660 636 611 584 555 522 487 448 405 356 302 241 172 92"
)


def ulps(a: float, b: float) -> int:
    """How many float32 numbers lie between two positive ones."""
    first, second = (struct.unpack("<i", struct.pack("<f", value))[0] for value in (a, b))
    return abs(first - second)


def test_schedules_are_the_references(golden: Path) -> None:
    for key, expected in json.loads((golden / "schedules.json").read_text()).items():
        steps, shift = key.split("/")
        for sampler, prefix in GOLDEN_KEYS.items():
            schedule = make_schedule(sampler, int(steps), float(shift))
            assert list(schedule.timesteps) == expected[f"{prefix}_timesteps"], (key, sampler)
            pairs = zip(schedule.sigmas, expected[f"{prefix}_sigmas"], strict=True)
            assert max(ulps(a, b) for a, b in pairs) <= 1, (key, sampler)


@pytest.mark.parametrize(("steps", "shift", "expected"), [(40, 12, T2V_40_12), (40, 5, I2V_40_5), (50, 5, TI2V_50_5)])
def test_the_published_default_schedules(steps: int, shift: float, expected: str) -> None:
    assert make_schedule("unipc", steps, shift).timesteps == tuple(map(float, expected.split()))


@pytest.mark.parametrize(
    ("sampler", "steps", "shift", "sigmas"),
    [
        ("unipc", 4, 3, (0.9996665, 0.8996398, 0.7496248, 0.4996666, 0)),
        ("unipc", 4, 12, (0.9999166, 0.9728677, 0.9229348, 0.7997865, 0)),
        ("dpm++", 4, 5, (1, 0.9375, 0.8333333, 0.625, 0)),
        ("dpm++", 8, 12, (1, 0.9882353, 0.972973, 0.952381, 0.9230769, 0.8780488, 0.8, 0.6315789, 0)),
        ("euler", 4, 5, (1, 0.9375, 0.8333333, 0.625, 0)),
    ],
)
def test_sigmas_of_the_specification(sampler: str, steps: int, shift: float, sigmas: tuple[float, ...]) -> None:
    assert make_schedule(sampler, steps, shift).sigmas == pytest.approx(sigmas, abs=6e-8)


def test_euler_is_given_the_exact_timestep() -> None:
    schedule = make_schedule("euler", 4, 5)
    assert schedule.timesteps == pytest.approx((1000, 937.5, 833.3333333333333, 625), rel=1e-15)
    assert make_schedule("dpm++", 4, 5).timesteps == (1000, 937, 833, 625)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
@pytest.mark.parametrize(("steps", "shift"), [(1, 5), (100, 12), (92, 12), (251, 5), (1000, 12), (1000, 1), (999, 16)])
def test_any_step_count_works(sampler: str, steps: int, shift: float) -> None:
    schedule = make_schedule(sampler, steps, shift)
    assert schedule.steps == steps == len(schedule.sigmas) - 1
    assert schedule.sigmas[-1] == 0
    assert all(a > b for a, b in pairwise(schedule.sigmas))
    assert all(a >= b for a, b in pairwise(schedule.timesteps))
    assert all(0 <= t <= 1000 for t in schedule.timesteps)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_sigmas_are_float32_numbers(sampler: str) -> None:
    for sigma in make_schedule(sampler, 7, 3.3).sigmas:
        assert struct.unpack("<f", struct.pack("<f", sigma))[0] == sigma


def test_the_grids_begin_where_the_reference_begins() -> None:
    for sampler, start in SIGMA_MAX.items():
        assert make_schedule(sampler, 10, 1).sigmas[0] == struct.unpack("<f", struct.pack("<f", start))[0]


@pytest.mark.parametrize(
    ("sampler", "steps", "shift", "code"),
    [("unpic", 4, 5, "E2011"), ("unipc", 0, 5, "E2007"), ("unipc", 1000, 1e12, "E2009"), ("euler", 3, 1e-60, "E2009")],
)
def test_what_cannot_be_scheduled_is_refused(sampler: str, steps: int, shift: float, code: str) -> None:
    with pytest.raises(InputError) as error:
        make_schedule(sampler, steps, shift)
    assert error.value.code == code


def test_an_unknown_sampler_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'unipc'"):
        make_schedule("unpic", 4, 5)


def test_explicit_sigmas_get_a_final_zero_and_timesteps() -> None:
    schedule = explicit_schedule("unipc", (1.0, 0.9375, 0.6255))
    assert schedule == explicit_schedule("unipc", (1.0, 0.9375, 0.6255, 0.0))
    assert schedule.sigmas == pytest.approx((1, 0.9375, 0.6255, 0), abs=6e-8)
    assert schedule.timesteps == (1000, 937, 625)
    assert explicit_schedule("euler", (1.0, 0.9375)).timesteps == (1000, 937.5)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_a_schedules_own_sigmas_make_it_again(sampler: str) -> None:
    schedule = make_schedule(sampler, 20, 5)
    explicit = explicit_schedule(sampler, schedule.sigmas)
    assert explicit.sigmas == schedule.sigmas
    assert explicit_schedule(sampler, explicit.sigmas) == explicit


def test_a_level_means_the_same_before_and_after_rounding_to_float32() -> None:
    # 1000 * 0.9 is 900, but 0.9 in float32 is 0.89999998, which would be cut to 899.
    assert explicit_schedule("unipc", (0.9, 0.6)).timesteps == (900, 600)
    assert explicit_schedule("unipc", (0.8999999761581421, 0.6000000238418579)).timesteps == (900, 600)


@pytest.mark.parametrize(
    "sigmas",
    [(), (0.0,), (1.1, 0.5), (0.5, 0.5), (0.4, 0.6), (1.0, float("nan")), (1.0, -0.1), (1.0, 0.0, 0.0), (1.0, 1e-60)],
)
def test_levels_that_do_not_fall_from_one_to_zero_are_refused(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(InputError) as error:
        explicit_schedule("unipc", sigmas)
    assert error.value.code == "E2031"


def test_a_schedule_has_one_more_sigma_than_timesteps() -> None:
    with pytest.raises(ValueError, match="expected one more"):
        Schedule(sigmas=(1.0,), timesteps=(1000.0,))
