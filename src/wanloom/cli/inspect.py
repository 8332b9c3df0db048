"""`wanloom inspect PATH`: what a checkpoint file or directory is, read from headers alone."""

from __future__ import annotations

import json

import click

from wanloom.cli.options import Command
from wanloom.errors import InputError


@click.command("inspect", cls=Command)
@click.argument("path", required=False, metavar="[PATH]")
@click.option("--manifest", metavar="NAME", help="instead: the tensors of our own module of a released model")
@click.option("--json", "as_json", is_flag=True, help="the same as JSON")
def command(path: str | None, manifest: str | None, as_json: bool) -> None:
    """Say what a checkpoint file or directory is: which released models it can be, number formats, sizes.

    With --manifest NAME (such as wan2.2-t2v-a14b-dit) PATH is left out.
    """
    from wanloom.checkpoint import inspect

    if (path is None) == (manifest is None):
        raise InputError("E2023", "inspect: give a PATH, or --manifest NAME, and not both.")
    if manifest is not None:
        tensors = inspect.manifest(manifest)
        if as_json:
            print(json.dumps(tensors))
        else:
            for name, shape in tensors["tensors"].items():
                print(f"{name}  {'x'.join(map(str, shape)) or 'scalar'}")
        return
    report = inspect.inspect(path or ".")
    print(json.dumps(report.to_json(), indent=2) if as_json else "\n".join(report.lines()))
