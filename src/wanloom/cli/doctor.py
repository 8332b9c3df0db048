"""`wanloom doctor`: what is installed and what this machine can do, without importing torch.

Versions come from the installed packages' records, the CPU and memory from the operating system, GPUs from the driver.
`--full` also starts torch and tries every video encoder, which takes some seconds; `--measure` times the attention
kernels that are here; `--calibrate` measures how fast this machine is, for `wanloom plan` and every run's estimate.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import Any

import click

from wanloom import __version__, store
from wanloom.cli.console import bytes_text, count_text, rich_console
from wanloom.cli.options import Command
from wanloom.errors import InputError
from wanloom.rates import DTYPES, RATES, Rates, keep_rates
from wanloom.request import SUFFIXES, check_device
from wanloom.runtime import machine
from wanloom.runtime.kernels import FUSED_FACTS, KERNEL_FACTS

# Package -> the oldest version that works (pyproject.toml has the same numbers; a test compares them).
PACKAGES = {
    "torch": "2.10",
    "transformers": "5.3",
    "tokenizers": "0.22",
    "safetensors": "0.6",
    "numpy": "2.0",
    "av": "16",
    "pillow": "12",
    "rich": "14",
    "click": "8.2",
    "ftfy": "6.3",
}

# Encoder libraries that PyAV's wheels carry -> what they write.
ENCODERS = {"x264": "H.264 (.mp4 .mkv)", "vpx": "VP9 (.webm)", "x265": "H.265", "SvtAv1Enc": "AV1"}


@click.command("doctor", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
@click.option("--full", is_flag=True, help="Also start torch and try the encoders (some seconds).")
@click.option("--measure", is_flag=True, help="Also time the attention kernels that are here (up to a minute).")
@click.option("--calibrate", is_flag=True, help="Measure how fast this machine is, and keep it for later estimates.")
@click.option(
    "--calibrate-share", type=click.FloatRange(0.001, 1), default=1.0, metavar="X", show_default=True,
    help="Part of the usual sizes and times: quicker and rougher.",
)  # fmt: skip
@click.option("--device", default=None, metavar="NAME", help="What to calibrate: cpu, cuda or cuda:N (default: a GPU).")
@click.option(
    "--cache", type=click.Choice(("show", "clear")), is_flag=False, flag_value="show",
    help="Only show the cache directory and its size, or clear it.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context, as_json: bool, full: bool, measure: bool, calibrate: bool, calibrate_share: float,
    device: str | None, cache: str | None,
) -> int:  # fmt: skip
    """What is installed and what this machine can do. Exit 8 when something that every run needs is missing."""
    if cache is not None:
        show_cache(clear=cache == "clear", as_json=as_json)
        return 0
    if calibrate:
        show_rates(device, calibrate_share, as_json=as_json)
        return 0
    if device is not None or calibrate_share != 1:
        raise InputError("E2023", "device: is for --calibrate, which was not asked for. Give both, or neither.")
    facts = examine()
    if full:
        facts["tried"] = try_out()
    if measure:
        facts["measured"] = measure_kernels(facts["attention"])
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)
    return 8 if facts["problems"] else 0


def examine() -> dict[str, Any]:
    """Everything the doctor knows, as plain data; `problems` holds one sentence for each thing to mend."""
    packages = {name: _version(name) for name in PACKAGES}
    problems = [
        f"{name} is missing: pip install '{name}>={oldest}'"
        if packages[name] is None
        else f"{name} {packages[name]} is older than {oldest}: pip install -U {name}"
        for name, oldest in PACKAGES.items()
        if packages[name] is None or _numbers(packages[name] or "") < _numbers(oldest)
    ]
    cpu, memory, gpus = machine.cpu(), machine.memory(), machine.gpus()
    build = _torch_build(packages["torch"])
    capability = gpus[0].capability if gpus and build != "cpu" else None
    notes = []
    if gpus and build == "cpu":
        notes.append("A GPU is here, but this torch is the CPU build: see 'Choosing torch' in the README.")
    return {
        "wanloom": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": packages,
        "torch_build": build,
        "cpu": {"name": cpu.name, "threads": cpu.threads, "features": list(cpu.features)},
        "memory": {"total": memory[0], "available": memory[1]} if memory else None,
        "gpus": [vars(gpu) for gpu in gpus],
        "driver": machine.driver_version(),
        "attention": attention_kernels(capability),
        "triton": _version("triton"),
        "fused": FUSED_FACTS.missing(capability),
        "encoders": bundled_encoders(),
        "disk_free": machine.disk_free(Path.cwd()),
        "demo_models": _demo_models(),
        "problems": problems,
        "notes": notes,
    }


def show(facts: dict[str, Any]) -> None:
    """The report as a two-column table on stdout."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, value in _rows(facts):
        table.add_row(name, Text(value))
    console = rich_console()
    console.print(table)
    for note in facts["notes"]:
        console.print(Text(note, style="yellow"))
    for problem in facts["problems"]:
        console.print(Text(problem, style="bold red"))
    if not facts["problems"]:
        next_step = " `wanloom demo` makes a video." if facts["demo_models"] else ""
        console.print(Text(f"All right.{next_step}", style="green"))


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    packages, cpu, memory = facts["packages"], facts["cpu"], facts["memory"]
    rest = [f"{name} {number or 'missing'}" for name, number in packages.items() if name != "torch"]
    gpus = [
        f"{gpu['name']}, {bytes_text(gpu['free'])} free of {bytes_text(gpu['total'])}, "
        f"compute capability {'.'.join(map(str, gpu['capability']))}"
        for gpu in facts["gpus"]
    ]
    here = [name for name, reason in facts["attention"].items() if reason is None]
    demos = [f"{name} ({status})" for name, status in facts["demo_models"].items()]
    rows = [
        ("wanloom", facts["wanloom"]),
        ("Python", f"{facts['python']}, {facts['system']}"),
        ("torch", f"{packages['torch'] or 'missing'} ({facts['torch_build']} build)"),
        ("packages", ", ".join(rest)),
        (
            "CPU",
            f"{cpu['name']}, {cpu['threads']} threads, {' '.join(cpu['features']) or 'no vector extensions known'}",
        ),
        ("memory", f"{bytes_text(memory['available'])} free of {bytes_text(memory['total'])}" if memory else "unknown"),
        ("GPU", "; ".join(gpus) or "none found"),
        ("attention", ", ".join(here)),
        ("Triton", f"{facts['triton'] or 'missing'}; --fused {facts['fused'] or 'can be had'}"),
        ("encoders", ", ".join(facts["encoders"]) or "not known without trying: --full"),
        ("disk", f"{bytes_text(facts['disk_free'])} free here"),
        ("demo models", ", ".join(demos) or "none"),
    ]
    if facts["driver"]:
        rows.insert(7, ("driver", f"NVIDIA {facts['driver']}"))
    rows += [(f"tried: {name}", value) for name, value in facts.get("tried", {}).items()]
    return rows + [(f"attention: {name}", _measured(row)) for name, row in facts.get("measured", {}).items()]


