"""`kill -9` at every point of a run, and at random moments: nothing done is lost, and the bits are the same.

A run with `--save-every 1` is killed and continued with `--resume`.  Then: it says that it goes on at the step after
the last state on disk; both processes together called the transformers at most once more than an undisturbed run, in
each branch; latents, frames and video are equal, bit for bit; nothing else lies around.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest

import tiny
from wanloom.durable import sweep

STEPS = 8
SAMPLERS = ("unipc", "dpm++", "euler")
RANDOM_MOMENTS = 100

# Names of `durable.failpoint`s, with the time at which to die.  The high-noise expert of this run has steps 1 to 5.
POINTS = (
    "folder", "write.json:1", "rename.json:1", "plan", "rename.safetensors:1", "conditioning",
    *(f"step:{i}" for i in range(1, STEPS + 1)),
    *(f"state:{i}" for i in range(1, STEPS)),
    "write.safetensors:2", "rename.safetensors:2", "write.safetensors:4", "rename.safetensors:6",
    f"write.safetensors:{STEPS + 1}", "latents",
    "decode:1", "decode:3", "encode:1", "encode:3",
    f"write.safetensors:{STEPS + 2}", f"rename.safetensors:{STEPS + 2}", "rename.json:2", "rename.mp4", "published",
    "finish", "discard",
)  # fmt: skip
SAMPLE = (
    "folder", "plan", "conditioning", "step:5", "state:3", "write.safetensors:4", "rename.safetensors:6", "latents",
    "decode:3", "encode:1", "rename.mp4", "published", "discard",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"), "t2v-A14B")


class Case(cases.Case):
    """A run of two experts."""

    def __init__(self, root: Path, zygote: cases.Zygote, model: Path, sampler: str) -> None:
        super().__init__(
            root, zygote,
            [
                "generate", "--task", "t2v-A14B", "--ckpt-dir", str(model), "--prompt", "a red cat", "--size", "32x32",
                "--frames", "9", "--steps", str(STEPS), "--seed", "5", "--device", "cpu", "--sampler", sampler,
                "--save-every", "1", "--out", "a.mp4", "--save-tensors", "a.safetensors",
            ],
        )  # fmt: skip

    def states(self) -> list[int]:
        return sorted(int(path.stem[6:]) for path in self.folder.glob("a.job/state-*.safetensors"))

    def finish(self) -> None:
        """What a person does after a kill: resume where there is a job, else run the command again."""
        job = self.folder / "a.job"
        if (job / "plan.json").exists():
            states = self.states()
            done = (job / "latents.safetensors").exists()
            assert self.run(["generate", "--resume", "a.job"]) == 0, self.err
            if done:
                assert "resuming at the decoder" in self.out
            elif states:
                assert f"resuming at step {states[-1] + 1} of {STEPS}" in self.out
            else:
                assert "resuming" not in self.out
        elif not (self.folder / "a.mp4").exists():
            assert self.run() == 0, self.err
        else:
            sweep(self.folder)  # as any later run in this folder does


@pytest.fixture(scope="module")
def undisturbed(
    zygote: cases.Zygote, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, str]]:
    """Sampler -> what a run without a kill leaves."""
    known: dict[str, dict[str, str]] = {}

    def result(sampler: str) -> dict[str, str]:
        if sampler not in known:
            case = Case(tmp_path_factory.mktemp("undisturbed"), zygote, model, sampler)
            assert case.run() == 0, case.err
            assert case.calls == 2 * STEPS
            known[sampler] = case.hashes()
            assert set(known[sampler]) == {"a.mp4", "a.safetensors"}
        return known[sampler]

    return result


def check(case: Case, expected: dict[str, str]) -> None:
    case.finish()
    assert case.hashes() == expected
    assert case.calls <= 2 * (STEPS + 1)


def killed_at(point: str, case: Case, expected: dict[str, str]) -> None:
    status = case.run(env={"WANLOOM_FAILPOINT": point})
    assert status == -9, f"{point} was not passed: {case.err}"
    if re.fullmatch(r"state:\d", point):
        assert case.states()[-1] == int(point[-1])
    check(case, expected)


@pytest.mark.parametrize("point", SAMPLE)
def test_a_killed_run_goes_on_where_it_was(
    point: str, zygote: Any, model: Path, undisturbed: Any, tmp_path: Path
) -> None:
    killed_at(point, Case(tmp_path, zygote, model, "unipc"), undisturbed("unipc"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_killed_twice_in_both_experts_is_the_same(
    sampler: str, zygote: Any, model: Path, undisturbed: Any, tmp_path: Path
) -> None:
    case = Case(tmp_path, zygote, model, sampler)
    assert case.run(env={"WANLOOM_FAILPOINT": "state:2"}) == -9
    assert case.run(["generate", "--resume", "a.job"], env={"WANLOOM_FAILPOINT": "state:5"}) == -9
    assert case.states() == [6, 7]
    case.finish()
    assert case.hashes() == undisturbed(sampler)
    assert case.calls == 2 * STEPS


def test_ctrl_c_saves_and_says_how_to_go_on(zygote: Any, model: Path, undisturbed: Any, tmp_path: Path) -> None:
    case = Case(tmp_path, zygote, model, "unipc")
    case.command[case.command.index("--save-every") + 1] = "1000"
    assert case.run(interrupt_after=7) == 7, case.err
    said = re.search(
        r"after step (\d) of 8; nothing is lost. Continue: (wanloom generate --resume \S+)$", case.err, re.M
    )
    assert said, case.err
    done = int(said[1])
    assert case.states() == [done] and 3 <= done < STEPS
    case.finish()
    assert case.hashes() == undisturbed("unipc")


@pytest.mark.faults
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_any_point_goes_on(
    point: str, sampler: str, zygote: Any, model: Path, undisturbed: Any, tmp_path: Path
) -> None:
    killed_at(point, Case(tmp_path, zygote, model, sampler), undisturbed(sampler))


def random_moments(count: int, zygote: Any, model: Path, undisturbed: Any, root: Path) -> None:
    rng = random.Random(20)
    trial = Case(root / "trial", zygote, model, "unipc")
    started = time.monotonic()
    assert trial.run() == 0
    length = time.monotonic() - started
    killed = 0
    for i in range(count):
        sampler = SAMPLERS[i % 3]
        case = Case(root / str(i), zygote, model, sampler)
        killed += case.run(kill_after=rng.random() * length) == -9
        if rng.random() < 0.3 and (case.folder / "a.job" / "plan.json").exists():  # and sometimes the second one too
            case.run(["generate", "--resume", "a.job"], kill_after=rng.random() * length)
            case.finish()
            assert case.hashes() == undisturbed(sampler)
        else:
            check(case, undisturbed(sampler))
    assert killed > count // 2


def test_runs_killed_at_random_moments_go_on(zygote: Any, model: Path, undisturbed: Any, tmp_path: Path) -> None:
    random_moments(3, zygote, model, undisturbed, tmp_path)


@pytest.mark.faults
def test_runs_killed_at_100_random_moments_go_on(zygote: Any, model: Path, undisturbed: Any, tmp_path: Path) -> None:
    random_moments(RANDOM_MOMENTS, zygote, model, undisturbed, tmp_path)
