"""What the plan says beside what a run takes: memory and time, for shapes from which nothing was learned.

    wanloom doctor --calibrate
    python benchmarks/plan.py [--model t2v-1.3B --ckpt-dir DIR] [--shapes 480x832x17x2 ...] [--fit 480x832x9x2 ...]
                              [--dtype bfloat16] [--json FILE]

A shape is width x height x frames x steps.  First the shapes of --fit run, each in a process of its own, and leave
records in a cache directory of this benchmark (with the rates of the user's, where they were measured); then each shape
of --shapes is planned, run in a process of its own, and compared.  Memory: the peak of the process minus what it had
after its imports, beside what is planned beyond the same.  Time: from the first to the last event.  None of the shapes
that are compared leaves a record.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MEMORY, BYTES, TIME = 0.10, 64e6, 0.25  # must: within 10 % or 64 MB, and 25 %
FIT = ("64x64x9x4", "96x96x17x4", "128x128x17x6")
SHAPES = ("64x64x17x8", "96x64x13x6", "128x96x9x5", "80x112x21x4", "128x128x33x4", "160x96x17x6")


def memory_now(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes (ru_maxrss would count the parent's before exec, too)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(key))


def import_all() -> None:
    """What a run imports on its way, so that neither its memory nor its time counts."""
    import av
    import ftfy
    import tokenizers
    from transformers import UMT5EncoderModel

    assert all((av, ftfy, tokenizers, UMT5EncoderModel))


def asked(shape: str, args: argparse.Namespace) -> Any:
    """The request of a shape."""
    from wanloom.request import Request

    width, height, frames, steps = (int(part) for part in shape.split("x"))
    folder = None if args.ckpt_dir is None else Path(args.ckpt_dir)
    return Request(
        task=args.model, ckpt_dir=folder, prompt="a red circle moves left on sand", size=(width, height), frames=frames,
        steps=steps, seed=1, dtype=args.dtype, device="cpu",
    )  # fmt: skip


def measure(shape: str, args: argparse.Namespace, *, keep: bool) -> dict[str, Any]:
    """Plan a shape, run it in this process, and say both."""
    from wanloom import budget, pipeline, records
    from wanloom.cli.forecast import forecast
    from wanloom.cli.room import basis_of, kind_of, place_of, what_is_free
    from wanloom.rates import device_key
    from wanloom.records import Meter, Record

    import_all()
    before = memory_now("VmRSS")
    request = asked(shape, args)
    pipe = pipeline.load(args.ckpt_dir or args.model, task=args.model, device="cpu", dtype=args.dtype)
    order = pipe.prepare(request)
    basis = basis_of(request, on_gpu=False)
    have = what_is_free(request, Path(), on_gpu=False)
    pipe.memory = place_of(request, order.plan, pipe.variant, have, basis, on_gpu=False)
    said = forecast(request, order.plan, pipe.variant, pipe.memory, basis, on_gpu=False)
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        result = pipe.run(request, out=Path(folder) / "a.mp4", on_event=meter.hear)
        seconds = time.perf_counter() - begun
    if keep:
        record = Record(
            kind=kind_of(request, pipe.variant, on_gpu=False), estimated=said.raw, seconds=meter.seconds,
            need=pipe.memory.need.host, peak=result.peak_host_bytes,
        )  # fmt: skip
        records.keep(record, device_key("cpu"), basis.rates)
    return {
        "shape": shape, "planned_bytes": pipe.memory.need.host - budget.HOST_BASE,
        "measured_bytes": memory_now("VmHWM") - before, "planned_seconds": said.total, "measured_seconds": seconds,
        "stages": {name: [said.seconds.get(name, 0.0), took] for name, took in meter.seconds.items()},
        "runs": said.runs, "calibrated": said.measured,
    }  # fmt: skip


def in_child(shape: str, words: list[str], cache: Path, *, keep: bool) -> dict[str, Any]:
    """The same in a process of its own, with the benchmark's cache directory."""
    more = ["--measure", shape, *(["--keep"] if keep else [])]
    environment = {**os.environ, "WANLOOM_CACHE": str(cache)}
    run = [sys.executable, "-W", "ignore", __file__, *words, *more]
    out = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    row: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return row


def judge(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its errors and whether it meets what must be."""
    apart = row["planned_bytes"] - row["measured_bytes"]
    late = row["planned_seconds"] / row["measured_seconds"] - 1
    memory_ok = abs(apart) <= max(BYTES, MEMORY * row["measured_bytes"])
    return {**row, "memory_error": apart, "time_error": late, "memory_ok": memory_ok, "time_ok": abs(late) <= TIME}


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['shape']:16}{row['planned_bytes'] / 1e6:10.0f}{row['measured_bytes'] / 1e6:10.0f} MB "
        f"{'yes' if row['memory_ok'] else 'NO':4}{row['planned_seconds']:10.2f}{row['measured_seconds']:10.2f} s "
        f"{row['time_error']:+7.0%} {'yes' if row['time_ok'] else 'NO'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo-t2v")
    parser.add_argument("--ckpt-dir")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--fit", nargs="*", default=FIT, metavar="WxHxFxS")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="WxHxFxS")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args, keep=args.keep)))
        return
    if set(args.fit) & set(args.shapes):
        sys.exit("a shape that is compared may not be one that is learned from")
    from wanloom import store

    words = ["--model", args.model, "--dtype", args.dtype, *(["--ckpt-dir", args.ckpt_dir] if args.ckpt_dir else [])]
    cache = Path(tempfile.mkdtemp())
    try:
        if (store.home() / "rates").is_dir():
            shutil.copytree(store.home() / "rates", cache / "rates")
        for shape in args.fit:
            in_child(shape, words, cache, keep=True)
        about = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores", "date": time.strftime("%Y-%m-%d"),
            "model": args.model, "dtype": args.dtype, "fit": list(args.fit),
        }  # fmt: skip
        print(", ".join(f"{key} {value}" for key, value in about.items()))
        print(f"{'shape':16}{'planned':>10}{'measured':>10}    ok     {'planned':>10}{'measured':>10}   error ok")
        rows = []
        for shape in args.shapes:
            rows.append(judge(in_child(shape, words, cache, keep=False)))
            show(rows[-1])
    finally:
        shutil.rmtree(cache)
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if not all(row["memory_ok"] and row["time_ok"] for row in rows):
        sys.exit("a plan was further off than it must be")


if __name__ == "__main__":
    main()
