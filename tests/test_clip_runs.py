"""Videos made clip by clip: what is saved, what a continued run makes again, and what stays out of memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from clip_files import CLIPS, PASSES, TASKS, three_clips
from wanloom.errors import Interrupted, NumericalError, WanloomWarning
from wanloom.jobs import load_tensors
from wanloom.models.dit import DiT
from wanloom.outputs import Output
from wanloom.parts import Parts
from wanloom.pipeline import Pipeline, load
from wanloom.request import Request
from wanloom.results import Event

STEPS = 3

pytestmark = pytest.mark.filterwarnings("ignore::wanloom.errors.WanloomWarning")


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return three_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    folder = tmp_path_factory.mktemp("models")
    return {task: load(tiny.checkpoint(folder, f"{task}-14B"), task=f"{task}-14B", device="cpu") for task in TASKS}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Make = Callable[..., Request]


@pytest.fixture
def ask(fields: dict[str, dict[str, Any]]) -> Make:
    """The request of a task, every step saved."""
    return lambda task, **more: Request(
        prompt="a red cat", **{**fields[task], "steps": STEPS, "seed": 7, "save_every": 1, **more}
    )


@pytest.fixture(scope="module")
def whole(
    pipes: dict[str, Pipeline], fields: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Task -> the folder of an undisturbed run: a.mp4 and a.safetensors."""
    folders = {}
    for task in TASKS:
        folders[task] = folder = tmp_path_factory.mktemp(task)
        asked = Request(prompt="a red cat", steps=STEPS, seed=7, save_tensors=folder / "a.safetensors", **fields[task])
        pipes[task].run(asked, out=folder / "a.mp4")
    return folders


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the transformer is called ("forward"), and what a clip computes once ("once")."""
    seen: Counter[str] = Counter()
    right = {name: getattr(DiT, name) for name in ("forward", "once")}

    def counted(name: str) -> Callable[..., Any]:
        def call(self: DiT, *given: Any, **named: Any) -> Any:
            seen[name] += 1
            return right[name](self, *given, **named)

        return call

    for name in right:
        monkeypatch.setattr(DiT, name, counted(name))
    return seen


def stop_at(stream: Iterator[Event], wanted: Callable[[Event], bool]) -> None:
    """Run until an event, and close."""
    for event in stream:
        if wanted(event):
            break
    stream.close()  # type: ignore[attr-defined]


def in_clip(clip: int, stage: str = "denoise", step: int = 0) -> Callable[[Event], bool]:
    """Whether an event is of this clip, after so many of its steps."""
    return lambda event: (
        event.stage == stage and event.clip == clip and (stage != "denoise" or event.step == clip * STEPS + step)
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------- what is computed, and what is said


def test_what_a_clip_computes_once_is_computed_once_for_each_pass(
    task: str, pipes: dict[str, Pipeline], ask: Make, calls: Counter[str]
) -> None:
    pipes[task].run(ask(task))
    assert calls["forward"] == CLIPS * STEPS * PASSES[task]
    assert calls["once"] == CLIPS * PASSES[task]


def test_steps_go_forward_and_end_at_their_number(
    task: str, pipes: dict[str, Pipeline], ask: Make, tmp_path: Path
) -> None:
    check_events(list(pipes[task].stream(ask(task, num=2), out=[tmp_path / "a.mp4", tmp_path / "b.mp4"])))


def check_events(events: list[Event]) -> None:
    for stage in ("encode", "denoise", "decode"):
        steps = [event.step for event in events if event.stage == stage]
        (total,) = {event.steps for event in events if event.stage == stage}
        assert steps == sorted(steps) and steps[-1] == total, stage
    decoded = [event.step for event in events if event.stage == "decode" and event.seed is not None]
    assert len(decoded) == len(set(decoded))


def test_tensors_are_those_of_every_clip_and_the_joined_video(
    task: str, pipes: dict[str, Pipeline], ask: Make, whole: dict[str, Path]
) -> None:
    tensors = load_file(whole[task] / "a.safetensors")
    video = pipes[task].run(ask(task)).videos[0]
    assert sorted(tensors) == [*(f"decode_latents_{i}" for i in range(CLIPS)), "video"]
    assert torch.equal(tensors["video"], video.tensor)
    assert video.tensor.shape[1] == sum(segment.frames for segment in video.plan.segments)
    for i, latents in enumerate(video.clips):
        assert torch.equal(tensors[f"decode_latents_{i}"], latents[None])


# ---------------------------------------------------------------- going on


def test_what_was_made_is_decoded_again_without_the_transformer(
    task: str, pipes: dict[str, Pipeline], ask: Make, whole: dict[str, Path], tmp_path: Path,
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pipe = pipes[task]
    stop_at(pipe.stream(ask(task), out=tmp_path / "a.mp4"), in_clip(CLIPS - 1, "decode"))
    calls.clear()
    loads: list[str] = []
    right = Parts.use
    monkeypatch.setattr(
        Parts, "use", lambda self, part, *rest, **more: loads.append(part) or right(self, part, *rest, **more)
    )
    result = pipe.run(ask(task), resume=tmp_path / "a.job")
    assert "dit" not in loads and "audio" not in loads and not calls
    assert result.began_at == CLIPS * STEPS
    assert (tmp_path / "a.mp4").read_bytes() == (whole[task] / "a.mp4").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_continued_run_says_where_and_counts_what_was_done(
    task: str, pipes: dict[str, Pipeline], ask: Make, whole: dict[str, Path], tmp_path: Path, calls: Counter[str]
) -> None:
    pipe = pipes[task]
    stop_at(pipe.stream(ask(task), out=tmp_path / "a.mp4"), in_clip(1, step=2))
    calls.clear()
    events: list[Event] = []
    result = pipe.run(ask(task), resume=tmp_path / "a.job", on_event=events.append)
    said = [event.message for event in events if event.message]
    assert said == ["the clips that were made before are decoded again", "resuming at clip 2 of 3, step 3 of 3"]
    assert result.began_at == STEPS + 2
    assert calls["forward"] == PASSES[task] * (CLIPS * STEPS - result.began_at)
    check_events(events)
    assert (tmp_path / "a.mp4").read_bytes() == (whole[task] / "a.mp4").read_bytes()


def test_states_go_when_their_clip_is_done(task: str, pipes: dict[str, Pipeline], ask: Make, tmp_path: Path) -> None:
    stop_at(pipes[task].stream(ask(task), out=tmp_path / "a.mp4"), in_clip(2, step=2))
    given = [f"given-{i:04d}.safetensors" for i in range(CLIPS)] if task == "s2v" else []
    states = [f"00.0002.state-{step:04d}.safetensors" for step in (1, 2)]
    latents = [f"00.{clip:04d}.latents.safetensors" for clip in (0, 1)]
    assert names(tmp_path / "a.job") == sorted([*latents, *states, *given, "conditioning.safetensors"])


DAMAGE = [
    ("00.0002.state-0002", 1), ("00.0001.latents", STEPS), ("00.0000.latents", STEPS), ("conditioning", 0),
    ("given-0000", 0), ("given-0002", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "again"), DAMAGE, ids=[name for name, _ in DAMAGE])
def test_what_is_damaged_is_said_and_made_again(
    name: str, again: int, task: str, pipes: dict[str, Pipeline], ask: Make, whole: dict[str, Path], tmp_path: Path,
    calls: Counter[str],
) -> None:  # fmt: skip
    if task == "animate" and name.startswith("given"):
        pytest.skip("animate reads its videos")
    stop_at(pipes[task].stream(ask(task), out=tmp_path / "a.mp4"), in_clip(2, step=2))
    spoil(tmp_path / "a.job" / f"{name}.safetensors")
    calls.clear()
    with pytest.warns(WanloomWarning, match=f"W7001: {name}.safetensors is damaged") as caught:
        pipes[task].run(ask(task), resume=tmp_path / "a.job")
    assert len([warning for warning in caught if "W7001" in str(warning.message)]) == 1
    assert calls["forward"] == PASSES[task] * (1 + again)
    assert (tmp_path / "a.mp4").read_bytes() == (whole[task] / "a.mp4").read_bytes()


def test_latents_that_were_damaged_are_saved_again(
    pipes: dict[str, Pipeline], ask: Make, tmp_path: Path, calls: Counter[str]
) -> None:
    pipe = pipes["s2v"]
    stop_at(pipe.stream(ask("s2v"), out=tmp_path / "a.mp4"), in_clip(2, step=1))
    path = tmp_path / "a.job" / "00.0001.latents.safetensors"
    right, _ = load_tensors(path)
    spoil(path)
    stop_at(pipe.stream(ask("s2v"), resume=tmp_path / "a.job"), in_clip(1, step=2))
    assert "00.0001.state-0002.safetensors" in names(tmp_path / "a.job")  # progress of the second making counts, too
    stop_at(pipe.stream(ask("s2v"), resume=tmp_path / "a.job"), in_clip(2, step=2))
    made, _ = load_tensors(path)
    assert made.keys() == right.keys() and all(torch.equal(made[name], right[name]) for name in right)


def test_a_run_in_memory_gives_the_bits_of_a_file(
    task: str, pipes: dict[str, Pipeline], ask: Make, whole: dict[str, Path]
) -> None:
    one, other = pipes[task].run(ask(task, num=2)).videos
    assert torch.equal(one.tensor, load_file(whole[task] / "a.safetensors")["video"])
    assert torch.equal(other.tensor, pipes[task].run(ask(task, seed=8)).videos[0].tensor)
    assert not torch.equal(one.tensor, other.tensor)


def test_a_file_that_has_its_name_is_not_made_again(
    task: str, pipes: dict[str, Pipeline], ask: Make, tmp_path: Path, calls: Counter[str]
) -> None:
    files = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    stop_at(
        pipes[task].stream(ask(task, num=2), out=files),
        lambda event: event.stage == "denoise" and event.step == CLIPS * STEPS + 1,
    )
    made = files[0].stat()
    calls.clear()
    result = pipes[task].run(ask(task, num=2), resume=tmp_path / "a.job")
    assert files[0].stat().st_mtime_ns == made.st_mtime_ns and result.began_at == CLIPS * STEPS + 1
    assert calls["forward"] == PASSES[task] * (CLIPS * STEPS - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_an_older_job_of_one_clip_goes_on(tmp_path: Path) -> None:
    """Plans had no `draw`, `skip`, `start`, `speech`, `animation`, inputs no `samples`, `frames`, `rate`."""
    pipe = load(tiny.checkpoint(tmp_path / "model", "i2v-A14B"), device="cpu")
    picture = tiny.picture(tmp_path / "a.png")
    asked = Request(prompt="a cat", image=picture, size="32x32", frames=5, steps=STEPS, seed=7, save_every=1)
    right = pipe.run(asked, out=tmp_path / "right.mp4").path.read_bytes()
    stop_at(pipe.stream(asked, out=tmp_path / "a.mp4"), lambda event: event.stage == "denoise" and event.step == 2)
    path = tmp_path / "a.job" / "plan.json"
    data = json.loads(path.read_text())
    plan = data["plan"]
    for holder, new in (
        (plan, ("speech", "animation")), (plan["segments"][0], ("draw", "skip", "start")),
        (plan["inputs"][0], ("samples", "frames", "rate")),
    ):  # fmt: skip
        for name in new:
            del holder[name]
    path.write_text(json.dumps(data))
    assert "state-0002.safetensors" in names(tmp_path / "a.job")
    result = pipe.run(asked, resume=tmp_path / "a.job")
    assert result.began_at == 2 and result.path.read_bytes() == right


# ---------------------------------------------------------------- how it ends


def test_bad_values_in_a_later_clip_keep_the_clips_before(
    task: str, pipes: dict[str, Pipeline], ask: Make, whole: dict[str, Path], tmp_path: Path,
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    right = DiT.forward
    with monkeypatch.context() as patch:
        bad = PASSES[task] * (STEPS + 1)
        patch.setattr(
            DiT, "forward", lambda self, *a, **b: right(self, *a, **b) * (float("nan") if calls["forward"] > bad else 1)
        )
        with pytest.raises(NumericalError, match="clip 2 of 3, step 2 of 3") as caught:
            pipes[task].run(ask(task, save_every=100), out=tmp_path / "a.mp4")
    assert caught.value.code == "E6001" and not (tmp_path / "a.mp4").exists()
    kept = [name for name in names(tmp_path / "a.job") if name.startswith("00.")]
    assert kept == ["00.0000.latents.safetensors", "00.0001.state-0001.safetensors"]
    result = pipes[task].run(ask(task), resume=tmp_path / "a.job")
    assert result.began_at == STEPS + 1
    assert (tmp_path / "a.mp4").read_bytes() == (whole[task] / "a.mp4").read_bytes()


@pytest.mark.parametrize(
    ("when", "words"),
    [
        (in_clip(1, step=2), "in clip 2 of 3, after step 2 of 3"),
        (in_clip(1, "decode"), "in clip 2 of 3, after denoising"),
        (in_clip(1, step=0), "in clip 2 of 3, before the first step"),
        (lambda event: event.stage == "encode", "before the first clip"),
    ],
)
def test_ctrl_c_says_in_which_clip(
    when: Callable[[Event], bool], words: str, pipes: dict[str, Pipeline], ask: Make, tmp_path: Path
) -> None:
    stream = pipes["s2v"].stream(ask("s2v"), out=tmp_path / "a.mp4")
    with pytest.raises(Interrupted) as caught:
        for event in stream:
            if when(event):
                stream.throw(KeyboardInterrupt())
    assert f"stopped {words}; nothing is lost." in caught.value.message
    assert f"wanloom generate --resume {tmp_path}/a.job" in caught.value.message


def test_frames_that_are_written_are_let_go(
    task: str, pipes: dict[str, Pipeline], ask: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Output] = []
    right = Output.write

    def write(self: Output, pixels: torch.Tensor) -> None:
        right(self, pixels)
        made.append(self)

    monkeypatch.setattr(Output, "write", write)
    pipes[task].run(ask(task), out=tmp_path / "a.mp4")
    assert made and not made[0].kept and not made[0].latents
