"""`wanloom demo`: a video by the model inside this package, with nothing to download and no GPU.

`--all` makes one with each demo model, an HTML page that shows them side by side, and a sheet of their frames.
"""

from __future__ import annotations

import html
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from wanloom import __version__, demo
from wanloom.cli.console import bytes_text, say
from wanloom.cli.options import Command
from wanloom.durable import free_name
from wanloom.errors import InputError
from wanloom.runtime import machine
from wanloom.variants import VARIANTS

FOLDER = Path("outputs")
TASKS = {
    "t2v": "text to video", "i2v": "image to video", "ti2v": "text and image to video", "s2v": "speech to video",
    "animate": "character animation",
}  # fmt: skip


@click.command("demo", cls=Command)
@click.option("--prompt", metavar="TEXT", help="what the video shows: plain shapes that move")
@click.option("--seed", default="7", metavar="N", help="another number, another video (default: 7)")
@click.option("--all", "every", is_flag=True, help="one video with each demo model, and a page that shows them")
@click.option("--preview", is_flag=True, help="show the video while it forms")
def command(prompt: str | None, seed: str, every: bool, preview: bool) -> None:
    """Make a video with the model that ships inside: no download, no GPU.

    The models were trained by this project on a small world of moving shapes; they are not Wan checkpoints.
    """
    names = list(demo.available())
    if not names:
        raise InputError("E4001", "demo: this installation has no demo weights. `wanloom models` says what there is.")
    say(header())
    FOLDER.mkdir(exist_ok=True)
    made = []
    for name in names if every else names[:1]:
        made.append(one(name, prompt, seed, preview))
        if VARIANTS[name].conditioner == "animate":
            made.append(one(name, prompt, seed, preview, replaced=True))
    say()
    if every:
        page, sheet = FOLDER / "demo.html", FOLDER / "demo.png"
        write_page(page, made)
        write_sheet(sheet, made)
        say(f"All together: {page}, and as one picture: {sheet}")
    say('Next   wanloom generate --prompt "a blue star bounces on sand"      your own')
    if not every and len(names) > 1:
        say("       wanloom demo --all                                         every demo model, on one page")
    say("       wanloom plan t2v-A14B                                      what the real model needs here")


def one(name: str, prompt: str | None, seed: str, preview: bool, *, replaced: bool = False) -> tuple[str, str, Path]:
    """One video by one demo model: what it is, the prompt, the file.

    replaced: the figure is put into another room (demo-animate).
    """
    from wanloom.cli.prepare import prepare
    from wanloom.cli.run import make

    row = VARIANTS[name]
    people = row.conditioner in ("speech", "animate")
    words = demo.EXAMPLES[name] if prompt is None or people else prompt
    what = f"{name}-replace" if replaced else name
    given = inputs_of(name, words, FOLDER / f"{what}_inputs", replaced=replaced)
    typed: dict[str, Any] = {"task": name, "prompt": words, "seed": seed, "preview": preview, **given}
    run = prepare(typed, like=None, resume=None, dry_run=True)
    out = free_name(FOLDER / f"{what}_{run.plan.seed}.mp4")
    run = replace(run, outputs=(out,), demo_name=None)
    kind = TASKS[name.removeprefix("demo-")] + (", replacing somebody" if replaced else "")
    state = "a smoke-test model" if demo.is_smoke_test(name) else "trained by this project"
    say()
    say(f"Model  {name}: {kind}, {bytes_text(demo.size_of(name))} inside this package, {state}; not a Wan checkpoint")
    say(f'Prompt "{words}"' + "".join(f", {role} {path}" for role, path in given.items() if path is not True))
    make(run)
    return what, words, out


def inputs_of(name: str, words: str, folder: Path, *, replaced: bool) -> dict[str, str | bool]:
    """Draw the pictures, sounds and videos that a demo model needs into `folder`: fields of the request."""
    row = VARIANTS[name]
    if row.conditioner in ("speech", "animate"):
        from wanloom.demo import cases

        folder.mkdir(exist_ok=True)
        if row.conditioner == "speech":
            found = cases.speech_case(0, folder).given
        else:
            found = cases.dance_case(int(replaced), folder).given
        return {role: path if isinstance(path, bool) else str(path) for role, path in found.items()}
    if not row.needs("image"):
        return {}
    folder.mkdir(exist_ok=True)
    demo.draw_first_frame(words, folder / "start.png", size=row.defaults.size[0])
    return {"image": str(folder / "start.png")}


def header() -> str:
    """'wanloom 0.1.0, Python 3.11.7, torch 2.13.0 (2 threads), no GPU'."""
    graphics = machine.gpus()
    card = graphics[0].name if graphics else "no GPU"
    torch = f"torch {version('torch')} ({machine.threads()} threads)"
    return f"wanloom {__version__}, Python {platform.python_version()}, {torch}, {card}"


def write_page(page: Path, made: list[tuple[str, str, Path]]) -> None:
    """One HTML page with all videos, which lie beside it."""
    from wanloom.durable import write_atomic

    figures = "\n".join(
        f'<figure><video src="{html.escape(file.name)}" autoplay loop muted playsinline controls></video>'
        f"<figcaption><b>{html.escape(name)}</b><br>{html.escape(prompt)}</figcaption></figure>"
        for name, prompt, file in made
    )
    style = (
        "body{font:16px sans-serif;margin:2em;background:#fafafa}figure{display:inline-block;margin:1em;width:256px}"
        "video{width:256px;height:256px;image-rendering:pixelated;border-radius:8px}"
    )
    text = f'<!DOCTYPE html><meta charset="utf-8"><title>wanloom demo</title><style>{style}</style>\n{figures}\n'
    write_atomic(page, text.encode())


def write_sheet(path: Path, made: list[tuple[str, str, Path]]) -> None:
    """All videos as rows of six frames."""
    from wanloom import media

    rows = [(f"{name}: {prompt}", [media.read_video(file).frames]) for name, prompt, file in made]
    media.contact_sheet(rows, path, scale=1, across=6)
