"""Options of several processes: what they mean, and what is refused before anything is loaded (rows B028 to B032)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from command_line import run_process, start
from wanloom import media
from wanloom.cli.several import ALONE, Several, read_place, read_several
from wanloom.errors import InputError
from wanloom.jobs import read_record
from wanloom.plan import make_plan
from wanloom.request import Request
from wanloom.runtime import machine
from wanloom.runtime.layouts import Layout, Place
from wanloom.runtime.machine import Gpu
from wanloom.shares import held_bytes
from wanloom.variants import VARIANTS

MODEL = "t2v-1.3B"
SHORT = ("--size", "64x64", "--frames", "5", "--steps", "2", "--seed", "1", "--prompt", "a cat runs")
TORCHRUN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"), MODEL)


def several(**given: Any) -> Several:
    return Several(Place(0, given.pop("world", 2)), **given)


# ---------------------------------------------------------------- reading


def test_without_options_and_torchrun_a_run_is_alone() -> None:
    assert read_several({}, {}) == ALONE
    assert read_several({"gpus": "1"}, {"RANK": "0", "WORLD_SIZE": "1", **TORCHRUN}) == ALONE


def test_torchrun_says_which_process_this_is() -> None:
    environment = {**TORCHRUN, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert read_place(environment) == (Place(5, 8, 1), 4)
    assert read_place({**environment, "WANLOOM_CREW": "/x"})[0] == Place(5, 8, 1, Path("/x"))


def test_options_are_read_and_taken_out() -> None:
    params: dict[str, Any] = {"gpus": "4", "ulysses_size": "2", "cfg_parallel": "1", "dit_fsdp": "true", "seed": "1"}
    found = read_several(params, {})
    assert params == {"seed": "1"}
    assert (found.world, found.local, found.start) == (4, 4, 4)
    assert found.sizes == {"ulysses": 2, "cfg": 1}
    assert found.cut == ("dit",)
    assert read_several({"t5_fsdp": "False", "ring_size": "1"}, {}) == Several(sizes={"ring": 1})
    assert read_several({"gpus": "2", "vae_parallel": "off"}, {}).vae_parallel is False
    assert found.vae_parallel is None


@pytest.mark.parametrize(
    ("params", "environment", "code"),
    [
        ({"gpus": "two"}, {}, "E2018"),
        ({"gpus": "0"}, {}, "E2018"),
        ({"gpus": "65"}, {}, "E2018"),
        ({"ulysses_size": "-1"}, {}, "E2018"),
        ({"ring_size": "1.5"}, {}, "E2018"),
        ({"dit_fsdp": "perhaps"}, {}, "E2022"),
        ({"vae_parallel": "perhaps"}, {}, "E2022"),
        ({"gpus": "2"}, {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "2"}, "E2023"),
        ({}, {"RANK": "foo", "WORLD_SIZE": "2", **TORCHRUN}, "E8001"),
        ({}, {"RANK": "0", "WORLD_SIZE": "0", **TORCHRUN}, "E8001"),
        ({}, {"RANK": "2", "WORLD_SIZE": "2", **TORCHRUN}, "E8001"),
        ({}, {"RANK": "-1", "WORLD_SIZE": "2", **TORCHRUN}, "E8001"),
        ({}, {"RANK": "0", **TORCHRUN}, "E8001"),
        ({}, {"WORLD_SIZE": "2", **TORCHRUN}, "E8001"),
        ({}, {"RANK": "0", "WORLD_SIZE": "2"}, "E8001"),
        ({}, {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "E8001"),
        ({}, {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3"}, "E8001"),
    ],
)
def test_numbers_that_cannot_be_are_refused(params: dict[str, Any], environment: dict[str, str], code: str) -> None:
    with pytest.raises(InputError) as error:
        read_several(params, environment)
    assert error.value.code == code


# ---------------------------------------------------------------- what goes together


def layout(company: Several, name: str = "t2v-A14B", *, on_gpu: bool = False, **fields: Any) -> Layout:
    row = VARIANTS[name]
    request = Request(prompt="a cat", **fields)
    return company.layout(request, row, make_plan(request, row), on_gpu=on_gpu)


def test_the_layout_is_chosen_from_processes_heads_and_guidance() -> None:
    assert layout(ALONE) == Layout()
    assert layout(several(world=8)) == Layout(2, 1, 4)
    assert layout(several(world=8), guidance=1.0) == Layout(1, 1, 8)
    assert layout(several(world=8, sizes={"ulysses": 8})) == Layout(1, 1, 8)  # as the official command is told
    assert layout(several(world=8, cut=("dit", "text"), sizes={"ring": 2})) == Layout(2, 2, 2)


@pytest.mark.parametrize(
    ("company", "fields", "code", "said"),
    [
        (several(world=3, sizes={"ulysses": 3}), {}, "E2018", "does not divide the 40 heads"),
        (several(world=4, sizes={"ulysses": 3}), {}, "E2018", "does not make 4 processes"),
        (several(sizes={"cfg": 2}), {"guidance": 1.0}, "E2018", "is off"),
        (Several(sizes={"ulysses": 2}), {}, "E2018", "this is one process"),
        (Several(sizes={"cfg": 2}), {}, "E2018", "this is one process"),
        (Several(cut=("dit",)), {}, "E2019", "this is one process"),
        (Several(cut=("text",)), {}, "E2019", "this is one process"),
        (Several(vae_parallel=True), {}, "E2023", "vae_parallel: this is one process"),
        (several(cut=("dit",)), {"quantise": "int8"}, "E2019", "--quantise"),
        (several(cut=("dit",)), {"resident_blocks": 2}, "E2019", "--resident-blocks"),
        (several(cut=("text",)), {"t5_cpu": True}, "E2019", "--t5-cpu"),
        (several(cut=("text",)), {"quantise": "int8"}, "E2019", "--quantise"),
        (several(), {"cache": "easycache"}, "E2023", "one process"),
        (several(), {"compile": True}, "E2023", "one process"),
        (several(), {"guidance_batch": "auto"}, "E2023", "one process"),
        (several(), {"device": "cuda:1"}, "E2023", "one each"),
        (several(sizes={"ring": 2, "cfg": 1}), {"attention": "plain"}, "E2023", "--ring-size 1"),
    ],
)
def test_what_does_not_go_together_is_refused(company: Several, fields: dict[str, Any], code: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        layout(company, **fields)
    assert error.value.code == code


def test_weights_that_are_cut_wear_no_lora() -> None:
    with pytest.raises(InputError, match="dit_fsdp: conflicts with --use-relighting-lora") as error:
        several(cut=("dit",))._refuse_cuts(Request(use_relighting_lora=True))
    assert error.value.code == "E2019"
    several(cut=("text",))._refuse_cuts(Request(use_relighting_lora=True))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: (Gpu(0, "GPU", 2**36, 2**36, (9, 0)),) * 3)
    assert layout(several(world=8, local=3), on_gpu=True).world == 8  # on three machines, say
    with pytest.raises(InputError, match="4 processes need 4 GPUs, 3 are here") as error:
        layout(several(world=4, local=4), on_gpu=True)
    assert error.value.code == "E8003"


def test_cut_weights_take_a_share_and_what_is_whole() -> None:
    row = VARIANTS["t2v-A14B"]
    whole, half, eighth = (held_bytes(row, "bfloat16", {"dit": n, "text": n}) for n in (1, 2, 8))
    assert whole["dit"] == 2 * 14_288_491_584
    assert 0.5 * whole["dit"] < half["dit"] < 0.6 * whole["dit"]
    assert 0.125 * whole["dit"] < eighth["dit"] < 0.22 * whole["dit"]
    embedding = 2 * row.text.vocab * row.text.dim
    assert 0.125 * whole["text"] + embedding < eighth["text"] < 0.2 * whole["text"] + embedding


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--ulysses_size", "2"], "E2018"),
        (["--gpus", "3", "--device", "cpu", "--ulysses_size", "3"], "E2018"),
        (["--gpus", "4", "--device", "cpu", "--ulysses-size", "2", "--ring-size", "3"], "E2018"),
        (["--dit_fsdp"], "E2019"),
        (["--t5_fsdp", "True"], "E2019"),
        (["--gpus", "2", "--device", "cpu", "--dit-fsdp", "--quantise", "int8"], "E2019"),
        (["--gpus", "2", "--device", "cpu", "--cache", "easycache"], "E2023"),
    ],
)
def test_a_wrong_combination_is_said_within_two_seconds(run: Any, model: Path, words: list[str], code: str) -> None:
    run("generate", "--ckpt-dir", model, "--task", MODEL, *SHORT, "--dry-run")  # modules are there
    before, started = set(sys.modules), time.process_time()
    ran = run("generate", "--ckpt-dir", model, "--task", MODEL, *SHORT, *words, "--dry-run")
    assert ran.err.splitlines()[-1].startswith(f"error[{code}]"), ran.err
    assert ran.code == 2
    assert time.process_time() - started < 2
    assert "wanloom.together" not in set(sys.modules) - before


def test_gpus_without_a_gpu_name_the_way_without(run: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", tuple)
    words = ("generate", "--ckpt-dir", model, "--task", MODEL, *SHORT, "--gpus", "2")
    ran = run(*words)
    assert ran.code == 8
    assert "error[E8002]" in ran.err and "--device cpu" in ran.err
    gpu = Gpu(0, "GPU", 2**36, 2**36, (9, 0))
    monkeypatch.setattr(machine, "gpus", lambda: (gpu,))
    monkeypatch.setattr("wanloom.cli.supervise.torch_has_gpu_build", lambda: True)
    ran = run(*words)
    assert ran.code == 8
    assert "error[E8003]: 2 processes need 2 GPUs, 1 are here" in ran.err


def test_odd_numbers_of_a_launcher_are_said(run: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "foo")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = run("generate", "--ckpt-dir", model, "--task", MODEL, *SHORT)
    assert ran.code == 8
    assert "error[E8001]: RANK: got 'foo' in the environment, expected 0..1." in ran.err
    assert run("models").code == 0  # which has no use for them


def test_a_dry_run_of_several_prints_the_plan_of_one(run: Any, model: Path) -> None:
    words = ("generate", "--ckpt-dir", model, "--task", MODEL, *SHORT, "--dry-run")
    alone = run(*words)
    assert alone.code == 0, alone.err
    assert run(*words, "--gpus", "2", "--device", "cpu").out == alone.out


def test_other_commands_say_where_several_processes_are(run: Any, model: Path) -> None:
    ran = run("plan", "--ckpt-dir", model, "--task", MODEL, "--ulysses_size", "8")
    assert ran.code == 2
    assert "Several processes are for `wanloom generate`" in ran.err


# ---------------------------------------------------------------- two processes, from the command to the file


def frames(path: Path) -> Any:
    return media.read_video(path)[0].astype(int)


def test_a_process_that_dies_ends_all_and_two_others_finish_the_video_of_one(
    process: Any, run: Any, model: Path, tmp_path: Path
) -> None:
    words = ("generate", "--ckpt-dir", model, "--task", MODEL, *SHORT, "--device", "cpu")
    two = ("--gpus", "2", "--dit_fsdp")
    ran = process(*words, *two, "--out", "a.png", WANLOOM_FAILPOINT="order:7")  # the second step, of process 1 alone
    assert ran.code == 7, ran.err
    assert "warning[W7002]: process 1 of 2 was killed by signal 9." in ran.err
    assert "error[E7002]: another process of this run is gone." in ran.err
    assert "Continue: wanloom generate --resume" in ran.err
    assert read_record(tmp_path / "a.job").machine["processes"] == "guidance 2 x ring 1 x Ulysses 1"
    assert (tmp_path / "a.job" / "state-0001.safetensors").is_file()
    again = process("generate", "--resume", "a.job", *two)
    assert again.code == 0, again.err
    assert again.out.count("2 processes: guidance 2 x ring 1 x Ulysses 1") == 1
    assert again.out.count("resuming at step 2 of 2") == 1
    assert again.out.count("saved a.png") == 1
    assert run(*words, "--out", "b.png").code == 0
    assert abs(frames(tmp_path / "a.png") - frames(tmp_path / "b.png")).max() <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.matrix
def test_a_process_that_dies_in_decoding_ends_all_and_the_latents_are_there(
    process: Any, run: Any, model: Path, tmp_path: Path
) -> None:
    words = ("generate", "--ckpt-dir", model, "--task", MODEL, *SHORT, "--device", "cpu")
    ran = process(*words, "--gpus", "2", "--out", "a.png", WANLOOM_FAILPOINT="order piece:2")
    assert ran.code == 7, ran.err
    assert "warning[W7002]: process 1 of 2 was killed by signal 9." in ran.err
    assert "error[E7002]: another process of this run is gone." in ran.err
    assert (tmp_path / "a.job" / "latents.safetensors").is_file()
    again = process("generate", "--resume", "a.job", "--gpus", "2", "--vae-rows", "16")
    assert again.code == 2  # a job knows what it was asked for
    again = process("generate", "--resume", "a.job", "--gpus", "2")
    assert again.code == 0, again.err
    assert again.out.count("denoising was done before") == 1
    for name, more in (("b.png", ()), ("c.png", ("--gpus", "2", "--vae-parallel", "off"))):
        ran = process(*words, *more, "--out", name)
        assert ran.code == 0, ran.err
        assert abs(frames(tmp_path / "a.png") - frames(tmp_path / name)).max() <= 1


OUT_OF_MEMORY = """
import sys, torch
from wanloom.cli import main
from wanloom.runtime import neighbours

