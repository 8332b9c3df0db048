"""Speed and memory beside diffusers on this CPU: the same random weights, dtype and threads, run in turn.

    python benchmarks/cpu.py [--rows NAME ...] [--pairs 5] [--quick] [--json FILE]

Each pair runs both sides once, so a machine that slows down slows both.  Printed are the median of the pairwise ratios
ours / diffusers (below 1: ours is faster), and the share of the rate that plain matrix products (DiT) or convolutions
(VAE) reach in the same run.  Peak memory is the growth of a fresh process during one forward.  Random weights
show speed and size, nothing about pictures.  How the figures are meant: docs/performance.md.

Rows are named by what computes and in which dtype.  The DiT has the width of Wan2.1 t2v-1.3B and four layers, and sees
1170 tokens or 4680; a step is one of a run, where our text has its keys and values from before the first step, while
diffusers makes them in every step.  The VAEs of Wan2.1 and Wan2.2 are whole and decode nine frames of 256 x 256.  In
"compiled" rows both sides have compiled blocks, ours by `compile_blocks`, diffusers' by `compile_repeated_blocks`;
compiling is not in the seconds.  "vae-2.1-bfloat16-float32" is our decoder in bfloat16 beside diffusers' in float32,
what each does when asked for a good picture quickly.
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
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from wanloom.checkpoint.names import get_format
from wanloom.models.config import VAE_21, VAE_22, DiTConfig
from wanloom.models.dit import DiT
from wanloom.models.vae import CausalVae
from wanloom.runtime.compile import compile_blocks

DIT = DiTConfig(dim=1536, ffn_dim=8960, heads=12, layers=4)
DIT_QUICK = DiTConfig(dim=384, ffn_dim=1536, heads=3, layers=2)
VAE = {"2.1": VAE_21, "2.2": VAE_22}  # the published ones, whole
VAE_QUICK = {"2.1": replace(VAE_21, dim=32, decoder_dim=32), "2.2": replace(VAE_22, dim=32, decoder_dim=48)}
LATENTS = {"1170": (16, 3, 30, 52), "4680": (16, 12, 30, 52)}  # by tokens: C, T, h, w
LATENT_QUICK = (16, 3, 16, 16)
SIDE, SIDE_QUICK, FRAMES = 256, 64, 3  # pixels a side, and latent frames, that a VAE decodes

Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A comparison: of what (tokens of the DiT, or which VAE), dtypes of both sides, and whether both are compiled."""

    kind: str
    of: str
    ours: str
    theirs: str
    compiled: bool = False

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return getattr(torch, self.ours), getattr(torch, self.theirs)


ROWS = {
    f"dit-{tokens}-{dtype}{'-compiled' if compiled else ''}": Row("dit", tokens, dtype, dtype, compiled)
    for tokens in LATENTS for dtype in ("float32", "bfloat16") for compiled in (False, True)
} | {
    f"vae-{which}-{name}": Row("vae", which, *dtypes)
    for which in VAE
    for name, dtypes in {
        "float32": ("float32", "float32"), "bfloat16": ("bfloat16", "bfloat16"),
        "bfloat16-float32": ("bfloat16", "float32"),
    }.items()
}  # fmt: skip


def renamed(kind: str, state: dict[str, torch.Tensor], **forms: bool) -> dict[str, torch.Tensor]:
    """Our state dict under diffusers' names."""
    names = get_format(kind, "diffusers", **forms)
    return {(names.foreign(name) or ((name,), ""))[0][0]: tensor for name, tensor in state.items()}


def dit_pair(quick: bool, row: Row, side: str = "both") -> dict[str, Run]:
    """Forward passes of equal weights on equal inputs."""
    dtype, their_dtype = row.dtypes
    config, shape = (DIT_QUICK, LATENT_QUICK) if quick else (DIT, LATENTS[row.of])
    torch.manual_seed(0)
    ours = DiT(config).to(dtype).eval()
    x, context, t = torch.randn(1, *shape), torch.randn(1, 512, 4096), torch.tensor([[437.0]])
    runs: dict[str, Run] = {}
    if side != "diffusers":
        ours.keeps = True
        once = ours.once({"context": context})
        runs["ours"] = lambda: ours(x, t, **once)
    if side != "ours":
        from diffusers import WanTransformer3DModel

        theirs = WanTransformer3DModel(
            num_attention_heads=config.heads, attention_head_dim=config.head_dim, in_channels=16, out_channels=16,
            ffn_dim=config.ffn_dim, num_layers=config.layers, text_dim=4096, cross_attn_norm=True,
        )  # fmt: skip
        theirs.load_state_dict(renamed("dit", ours.state_dict()))
        theirs = theirs.to(their_dtype).eval()
        if row.compiled:
            theirs.compile_repeated_blocks()
        if side == "diffusers":
            del ours
        x, context = x.to(their_dtype), context.to(their_dtype)
        inputs = {"hidden_states": x, "timestep": t[0], "encoder_hidden_states": context}
        runs["diffusers"] = lambda: theirs(**inputs, return_dict=False)
    if row.compiled and "ours" in runs:
        compile_blocks(ours.blocks)
    return runs


