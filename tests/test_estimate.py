"""How long runs take: operations over rates, what earlier runs teach, and the files in which it is kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest

from wanloom import budget, records, store
from wanloom.errors import WanloomWarning
from wanloom.estimate import BOUNDS, NEAREST, Seen, Work, estimate, learned, learned_bytes, passes_of, works
from wanloom.plan import Plan, make_plan
from wanloom.rates import RATES, Rates, device_key, guessed_rates, keep_rates, read_rates
from wanloom.records import LARGEST, Meter, Record
from wanloom.request import Request
from wanloom.variants import VARIANTS

RATE = Rates(
    matrix={"float32": 1e10, "bfloat16": 4e10}, attention={"float32": 5e9, "bfloat16": 1e10}, conv=2e10, copy=1e9,
    disk=1e8, call=1e-5,
)  # fmt: skip
KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache directory, empty."""
    monkeypatch.setenv("WANLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plan_of(name: str, **fields: object) -> Plan:
    return make_plan(Request(task=name, seed=1, **fields), VARIANTS[name], draft=True)  # type: ignore[arg-type]


# ---------------------------------------------------------------- work


@pytest.mark.parametrize("name", VARIANTS)
def test_all_operations_of_the_budget_are_work(name: str) -> None:
    plan, row = plan_of(name), VARIANTS[name]
    flops = budget.flops(plan, row)
    work = works(plan, row, "bfloat16")
    assert sum(one.matrix + one.attention + one.conv for one in work.values()) == sum(flops.values())
    assert work["denoise"].matrix + work["denoise"].attention == flops["denoise"]
    assert ("sound" in work) == (row.audio is not None)


def test_attention_is_the_part_that_grows_with_the_square() -> None:
    row = VARIANTS["t2v-A14B"]
    short, long = (works(plan_of("t2v-A14B", frames=frames), row, "bfloat16")["denoise"] for frames in (41, 81))
    ratio = 21 / 11  # latent frames
    assert long.attention == pytest.approx(ratio**2 * short.attention, rel=1e-9)
    assert long.matrix == pytest.approx(ratio * short.matrix, rel=0.01)
    assert passes_of(plan_of("t2v-A14B", guidance=1.0)) == 40 and passes_of(plan_of("t2v-A14B")) == 80
    assert passes_of(plan_of("t2v-A14B"), at_once=True) == 40


def test_several_videos_are_encoded_once_and_denoised_each() -> None:
    one, three = (works(plan_of("i2v-A14B"), VARIANTS["i2v-A14B"], "bfloat16", num=num) for num in (1, 3))
    assert three["encode"] == one["encode"]
    assert three["decode"].conv == 3 * one["decode"].conv and three["denoise"].matrix == 3 * one["denoise"].matrix


def test_an_estimate_is_operations_over_rates() -> None:
    work = Work(dtype="bfloat16", matrix=8e10, attention=2e10, conv=4e10, calls=1000, share=0.5)
    assert estimate(work, RATE) == pytest.approx((2 + 2 + 2) / 0.5 + 0.01)
    assert estimate(replace(work, dtype="float32"), RATE) == pytest.approx((8 + 4 + 2) / 0.5 + 0.01)


def test_guessed_rates_grow_with_the_machine() -> None:
    small, large = guessed_rates(2, (), None), guessed_rates(8, ("AVX-512", "AMX-BF16"), None)
    assert large.matrix["float32"] > 4 * small.matrix["float32"] and large.matrix["bfloat16"] > small.matrix["bfloat16"]
    assert guessed_rates(8, (), (9, 0)).matrix["bfloat16"] > guessed_rates(8, (), (8, 9)).matrix["bfloat16"]
    assert not small.measured


# ---------------------------------------------------------------- what earlier runs teach


def run(seconds: float, *, raw: float = 10.0, kind: str = "a", peak: float = 100.0) -> Seen:
    return Seen(kind=kind, stages={"denoise": (raw, seconds)}, memory=(100.0, peak))


def test_without_earlier_runs_nothing_is_corrected() -> None:
    assert learned((), "denoise", "a", 10.0) == (1.0, 0)
    assert learned([run(20.0)], "decode", "a", 10.0) == (1.0, 0)


def test_the_median_of_runs_corrects_and_odd_ones_do_not_count() -> None:
    seen = [run(13.0), run(14.0), run(500.0), run(15.0), run(0.01)]
    assert learned(seen, "denoise", "a", 10.0) == (1.4, 5)


def test_runs_of_the_same_kind_and_about_the_same_length_are_asked() -> None:
    seen = [run(20.0, kind="b"), *(run(raw * 3, raw=raw) for raw in (1000.0, 1100.0)), *(run(15.0) for _ in range(9))]
    assert learned(seen, "denoise", "a", 10.0) == (1.5, NEAREST)
    assert learned(seen[:3], "denoise", "a", 900.0) == (3.0, 2)
    assert learned(seen[:1], "denoise", "a", 10.0) == (2.0, 1)  # another kind is better than none
    assert learned(seen[:1], "denoise", "a", 1000.0) == (1.0, 0)  # but not at another length


def test_a_correction_has_bounds() -> None:
    assert learned([run(1e9)], "denoise", "a", 10.0) == (BOUNDS[1], 1)
    assert learned([run(1e-9)], "denoise", "a", 10.0) == (BOUNDS[0], 1)


def test_memory_is_corrected_upwards_only_and_at_most_by_half() -> None:
    assert learned_bytes([run(1.0, peak=p) for p in (90.0, 120.0, 130.0)], "a", 100) == 20
    assert learned_bytes([run(1.0, peak=50.0)], "a", 100) == 0
    assert learned_bytes([run(1.0, peak=900.0)], "a", 100) == 50
    assert learned_bytes([run(1.0, peak=120.0, kind="b")], "a", 100) == 0


# ---------------------------------------------------------------- the meter


@dataclass(frozen=True)
class Said:
    stage: str
    seconds: float


def test_the_seconds_between_two_stages_belong_to_the_first_but_before_denoising_to_encoding() -> None:
    meter = Meter()
    told = [
        ("encode", 0.5), ("encode", 1.0), ("sound", 0.1), ("sound", 2.0), ("denoise", 0.25), ("denoise", 4.0),
        ("decode", 0.125), ("decode", 8.0), ("denoise", 16.0), ("denoise", 32.0), ("decode", 64.0), ("done", 128.0),
    ]  # fmt: skip
    for stage, seconds in told:
        meter.hear(Said(stage, seconds))
    assert meter.seconds == {
        "encode": 0.5 + 1.0 + 0.1 + 0.25 + 16.0, "sound": 2.0, "denoise": 4.0 + 0.125 + 32.0 + 64.0,
        "decode": 8.0 + 128.0,
    }  # fmt: skip


# ---------------------------------------------------------------- files


def record(seconds: float = 15.0) -> Record:
    return Record(kind="a", estimated={"denoise": 10.0}, seconds={"denoise": seconds}, need=100, peak=120)


def test_what_was_kept_is_read_in_order_and_other_machines_and_rates_are_not() -> None:
    for seconds in (11.0, 12.0, 13.0):
        records.keep(record(seconds), KEY, RATE)
    records.keep(record(99.0), "f" * 16, RATE)
    records.keep(record(98.0), KEY, replace(RATE, conv=1.0))
    seen = records.read(KEY, RATE)
    assert [one.stages["denoise"] for one in seen] == [(10.0, 11.0), (10.0, 12.0), (10.0, 13.0)]
    assert seen[0].kind == "a" and seen[0].memory == (100.0, 120.0)
    assert store.sizes()["runs"][0] == 5


DAMAGED = {
    "nothing": b"", "half": b'{"format": 1, "kind"', "no json": b"\xff\xfe\x00", "a list": b"[1]", "a number": b"7",
    "other format": b'{"format": 2}', "no stages": b'{"format": 1, "kind": "a", "need": 1, "peak": 1}',
    "deep": b"[" * 12000, "long": b'"' + b"a" * LARGEST + b'"',
    "text": b'{"format":1,"kind":"a","estimated":{"denoise":"x"},"seconds":{"denoise":1},"need":1,"peak":1}',
    "nan": b'{"format":1,"kind":"a","estimated":{"denoise":NaN},"seconds":{"denoise":1},"need":1,"peak":1}',
    "negative": b'{"format":1,"kind":"a","estimated":{"denoise":1},"seconds":{"denoise":-1},"need":1,"peak":1}',
    "stages of a list": b'{"format":1,"kind":"a","estimated":[1],"seconds":{},"need":1,"peak":1}',
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_record_is_left_out_with_a_warning(name: str, cache: Path) -> None:
    records.keep(record(), KEY, RATE)
    whole = next((cache / "runs").iterdir())
    bad = whole.with_name(f"{records.name_of(KEY, RATE)}-{0:020d}-1.json")
    bad.write_bytes(DAMAGED[name])
    with pytest.warns(WanloomWarning, match="W5007"):
        seen = records.read(KEY, RATE)
    assert len(seen) == 1 and seen[0].stages == {"denoise": (10.0, 15.0)}


def test_a_foreign_file_or_folder_among_the_records_is_no_matter(cache: Path) -> None:
    records.keep(record(), KEY, RATE)
    (cache / "runs" / "notes.txt").write_text("mine")
    (cache / "runs" / f"{records.name_of(KEY, RATE)}-folder.json").mkdir()
    with pytest.warns(WanloomWarning, match="W5007"):
        assert len(records.read(KEY, RATE)) == 1


def test_a_cache_that_cannot_be_written_costs_a_warning(cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("in the way")
    with pytest.warns(WanloomWarning, match="W5006"):
        records.keep(record(), KEY, RATE)
    assert records.read(KEY, RATE) == ()


def test_old_records_go_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count(10**18)
    monkeypatch.setattr(records.time, "time_ns", lambda: next(ticks))
    size = len(record(1.0).to_json())
    monkeypatch.setattr(records, "RUNS", replace(records.RUNS, limit=4 * size + size // 2))
    for number in range(8):
        records.keep(record(float(number + 1)), KEY, RATE)
        for age, file in enumerate(sorted((cache / "runs").iterdir(), reverse=True)):
            os.utime(file, (10**9 - age, 10**9 - age))
    assert [one.stages["denoise"][1] for one in records.read(KEY, RATE)] == [5.0, 6.0, 7.0, 8.0]


def _keep_some(number: int) -> None:
    for index in range(20):
        records.keep(record(1.0 + number * 20 + index), KEY, RATE)


def test_runs_side_by_side_lose_nothing(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_keep_some, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = records.read(KEY, RATE)
    assert sorted(one.stages["denoise"][1] for one in seen) == [float(number) for number in range(1, 61)]


# ---------------------------------------------------------------- rates


def test_measured_rates_are_read_again_and_belong_to_a_device_and_its_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not read_rates("cpu").measured
    keep_rates(RATE, "cpu")
    again = read_rates("cpu")
    assert again == RATE and again.measured
    key = device_key("cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "31")
    device_key.cache_clear()
    assert device_key("cpu") != key and not read_rates("cpu").measured
    device_key.cache_clear()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', RATE.to_json().replace("0.01", "-1").replace("1e-05", "0")]
)
def test_damaged_rates_are_left_out_with_a_warning(text: str) -> None:
    RATES.open()
    RATES.path(device_key("cpu")).write_text(text)
    with pytest.warns(WanloomWarning, match="W5007"):
        assert not read_rates("cpu").measured
    assert json.loads(RATE.to_json())["format"] == 1
