"""`wanloom plan`: the need of a run beside what a machine has."""

from __future__ import annotations

import json

import pytest

from wanloom.cli import room
from wanloom.plan import make_plan
from wanloom.rates import Rates, keep_rates
from wanloom.request import Request
from wanloom.runtime.machine import Gpu
from wanloom.variants import VARIANTS

GB = 10**9
STAGES = ("encode", "denoise", "decode")
PIECES = "--row-chunks 4096 --vae-rows 64"


@pytest.fixture
def computer(monkeypatch, tmp_path):
    """`computer(memory=..., disk=..., gpu=...)`: a machine with that much free, in GB; gpu 0: none.

    It knows nothing of earlier runs.
    """
    monkeypatch.setenv("WANLOOM_CACHE", str(tmp_path / "no runs yet"))

    def build(memory: float = 1000, disk: float = 1000, gpu: float = 0) -> None:
        cards = (Gpu(0, "Test GPU", int(gpu * GB), int(gpu * GB), (9, 0)),) if gpu else ()
        monkeypatch.setattr(room.machine, "memory", lambda: (int(memory * GB), int(memory * GB)))
        monkeypatch.setattr(room.machine, "disk_free", lambda path: int(disk * GB))
        monkeypatch.setattr(room.machine, "gpus", lambda: cards)
        monkeypatch.setattr(room, "torch_has_gpu_build", lambda: bool(gpu))

    return build


def test_a_large_machine_fits_and_exits_0(run, computer):
    computer()
    ran = run("plan", "t2v-A14B")
    assert ran.code == 0
    assert "It fits." in ran.out


@pytest.mark.parametrize(
    ("has", "short"), [({"memory": 18}, "memory"), ({"disk": 50}, "disk"), ({"gpu": 16, "memory": 100}, "GPU")]
)
def test_what_does_not_fit_is_named_and_exits_5(run, computer, has, short):
    computer(**has)
    ran = run("plan", "t2v-A14B")
    assert ran.code == 5
    assert f"It does not fit. {short}: " in ran.out


@pytest.mark.parametrize(
    ("asked", "memory", "words"),
    [
        (("t2v-A14B",), 18.5, f"t2v-A14B --size 1280x720 --frames 81 --dtype float32 {PIECES}"),
        (("t2v-A14B",), 11, "t2v-A14B --size 1280x720 --frames 33 --dtype float32 --vae-dtype bfloat16"),
        (("t2v-A14B",), 3, "demo-t2v"),
        (("t2v-A14B", "--resident-blocks", 39), 45, "t2v-A14B --size 1280x720 --frames 81 --dtype float32"),
        (("t2v-A14B", "--offload-model", "false"), 45, "t2v-A14B --size 1280x720 --frames 81 --dtype float32"),
        (("s2v-14B",), 25, f"s2v-14B --size 1024x704 --dtype float32 {PIECES}"),
        (("animate-14B", "--frames", 33), 10, "animate-14B --size 480x832 --frames 33 --dtype bfloat16"),
    ],
)  # fmt: skip
def test_what_would_fit_instead_is_named_cheapest_first_and_does(run, computer, asked, memory, words):
    computer(memory=memory)
    ran = run("plan", *asked)
    assert ran.code == 5
    offers = [line.partition(": wanloom ")[2].split() for line in ran.out.splitlines() if ": wanloom " in line]
    assert offers[0] == ["plan", *words.split()]
    assert 1 <= len(offers) <= 3 and len(set(map(tuple, offers))) == len(offers)
    assert all(run(*offer).code == 0 for offer in offers)


