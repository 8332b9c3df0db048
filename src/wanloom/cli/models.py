"""`wanloom models`: the models there are, where to get them, how large they are."""

from __future__ import annotations

import json
from typing import Any

import click

from wanloom import demo
from wanloom.cli.console import bytes_text, rich_console
from wanloom.cli.options import Command
from wanloom.errors import InputError, did_you_mean
from wanloom.variants import VARIANTS, Variant

# Of which other sizes a model makes videos, by its conditioner; those with a line of their own are made clip by clip.
OTHER = "others that are multiples of {} work too"
OTHERS = {
    "speech": "an area; the shape is the picture's, in multiples of 64",
    "animate": "the pose video's, multiples of {}",
}


@click.command("models", cls=Command)
@click.argument("name", required=False, metavar="[NAME]")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def command(name: str | None, as_json: bool) -> None:
    """The models there are, where to get them, how large they are. With NAME: its files and defaults."""
    if name is not None and name not in VARIANTS:
        raise InputError("E2002", f"model: '{name}' is not known. {did_you_mean(name, VARIANTS)}")
    rows = [VARIANTS[name]] if name else list(VARIANTS.values())
    if as_json:
        facts = [describe(row) for row in rows]
        print(json.dumps(facts[0] if name else facts, indent=2, ensure_ascii=False))
    elif name:
        show_one(rows[0])
    else:
        show_all(rows)


def describe(row: Variant) -> dict[str, Any]:
    """One model as plain data: what it makes, its files with their bytes, its defaults."""
    defaults = row.defaults
    return {
        "name": row.name,
        "task": row.task,
        "about": row.about,
        "repositories": list(row.repos),
        "bytes": size(row),
        "present": is_present(row),
        "files": [{"part": file.part, "name": file.name, "bytes": file.bytes} for file in row.files],
        "inputs": {role: "needed" if needed else "optional" for role, needed in row.inputs},
        "sizes": ["x".join(map(str, pair)) for pair in row.sizes],
        "defaults": {
            "size": "x".join(map(str, defaults.size)),
            "frames": defaults.frames,
            "fps": defaults.fps,
            "steps": defaults.steps,
            "shift": defaults.shift,
            "guidance": {"low": defaults.guidance[0], "high": defaults.guidance[1]},
            "sampler": defaults.sampler,
        },
    }


def size(row: Variant) -> int:
    """Bytes to download; for a demo model, bytes on this disk."""
    return demo.size_of(row.name) if row.demo else sum(file.bytes for file in row.files)


def is_present(row: Variant) -> bool | None:
    """Whether a demo model's weights are here; None for published models, which lie where a person put them."""
    return row.name in demo.available() if row.demo else None


def show_all(rows: list[Variant]) -> None:
    """The table of all models on stdout."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, header_style="bold cyan", show_edge=False, pad_edge=False)
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("what it is", ratio=1)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("where", overflow="fold")
    for row in rows:
        bytes_ = bytes_text(size(row)) if size(row) else "-"
        table.add_row(row.name, row.about, bytes_, where(row))
    console = rich_console()
    console.print(table, "")
    console.print("To use a published model, fetch its repository from Hugging Face or ModelScope, for example")
    console.print(f"  hf download {VARIANTS['t2v-1.3B'].repos[0]} --local-dir models/t2v-1.3B", style="bold")
    console.print('  wanloom generate --task t2v-1.3B --ckpt-dir models/t2v-1.3B --prompt "..."', style="bold")
    console.print("`wanloom plan NAME` says whether this machine can run it; `wanloom models NAME` lists its files.")


def show_one(row: Variant) -> None:
    """One model's files and defaults on stdout."""
    from rich.table import Table
    from rich.text import Text

    facts = describe(row)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    table.add_row("name", Text(row.name, style="bold"))
    table.add_row("what", row.about)
    table.add_row("where", where(row))
    for file in row.files:
        table.add_row(f"file: {file.part}", f"{file.name}  {bytes_text(file.bytes)}")
    if row.files:
        table.add_row("in all", bytes_text(size(row)))
    table.add_row("sizes", ", ".join(facts["sizes"]) + f"; {OTHERS.get(row.conditioner, OTHER).format(row.multiple)}")
    inputs = [f"--{name.replace('_', '-')} ({need})" for name, need in facts["inputs"].items()]
    table.add_row("inputs", ", ".join(inputs) or "none")
    low, high = row.defaults.guidance
    guidance = f"{high} high, {low} low" if len(row.experts) > 1 else f"{low}"
    defaults = {**facts["defaults"], "guidance": guidance}
    table.add_row("defaults", ", ".join(f"{name} {value}" for name, value in defaults.items()))
    if row.conditioner in OTHERS:
        table.add_row("clips", f"the video is made clip by clip; a clip has {row.defaults.frames} frames")
    rich_console().print(table)


def where(row: Variant) -> str:
    """Where the weights come from, in words."""
    if not row.demo:
        return "\n".join(row.repos)
    if not is_present(row):
        return "not in this installation"
    return "inside this package" + (" (a smoke-test model)" if demo.is_smoke_test(row.name) else "")
