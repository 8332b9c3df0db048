"""Speed and memory beside diffusers on this CPU: the same random weights, dtype and threads, run in turn.

    python benchmarks/cpu.py [--pairs 5] [--quick] [--json FILE]

Each pair runs both sides once, so a machine that slows down slows both.  Printed are the median of the pairwise ratios
ours / diffusers (below 1: ours is faster), and the share of the rate that plain matrix products (DiT) or convolutions
(VAE) reach in the same run.  Peak memory is the growth of a fresh process during one forward.  Random weights
show speed and size, nothing about pictures.  How the figures are meant: docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from wanloom.checkpoint.names import get_format
from wanloom.models.config import DiTConfig, VaeConfig
from wanloom.models.dit import DiT
from wanloom.models.vae import CausalVae

DIT = DiTConfig(dim=1536, ffn_dim=8960, heads=12, layers=2)  # the width of Wan2.1 t2v-1.3B, fewer layers
DIT_QUICK = DiTConfig(dim=384, ffn_dim=1536, heads=3, layers=2)
VAE = VaeConfig()  # the published Wan2.1 VAE, whole
VAE_QUICK = VaeConfig(dim=32, decoder_dim=32)
LATENT, LATENT_QUICK = (16, 5, 30, 52), (16, 3, 16, 16)  # DiT: C, T, h, w (1950 tokens)
CODE, CODE_QUICK = (16, 3, 12, 20), (16, 2, 8, 8)  # VAE: 9 frames of 160 x 96

Run = Callable[[], object]


def renamed(kind: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under diffusers' names."""
    names = get_format(kind, "diffusers")
    return {(names.foreign(name) or ((name,), ""))[0][0]: tensor for name, tensor in state.items()}


def dit_pair(quick: bool, dtype: torch.dtype, side: str = "both") -> dict[str, Run]:
    """Forward passes of equal weights on equal inputs."""
    config, shape = (DIT_QUICK, LATENT_QUICK) if quick else (DIT, LATENT)
    torch.manual_seed(0)
    ours = DiT(config).to(dtype).eval()
    x, context, t = torch.randn(1, *shape), torch.randn(1, 512, 4096), torch.tensor([[437.0]])
    runs: dict[str, Run] = {}
    if side != "diffusers":
        runs["ours"] = lambda: ours(x, t, context)
    if side != "ours":
        from diffusers import WanTransformer3DModel

        theirs = WanTransformer3DModel(
            num_attention_heads=config.heads, attention_head_dim=config.head_dim, in_channels=16, out_channels=16,
            ffn_dim=config.ffn_dim, num_layers=config.layers, text_dim=4096, cross_attn_norm=True,
        )  # fmt: skip
        theirs.load_state_dict(renamed("dit", ours.state_dict()))
        theirs = theirs.to(dtype).eval()
        if side == "diffusers":
            del ours
        inputs = {"hidden_states": x.to(dtype), "timestep": t[0], "encoder_hidden_states": context.to(dtype)}
        runs["diffusers"] = lambda: theirs(**inputs, return_dict=False)
    return runs


def vae_pair(quick: bool, dtype: torch.dtype, side: str = "both") -> dict[str, Run]:
    """Decoding of equal weights, streamed by latent frames on both sides (what each does by default)."""
    config, shape = (VAE_QUICK, CODE_QUICK) if quick else (VAE, CODE)
    torch.manual_seed(0)
    ours = CausalVae(config).to(dtype).eval()
    z = torch.randn(1, *shape)
    runs: dict[str, Run] = {}
    if side != "diffusers":
        runs["ours"] = lambda: torch.cat(list(ours.decode_chunks(z)), 2)
    if side != "ours":
        from diffusers import AutoencoderKLWan

        theirs = AutoencoderKLWan(base_dim=config.dim, z_dim=config.z)
        theirs.load_state_dict(renamed("vae", ours.state_dict()))
        theirs = theirs.to(dtype).eval()
        if side == "diffusers":
            del ours
        code = z.to(dtype)
        runs["diffusers"] = lambda: theirs.decode(code, return_dict=False)
    return runs


