"""`wanloom generate`: a video from a prompt, and pictures where the task takes them.

First everything is checked that can be checked without weights (`prepare.py`), then the pipeline works while its
progress is shown (`run.py`). The last line says the file, the time, the peak memory and the seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wanloom.cli.options import Command, request_options
from wanloom.cli.prepare import prepare
from wanloom.errors import InputError


@click.command("generate", cls=Command)
@request_options()
@click.option("--like", metavar="FILE", help="Make the video in FILE again; other options change it.")
@click.option("--resume", metavar="DIR", help="Continue an unfinished run from its folder.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan as JSON; make nothing.")
def command(like: str | None, resume: str | None, dry_run: bool, **params: Any) -> None:
    """Make a video from a prompt, and an image where the task takes one.

    \b
    wanloom generate --prompt "a red circle moves left on sand"
    wanloom generate --task t2v-A14B --ckpt-dir Wan2.2-T2V-A14B --prompt "two cats boxing on a stage"
    wanloom generate --task i2v-A14B --ckpt-dir Wan2.2-I2V-A14B --image cat.jpg --prompt "the cat surfs"

    Without a checkpoint the small model inside this package runs. Not given, a number is the model's default.
    """
    if like is not None and resume is not None:
        raise InputError("E2023", "resume: conflicts with --like. An unfinished run already knows what it makes.")
    run = prepare(params, like=Path(like) if like else None, resume=Path(resume) if resume else None, dry_run=dry_run)
    if dry_run:
        print(run.plan.to_json(indent=2))
        return
    from wanloom.cli.run import make

    make(run)