def _measured(row: dict[str, Any]) -> str:
    return (
        f"{1000 * row['seconds']:.1f} ms, {row['flops'] / row['seconds'] / 1e12:.2f} TFLOP/s, error {row['error']:.0e}"
    )


def attention_kernels(capability: tuple[int, int] | None) -> dict[str, str | None]:
    """Each kernel of `--attention` and why it is not to be had here; None: it is."""
    return {name: facts.missing(capability) for name, facts in KERNEL_FACTS.items()}


def measure_kernels(kernels: dict[str, str | None]) -> dict[str, dict[str, float]]:
    """Seconds, operations and relative error of each kernel that is here, on random numbers."""
    from wanloom.runtime import selftest

    return {name: selftest.time_kernel(name) for name, reason in kernels.items() if reason is None}


def show_cache(*, clear: bool, as_json: bool) -> None:
    """The cache directory and what is in it, on stdout; with `clear` it is emptied first."""
    freed = store.clear() if clear else 0
    kinds = {kind: {"files": count, "bytes": size} for kind, (count, size) in store.sizes().items()}
    if as_json:
        print(json.dumps({"directory": str(store.home()), "kinds": kinds, "freed": freed}, indent=2))
        return
    print(f"{store.home()}" + (f": {bytes_text(freed)} freed" if clear else ""))
    for kind, found in kinds.items():
        print(f"{store.KINDS[kind]}: {found['files']} files, {bytes_text(found['bytes'])}")


