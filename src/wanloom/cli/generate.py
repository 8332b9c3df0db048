"""`wanloom generate`: a video from a prompt, and pictures where the task takes them.

First everything is checked that can be checked without weights (`prepare.py`), then the pipeline works while its
progress is shown (`run.py`). The last line says the file, the time, the peak memory and the seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wanloom.cli.options import WORDS, Command, request_options
from wanloom.cli.prepare import prepare
from wanloom.cli.several import Several, read_several, several_options
from wanloom.errors import InputError
from wanloom.runtime.layouts import Place


@click.command("generate", cls=Command)
@request_options()
@several_options
@click.option("--like", metavar="FILE", help="Make the video in FILE again; other options change it.")
@click.option("--resume", metavar="DIR", help="Continue an unfinished run from its folder.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan as JSON; make nothing.")
@click.pass_context
def command(ctx: click.Context, /, like: str | None, resume: str | None, dry_run: bool, **params: Any) -> int | None:
    """Make a video from a prompt, and an image where the task takes one.

    \b
    wanloom generate --prompt "a red circle moves left on sand"
    wanloom generate --task t2v-A14B --ckpt-dir Wan2.2-T2V-A14B --prompt "two cats boxing on a stage"
    wanloom generate --task i2v-A14B --ckpt-dir Wan2.2-I2V-A14B --image cat.jpg --prompt "the cat surfs"

    With --gpus N, or under torchrun, several processes make it together.
    Without a checkpoint the small model inside this package runs. Not given, a number is the model's default.
    """
    if like is not None and resume is not None:
        raise InputError("E2023", "resume: conflicts with --like. An unfinished run already knows what it makes.")
    several = read_several(params)
    if not dry_run and several.start:
        return _supervised(ctx, several, params, resume)
    if several.place is not None and several.place.rank > 0:
        return 0 if dry_run else _following(several.place)
    run = prepare(
        params, like=Path(like) if like else None, resume=Path(resume) if resume else None, dry_run=dry_run,
        several=several,
    )  # fmt: skip
    if dry_run:
        print(run.plan.to_json(indent=2))
        return None
    from wanloom.cli.run import make

    make(run)
    return None


def _supervised(ctx: click.Context, several: Several, params: dict[str, Any], resume: str | None) -> int:
    """The same command in processes that are started here."""
    from wanloom.cli.supervise import supervise

    device = params.get("device")
    if device is None and resume is not None:
        from wanloom.jobs import stored_request

        device = stored_request(resume).get("device")
    words = [word for word in ctx.meta[WORDS] if not word.startswith("--gpus")]
    if "--gpus" in ctx.meta[WORDS]:
        at = ctx.meta[WORDS].index("--gpus")
        words = [*ctx.meta[WORDS][:at], *ctx.meta[WORDS][at + 2 :]]
    return supervise(words, several.start, None if device is None else str(device))


def _following(place: Place) -> int:
    from wanloom.cli.crew import follow

    return follow(place)
