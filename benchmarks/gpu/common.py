"""What the GPU benchmarks share: shapes, random weights, timing in turn, what the machine can do at most.

Each of them runs from a checkout, with nothing installed but torch and numpy (diffusers where it is compared with):

    PYTHONPATH=src python benchmarks/gpu/step.py --shape 720p

Without a GPU they run on the CPU with `--shape small`, which shows that they run and nothing else.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanloom.checkpoint.names import get_format
from wanloom.models.config import DiTConfig
from wanloom.models.dit import DiT
from wanloom.variants import VARIANTS

Run = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A transformer and the latent [C, T, h, w] it is given; distinct: whether diffusers gives each token a time."""

    config: DiTConfig
    latent: tuple[int, int, int, int]
    per_token: bool = False

    @property
    def tokens(self) -> int:
        _, frames, height, width = self.latent
        return frames * (height // 2) * (width // 2)


SMALL = DiTConfig(dim=96, ffn_dim=192, heads=3, layers=2, text_dim=32, text_len=16)
SHAPES = {
    "480p": Shape(VARIANTS["t2v-A14B"].dit, (16, 21, 60, 104)),
    "720p": Shape(VARIANTS["t2v-A14B"].dit, (16, 21, 90, 160)),
    "5b": Shape(VARIANTS["ti2v-5B"].dit, (48, 31, 44, 80), per_token=True),
    "small": Shape(SMALL, (16, 2, 8, 12)),
}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_weights(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A module from the meta device with random values on ours: matrices of unit gain, no zeros anywhere."""
    module = module.to(dtype).to_empty(device=device())
    generator = torch.Generator(device()).manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            gain = (value[0].numel() if value.dim() > 1 else value.numel()) ** -0.5
            if value.dim() == 1 or name.endswith("gamma"):
                value.normal_(1.0 if name.endswith(("weight", "gamma")) else 0.0, 0.1, generator=generator)
            else:
                value.normal_(0, gain, generator=generator)
    return module.eval().requires_grad_(False)


def random_dit(config: DiTConfig, dtype: torch.dtype) -> DiT:
    with torch.device("meta"):
        dit = DiT(config)
    made = random_weights(dit, dtype)
    assert isinstance(made, DiT)
    return made


def same_weights(dit: DiT) -> DiT:
    """Another module with the same tensors, not copied."""
    with torch.device("meta"):
        twin = DiT(dit.config)
    twin.load_state_dict(dit.state_dict(), assign=True)
    return twin.eval().requires_grad_(False)


def their_names(kind: str, state: Mapping[str, Tensor], *, residual: bool = False) -> dict[str, Tensor]:
    """Our state dict under diffusers' names."""
    names = get_format(kind, "diffusers", residual=residual)
    return {(names.foreign(name) or ((name,), ""))[0][0]: tensor for name, tensor in state.items()}


def inputs(shape: Shape) -> dict[str, Tensor]:
    """Noise, a timestep and text features."""
    generator = torch.Generator().manual_seed(1)
    config = shape.config
    return {
        "x": torch.randn(1, *shape.latent, generator=generator).to(device()),
        "t": torch.tensor([[437.0]], device=device()),
        "context": torch.randn(1, config.text_len, config.text_dim, generator=generator).to(device()),
    }


# ---------------------------------------------------------------- time and memory


def seconds(run: Run) -> float:
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def in_turn(runs: Mapping[str, Run], rounds: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Seconds of the first call of each, and of `rounds` calls in turn, another one first in each round."""
    first = {name: seconds(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(runs[name]))
    return first, times


def ratios(times: Mapping[str, Sequence[float]], to: str) -> dict[str, tuple[float, float, float]]:
    """Of each against `to`, round for round: median, least, most."""
    found = {}
    for name, some in times.items():
        each = [a / b for a, b in zip(some, times[to], strict=True)]
        found[name] = statistics.median(each), min(each), max(each)
    return found


def peak(run: Run) -> dict[str, float]:
    """GB allocated and reserved at most during a run; nothing on a CPU."""
    if not torch.cuda.is_available():
        run()
        return {}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    wait()
    return {
        "allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def gemm_size() -> int:
    """The side of the square matrices that `gemm_rate` multiplies."""
    return 8192 if torch.cuda.is_available() else 256


def gemm_rate(repeats: int = 10) -> float:
    """Operations a second of a bfloat16 product of such matrices, now."""
    size = gemm_size()
    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))

    def run() -> None:
        for _ in range(repeats):
            a @ b

    run()
    return repeats * 2 * size**3 / min(seconds(run) for _ in range(3))


# ---------------------------------------------------------------- words


def about(**more: Any) -> dict[str, Any]:
    """The machine, the versions and what was asked for; printed in one line."""
    packages = {}
    for name in ("triton", "diffusers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "-"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {"gpu": gpu, "torch": torch.__version__, **packages, "date": time.strftime("%Y-%m-%d"), **more}
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    return facts


def table(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Rows of the same columns."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    wide = max(map(len, rows), default=0) + 2
    print(" " * wide + "".join(f"{column:>22}" for column in columns))
    for name, row in rows.items():
        print(f"{name:{wide}}" + "".join(f"{_text(row.get(column)):>22}" for column in columns), flush=True)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        median, least, most = value
        return f"{median:.3f} ({least:.3f}-{most:.3f})"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def save(path: Path | None, facts: Mapping[str, Any], **rows: Any) -> None:
    if path is not None:
        path.write_text(json.dumps({**facts, **rows}, indent=1) + "\n")
