"""How many steps the high-noise expert makes, said by number: who makes which step, what is refused, what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tiny
from command_line import ENVIRONMENT, run_here
from wanloom.errors import InputError, WanloomWarning
from wanloom.parts import Parts
from wanloom.pipeline import Pipeline, load
from wanloom.plan import Plan, make_plan, request_like
from wanloom.request import Request
from wanloom.variants import VARIANTS

HIGH, LOW = "high_noise_model", "low_noise_model"
T2V = VARIANTS["t2v-A14B"]
FOUR = (1.0, 0.9375, 0.8333, 0.625)
# A small size has a warning, and prompts of a made-up vocabulary.
pytestmark = pytest.mark.filterwarnings("ignore::wanloom.errors.WanloomWarning")
SMALL: dict[str, Any] = {"size": (64, 64), "frames": 5, "sampler": "euler", "guidance": 1.0, "seed": 7}


def plan(**values: Any) -> Plan:
    return make_plan(Request(prompt="a cat", seed=1, **values), T2V)


def makers(plan: Plan) -> list[str]:
    return [plan.span_at(step).expert for step in range(plan.steps)]


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("step", [1, 2, 3])
def test_so_many_steps_are_the_high_noise_experts(step: int) -> None:
    made = plan(sigmas=FOUR, boundary_step=step, sampler="euler", guidance=(3.0, 4.0))
    assert makers(made) == [HIGH] * step + [LOW] * (4 - step)
    assert [span.guidance for span in made.spans] == [4.0, 3.0]


def test_without_it_the_noise_level_decides() -> None:
    assert makers(plan(sigmas=FOUR, sampler="euler")) == [HIGH, HIGH, LOW, LOW]
    assert makers(plan(sigmas=(0.8, 0.5), sampler="euler")) == [LOW, LOW]
    assert makers(plan(sigmas=(0.8, 0.5), sampler="euler", boundary_step=1)) == [HIGH, LOW]


def test_it_goes_with_steps_and_shift_as_well() -> None:
    made = plan(steps=8, shift=5.0, boundary_step=3)
    assert makers(made) == [HIGH] * 3 + [LOW] * 5 and made.schedule == plan(steps=8, shift=5.0).schedule


def test_steps_may_be_said_beside_as_many_levels() -> None:
    assert plan(sigmas=FOUR, steps=4) == plan(sigmas=(*FOUR, 0.0))


def test_a_plan_keeps_it() -> None:
    made = plan(sigmas=FOUR, boundary_step=1, sampler="euler")
    assert Plan.from_json(made.to_json()) == made
    assert make_plan(request_like(made), T2V) == made


@pytest.mark.parametrize(
    ("values", "code", "said"),
    [
        ({"sigmas": FOUR, "boundary_step": 0}, "E2052", "expected 1..3"),
        ({"sigmas": FOUR, "boundary_step": 4}, "E2052", "expected 1..3"),
        ({"sigmas": FOUR, "boundary_step": -1}, "E2052", "expected 1..3"),
        ({"sigmas": FOUR, "boundary_step": 1.5}, "E2052", "got 1.5"),
        ({"sigmas": (1.0,), "boundary_step": 1}, "E2052", "two steps at least"),
        ({"sigmas": FOUR, "steps": 5}, "E2023", "4 noise levels are 4 steps, not 5"),
        ({"sigmas": (1.0, 0.9, 0.95)}, "E2031", "smaller than the one before"),
        ({"sigmas": (1.2, 0.9)}, "E2031", "in (0, 1]"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], code: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(**values)
    assert caught.value.code == code and said in caught.value.message


def test_a_model_with_one_expert_refuses_it() -> None:
    with pytest.raises(InputError) as caught:
        make_plan(Request(prompt="a cat", seed=1, boundary_step=2), VARIANTS["ti2v-5B"])
    assert caught.value.code == "E2052" and "one expert" in caught.value.message


# ---------------------------------------------------------------- the command line


def test_plan_shows_levels_and_boundary(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "t2v-A14B", "--sampler", "euler", "--sigmas", "1.0,0.9375,0.8333,0.625,0", "--boundary-step", "1")
    ran = run_here(capsys, *words)
    assert "euler 4 steps at 1 0.9375 0.8333 0.625, 1 of high noise, guidance" in ran.out
    stated = json.loads(run_here(capsys, *words, "--json").out)["plan"]
    assert [(span["expert"], span["start"], span["stop"]) for span in stated["spans"]] == [(HIGH, 0, 1), (LOW, 1, 4)]
    many = ",".join(str(1 - i / 20) for i in range(20))
    assert "at 1 0.95 0.9 0.85 ... 0.1 0.05" in run_here(capsys, "plan", "t2v-A14B", "--sigmas", many).out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--sigmas 1,0.5,0.5", "E2031"),
        ("--sigmas 1,high", "E2031"),
        ("--sigmas 1,0.5 --steps 3", "E2023"),
        ("--steps 4 --boundary-step 4", "E2052"),
        ("--steps 4 --boundary-step two", "E2052"),
        ("--steps 4 --boundary_step 1.5", "E2052"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], words: str, code: str) -> None:
    ran = run_here(capsys, "plan", "t2v-A14B", *words.split())
    assert ran.code == 2 and ran.err.startswith(f"error[{code}]: ") and ran.err.count("\n") == 1


def test_a_mistake_is_said_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom wanloom.cli import main\n"
        "code = main('generate --task t2v-A14B --prompt x --steps 4 --boundary-step 9'.split())\n"
        "assert code == 2 and 'torch' not in sys.modules, code"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "E2052" in done.stderr, done.stderr
    assert time.monotonic() - began < 20  # 0.5 s on an idle core


# ---------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tiny.checkpoint(tmp_path_factory.mktemp("models"), "t2v-A14B", pickles=False)
    with pytest.warns(WanloomWarning, match="W4018"):  # small checkpoints record no experts
        return load(folder, task="t2v-A14B", device="cpu")


@pytest.fixture
def calls(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """The expert and the timestep of every call of a transformer."""
    made: list[tuple[str, float]] = []
    right = Parts.use

    @contextmanager
    def use(self: Parts, part: str, expert: str | None = None) -> Iterator[Any]:
        with right(self, part, expert) as module:
            if part != "dit":
                yield module
                return

            def note(dit: Any, given: tuple[Any, ...]) -> None:
                made.append((str(expert), float(given[1][0, 0])))

            hook = module.register_forward_pre_hook(note)
            try:
                yield module
            finally:
                hook.remove()

    monkeypatch.setattr(Parts, "use", use)
    return made


@pytest.mark.parametrize("step", [1, 3])
def test_each_step_is_made_by_its_expert_once(pipe: Pipeline, calls: list[tuple[str, float]], step: int) -> None:
    pipe.run(Request(prompt="a red cat", sigmas=FOUR, boundary_step=step, **SMALL))
    assert [name for name, _ in calls] == [HIGH] * step + [LOW] * (4 - step)
    assert [t for _, t in calls] == pytest.approx([1000 * sigma for sigma in FOUR])


def test_equal_timesteps_on_both_sides_of_the_boundary(pipe: Pipeline, calls: list[tuple[str, float]]) -> None:
    levels = (0.5008, 0.5006, 0.5004)  # unipc tells the model 500 of all three
    pipe.run(Request(prompt="a red cat", sigmas=levels, boundary_step=2, **{**SMALL, "sampler": "unipc"}))
    assert calls == [(HIGH, 500.0), (HIGH, 500.0), (LOW, 500.0)]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_run_goes_on_with_the_same_bits(pipe: Pipeline, calls: list[Any], at: int, tmp_path: Path) -> None:
    request = Request(prompt="a red cat", sigmas=FOUR, boundary_step=3, save_every=1, **SMALL)
    whole = pipe.run(request, out=tmp_path / "whole.png")
    stream = pipe.stream(request, out=tmp_path / "a.png")
    for event in stream:
        if event.stage == "denoise" and event.step == at:
            break
    stream.close()
    calls.clear()
    again = pipe.run(request, resume=tmp_path / "a.job")
    assert again.began_at == at and [name for name, _ in calls] == ([HIGH] * 3 + [LOW])[at:]
    assert whole.path is not None and (tmp_path / "a.png").read_bytes() == whole.path.read_bytes()


def test_a_run_with_another_boundary_is_another_run(pipe: Pipeline, tmp_path: Path) -> None:
    request = Request(prompt="a red cat", sigmas=FOUR, boundary_step=3, save_every=1, **SMALL)
    stream = pipe.stream(request, out=tmp_path / "a.png")
    for event in stream:
        if event.stage == "denoise" and event.step == 1:
            break
    stream.close()
    other = Request(prompt="a red cat", sigmas=FOUR, boundary_step=2, save_every=1, **SMALL)
    with pytest.raises(InputError) as caught:
        pipe.run(other, resume=tmp_path / "a.job")
    assert caught.value.code == "E2020" and "boundary_step" in caught.value.message
