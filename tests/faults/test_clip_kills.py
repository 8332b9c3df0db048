"""`kill -9` over clips and steps of s2v and animate: nothing done is lost, and the bits are the same.

A run with `--save-every 1` is killed at a random point and continued with `--resume`, sometimes killed again.  Then: it
goes on at the clip and step after the last saved one and says so; only the step under way is computed twice; video and
tensors are equal, bit for bit; nothing else lies around.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import cases
import pytest

import tiny
from clip_files import CLIPS, PASSES, TASKS, three_clips
from wanloom.durable import sweep

STEPS = 4
KILLS, SAMPLE = 50, 4

# Names of `durable.failpoint`s, and how often each is passed.  A clip of s2v has 3 latent frames, behind 1 (the
# picture) or 19 (the past); one of animate 2, sharing 1 frame with the clip before, and the last shows 3 of its 4.
POINTS = {
    "s2v": {
        "conditioning": 1, "given": CLIPS, "step": CLIPS * STEPS, "state": CLIPS * (STEPS - 1), "latents": CLIPS,
        "decode": 4 + 22 + 22, "encode": 3 + 3 + 3, "sound": 1, "rename.mp4": 1, "published": 1, "finish": 1,
        "discard": 1,
    },
    "animate": {
        "conditioning": 1, "step": CLIPS * STEPS, "state": CLIPS * (STEPS - 1), "latents": CLIPS,
        "decode": 2 * CLIPS, "encode": 2 + 1 + 1, "rename.mp4": 1, "published": 1, "finish": 1, "discard": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Task -> the command line of three clips of four steps."""
    root = tmp_path_factory.mktemp("clips")
    fields = three_clips(root)
    given = {
        task: [word for name, value in fields[task].items() for word in (f"--{name.replace('_', '-')}", str(value))]
        for task in TASKS
    }
    return {
        task: [
            "generate", "--task", f"{task}-14B", "--ckpt-dir", str(tiny.checkpoint(root, f"{task}-14B")), "--prompt",
            "a red cat", *given[task], "--steps", str(STEPS), "--seed", "5", "--device", "cpu", "--save-every", "1",
            "--out", "a.mp4", "--save-tensors", "a.safetensors",
        ]
        for task in TASKS
    }  # fmt: skip


Undisturbed = Callable[[str, int], dict[str, str]]


@pytest.fixture(scope="module")
def undisturbed(
    zygote: cases.Zygote, commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    """Task and number of videos -> what a run without a kill leaves."""
    known: dict[tuple[str, int], dict[str, str]] = {}

    def result(task: str, videos: int = 1) -> dict[str, str]:
        if (task, videos) not in known:
            case = cases.Case(tmp_path_factory.mktemp("undisturbed"), zygote, [*commands[task], "--num", str(videos)])
            assert case.run() == 0, case.err
            assert case.calls == PASSES[task] * STEPS * CLIPS * videos
            known[task, videos] = case.hashes()
            assert len(known[task, videos]) == 2 * videos
        return known[task, videos]

    return result


def saved(case: cases.Case) -> tuple[set[tuple[int, int]], dict[tuple[int, int], int]]:
    """Of the job on disk: (video, clip) with latents, and (video, clip) -> steps done by its last state."""
    latents, states = set(), {}
    for path in sorted(case.folder.glob("[!.]*.job/??.????.*.safetensors")):
        video, clip, name, _ = path.name.split(".")
        if name == "latents":
            latents.add((int(video), int(clip)))
        else:
            states[int(video), int(clip)] = int(name.removeprefix("state-"))
    return latents, states


def where(case: cases.Case, videos: int) -> str:
    """What a resumed run must say, "" when there is nothing to denoise or nothing was done."""
    latents, states = saved(case)
    for place in ((video, clip) for video in range(videos) for clip in range(CLIPS)):
        if place in latents:
            continue
        if not latents and not states:
            return ""
        words = f"video {place[0] + 1} of {videos}, " if videos > 1 else ""
        return f"resuming at {words}clip {place[1] + 1} of {CLIPS}, step {states.get(place, 0) + 1} of {STEPS}"
    return ""


def finish(case: cases.Case, videos: int = 1) -> None:
    """What a person does after a kill: resume where there is a job, else run the command again."""
    jobs = list(case.folder.glob("[!.]*.job/plan.json"))  # one that was given up has a dot
    if jobs:
        said = where(case, videos)
        assert case.run(["generate", "--resume", jobs[0].parent.name]) == 0, case.err
        assert re.findall(r"resuming at .*", case.out) == [said][: bool(said)]
        assert "damaged" not in case.err
    elif not list(case.folder.glob("*.mp4")):
        assert case.run() == 0, case.err
    else:
        sweep(case.folder)  # as any later run in this folder does


def killed_at_random(number: int, case: cases.Case, task: str, expected: dict[str, str]) -> None:
    rng = random.Random(number)
    times = POINTS[task]
    name = rng.choice([*times, "step", "state", "latents", "decode", "encode"])
    point = f"{name}:{rng.randint(1, times[name])}"
    assert case.run(env={"WANLOOM_FAILPOINT": point}) == -9, f"{point} was not passed: {case.err}"
    kills = 1
    if rng.random() < 0.3 and (case.folder / "a.job" / "plan.json").exists():
        kills += case.run(["generate", "--resume", "a.job"], env={"WANLOOM_FAILPOINT": f"decode:{number}"}) == -9
    finish(case)
    assert case.hashes() == expected, point
    assert case.calls <= PASSES[task] * (STEPS * CLIPS + kills)


@pytest.mark.parametrize(
    "number", [*range(SAMPLE), *(pytest.param(i, marks=pytest.mark.faults) for i in range(SAMPLE, SAMPLE + KILLS))]
)
def test_a_run_killed_in_any_clip_goes_on_where_it_was(
    number: int, zygote: cases.Zygote, commands: dict[str, list[str]], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    task = TASKS[number % 2]
    killed_at_random(number, cases.Case(tmp_path, zygote, commands[task]), task, undisturbed(task))


@pytest.mark.parametrize("task", TASKS)
def test_of_several_videos_the_one_under_way_is_continued(
    task: str, zygote: cases.Zygote, commands: dict[str, list[str]], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    case = cases.Case(tmp_path, zygote, [*commands[task], "--num", "2"])
    point = f"state:{CLIPS * (STEPS - 1) + STEPS}"  # the first step of the second clip of the second video
    assert case.run(env={"WANLOOM_FAILPOINT": point}) == -9, case.err
    assert where(case, 2) == f"resuming at video 2 of 2, clip 2 of {CLIPS}, step 2 of {STEPS}"
    finish(case, videos=2)
    assert case.hashes() == undisturbed(task, 2)
    assert case.calls == PASSES[task] * STEPS * CLIPS * 2


@pytest.mark.parametrize("task", TASKS)
def test_ctrl_c_names_the_clip(
    task: str, zygote: cases.Zygote, commands: dict[str, list[str]], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    case = cases.Case(tmp_path, zygote, commands[task])
    assert case.run(interrupt_after=PASSES[task] * (STEPS + 2)) == 7, case.err
    said = re.search(
        rf"stopped in clip (\d) of {CLIPS}, after step \d of {STEPS}; nothing is lost. "
        r"Continue: wanloom generate --resume a\.job$",
        case.err, re.M,
    )  # fmt: skip
    assert said, case.err
    finish(case)
    assert case.hashes() == undisturbed(task)