def show_rates(device: str | None, share: float, *, as_json: bool) -> None:
    """Measure and keep the rates of a device, each on a line while the next is measured.  Error: E8002 no such GPU."""
    from wanloom.runtime.measure import measure, present_device

    device = present_device(None if device is None else check_device(device, "device"))
    RATES.open()
    found: dict[str, float] = {}
    for name, rate in measure(device, store.home() / RATES.kind, share=share):
        found[name] = rate
        if not as_json:
            print(f"{name:20}{_rate_text(name, rate)}", flush=True)
    tables = {kind: {name: found[f"{kind} {name}"] for name in DTYPES} for kind in ("matrix", "attention")}
    rates = Rates(**tables, **{name: found[name] for name in ("conv", "copy", "disk", "call")})  # type: ignore[arg-type]
    path = keep_rates(rates, device)
    print(json.dumps({"device": device, "file": path, **found}, indent=2) if as_json else f"kept for {device}: {path}")


def _rate_text(name: str, rate: float) -> str:
    if name == "call":
        return f"{1e6 * rate:.1f} us"
    return f"{bytes_text(rate)}/s" if name in ("copy", "disk") else f"{count_text(rate)}FLOP/s"


def bundled_encoders() -> list[str]:
    """What PyAV's wheel can write, from the names of the libraries in it; empty for a PyAV built elsewhere."""
    try:
        names = " ".join(file.name for file in files("av") or ())
    except PackageNotFoundError:
        return []
    return [label for library, label in ENCODERS.items() if f"lib{library}" in names]


def try_out() -> dict[str, str]:
    """Start torch and write two frames with each encoder that this program uses; one line for each."""
    from wanloom import media
    from wanloom.runtime import selftest

    tried = {"matrix product": f"{selftest.matrix_rate() / 1e9:.0f} GFLOP/s in float32 on the CPU"}
    tried |= {f"GPU {index}": line for index, line in enumerate(selftest.try_gpus())}
    return tried | {suffix: _try_encoder(media, suffix) for suffix in SUFFIXES}


def _try_encoder(media: Any, suffix: str) -> str:
    from wanloom.errors import WanloomError

    try:
        media.try_encoder(Path(f"probe{suffix}"), size=(64, 64), fps=16, quality=8)
    except WanloomError as problem:
        return problem.message
    return "works"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def _torch_build(torch_version: str | None) -> str:
    """'cpu', 'cuda 13.0', 'rocm...': the local part of the version, or what torch/version.py says."""
    if torch_version is None:
        return "no"
    local = torch_version.partition("+")[2]
    if local:
        return re.sub(r"^cu(\d+)(\d)$", r"cuda \1.\2", local)
    for place in sys.path:
        file = Path(place) / "torch" / "version.py"
        if file.is_file():
            match = re.search(r"^cuda[^=]*= '([\d.]+)'", file.read_text(encoding="utf-8"), re.MULTILINE)
            return f"cuda {match[1]}" if match else "cpu"
    return "unknown"


def torch_has_gpu_build() -> bool:
    """Whether the installed torch was built for GPUs (whether one works is another question)."""
    return _torch_build(_version("torch")) not in ("no", "cpu", "unknown")


def _demo_models() -> dict[str, str]:
    from wanloom import demo

    return {name: "smoke test" if demo.is_smoke_test(name) else "trained" for name in demo.available()}