PAIRS = {"dit": dit_pair, "vae": vae_pair}


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def operations(run: Run) -> float:
    """Floating-point operations of one run, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def plain_rate(kind: str, dtype: torch.dtype) -> float:
    """What this machine reaches now with nothing but the main operation: operations a second."""
    if kind == "dit":
        a, b = torch.randn(1950, 1536).to(dtype), torch.randn(1536, 8960).to(dtype)
        work, run = 2.0 * 1950 * 1536 * 8960, lambda: a @ b
    else:
        conv = torch.nn.Conv3d(96, 96, 3, padding=(0, 1, 1)).to(dtype)
        x = torch.randn(1, 96, 6, 80, 128).to(dtype)
        work, run = 2.0 * 96 * 96 * 27 * 4 * 80 * 128, lambda: conv(x)
    run()
    return work / min(seconds(run) for _ in range(5))


def compare(kind: str, dtype: torch.dtype, pairs: int, quick: bool) -> dict[str, float]:
    runs = PAIRS[kind](quick, dtype)
    work = operations(runs["ours"])
    seconds(runs["diffusers"])  # warm both
    times: dict[str, list[float]] = {"ours": [], "diffusers": []}
    rates = []
    for i in range(pairs):
        for side in ("ours", "diffusers") if i % 2 == 0 else ("diffusers", "ours"):
            times[side].append(seconds(runs[side]))
        rates.append(plain_rate(kind, dtype))
    ratios = [a / b for a, b in zip(times["ours"], times["diffusers"], strict=True)]
    median = statistics.median(times["ours"])
    return {
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios), "seconds": median,
        "of_plain_rate": work / median / statistics.median(rates),
    }  # fmt: skip


def resident() -> int:
    """Bytes of memory this process holds now, and with reset afterwards the peak starts from here."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_growth(kind: str, dtype: torch.dtype, quick: bool, side: str) -> int:
    """In a process of its own: how much the peak rises above the loaded model during one forward, bytes."""
    (run,) = PAIRS[kind](quick, dtype, side).values()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak (VmHWM)
    with torch.no_grad():
        run()
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return peak - before


# glibc keeps what a program frees for later, so building a model would hide memory that its forward then takes from
# there. With this every larger block goes back to the system at once, and the peak is what is really in use.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def memory_ratio(kind: str, dtype: torch.dtype, quick: bool) -> float:
    growth = {}
    for side in ("ours", "diffusers"):
        command = [sys.executable, __file__, "--measure", kind, str(dtype).removeprefix("torch."), side]
        command += ["--quick"] if quick else []
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | RETURN_MEMORY)
        growth[side] = int(out.stdout.split()[-1])
    return growth["ours"] / growth["diffusers"]


def has_fast_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small models: whether it runs, not how fast")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "DTYPE", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, dtype, side = args.measure
        print(peak_growth(kind, getattr(torch, dtype), args.quick, side))
        return
    dtypes = [torch.float32, *([torch.bfloat16] if has_fast_bf16() else [])]
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "diffusers": version("diffusers"), "date": time.strftime("%Y-%m-%d"),
        "pairs": args.pairs, "quick": args.quick,
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"{'':14}{'ours/diffusers':>16}{'(min to max)':>16}{'seconds':>9}{'of plain rate':>15}{'peak memory':>13}")
    rows = {}
    with torch.no_grad():
        for kind in PAIRS:
            for dtype in dtypes:
                name = f"{kind} {str(dtype).removeprefix('torch.')}"
                row = compare(kind, dtype, args.pairs, args.quick)
                row["memory"] = memory_ratio(kind, dtype, args.quick)
                rows[name] = row
                span = f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
                print(
                    f"{name:14}{row['ratio']:16.3f}{span:>16}{row['seconds']:9.2f}{row['of_plain_rate']:15.2f}"
                    f"{row['memory']:13.2f}",
                    flush=True,
                )
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
