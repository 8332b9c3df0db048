"""Bad input that only a run can find, and runs that are stopped, continued wrongly, or changed under their feet."""

from __future__ import annotations

import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import SHARD, SHORT, SMALL, T2V, check_refusal, edit

from command_line import run_process, start


def long_run(models: Path, *words: object) -> tuple[object, ...]:
    """A command line whose file is a.mp4."""
    return "generate", "--ckpt-dir", models / T2V, *SHORT, "--prompt", "a cat runs", "--out", "a.mp4", *words


def test_b074_weights_that_are_not_finite_are_found_while_loading(model, run, here):
    folder = model(SMALL)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.1.ffn.0.weight"][0, 0] = float("nan")

    edit(folder / SHARD, spoil)
    ran = run("generate", "--task", SMALL, "--ckpt-dir", folder, *SHORT, "--prompt", "x", "--out", "a.mp4")
    check_refusal(ran, "E4010")
    assert "tensor blocks.1.ffn.0.weight: 1 of" in ran.err
    assert not (here / "a.mp4").exists()


def test_b075_one_flipped_bit_in_a_file_whose_hash_is_recorded(model, run, here):
    from wanloom.checkpoint import manifest

    folder = model(SMALL)
    manifest.write(folder, [folder / SHARD])
    data = bytearray((folder / SHARD).read_bytes())
    data[-2] ^= 1
    (folder / SHARD).write_bytes(data)
    ran = run("generate", "--task", SMALL, "--ckpt-dir", folder, *SHORT, "--prompt", "x", "--out", "a.mp4")
    check_refusal(ran, "E4011")
    assert SHARD in ran.err
    assert not (here / "a.mp4").exists()


@pytest.mark.parametrize("kind", ["removed", "swapped"])
def test_b096_a_file_that_changes_while_it_is_loaded(kind, model, run, monkeypatch):
    from wanloom.checkpoint import load

    folder = model(SMALL)
    file, read, once = folder / SHARD, load.read_entry, threading.Lock()

    def read_and_change(one: Any) -> torch.Tensor:
        value = read(one)
        if one.file == file and once.acquire(blocking=False):  # several threads read
            data = file.read_bytes()
            if kind == "removed":
                file.unlink()
            else:
                file.with_suffix(".new").write_bytes(data + b"\0")
                file.with_suffix(".new").replace(file)
        return value

    monkeypatch.setattr(load, "read_entry", read_and_change)
    ran = run("generate", "--task", SMALL, "--ckpt-dir", folder, *SHORT, "--prompt", "x", "--out", "a.mp4")
    check_refusal(ran, "E4001" if kind == "removed" else "E4011")


@pytest.fixture(scope="session")
def killed(models, tmp_path_factory) -> Path:
    """The folder of a run that was killed after its first step; not to be changed."""
    folder = tmp_path_factory.mktemp("killed")
    ran = run_process(folder, *long_run(models, "--save-every", 1), WANLOOM_FAILPOINT="state")
    assert ran.code == -signal.SIGKILL, ran.err
    return folder / "a.job"


@pytest.fixture
def unfinished(killed, here) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed, here / "a.job"))


def test_b035_resuming_something_else_changes_nothing(unfinished, models, run, here):
    before = {file.name: file.read_bytes() for file in unfinished.iterdir()}
    for words, field in ((("--prompt", "a dog"), "prompt"), (("--steps", "3"), "steps"), (("--seed", "5"), "seed")):
        ran = run("generate", "--resume", unfinished, *words)
        check_refusal(ran, "E2020")
        assert field in ran.err
    swapped = run("generate", "--resume", unfinished, "--task", SMALL, "--ckpt-dir", models / SMALL)
    check_refusal(swapped, "E2020")
    after = {file.name: file.read_bytes() for file in unfinished.iterdir()}
    assert {name: data for name, data in after.items() if name != "lock"} == {
        name: data for name, data in before.items() if name != "lock"
    }
    assert not (here / "a.mp4").exists()
    ran = run("generate", "--resume", here / "nothing.job")
    check_refusal(ran, "E2020")


def test_b036_resuming_what_another_process_works_on(unfinished, run):
    import fcntl

    with (unfinished / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("4242\n")
        lock.flush()
        ran = run("generate", "--resume", unfinished)
    check_refusal(ran, "E2021")
    assert "in use by process 4242" in ran.err


@pytest.mark.parametrize("times", [1, 2])
def test_b040_ctrl_c_once_keeps_the_work_twice_stops_at_once(times, models, run, here, monkeypatch):
    passed = []

    def strike(point: str) -> None:
        passed.append(point)
        if (passed.count("step") == 2 and point == "step") or (point == "state" and times == 2):
            signal.raise_signal(signal.SIGINT)  # in the second step, and again while that is being saved

    monkeypatch.setattr("wanloom.pipeline.failpoint", strike)
    monkeypatch.setattr("wanloom.jobs.failpoint", strike)
    ran = run(*long_run(models))
    if times == 2:
        assert (ran.code, ran.err.splitlines()[-1]) == (130, "stopped.")
        return
    check_refusal(ran, "E7001")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    command = re.search(r"Continue: wanloom (generate --resume \S+)", ran.err)
    assert command
    again = run(*command[1].split())
    assert again.code == 0, again.err
    assert "resuming at step 2 of 2" in again.out
    assert (here / "a.mp4").is_file()


def test_b040_by_a_real_signal(models, here):
    words = [1000 if word == "2" else word for word in long_run(models)]
    with start(here, *words) as process:
        for line in process.stdout:
            if line.startswith("denoise "):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 7, err
    assert "Continue: wanloom generate --resume" in err
    assert (here / "a.job" / "plan.json").is_file()
