"""The job folder: what is saved when, who may work there, and what a damaged or foreign one says."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wanloom import jobs
from wanloom.errors import InputError, Interrupted, NumericalError, WanloomWarning
from wanloom.jobs import Record, State, open_job
from wanloom.plan import make_plan
from wanloom.request import Request, request_from_text
from wanloom.variants import VARIANTS

STEPS = 40


def record(**changes: Any) -> Record:
    request = Request(prompt="a cat", seed=3, steps=STEPS)
    whole = Record(
        plan=make_plan(request, VARIANTS["t2v-A14B"]),
        seeds=(3,),
        outputs=("a.mp4",),
        request=jobs.request_texts(request),
        precision={"dit": "float32", "vae": "float32"},
        weights={"dit high_noise_model": "1" * 32, "vae": "2" * 32},
        machine={"torch": "2.13", "threads": "2"},
    )
    return replace(whole, **changes)


def state(done: int) -> State:
    return State(done, ({"x": torch.full((2, 3), float(done)), "anchor": torch.ones(2, dtype=torch.bfloat16)},))


def start(folder: Path, **options: Any) -> jobs.Job:
    return open_job(folder / "a.job", record(), resume=False, **options)[0]


def go_on(folder: Path, **changes: Any) -> tuple[jobs.Job, str]:
    return open_job(folder / "a.job", record(**changes), resume=True)


def code_of(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(InputError) as caught:
        call()
    return caught.value.code, caught.value.message


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_finished_job_leaves_nothing(tmp_path: Path) -> None:
    with start(tmp_path, save_every=1) as job:
        job.reached(state(1))
        job.save("latents", {"0": torch.ones(2)})
        job.finish()
    assert left(tmp_path) == []


def test_a_strangers_file_in_the_folder_is_left(tmp_path: Path) -> None:
    with start(tmp_path) as job:
        (job.folder / "notes.txt").write_text("mine")
        job.save("latents", {"0": torch.ones(2)})
        job.finish()
    assert (tmp_path / "a.job" / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "a.job" / "plan.json").exists()


def test_the_record_comes_back_as_it_was(tmp_path: Path) -> None:
    with start(tmp_path):
        assert jobs.read_record(tmp_path / "a.job") == record()


def test_the_last_two_states_are_kept_and_the_newest_is_used(tmp_path: Path) -> None:
    with start(tmp_path, save_every=1) as job:
        for done in range(1, 6):
            job.reached(state(done))
        assert [name for name in left(tmp_path) if "state" in name] == [
            "state-0004.safetensors",
            "state-0005.safetensors",
        ]
    with go_on(tmp_path)[0] as job:
        loaded = job.load_state()
        assert loaded is not None and loaded.done == 5
        assert torch.equal(loaded.takes[0]["x"], state(5).takes[0]["x"])
        assert loaded.takes[0]["anchor"].dtype == torch.bfloat16


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "empty"])
def test_a_damaged_state_is_said_and_the_one_before_is_used(damage: str, tmp_path: Path) -> None:
    with start(tmp_path, save_every=1) as job:
        job.reached(state(1))
        job.reached(state(2))
    path = tmp_path / "a.job" / "state-0002.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    if damage == "header":
        data[40] ^= 1
    path.write_bytes({"cut": data[:-5], "empty": b""}.get(damage, data))
    with go_on(tmp_path)[0] as job, pytest.warns(WanloomWarning, match="W7001: state-0002.safetensors is damaged"):
        loaded = job.load_state()
    assert loaded is not None and loaded.done == 1


def test_every_flipped_byte_of_a_state_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    jobs.save_tensors(path, {"x": torch.randn(3, 4), "y": torch.arange(3)}, {"done": 2})
    whole = path.read_bytes()
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 0x04
        path.write_bytes(data)
        try:
            tensors, note = jobs.load_tensors(path)
        except jobs.DAMAGED:
            continue
        path.write_bytes(whole)
        right, right_note = jobs.load_tensors(path)
        assert note == right_note and all(torch.equal(tensors[name], right[name]) for name in right)


def test_tensors_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    x = torch.arange(6.0).view(2, 3)
    jobs.save_tensors(tmp_path / "a.safetensors", {"x": x, "same": x, "row": x[1], "turned": x.T}, {})
    tensors, _ = jobs.load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["x"], x) and torch.equal(tensors["same"], x)
    assert torch.equal(tensors["row"], x[1]) and torch.equal(tensors["turned"], x.T)


def test_states_are_saved_after_a_minute_and_five_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    saved = []
    with start(tmp_path) as job:
        monkeypatch.setattr(job, "save_state", lambda s: (saved.append(s.done), save(s)))
        save = type(job).save_state.__get__(job)
        for done in range(1, STEPS + 1):  # 45 s a step: 5 % are 2 steps, a minute too
            clock[0] += 45
            job.reached(state(done))
    assert saved == list(range(2, STEPS, 2))
    saved.clear()
    with start(tmp_path, overwrite=True) as job:
        monkeypatch.setattr(job, "save_state", lambda s: (saved.append(s.done), save(s)))
        save = type(job).save_state.__get__(job)
        for done in range(1, STEPS + 1):  # 5 s a step: a minute is 12 steps
            clock[0] += 5
            job.reached(state(done))
    assert saved == [12, 24, 36]


def test_save_every_overrides_and_the_last_step_is_left_to_the_latents(tmp_path: Path) -> None:
    with start(tmp_path, save_every=15) as job:
        for done in range(1, STEPS + 1):
            job.reached(state(done))
    assert [name for name in left(tmp_path) if "state" in name] == ["state-0015.safetensors", "state-0030.safetensors"]


# ---------------------------------------------------------------- who may


def test_two_processes_do_not_share_a_job(tmp_path: Path) -> None:
    with start(tmp_path):
        code, message = code_of(lambda: go_on(tmp_path))
        assert code == "E2021" and str(os.getpid()) in message
        assert code_of(lambda: start(tmp_path, overwrite=True))[0] == "E2021"
    handle = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)  # a lock elsewhere means nothing
    go_on(tmp_path)[0].close()
    os.close(handle)


def test_an_unfinished_job_is_not_overwritten_unasked(tmp_path: Path) -> None:
    with start(tmp_path, save_every=1) as job:
        job.reached(state(1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "a.job").iterdir()}
    code, message = code_of(lambda: start(tmp_path))
    assert code == "E5002" and "wanloom generate --resume" in message
    assert {path.name: path.read_bytes() for path in (tmp_path / "a.job").iterdir()} == before
    with start(tmp_path, overwrite=True) as job:
        assert job.load_state() is None


def test_a_job_without_a_finished_step_is_in_nobodys_way(tmp_path: Path) -> None:
    start(tmp_path).close()  # as a killed process leaves it
    start(tmp_path).close()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"plan": make_plan(Request(prompt="a dog", seed=3, steps=STEPS), VARIANTS["t2v-A14B"])}, ["prompt"]),
        ({"plan": make_plan(Request(prompt="a cat", seed=4, steps=STEPS), VARIANTS["t2v-A14B"])}, ["seed", "segments"]),
        ({"seeds": (3, 4)}, ["seeds"]),
        ({"precision": {"dit": "bfloat16", "vae": "float32"}}, ["precision of dit"]),
        ({"weights": {"dit high_noise_model": "9" * 32, "vae": "2" * 32}}, ["weights of dit high_noise_model"]),
    ],
)
def test_another_request_or_other_weights_are_refused_by_name(
    changes: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    with start(tmp_path, save_every=1) as job:
        job.reached(state(1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "a.job").iterdir()}
    code, message = code_of(lambda: go_on(tmp_path, **changes))
    assert code == "E2020" and all(name in message for name in named)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a.job").iterdir()} == before


def test_on_another_machine_a_job_starts_over_and_says_so(tmp_path: Path) -> None:
    with start(tmp_path, save_every=1) as job:
        job.reached(state(1))
        job.save("conditioning", {"x": torch.ones(1)})
    job, notice = go_on(tmp_path, machine={"torch": "2.13", "threads": "1"})
    with job:
        assert "threads 2 -> 1" in notice and "starts over" in notice
        assert job.load_state() is None and job.load("conditioning") is None
        job.reached(state(1))


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"format": 1}', '{"format": 99}', "\0"])
def test_what_is_no_job_is_said(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.job").mkdir()
        (tmp_path / "a.job" / "plan.json").write_text(content)
    assert code_of(lambda: jobs.stored_request(tmp_path / "a.job"))[0] == "E2020"
    assert code_of(lambda: go_on(tmp_path))[0] == "E2020"


def test_outputs_of_a_foreign_plan_stay_beside_the_job(tmp_path: Path) -> None:
    start(tmp_path).close()
    path = tmp_path / "a.job" / "plan.json"
    data = json.loads(path.read_text())
    data["outputs"] = ["/etc/passwd", "../../b.mp4"]
    path.write_text(json.dumps(data))
    assert jobs.read_record(tmp_path / "a.job").outputs == ("passwd", "b.mp4")


# ---------------------------------------------------------------- how it ends


def test_ctrl_c_saves_the_last_step_and_tells_the_way_back(tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught, start(tmp_path) as job:
        job.reached(state(1))
        job.reached(state(2))
        os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.exit_code == 7
    assert "after step 2 of 40" in caught.value.message and f"--resume {tmp_path}/a.job" in caught.value.message
    with go_on(tmp_path)[0] as job:
        loaded = job.load_state()
    assert loaded is not None and loaded.done == 2


def test_a_polite_end_is_like_ctrl_c(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted), start(tmp_path) as job:
        job.reached(state(1))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "a.job" / "state-0001.safetensors").exists()


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(jobs, "save_tensors", slow)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), start(tmp_path) as job:
        job.reached(state(1))
        raise KeyboardInterrupt
    assert time.monotonic() - started < 2


def test_a_crash_keeps_the_last_step(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), start(tmp_path) as job:
        job.reached(state(7))
        raise RuntimeError("out of memory")
    assert (tmp_path / "a.job" / "state-0007.safetensors").exists()


def test_ctrl_c_while_the_latents_are_saved_does_not_lose_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, struck = jobs.save_tensors, []

    def save(*given: Any) -> None:
        if not struck:
            struck.append(1)
            raise KeyboardInterrupt
        right(*given)

    last = State(STEPS, ({"x": torch.ones(1, 2)},))
    with start(tmp_path, save_every=10) as job:
        job.reached(state(10))
    monkeypatch.setattr(jobs, "save_tensors", save)
    with pytest.raises(Interrupted, match="after denoising"), go_on(tmp_path)[0] as job:
        job.reached(last)
    with go_on(tmp_path)[0] as job:
        latents = job.load("latents")
    assert latents is not None and torch.equal(latents["0"], torch.ones(2))


def test_ctrl_c_before_the_first_step_leaves_a_job_that_starts_over(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="before the first step"), start(tmp_path):
        raise KeyboardInterrupt
    with go_on(tmp_path)[0] as job:
        assert job.load_state() is None
        job.finish()
    assert left(tmp_path) == []


def test_an_error_before_the_first_step_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError), start(tmp_path) as job:
        job.save("conditioning", {"x": torch.ones(1)})
        raise InputError("E4010", "a tensor is not finite")
    assert left(tmp_path) == []


def test_latents_that_are_not_finite_are_not_continued_but_frames_are(tmp_path: Path) -> None:
    with pytest.raises(NumericalError), start(tmp_path, save_every=1) as job:
        job.reached(state(1))
        raise NumericalError("E6001", "step 2")
    assert left(tmp_path) == []
    with pytest.raises(NumericalError), start(tmp_path, save_every=1) as job:
        job.reached(state(STEPS))
        job.save("latents", {"0": torch.ones(1)})
        raise NumericalError("E6003", "frames")
    assert "latents.safetensors" in left(tmp_path)


def test_a_published_file_is_known_by_its_content(tmp_path: Path) -> None:
    with start(tmp_path) as job:
        path = tmp_path / "a.mp4"
        assert not job.published(path)
        path.write_bytes(b"video")
        job.announce("a.mp4", jobs.sha256_file(path))
        assert job.published(path)
        path.write_bytes(b"other")
        assert not job.published(path)


# ---------------------------------------------------------------- requests and identities


def test_a_request_survives_as_option_texts(tmp_path: Path) -> None:
    request = Request(
        task="i2v-A14B", prompt="a\ncat", size=(832, 480), guidance=(3.0, 4.5), sigmas=(1.0, 0.25), seed=2**62,
        image=tmp_path / "a b.png", ckpt_dir=tmp_path, out=tmp_path / "a.mp4", overwrite=True, num=3, shift=0.1,
        sampler="dpm++", save_tensors=tmp_path / "t.safetensors", t5_cpu=True,
    )  # fmt: skip
    again = request_from_text(json.loads(json.dumps(jobs.request_texts(request))))
    assert again == request


def test_the_stored_request_has_its_seed_decided(tmp_path: Path) -> None:
    start(tmp_path).close()
    assert jobs.stored_request(tmp_path / "a.job")["seed"] == "3"


def test_identity_depends_on_the_content_and_not_on_the_name(tmp_path: Path) -> None:
    data = torch.randn(2_000_000).numpy().tobytes()  # 8 MB, of which 4 are looked at
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(data)
    other.write_bytes(data)
    assert jobs.identity(one) == jobs.identity(other)
    other.write_bytes(data + b"\0")
    assert jobs.identity(one) != jobs.identity(other)
    other.write_bytes(torch.randn(2_000_000).numpy().tobytes())
    assert jobs.identity(one) != jobs.identity(other)
    for at in (0, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        other.write_bytes(changed)
        assert jobs.identity(one) != jobs.identity(other)


def test_the_fingerprint_knows_the_threads() -> None:
    before = torch.get_num_threads()
    one = jobs.machine_fingerprint("cpu", "cpu")
    try:
        torch.set_num_threads(before + 1)
        other = jobs.machine_fingerprint("cpu", "cpu")
    finally:
        torch.set_num_threads(before)
    assert {key for key in one if one[key] != other[key]} == {"threads"}
    assert one == jobs.machine_fingerprint("cpu", "cpu")
