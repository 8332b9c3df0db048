"""Run what was prepared, and show it: the plan line, the stages as they pass, the last line.

This is where torch is imported; everything before it is done by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanloom import demo, records
from wanloom.cli.console import bytes_text, say, time_text
from wanloom.cli.plan import headline
from wanloom.cli.prepare import Prepared
from wanloom.cli.progress import View, open_view
from wanloom.cli.room import device_of, kind_of
from wanloom.rates import device_key
from wanloom.records import Meter, Record

if TYPE_CHECKING:
    from wanloom.cli.crew import Lead
    from wanloom.pipeline import Pipeline, Stream
    from wanloom.results import Event, Result


CLIPS = "clips"  # one stage for videos made clip by clip: it counts denoising steps, decoding comes between them


def make(run: Prepared) -> Result:
    """Make the videos of a prepared run. Errors: those of `Pipeline.stream`, Interrupted (exit 7) among them."""
    started = time.monotonic()
    for line in opening(run):
        say(line)
    meter = Meter()
    with _company(run) as leading:
        pipe = pipeline_of(run, leading)
        with open_view() as view:
            # A continued run knows its files itself; naming them again could only contradict it.
            outputs = None if run.resume else run.outputs
            result = follow(pipe.stream(run.request, out=outputs, resume=run.resume), view, meter.hear)
    remember(run, result, meter)
    for line in closing(result, time.monotonic() - started):
        say(line)
    return result


def _company(run: Prepared) -> AbstractContextManager[Lead | None]:
    """The other processes of a run of several; a run alone has nobody."""
    if run.several.alone:
        return nullcontext()
    from wanloom.cli.crew import lead

    return lead(run)


def pipeline_of(run: Prepared, leading: Lead | None = None) -> Pipeline:
    """The pipeline that a prepared run asks for; of the first of several processes."""
    from wanloom.pipeline import Pipeline

    request = run.request
    make: dict[str, Any] = {} if leading is None else {"make_parts": leading.make_parts}
    pipe = Pipeline(
        run.variant,
        run.files,
        device=request.device if leading is None else leading.device,
        dtype=request.dtype or ("bfloat16" if request.convert_model_dtype else None),
        text_device="cpu" if request.t5_cpu else None,
        attention=request.attention,
        compile=request.compile,
        fused=request.fused,
        quantise=request.quantise,
        resident_blocks=request.resident_blocks,
        vae_dtype=request.vae_dtype,
        offload=request.offload_model,
        memory=run.memory,
        row_chunks=request.row_chunks,
        vae_rows=request.vae_rows,
        **make,
    )
    if leading is not None:
        leading.pipe = pipe
    return pipe


def remember(run: Prepared, result: Result, meter: Meter) -> None:
    """Keep what a run took, for later estimates; not of one that was continued, of which a part is missing."""
    if result.began_at:
        return
    on_gpu = bool(run.need.gpu)
    kind = kind_of(run.request, run.variant, on_gpu=on_gpu, several=run.several)
    record = Record(
        kind=kind, estimated=run.time.raw, seconds=meter.seconds,
        need=run.need.host, peak=result.peak_host_bytes, need_gpu=run.need.gpu, peak_gpu=result.peak_gpu_bytes or 0,
    )  # fmt: skip
    records.keep(record, device_key(device_of(run.request, on_gpu=on_gpu)), run.basis.rates)


def follow(stream: Stream, view: View, hear: Callable[[Event], None] = lambda event: None) -> Result:
    """Show a pipeline's events to the end and return its result; `hear` is told each of them."""
    stage, drawing = "", False
    try:
        while True:
            try:
                event = next(stream)
            except StopIteration as end:
                result: Result = end.value
                return result
            drawing = True
            hear(event)
            stage = show(event, stage, view)
            drawing = False
    except KeyboardInterrupt as stop:
        if drawing:
            stream.throw(stop)  # the run saves what it has and says how to go on
        raise  # it struck inside the run, a second time while that was saving


def show(event: Event, stage: str, view: View) -> str:
    """One event on the screen, after those of `stage`; the stage it belongs to."""
    if event.message:
        view.line(event.message)
    if event.stage == "done":
        return stage
    name = event.stage if event.clip is None else CLIPS
    if name != stage:
        view.stage(name, event.steps if event.steps > 1 else None, event.step)
    elif event.steps > 1 and not (name == CLIPS and event.stage == "decode"):
        view.step(event.step, event.peak_gpu or event.peak_host)
    if event.film is not None and view.shows_pictures:
        film = event.film()
        view.preview(film.width, film.height, film.frames[event.step % len(film.frames)])
    return name


def opening(run: Prepared) -> list[str]:
    """What is said before the work: whose model, if it is ours, and the plan with its need."""
    lines = []
    if run.demo_name is not None:
        what = "a smoke-test model: it proves that all works, not what Wan can do" if is_smoke(run) else "small shapes"
        lines.append(f"No --ckpt-dir: using {run.demo_name}, the small model inside this package ({what}).")
    on_gpu = bool(run.need.gpu)
    need, free = (run.need.gpu, run.have.gpu) if on_gpu else (run.need.host, run.have.host)
    place = "GPU memory" if on_gpu else "memory"
    many = f" to {run.plan.seed + run.request.num - 1}" if run.request.num > 1 else ""
    room = f"about {bytes_text(need)} {place}, {bytes_text(free or 0)} free"
    room += f"; {run.memory.words(run.variant.dit.layers)}; {run.time.words()}"
    lines.append(f"plan: {run.variant.name} {headline(run.plan)}, seed {run.plan.seed}{many}; {room}")
    if not run.several.alone:
        lines.append(f"{run.layout.world} processes: {run.layout}")
    return lines


def is_smoke(run: Prepared) -> bool:
    return run.demo_name is not None and demo.is_smoke_test(run.demo_name)


def closing(result: Result, seconds: float) -> list[str]:
    """The last lines: each file, then the last one with time, peak memory and seed."""
    *earlier, last = zip(result.files, result.seeds, strict=True)
    lines = [f"saved {shown(path)}, seed {seed}" for path, seed in earlier]
    memory = f"peak {bytes_text(result.peak_host_bytes)}"
    if result.peak_gpu_bytes is not None:
        memory += f", GPU {bytes_text(result.peak_gpu_bytes)}"
    path, seed = last
    lines.append(f"saved {shown(path)} in {time_text(seconds)}, {memory}, seed {seed}")
    return lines


def shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    here = Path.cwd()
    absolute = path.absolute()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)