right, calls = neighbours.SharedAttention.forward, []

def full(*given):
    calls.append(1)
    if len(calls) == 2:
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
    return right(*given)

neighbours.SharedAttention.forward = full
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.matrix
@pytest.mark.parametrize("short", [0, 1])
def test_where_memory_runs_out_in_decoding_the_first_goes_on_alone(
    run: Any, model: Path, tmp_path: Path, short: int
) -> None:
    words = ("generate", "--ckpt-dir", model, "--task", MODEL, *SHORT, "--device", "cpu", "--out", "a.png")
    (tmp_path / "crew").mkdir()
    place = {"WORLD_SIZE": "2", "WANLOOM_CREW": str(tmp_path / "crew")}
    programs = [("-c", OUT_OF_MEMORY) if rank == short else ("-m", "wanloom") for rank in range(2)]
    started = [
        start(tmp_path, *words, program=program, RANK=str(rank), **place) for rank, program in enumerate(programs)
    ]
    said = [running.communicate(timeout=300)[1] for running in started]
    if short == 0:
        assert started[0].returncode == 0, said
        assert "warning[W5008]: memory ran out in decoding; it goes on: by the first process alone." in said[0]
    else:
        assert [running.returncode for running in started] == [7, 5], said
        assert "error[E5007]: process 1: memory: it ran out" in said[1] and "--vae-parallel off" in said[1]
        again = run("generate", "--resume", "a.job")
        assert again.code == 0, again.err
    assert run(*words[:-1], "b.png").code == 0
    assert abs(frames(tmp_path / "a.png") - frames(tmp_path / "b.png")).max() <= 1


