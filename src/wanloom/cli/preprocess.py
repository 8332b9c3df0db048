"""`wanloom preprocess animate`: the folder that the animate model is given, from a driving video and a picture."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wanloom.cli.console import say, time_text
from wanloom.cli.options import Command
from wanloom.cli.progress import View, open_view
from wanloom.errors import InputError
from wanloom.request import parse_size

if TYPE_CHECKING:
    from wanloom.preprocess.animate import Progress

PATHS = (
    "video", "image", "out", "ckpt_dir", "process_checkpoint", "sam2", "keypoints", "image_keypoints", "mask_video",
)  # fmt: skip


@click.group("preprocess", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Make a model's inputs from raw videos and pictures."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


@command.command("animate", cls=Command)
@click.option("--video", required=True, metavar="FILE", help="The driving video: whose movements are taken.")
@click.option("--image", required=True, metavar="FILE", help="The picture: who shall move so.")
@click.option("--out", required=True, metavar="DIR", help="The folder to make.")
@click.option("--replace", is_flag=True, help="Put the person into the video's scene: also masks and background.")
@click.option("--retarget", is_flag=True, help="Keep the bone lengths of the picture's person.")
@click.option("--ckpt-dir", metavar="DIR", help="Wan2.2-Animate-14B, with process_checkpoint/ in it.")
@click.option("--process-checkpoint", metavar="DIR", help="The directory process_checkpoint/ itself.")
@click.option("--sam2", metavar="DIR", help="SAM2 in transformers' format (--replace).")
@click.option("--keypoints", metavar="FILE", help="133 points a frame as JSON, in place of the networks.")
@click.option("--image-keypoints", metavar="FILE", help="The same for the picture (--retarget).")
@click.option("--mask-video", metavar="FILE", help="White where the person is, in place of SAM2 (--replace).")
@click.option("--size", metavar="WxH", help="The area of the videos; proportions stay (default: 1280x720).")
@click.option("--fps", metavar="N", help="Frames per second; -1 keeps the video's own (default: 30).")
@click.option("--mask-dilation", metavar="N", help="Pixels that the mask grows (default: 9).")
@click.option("--mask-cells", metavar="W,H", help="Cells of the mask's box; 0 keeps the outline (default: 1,1).")
@click.option("--reference-channels", is_flag=True, help="Blue and red swapped for the networks, as the official code.")
@click.option("--overwrite", is_flag=True, help="Replace the files that are there.")
def animate(**params: Any) -> None:
    """Make the inputs of the animate model.

    \b
    wanloom preprocess animate --video dance.mp4 --image me.png --ckpt-dir Wan2.2-Animate-14B --out dance
    wanloom preprocess animate --video dance.mp4 --image me.png --keypoints dance.json --out dance

    Look at sheet.png in the folder before a long run.
    """
    values = _values(params)
    from wanloom.preprocess.animate import Settings, preprocess

    started = time.perf_counter()
    with open_view() as view:
        made = preprocess(Settings(**values), _follow(view))
    wide, high = made.size
    say(f"Wrote {made.folder}: {', '.join(made.files)}")
    seconds = time_text(time.perf_counter() - started)
    say(f"{made.frames} frames of {wide}x{high} at {float(made.fps):g} a second, in {seconds}; look at sheet.png first")


def _follow(view: View) -> Progress:
    """What shows the stages of the work."""
    stage = ""

    def progress(name: str, done: int, total: int | None) -> None:
        nonlocal stage
        if name != stage:
            stage = name
            view.stage(name, total, done)
        elif total:
            view.step(done)

    return progress


def _values(params: dict[str, Any]) -> dict[str, Any]:
    """What was typed as fields of Settings.  Errors: E2003 size, E2022 and E2032 numbers."""
    values = {name: value for name, value in params.items() if value is not None}
    for name in PATHS:
        if name in values:
            values[name] = Path(values[name])
    if "size" in values:
        values["size"] = parse_size(values["size"])
    if "fps" in values:
        values["fps"] = _rate(values["fps"])
    dilation = values.pop("mask_dilation", None)
    if dilation is not None:
        (values["dilation"],) = _whole("mask-dilation", dilation, 1, 0, 256)
    cells = values.pop("mask_cells", None)
    if cells is not None:
        values["cells"] = None if cells.strip() == "0" else _whole("mask-cells", cells, 2, 1, 256)
    return values


def _rate(text: str) -> float | None:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not math.isfinite(rate):
        raise InputError("E2032", f"fps: got '{text}', expected a number from 1 to 120, or -1 for the video's own.")
    return None if rate == -1 else rate


def _whole(name: str, text: str, count: int, low: int, high: int) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(low <= number <= high for number in numbers):
        form = "W,H, each a whole number" if count == 2 else "a whole number"
        raise InputError("E2022", f"{name}: got '{text}', expected {form} from {low} to {high}.")
    return numbers