@pytest.mark.parametrize(
    ("has", "said"),
    [
        ({"memory": 45}, "placement: 18 of 40 blocks stay, the others are streamed"),
        ({"memory": 20}, "placement: 0 of 40 blocks stay, the others are streamed, the text encoder is streamed"),
        ({"memory": 100}, "placement: parts come and go"),
        ({"memory": 100, "gpu": 24}, "placement: 17 of 40 blocks stay, the others are streamed"),
        ({"memory": 100, "gpu": 80}, "placement: parts come and go"),
    ],
)
def test_what_does_not_fit_whole_is_streamed_and_said(run, computer, has, said):
    computer(**has)
    ran = run("plan", "t2v-A14B")
    assert ran.code == 0
    assert said in ran.out.splitlines()


def test_the_time_is_that_of_guessed_rates_until_somebody_measures(run, computer, tmp_path, monkeypatch):
    monkeypatch.setenv("WANLOOM_CACHE", str(tmp_path / "cache"))
    computer()
    guessed = json.loads(run("plan", "t2v-1.3B", "--json").out)
    assert guessed["calibrated"] is False and guessed["earlier_runs"] == 0
    assert guessed["seconds"]["total"] == pytest.approx(sum(guessed["seconds"][name] for name in STAGES))
    assert "(uncalibrated)" in run("plan", "t2v-1.3B").out
    fast = Rates(
        matrix={"float32": 1e15, "bfloat16": 1e15}, attention={"float32": 1e15, "bfloat16": 1e15}, conv=1e15, copy=1e12,
        disk=1e12, call=1e-9,
    )  # fmt: skip
    keep_rates(fast, "cpu")
    measured = json.loads(run("plan", "t2v-1.3B", "--json").out)
    assert measured["calibrated"] is True and measured["seconds"]["total"] < 200 < guessed["seconds"]["total"]
    assert "(calibrated)" in run("plan", "t2v-1.3B").out


def test_clips_are_said_and_take_no_more_gpu_memory(run, computer):
    computer(gpu=100)
    two, three = (json.loads(run("plan", "s2v-14B", "--num-clips", n, "--json").out)["need"] for n in (2, 3))
    assert "237 frames in 3 clips at 16 fps" in run("plan", "s2v-14B", "--num-clips", 3).out
    assert two["gpu"] == three["gpu"] and 1.4 < three["flops"] / two["flops"] < 1.6


def test_a_checkpoint_that_is_here_is_not_counted_as_a_download(run, computer):
    computer(disk=50)
    assert run("plan", "t2v-A14B").code == 5
    assert run("plan", "t2v-A14B", "--ckpt-dir", "here").code == 0


def test_numbers_are_those_of_the_budget(run, computer):
    from wanloom import budget

    computer(memory=40)  # not so much that everything may stay
    facts = json.loads(run("plan", "t2v-1.3B", "--frames", "33", "--dtype", "bfloat16", "--json").out)
    row = VARIANTS["t2v-1.3B"]
    plan = make_plan(Request(task="t2v-1.3B", frames=33), row, draft=True)
    need = budget.need(plan, row, "bfloat16")
    assert facts["need"]["host"] == need.host
    assert facts["need"]["flops"] == need.flops
    assert facts["checkpoint_bytes"] == sum(file.bytes for file in row.files)
    assert facts["fits"] is True


def test_a_gpu_is_used_when_torch_can_and_nobody_says_otherwise(run, computer):
    computer(gpu=80, memory=200)
    assert json.loads(run("plan", "--json").out)["on"] == "gpu"
    assert json.loads(run("plan", "--device", "cpu", "--json").out)["on"] == "cpu"


def test_an_alias_of_an_option_is_the_option(run, computer):
    computer()
    by_alias = json.loads(run("plan", "--sample_steps", "4", "--frame_num", "5", "--base_seed", "1", "--json").out)
    by_name = json.loads(run("plan", "--steps", "4", "--frames", "5", "--seed", "1", "--json").out)
    assert by_alias["plan"] == by_name["plan"]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_can_be_planned(run, computer, name):
    computer()
    assert run("plan", name).code == 0


def test_two_names_for_the_model_conflict(run):
    ran = run("plan", "t2v-14B", "--task", "i2v-14B")
    assert ran.code == 2
    assert ran.err.startswith("error[E2023]")
