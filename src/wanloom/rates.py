"""What this machine does in a second, as `wanloom doctor --calibrate` measured it, and guesses for one nobody measured.

    rates = read_rates(device_name())     # plain numbers; `rates.measured` says whether they were measured

Measured rates lie in the user's cache directory under a key of processor, threads, device and torch.  No torch here:
`wanloom plan` and the line in front of every run answer at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from wanloom.durable import write_atomic
from wanloom.errors import WanloomWarning
from wanloom.runtime import machine
from wanloom.store import Store

FORMAT = 1
RATES = Store("rates", limit=2**18, suffix=".json")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """matrix, attention: dtype -> operations a second; conv: the same of the VAE's convolutions, in float32.

    copy: bytes a second from the host to the device; disk: read from files; call: seconds that one operation of torch
    costs beside its arithmetic.
    """

    matrix: Mapping[str, float]
    attention: Mapping[str, float]
    conv: float
    copy: float
    disk: float
    call: float
    measured: bool = field(default=False, compare=False)

    def to_json(self) -> str:
        data = asdict(self)
        del data["measured"]
        return json.dumps({"format": FORMAT, **data})

    @classmethod
    def from_json(cls, text: str | bytes) -> Rates:
        """What `to_json` wrote.  Raises ValueError, LookupError or TypeError for anything else."""
        data: dict[str, Any] = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}")
        tables = {name: {kind: _positive(data[name][kind]) for kind in DTYPES} for name in ("matrix", "attention")}
        plain = [entry.name for entry in fields(cls) if entry.name not in (*tables, "measured")]
        return cls(**tables, **{name: _positive(data[name]) for name in plain}, measured=True)  # type: ignore[arg-type]


def _positive(value: Any) -> float:
    if not isinstance(value, float | int) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{value!r} is no rate")
    return float(value)


def guessed_rates(threads: int, features: tuple[str, ...], capability: tuple[int, int] | None) -> Rates:
    """Rates of a machine that nobody measured: of so many threads of a processor, or of a GPU of this capability.

    Half of what such machines reach in plain products, rounded: a time that is too long is the better mistake.
    """
    if capability is None:
        wide = "AMX-BF16" in features
        plain = 2.5e10 * threads * (1.0 if "AVX-512" in features else 0.6)
        narrow = plain * (6.0 if wide else 1.5 if "AVX512-BF16" in features else 0.5)
        attention = {"float32": plain / 2, "bfloat16": plain / 2}
        return Rates(
            matrix={"float32": plain, "bfloat16": narrow}, attention=attention, conv=plain, copy=5e9, disk=4e8,
            call=1e-5,
        )  # fmt: skip
    tera = {7: 3e13, 8: 7e13, 9: 4e14, 10: 7e14}.get(capability[0], 5e13)
    return Rates(
        matrix={"float32": tera / 6, "bfloat16": tera}, attention={"float32": tera / 10, "bfloat16": tera / 2},
        conv=tera / 8, copy=1.2e10, disk=8e8, call=6e-6,
    )  # fmt: skip


# ---------------------------------------------------------------- of this machine


@cache
def device_key(device: str) -> str:
    """16 hexadecimal digits that name this machine, the device ("cpu", "cuda:0") and the installed torch."""
    cpu = machine.cpu()
    threads = os.environ.get("OMP_NUM_THREADS") or cpu.threads
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = ""
    device = "cuda:0" if device == "cuda" else device
    about = [cpu.name, str(threads), *cpu.features, _gpu_name(device), torch]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _gpu_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    graphics, index = machine.gpus(), int(device.partition(":")[2] or 0)
    return graphics[index].name if index < len(graphics) else "gpu"


def read_rates(device: str) -> Rates:
    """The rates of a device as they were measured, or guessed ones.  Warning: W5007 for a file that is damaged."""
    path = RATES.path(device_key(device))
    try:
        return Rates.from_json(path.read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError) as error:
        text = (
            f"W5007: {path}: not readable ({str(error)[:80]}); it is left out. `wanloom doctor --calibrate` mends it."
        )
        warnings.warn(WanloomWarning(text), stacklevel=2)
    cpu, graphics = machine.cpu(), machine.gpus() if device != "cpu" else ()
    index = int(device.partition(":")[2] or 0)
    capability = graphics[index].capability if index < len(graphics) else None if device == "cpu" else (8, 0)
    return guessed_rates(_threads(cpu.threads), cpu.features, capability)


def _threads(found: int) -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(asked)) if asked.isdigit() else found


def keep_rates(rates: Rates, device: str) -> str:
    """Write measured rates where later runs look for them; the file.  Errors: E5001, E5003, OSError."""
    RATES.open()
    path = RATES.path(device_key(device))
    write_atomic(path, rates.to_json().encode())
    RATES.trim()
    return str(path)
