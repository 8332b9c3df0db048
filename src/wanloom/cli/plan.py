"""`wanloom plan`: what a run would need, what this machine has, and whether it fits. Nothing is loaded.

Bytes and operations come from the Plan by closed formulas (`budget.py`), where parts are from `placement.py`, the time
from `forecast.py`; the machine is asked through the operating system. Exit code 0: it fits, 5: it does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import click

from wanloom import budget, demo
from wanloom.cli.console import bytes_text, count_text, rich_console, time_text
from wanloom.cli.forecast import Forecast, forecast
from wanloom.cli.options import DEFAULT_TASK, Command, read_request, request_options
from wanloom.cli.room import PLENTY, Basis, basis_of, dtype_of, place_of, runs_on_gpu, what_is_free
from wanloom.errors import InputError
from wanloom.placement import MemoryPlan
from wanloom.plan import Plan, make_plan
from wanloom.request import Request
from wanloom.variants import VARIANTS, Variant, variant_for

# Ways to take less memory: as it is (streamed where it has to be, which changes no bit), then in pieces (to rounding),
# with a decoder in half of its memory; a transformer in 8 bits.
KEEPS: tuple[dict[str, Any], ...] = (
    {}, {"row_chunks": 4096, "vae_rows": 64}, {"vae_dtype": "bfloat16"}, {"quantise": "int8"},
)  # fmt: skip
OFFERS = 3  # other runs that are named
RESOURCES = {"disk": "disk", "host": "memory", "gpu": "GPU"}


@dataclass(frozen=True)
class Outlook:
    """One run beside one machine."""

    plan: Plan
    variant: Variant
    request: Request
    dtype: str
    on_gpu: bool
    memory: MemoryPlan
    time: Forecast
    basis: Basis
    have: budget.Have
    fetch: int  # bytes of the checkpoint that are still to download
    short: tuple[budget.Shortage, ...]

    @property
    def need(self) -> budget.Need:
        return self.memory.need


@click.command("plan", cls=Command)
@click.argument("model", required=False, metavar="[MODEL]")
@request_options()
@click.option("--json", "as_json", is_flag=True, help="The numbers as JSON.")
def command(model: str | None, as_json: bool, **params: Any) -> int:
    """What a run would need, what this machine has, and whether it fits: exit code 0 or 5.

    MODEL is a task or a demo model, as in `wanloom models`; all options of `wanloom generate` count. A video that is
    made clip by clip (s2v, animate) is counted as one clip; s2v as --num-clips of them, where that is given.
    """
    if model is not None:
        if params.get("task") not in (None, model):
            raise InputError("E2023", f"model: '{model}' and --task {params['task']} name two. Give one.")
        params["task"] = model
    request = read_request(params)
    outlook = look(request, _variant(request))
    if as_json:
        print(json.dumps(describe(outlook), indent=2))
    else:
        show(outlook)
    return 5 if outlook.short else 0


def look(request: Request, variant: Variant, basis: Basis | None = None) -> Outlook:
    """Plan a request and hold it against this machine; basis: what is known of it, read where it is not given."""
    plan = make_plan(request, variant, draft=True)
    on_gpu = runs_on_gpu(request)
    dtype = dtype_of(request, on_gpu=on_gpu)
    basis = basis or basis_of(request, on_gpu=on_gpu)
    have = what_is_free(request, (request.out or Path()).parent, on_gpu=on_gpu)
    memory = place_of(request, plan, variant, have, basis, on_gpu=on_gpu)
    time = forecast(request, plan, variant, memory, basis, on_gpu=on_gpu)
    fetch = 0 if request.ckpt_dir or request.dit or request.dit_high else sum(file.bytes for file in variant.files)
    short = budget.fits(replace(memory.need, disk=memory.need.disk + fetch), have)
    return Outlook(plan, variant, request, dtype, on_gpu, memory, time, basis, have, fetch, short)


def describe(outlook: Outlook) -> dict[str, Any]:
    """The same as plain data, in bytes and operations."""
    need = asdict(outlook.need)
    return {
        "plan": json.loads(outlook.plan.to_json()),
        "dtype": outlook.dtype,
        "on": "gpu" if outlook.on_gpu else "cpu",
        "checkpoint_bytes": outlook.fetch,
        "need": {**need, "flops": outlook.need.flops},
        "have": asdict(outlook.have),
        "placement": {
            "modes": dict(outlook.memory.modes),
            "resident_blocks": outlook.memory.resident_blocks,
            "guidance_at_once": outlook.memory.at_once,
        },
        "seconds": {**outlook.time.seconds, "total": outlook.time.total},
        "calibrated": outlook.time.measured,
        "earlier_runs": outlook.time.runs,
        "fits": not outlook.short,
        "short": [asdict(item) for item in outlook.short],
    }


def show(outlook: Outlook) -> None:
    """Three small tables on stdout: the run, its stages, this machine; then the verdict."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    console = rich_console()
    console.print(Text.assemble((outlook.variant.name, "bold"), "  ", headline(outlook.plan)))
    place = "the GPU" if outlook.on_gpu else "the CPU"
    console.print(Text(f"in {outlook.dtype} on {place}\n", style="dim"))
    stages = Table(box=SIMPLE_HEAD, header_style="bold cyan", show_edge=False, pad_edge=False)
    stages.add_column("stage")
    for title in ("weights", "working", "operations"):
        stages.add_column(title, justify="right")
    for stage in outlook.need.stages:
        numbers = bytes_text(stage.weights), bytes_text(stage.activations), count_text(stage.flops)
        stages.add_row(stage.name, *numbers)
    console.print(stages, "")
    table = Table(box=SIMPLE_HEAD, header_style="bold cyan", show_edge=False, pad_edge=False)
    for title in ("", "needed", "free here", ""):
        table.add_column(title, justify="right" if title else "left")
    for row in _resources(outlook):
        table.add_row(*row)
    console.print(table, "")
    console.print(Text(f"placement: {outlook.memory.words(outlook.variant.dit.layers)}"), soft_wrap=True)
    stages_text = ", ".join(f"{name} {time_text(seconds)}" for name, seconds in outlook.time.seconds.items())
    console.print(Text(f"time: {outlook.time.words()}: {stages_text}"), soft_wrap=True)
    if not outlook.time.measured:
        console.print(Text("`wanloom doctor --calibrate` measures this machine in some seconds.", style="dim"))
    for line in verdict(outlook):
        console.print(Text(line, style="bold red" if outlook.short else "green"), soft_wrap=True)


