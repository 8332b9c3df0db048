"""A step of the transformer, lossless, beside diffusers as it comes, diffusers tuned, and the official formulation.

    PYTHONPATH=src python benchmarks/gpu/step.py --shape 720p [--layers N] [--engines NAME ...] [--rounds 5]
    PYTHONPATH=src python benchmarks/gpu/step.py --shape 480p --layers 4 --errors
    PYTHONPATH=src python benchmarks/gpu/step.py --shape 480p --engines ours ours-fused near-int8 near-fp8 --to ours

All engines have the same random bfloat16 weights (one copy) and inputs, and run in turn; compiling is in "first".
Printed are the seconds of a step (one branch of guidance), the ratio to diffusers as it comes, and operations a second,
also as a share of what a plain product of 8192 x 8192 reaches in the same minutes.  --layers takes fewer blocks, which
lasts less and keeps the share of the whole.  --errors compares each with our float32 result instead, and needs its
memory besides.  "diffusers-tuned" has cuDNN's attention and compiled blocks; "ours-fused" our Triton operations;
"near-int8" and "near-fp8" compiled blocks, products of 8 bits (e4m3, on a CPU int8) and attention `int8` or `int8-fp8`
(on a CPU the exact one), and hold their 8-bit weights besides.  --to names the engine that ratios are to.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from common import SHAPES, Shape
from official import official_step
from torch import Tensor

from wanloom.budget import dit_flops
from wanloom.models.dit import DiT
from wanloom.models.layers import use_ops
from wanloom.runtime.attention import kernel_for, use_kernel
from wanloom.runtime.compile import compile_blocks
from wanloom.runtime.fused import FUSED
from wanloom.runtime.quant import quantise

Engine = Callable[[DiT, Shape, dict[str, Tensor]], Callable[[], Tensor]]


def ours(
    dit: DiT, shape: Shape, given: dict[str, Tensor], *, compiled: bool = False, fused: bool = False,
    near: str | None = None,
) -> Callable[[], Tensor]:  # fmt: skip
    model, gpu = common.same_weights(dit), torch.cuda.is_available()
    if fused and not gpu:
        raise SystemExit("ours-fused: Triton's kernels need an NVIDIA GPU. Leave this engine out.")
    use_kernel(model, kernel_for(near if gpu else None, common.device()))
    if near is not None:
        quantise(model, "fp8-compute" if gpu else "int8-compute")
    if fused:
        use_ops(model, FUSED)
    if compiled:
        compile_blocks(model.blocks, dynamic=False)
    model.keeps = True  # as in a run: what blocks read of the text is made before the first step
    once = model.once({"context": given["context"]})
    return partial(model, given["x"], given["t"], **once)


def diffusers(dit: DiT, shape: Shape, given: dict[str, Tensor], *, tuned: bool = False) -> Callable[[], Tensor]:
    from diffusers import WanTransformer3DModel

    config = dit.config
    with torch.device(common.device()):  # its tables are not parameters, so it cannot be built without values
        model = WanTransformer3DModel(
            num_attention_heads=config.heads, attention_head_dim=config.head_dim, in_channels=config.in_channels,
            out_channels=config.out_channels, ffn_dim=config.ffn_dim, num_layers=0, text_dim=config.text_dim,
            cross_attn_norm=True,
        )  # fmt: skip
    with torch.device("meta"):
        full = WanTransformer3DModel.from_config({**model.config, "num_layers": config.layers})
    model.blocks = full.blocks
    wide = set(model._keep_in_fp32_modules)  # as its own loader has them
    state = common.their_names("dit", dit.state_dict())
    state = {name: tensor.float() if wide & set(name.split(".")) else tensor for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    model.eval().requires_grad_(False)
    if tuned:
        if torch.cuda.is_available():
            model.set_attention_backend("_native_cudnn")
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    dtype = dit.dtype
    t = given["t"][0].expand(1, shape.tokens) if shape.per_token else given["t"][0]
    x, context = given["x"].to(dtype), given["context"].to(dtype)
    call = partial(model, hidden_states=x, timestep=t, encoder_hidden_states=context, return_dict=False)

    def run() -> Tensor:
        out: Tensor = call()[0]
        return out

    return run


def official(dit: DiT, shape: Shape, given: dict[str, Tensor], *, tf32: bool = False) -> Callable[[], Tensor]:
    step = official_step(dit, kernel_for(None, common.device()))

    def run() -> Tensor:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            return step(**given)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return run


ENGINES: dict[str, Engine] = {
    "ours": ours,
    "ours-compiled": partial(ours, compiled=True),
    "ours-fused": partial(ours, fused=True),
    "near-int8": partial(ours, compiled=True, near="int8"),
    "near-fp8": partial(ours, compiled=True, near="int8-fp8"),
    "diffusers": diffusers,
    "diffusers-tuned": partial(diffusers, tuned=True),
    "official": official,
    "official-tf32": partial(official, tf32=True),
}


LOSSLESS = ["ours", "ours-compiled", "diffusers", "diffusers-tuned", "official", "official-tf32"]


def speed(
    runs: dict[str, Callable[[], Tensor]], shape: Shape, rounds: int, to: str | None
) -> dict[str, dict[str, Any]]:
    work = dit_flops(shape.config, shape.latent)
    rate = common.gemm_rate()
    first, times = common.in_turn(runs, rounds)
    rate = statistics.median((rate, common.gemm_rate()))
    base = to if to in runs else "diffusers" if "diffusers" in runs else next(iter(runs))
    against = common.ratios(times, base)
    rows = {}
    for name, some in times.items():
        median = statistics.median(some)
        rows[name] = {
            "first": first[name], "seconds": median, f"/ {base}": against[name], "TFLOP/s": work / median / 1e12,
            "of the product": work / median / rate,
        }  # fmt: skip
    side = common.gemm_size()
    print(f"a product of {side} x {side}: {rate / 1e12:.1f} TFLOP/s; a step: {work / 1e12:.3f} TFLOP")
    return rows


def _wide(dit: DiT) -> DiT:
    """The same weights in float32."""
    with torch.device("meta"):
        model = DiT(dit.config)
    model.load_state_dict({name: tensor.float() for name, tensor in dit.state_dict().items()}, assign=True)
    return model.eval().requires_grad_(False)


def errors(runs: dict[str, Callable[[], Tensor]], exact: Callable[[], Tensor]) -> dict[str, dict[str, Any]]:
    """The distance of each from the float32 result, as a share of its length."""
    wanted = exact().double()
    return {name: {"error": float((run().double() - wanted).norm() / wanted.norm())} for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="480p" if torch.cuda.is_available() else "small")
    parser.add_argument("--layers", type=int, help="blocks (default: all)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=LOSSLESS, metavar="NAME")
    parser.add_argument("--to", choices=ENGINES, help="the engine that ratios are to (default: diffusers)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    shape = replace(shape, config=replace(shape.config, layers=args.layers or shape.config.layers))
    facts = common.about(shape=args.shape, tokens=shape.tokens, layers=shape.config.layers, rounds=args.rounds)
    with torch.no_grad():
        dit = common.random_dit(shape.config, torch.bfloat16)
        given = common.inputs(shape)
        runs = {name: ENGINES[name](dit, shape, given) for name in args.engines}
        rows = errors(runs, partial(_wide(dit), **given)) if args.errors else speed(runs, shape, args.rounds, args.to)
    common.table(rows)
    common.save(args.json, facts, rows=rows)


if __name__ == "__main__":
    main()