@pytest.mark.matrix
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_hangs_ends_all_and_one_goes_on(model: Path, tmp_path: Path, run: Any, stopped: int) -> None:
    words = ("generate", "--ckpt-dir", model, "--task", MODEL, *SHORT[:4], *SHORT[6:], "--device", "cpu")
    words = (*words, "--steps", "900", "--save-every", "1", "--out", "a.png")
    with start(tmp_path, *words, "--gpus", "2", WANLOOM_PATIENCE="60") as running:
        wait_for_state(running, tmp_path / "a.job")
        os.kill(rank_of(running.pid, stopped), signal.SIGSTOP)
        err = running.communicate(timeout=300)[1]
    assert running.returncode == 7, err
    assert "did anything for" in err or "is gone" in err
    assert "Continue: wanloom generate --resume" in err
    again = run("generate", "--resume", "a.job")
    assert again.code == 0, again.err
    assert "begun by another number of processes" in again.out and "resuming at step" in again.out


@pytest.mark.matrix
@pytest.mark.parametrize("world", [2, 3])
def test_torchrun_starts_them_too_and_ctrl_c_saves(model: Path, tmp_path: Path, run: Any, world: int) -> None:
    program = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "-m", "wanloom")
    words = ("generate", "--ckpt-dir", model, "--task", MODEL, *SHORT, "--device", "cpu", "--out", "a.png")
    ran = run_process(tmp_path, *words, program=program)
    assert ran.code == 0, ran.err
    assert ran.out.count("saved a.png") == 1
    assert run(*words[:-1], "b.png").code == 0
    assert abs(frames(tmp_path / "a.png") - frames(tmp_path / "b.png")).max() <= 1
    words = (*words[:5], *SHORT[:4], *SHORT[6:], "--steps", "900", "--save-every", "1", "--device", "cpu")
    with start(tmp_path, *words, "--out", "c.png", program=program) as running:
        wait_for_state(running, tmp_path / "c.job")
        running.send_signal(signal.SIGINT)
        err = running.communicate(timeout=300)[1]
    assert running.returncode != 0
    assert "Continue: wanloom generate --resume" in err
    assert (tmp_path / "c.job" / "plan.json").is_file()


def wait_for_state(running: subprocess.Popen[str], job: Path) -> None:
    """Until a step is on disk."""
    while not list(job.glob("state-*.safetensors")):
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.05)


def rank_of(parent: int, rank: int) -> int:
    """The process of this rank among those that a process has started."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise LookupError(rank)