def headline(plan: Plan) -> str:
    """'832x480, 81 frames at 16 fps, unipc 40 steps, shift 12, guidance 4 high 3 low'; with several clips how many."""
    low, high = plan.guidance
    guidance = f"{high:g}" if low == high else f"{high:g} high {low:g} low"
    shift = f", shift {plan.shift:g}" if plan.shift is not None else f" at {_levels(plan)}"
    shift += f", {plan.boundary_step} of high noise" if plan.boundary_step is not None else ""
    clips = f" in {len(plan.segments)} clips" if len(plan.segments) > 1 else ""
    return (
        f"{plan.size[0]}x{plan.size[1]}, {plan.frames} frames{clips} at {float(plan.rate):.4g} fps, "
        f"{plan.sampler} {plan.steps} steps{shift}, guidance {guidance}"
    )


def _levels(plan: Plan) -> str:
    """The noise levels that were given, the middle of many left out."""
    words = [f"{sigma:.4g}" for sigma in plan.sigmas[:-1]]
    return " ".join(words if len(words) <= 8 else [*words[:4], "...", *words[-2:]])


def verdict(outlook: Outlook) -> list[str]:
    """One line that says whether it fits, and when it does not, what would, cheapest first."""
    if not outlook.short:
        return ["It fits."]
    words = [
        f"{RESOURCES[item.what]}: {bytes_text(item.need)} needed, {bytes_text(item.have)} free"
        for item in outlook.short
    ]
    lines = [f"It does not fit. {'; '.join(words)}."]
    found = islice(dict.fromkeys(islice(alternatives(outlook), 2 * OFFERS)), OFFERS)
    lines += [f"{'Or' if number else 'This would'}: wanloom plan {words}" for number, words in enumerate(found)]
    return lines


