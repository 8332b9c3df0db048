"""`wanloom calibrate cache`: measure what `--cache magcache` and `--cache teacache` have to know of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from wanloom.cli.console import say
from wanloom.cli.options import Command, request_options
from wanloom.cli.prepare import prepare
from wanloom.errors import InputError


@click.command("calibrate", cls=Command)
@click.argument("what", metavar="cache", type=click.Choice(["cache"]))
@request_options()
@click.option("--videos", default=4, metavar="N", help="How many videos to measure, with seeds s, s+1, ... (4).")
@click.option("--beside", is_flag=True, help="Keep the figures beside the checkpoint, not in your cache directory.")
def command(what: str, videos: int, beside: bool, **params: Any) -> None:
    """Measure a model for the step caches that need it. Nothing is decoded, no video is written.

    \b
    wanloom calibrate cache --task t2v-A14B --ckpt-dir Wan2.2-T2V-A14B --prompt "two cats boxing on a stage"

    Takes the time of so many videos. Later runs of this checkpoint find what was measured by themselves.
    """
    if not 1 <= videos <= 100:
        raise InputError("E2029", f"videos: got {videos}, expected a whole number, 1..100.")
    run = prepare(params, like=None, resume=None, dry_run=True)
    from wanloom.calibrate import calibrate, keep
    from wanloom.cli.progress import open_view
    from wanloom.cli.run import pipeline_of

    pipe = pipeline_of(run)
    prompts = _prompts(run.request.prompt, run.demo_name, videos)
    requests = [
        replace(run.request, out=None, seed=run.plan.seed + i, prompt=prompt) for i, prompt in enumerate(prompts)
    ]
    steps = run.plan.steps
    with open_view() as view:
        view.stage("measure", steps * videos, 0)
        fit = calibrate(
            pipe, requests,
            lambda number, event: view.step(steps * number + event.step, event.peak_gpu or event.peak_host)
            if event.stage == "denoise" else None,
        )  # fmt: skip
    say(f"measured {fit.about}; kept in {keep(fit, pipe, beside=beside)}")


def _prompts(prompt: str, demo_name: str | None, videos: int) -> list[str]:
    """The prompt for each video; the demo models of shapes get prompts of their own world."""
    if demo_name is None or prompt.strip():
        return [prompt] * videos
    from wanloom.demo.world import example_prompts

    return example_prompts(videos)
