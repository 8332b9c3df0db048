"""The loop: phases, steps, saved states, looks at what is learned.  It knows no model; a task does.

    run(recipe)                       one or several processes
      for phase in recipe.phases      its own optimiser, schedule, average
        for step in phase             loss, backward, one update; now and then a state, a line, a look
      task.finish()                   the checkpoint in the published layout
A run that was killed goes on from its newest state and gives the same bits: batches and noise are functions of
the step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wanloom.durable import atomic_path
from wanloom.train.learner import Learner, learning_rate
from wanloom.train.ranks import Ranks, spawn
from wanloom.train.recipe import Phase, Recipe, Stage, read_recipe
from wanloom.train.report import Log, clock, plot
from wanloom.train.state import find_state, load_tensors, save_state
from wanloom.variants import VARIANTS


class Task(Protocol):
    """What is trained: its modules, the loss of a step, how to look at it, how to write it out."""

    modules: dict[str, nn.Module]

    def start(self, expert: str) -> None:
        """Take the weights of an expert of the recipe's `start` checkpoint."""

    def only(self, phase: Phase) -> tuple[str, ...] | None:
        """Prefixes of the parameters that this phase trains; None: all."""

    def loss(self, phase: Phase, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of this rank's batch at `step`, and figures for the log."""

    def look(self, phase: Phase, step: int, *, picture: bool) -> dict[str, Any]:
        """Held-out figures; all ranks call it, each does its share."""

    def finish(self) -> None:
        """Write the checkpoint from the phases' averages."""


def make_task(recipe: Recipe, ranks: Ranks, folder: Path) -> Task:
    if recipe.kind == "vae":
        from wanloom.train.vae import VaeTask

        return VaeTask(recipe, ranks, folder)
    if recipe.kind == "audio":
        from wanloom.train.audio import AudioTask

        return AudioTask(recipe, ranks, folder)
    if recipe.kind == "image":
        from wanloom.train.looks import LooksTask

        return LooksTask(recipe, ranks, folder)
    conditioner = VARIANTS[recipe.variant].conditioner
    if conditioner == "speech":
        from wanloom.train.speech import SpeechTask

        return SpeechTask(recipe, ranks, folder)
    if conditioner == "animate":
        from wanloom.train.dance import DanceTask

        return DanceTask(recipe, ranks, folder)
    from wanloom.train.flow import FlowTask

    return FlowTask(recipe, ranks, folder)


def run(path: str | Path, root: str | Path = "runs") -> Path:
    """Train what the recipe says, or go on with it; the folder of the run, with `checkpoint/` in it."""
    recipe = read_recipe(path)
    folder = Path(root) / recipe.name
    spawn(_train, recipe.processes, recipe.device, recipe, folder)
    return folder


def _train(ranks: Ranks, recipe: Recipe, folder: Path) -> None:
    torch.manual_seed(recipe.seed)
    task = make_task(recipe, ranks, folder)
    for phase in recipe.phases:
        _run_phase(task, phase, recipe, ranks, folder)
    task.finish()
    ranks.barrier()


def start_from(task: Task, averages: Path) -> None:
    """Give the task's modules the averages that a finished phase left."""
    values = load_file(averages)
    with torch.no_grad():
        for prefix, module in task.modules.items():
            for name, p in module.named_parameters():
                if f"{prefix}.{name}" in values:
                    p.copy_(values[f"{prefix}.{name}"])


def _run_phase(task: Task, phase: Phase, recipe: Recipe, ranks: Ranks, folder: Path) -> None:
    home = folder / phase.name
    done = home / "average.safetensors"
    if phase.init is not None and phase.init.startswith("start:"):
        task.start(phase.init.removeprefix("start:"))
    elif phase.init is not None:
        start_from(task, folder / phase.init / "average.safetensors")
    if done.exists():
        start_from(task, done)  # over what it began with: parts that the phase did not train are not in it
        return
    learner = Learner(task.modules, phase.optim, ranks, task.only(phase))
    home.mkdir(parents=True, exist_ok=True)
    step, before = 0, 0.0
    if (found := find_state(home, recipe.digest, ranks)) is not None:
        step, before, state = found
        learner.load(load_tensors(state, ranks))
    log = Log(folder / "log.jsonl") if ranks.first else None
    if log is not None:
        log(phase=phase.name, event="resume" if step else "start", step=step, parameters=learner.flat.numel())
    _run_steps(task, phase, recipe, ranks, learner, home, log, step, before)
    if log is not None:
        log.file.close()
    if ranks.first:
        averages = {n.removeprefix("average/"): v for n, v in learner.state().items() if n.startswith("average/")}
        with atomic_path(done) as part:
            save_file({k: v.contiguous() for k, v in averages.items()}, part)
    ranks.barrier()
    learner.show(learner.average)


def _run_steps(
    task: Task, phase: Phase, recipe: Recipe, ranks: Ranks, learner: Learner, home: Path, log: Log | None,
    step: int, before: float,
) -> None:  # fmt: skip
    watch, total = recipe.watch, phase.steps
    began, first, skipped = time.monotonic(), step, 0
    sums = torch.zeros(2)
    for step in range(first, total):
        loss, figures = task.loss(phase, phase.stage_at(step), step)
        loss.backward()  # type: ignore[no-untyped-call]
        norm, finite = learner.step(learning_rate(step, total, phase.optim), step)
        skipped += not finite
        sums += torch.tensor([float(loss.detach()), 1.0])
        done = step + 1
        seconds = before + time.monotonic() - began
        if log is not None and (done % watch.log == 0 or done == total):
            rate = (time.monotonic() - began) / (done - first)
            log(
                phase=phase.name, step=done, loss=float(sums[0] / sums[1]), **figures, norm=norm, skipped=skipped,
                seconds=round(seconds, 1), per_step=round(rate, 3), left=clock(rate * (total - done)),
            )  # fmt: skip
            sums.zero_()
        if done % watch.save == 0 and done < total:
            save_state(home, done, learner.state(), recipe.digest, ranks, seconds)
        picture = done % watch.sheet == 0 or done == total
        if picture or done % watch.loss == 0:
            with learner.averaged():
                report = task.look(phase, done, picture=picture)
            if log is not None:
                log(phase=phase.name, step=done, seconds=round(seconds, 1), **report)
                plot_if_possible(log)


def plot_if_possible(log: Log) -> None:
    """The loss plot, where matplotlib (extra `train`) is installed."""
    path = Path(log.file.name)
    try:
        plot(path, path.with_name("loss.png"))
    except ModuleNotFoundError:
        return