def alternatives(outlook: Outlook) -> Iterator[str]:
    """Runs that fit this machine, as words for `wanloom plan`: what costs nothing first, then the least changed."""
    request, basis = outlook.request, outlook.basis
    plain = replace(request, resident_blocks=None, offload_model=None, guidance_batch=None)
    if plain != request and not look(plain, outlook.variant, basis).short:
        frames = None if outlook.variant.needs("audio") else outlook.plan.frames
        yield _words(outlook.variant, outlook.plan.asked, frames, outlook.dtype, {}, request.device)
    alike = [row for row in VARIANTS.values() if not row.demo and _needed(row) == _needed(outlook.variant)]
    by_size = sorted(alike, key=lambda row: sum(file.bytes for file in row.files), reverse=True)
    here = by_size.index(outlook.variant) if outlook.variant in by_size else 0
    for row in by_size[here:]:
        for size, frames in product(*_shapes(row, outlook.plan if row is outlook.variant else None)):
            for dtype, keep in product(dict.fromkeys((outlook.dtype, "bfloat16")), KEEPS):
                other = Request(task=row.name, size=size, frames=frames, dtype=dtype, device=request.device, **keep)
                if not look(other, row, basis).short:
                    yield _words(row, size, frames, dtype, keep, request.device)
                    break
    if (name := f"demo-{outlook.variant.task.partition('-')[0]}") in demo.available():
        yield name


def _shapes(row: Variant, plan: Plan | None) -> tuple[list[tuple[int, int]], list[int | None]]:
    """Sizes and lengths to try, what was asked for first; a sound has a length of its own."""
    small = min(row.sizes, key=lambda size: size[0] * size[1])
    size, frames = (plan.asked, plan.frames) if plan else (row.defaults.size, row.defaults.frames)
    sizes = [size, *([small] if small[0] * small[1] < size[0] * size[1] else [])]
    return sizes, [None] if row.needs("audio") else [frames, *([33] if frames > 33 else [])]


def _words(
    row: Variant, size: tuple[int, int], frames: int | None, dtype: str, keep: Mapping[str, Any],
    device: str | None = None,
) -> str:  # fmt: skip
    """A run as words for `wanloom plan`."""
    given = {"size": f"{size[0]}x{size[1]}", "frames": frames, "dtype": dtype, **keep, "device": device}
    return row.name + "".join(
        f" --{name.replace('_', '-')} {value}" for name, value in given.items() if value is not None
    )


def _needed(row: Variant) -> list[str]:
    """The inputs that a model cannot do without."""
    return [name for name, needed in row.inputs if needed]


def _resources(outlook: Outlook) -> Iterator[tuple[str, str, str, str]]:
    short = {item.what for item in outlook.short}
    needed = {"host": outlook.need.host, "gpu": outlook.need.gpu, "disk": outlook.need.disk + outlook.fetch}
    free = {"host": outlook.have.host, "gpu": outlook.have.gpu or 0, "disk": outlook.have.disk}
    for what, bytes_ in needed.items():
        if not bytes_:
            continue
        remark = f"of it {bytes_text(outlook.fetch)} checkpoint to fetch" if what == "disk" and outlook.fetch else ""
        if what in short:
            remark = f"too little{', ' if remark else ''}{remark}"
        yield RESOURCES[what], bytes_text(bytes_), bytes_text(free[what]) if free[what] < PLENTY else "unknown", remark


def _variant(request: Request) -> Variant:
    """The published model of a task (its demo model only when named so). Error: E2002."""
    task = request.task or DEFAULT_TASK
    return VARIANTS[task] if task in VARIANTS else variant_for(task)
