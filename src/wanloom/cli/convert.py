"""`wanloom convert SRC DST --to LAYOUT`: a checkpoint in another layout or number format, with its SHA-256 sums."""

from __future__ import annotations

import time

import click

from wanloom.cli.console import bytes_text, say, time_text
from wanloom.cli.options import Command


@click.command("convert", cls=Command)
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST")
@click.option("--to", default="official", metavar="NAME", help="official, diffusers or comfy (default: official)")
@click.option("--dtype", metavar="NAME", help="bf16, fp16 or fp32 (default: as stored)")
@click.option("--overwrite", is_flag=True, help="write into a directory that is not empty")
def command(src: str, dst: str, to: str, dtype: str | None, overwrite: bool) -> None:
    """Write a checkpoint in another layout or number format.

    SRC is a model directory, or one model's file (a pickled .pth is read as data, never executed). DST is a new
    directory; beside the weights it gets a manifest with the SHA-256 of every file, which loading then checks.
    """
    from wanloom.checkpoint.convert import convert

    started = time.perf_counter()
    written = convert(src, dst, to=to, dtype=dtype, overwrite=overwrite)
    total = 0
    for file in written.files:
        size = file.stat().st_size
        total += size
        say(f"{bytes_text(size):>9}  {file.relative_to(written.path) if file != written.path else file.name}")
    took = time_text(time.perf_counter() - started)
    say(f"Wrote {written.path}: {len(written.files)} files, {bytes_text(total)}, {took}")
