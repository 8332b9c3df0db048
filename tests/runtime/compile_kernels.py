"""Compile every Triton kernel for GPUs that need not be here, as its launcher would: run by `test_triton_compiles.py`.

    python compile_kernels.py 80 90

prints a line of JSON for each kernel: its name, the capability, bytes of shared memory, the program's length, and the
instructions of tensor cores in it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wanloom.runtime import triton_attention, triton_rows

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.int64: "*i64"}
TYPES[torch.float8_e4m3fn] = "*fp8e4nv"
ALIGNED = [["tt.divisibility", 16]]  # what Triton's launcher says of pointers and numbers that are multiples of 16
KERNELS = (
    (triton_rows, "_norm_modulate"), (triton_rows, "_gate_add"), (triton_rows, "_rms_rotate"),
    (triton_attention, "_to_int8"), (triton_attention, "_to_fp8"), (triton_attention, "_attend"),
)  # fmt: skip


class CompileOnly:
    """Stands in for a kernel: a launch compiles it for the arguments and runs nothing."""

    def __init__(self, function: Any, capability: int) -> None:
        self.function, self.capability = function, capability

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, num_warps: int, num_stages: int = 3, **constants: Any) -> None:
        values = dict(zip(self.function.arg_names, args, strict=False)) | constants
        signature, fixed, attributes = {}, {}, {}
        for place, parameter in enumerate(self.function.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], fixed[(place,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], attributes[(place,)] = TYPES[value.dtype], ALIGNED
            elif isinstance(value, int):
                signature[parameter.name] = "i32"
                if value % 16 == 0:
                    attributes[(place,)] = ALIGNED
            else:
                signature[parameter.name] = "fp32"
        done = triton.compile(
            ASTSource(self.function, signature, fixed, attributes), target=GPUTarget("cuda", self.capability, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )  # fmt: skip
        line = {
            "kernel": self.function.__name__, "capability": self.capability, "shared": done.metadata.shared,
            "bytes": len(done.asm["cubin"]),
            "products": len(re.findall(r"(wgmma\.mma_async|mma\.sync)", done.asm["ptx"])),
            "integers": len(re.findall(r"(wgmma\.mma_async|mma\.sync)\S*s32\.s8\.s8", done.asm["ptx"])),
            "fp8": len(re.findall(r"(wgmma\.mma_async|mma\.sync)\S*e4m3\.e4m3", done.asm["ptx"])),
        }  # fmt: skip
        print(json.dumps(line))


def launch_all(capability: int) -> None:
    """Every launcher once, at sizes and in formats of a large model; nothing runs."""
    width, heads, length = 5120, 40, 64
    x, narrow = torch.zeros(1, length, width), torch.zeros(1, length, width, dtype=torch.bfloat16)
    shift, scale, gate = torch.zeros(1, 2, 6, width).unbind(2)[:3]
    group, weight = torch.zeros(length, dtype=torch.long), torch.ones(width, dtype=torch.bfloat16)
    triton_rows.norm_modulate(x, shift, scale, group, 1e-6, torch.bfloat16)
    triton_rows.gate_add(x, narrow, gate, group, x)
    triton_rows.gate_add_norm(x, narrow, gate, group, x, weight, weight, 1e-6, torch.bfloat16)
    triton_rows.rms_rotate(narrow, weight, 1e-6, heads, torch.zeros(length, width // heads // 2, 2))
    q = torch.zeros(1, length, 2, 128, dtype=torch.bfloat16)
    triton_attention._interpreted = lambda x: False
    triton_attention.attend(q, q, q)
    if capability >= 89:
        triton_attention.attend(q, q, q, narrow=True)


def main(capabilities: list[int]) -> None:
    originals = [getattr(module, name) for module, name in KERNELS]
    for capability in capabilities:
        for (module, name), function in zip(KERNELS, originals, strict=True):
            setattr(module, name, CompileOnly(function, capability))
        launch_all(capability)


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]])