def vae_pair(quick: bool, row: Row, side: str = "both") -> dict[str, Run]:
    """Decoding of equal weights, streamed by latent frames on both sides (what each does by default)."""
    dtype, their_dtype = row.dtypes
    config, side_of = (VAE_QUICK[row.of], SIDE_QUICK) if quick else (VAE[row.of], SIDE)
    torch.manual_seed(0)
    ours = CausalVae(config).to(dtype).eval()
    z = torch.randn(1, config.z, FRAMES, side_of // config.stride[1], side_of // config.stride[2])
    runs: dict[str, Run] = {}
    if side != "diffusers":
        runs["ours"] = lambda: torch.cat(list(ours.decode_chunks(z)), 2)
    if side != "ours":
        from diffusers import AutoencoderKLWan

        theirs = AutoencoderKLWan(
            base_dim=config.dim, decoder_base_dim=config.decoder_dim, z_dim=config.z, dim_mult=list(config.multipliers),
            num_res_blocks=config.blocks, temperal_downsample=list(config.temporal), is_residual=config.residual,
            in_channels=3 * config.patch**2, out_channels=3 * config.patch**2,
            patch_size=config.patch if config.patch > 1 else None, scale_factor_spatial=config.stride[1],
        )  # fmt: skip
        theirs.load_state_dict(renamed("vae", ours.state_dict(), residual=config.residual))
        theirs = theirs.to(their_dtype).eval()
        if side == "diffusers":
            del ours
        code = z.to(their_dtype)
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


def compare(row: Row, pairs: int, quick: bool) -> dict[str, float]:
    work = operations(PAIRS[row.kind](quick, replace(row, compiled=False), "ours")["ours"])
    runs = PAIRS[row.kind](quick, row)
    first = {side: seconds(run) for side, run in runs.items()}  # warm both, and compile
    times: dict[str, list[float]] = {"ours": [], "diffusers": []}
    rates = []
    for i in range(pairs):
        for side in ("ours", "diffusers") if i % 2 == 0 else ("diffusers", "ours"):
            times[side].append(seconds(runs[side]))
        rates.append(plain_rate(row.kind, row.dtypes[0]))
    ratios = [a / b for a, b in zip(times["ours"], times["diffusers"], strict=True)]
    median = statistics.median(times["ours"])
    return {
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios), "seconds": median,
        "of_plain_rate": work / median / statistics.median(rates), "first": first["ours"],
        "first_diffusers": first["diffusers"],
    }  # fmt: skip


def resident() -> int:
    """Bytes of memory this process holds now, and with reset afterwards the peak starts from here."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_growth(row: Row, quick: bool, side: str) -> int:
    """In a process of its own: how much the peak rises above the loaded model during one forward, bytes."""
    (run,) = PAIRS[row.kind](quick, row, side).values()
    return growth_of(run)


def growth_of(run: Run) -> int:
    """How much the peak of this process rises during one run, bytes."""
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


def memory_ratio(name: str, quick: bool) -> float:
    growth = {}
    for side in ("ours", "diffusers"):
        command = [sys.executable, __file__, "--measure", name, side]
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
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="NAME", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--measure", nargs=2, metavar=("ROW", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, side = args.measure
        print(peak_growth(ROWS[name], args.quick, side))
        return
    chosen = args.rows or [name for name, row in ROWS.items() if row.ours == "float32" or has_fast_bf16()]
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "diffusers": version("diffusers"), "date": time.strftime("%Y-%m-%d"),
        "pairs": args.pairs, "quick": args.quick,
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"{'':27}{'ours/diffusers':>16}{'(min to max)':>16}{'seconds':>9}{'of plain rate':>15}{'peak memory':>13}")
    rows: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for name in chosen:
            rows[name] = row = compare(ROWS[name], args.pairs, args.quick)
            if not ROWS[name].compiled:  # a compiler's own memory would be counted
                row["memory"] = memory_ratio(name, args.quick)
            span = f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
            memory = f"{row['memory']:13.2f}" if "memory" in row else f"{'-':>13}"
            print(
                f"{name:27}{row['ratio']:16.3f}{span:>16}{row['seconds']:9.2f}{row['of_plain_rate']:15.2f}{memory}",
                flush=True,
            )
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
