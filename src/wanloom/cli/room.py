"""Is there room: what a run needs beside what this machine has free, without torch."""

from __future__ import annotations

import warnings
from pathlib import Path

from wanloom import budget
from wanloom.cli.console import bytes_text
from wanloom.cli.doctor import torch_has_gpu_build
from wanloom.errors import InputError, WanloomWarning
from wanloom.plan import Plan
from wanloom.request import Request
from wanloom.runtime import machine
from wanloom.runtime.kernels import require_compiler, require_kernel, require_method
from wanloom.variants import Variant

PLENTY = 2**62  # bytes; what cannot be measured is not held against a run


def check_machine(request: Request) -> None:
    """What was asked for must be there.

    Errors: E8002 a GPU, E2038 and E8007 an attention kernel, E2039 and E8009 8-bit products, E8008 a compiler,
    E2040 blocks that cannot come and go, E2055 numbers of rows that cannot be.
    """
    _check_gpu(request)
    on_gpu = runs_on_gpu(request)
    capability = machine.gpus()[_index(request)].capability if on_gpu else None
    if request.attention is not None:
        require_kernel(request.attention, capability)
    if request.quantise is not None:
        require_method(request.quantise, capability)
    lora = "a LoRA" if request.use_relighting_lora else None
    changed = "quantise" if request.quantise is not None else lora
    budget.check_blocks(request.resident_blocks, changed=changed, on_gpu=on_gpu)
    budget.check_rows("row-chunks", request.row_chunks)
    budget.check_rows("vae-rows", request.vae_rows)
    if request.compile:
        require_compiler(on_gpu=on_gpu)


def _index(request: Request) -> int:
    """The number of the GPU that was asked for."""
    return int((request.device or "").partition(":")[2] or 0)


def _check_gpu(request: Request) -> None:
    """A GPU that was asked for must be there. Error: E8002, which names the way without one."""
    wanted = [value for value in (request.device, request.noise_device) if value not in (None, "cpu")]
    if not wanted:
        return
    graphics = machine.gpus()
    index = int(str(wanted[0]).partition(":")[2] or 0)
    if not graphics:
        raise InputError("E8002", f"device: {wanted[0]} was asked for, but no NVIDIA GPU is here. Use --device cpu.")
    if not torch_has_gpu_build():
        raise InputError("E8002", "device: this torch is the CPU build. Install the CUDA build, or use --device cpu.")
    if index >= len(graphics):
        raise InputError("E8002", f"device: {wanted[0]} was asked for, but there are {len(graphics)} GPUs, from 0 on.")


def runs_on_gpu(request: Request) -> bool:
    """Where the run will be: what was asked for, else a GPU where torch can use one."""
    if request.device is not None:
        return request.device != "cpu"
    return bool(machine.gpus()) and torch_has_gpu_build()


def dtype_of(request: Request, *, on_gpu: bool) -> str:
    """The number format of the transformer: what was asked for, else bfloat16 on a GPU and float32 on a CPU."""
    return request.dtype or ("bfloat16" if on_gpu or request.convert_model_dtype else "float32")


def need_of(request: Request, plan: Plan, variant: Variant, *, on_gpu: bool) -> budget.Need:
    """What a run takes the way it was asked for."""
    return budget.need(
        plan, variant, dtype_of(request, on_gpu=on_gpu), on_gpu=on_gpu, t5_cpu=request.t5_cpu,
        quantise=request.quantise, resident_blocks=request.resident_blocks, row_chunks=request.row_chunks,
        vae_rows=request.vae_rows,
    )  # fmt: skip


def what_is_free(request: Request, folder: Path, *, on_gpu: bool) -> budget.Have:
    """Free bytes of disk, memory and the GPU that would be used; what cannot be known counts as enough."""
    memory = machine.memory()
    graphics = machine.gpus() if on_gpu else ()
    index = _index(request)
    return budget.Have(
        disk=machine.disk_free(folder),
        host=memory[1] if memory else PLENTY,
        gpu=graphics[index].free if index < len(graphics) else None,
    )


def check_room(need: budget.Need, have: budget.Have) -> None:
    """Room for the largest stage. Errors: E5003 disk, E5004 GPU memory. Warning: W5005 main memory, which can swap."""
    for item in budget.fits(need, have):
        numbers = f"needs about {bytes_text(item.need)}, {bytes_text(item.have)} are free"
        if item.what == "gpu":
            cure = "Try a smaller --size, fewer --frames, or --device cpu."
            raise InputError("E5004", f"GPU memory: {numbers}. {cure}")
        if item.what == "disk":
            raise InputError("E5003", f"disk: {numbers}. Free some, or write elsewhere with --out.")
        cure = "`wanloom plan` says what fits."
        warnings.warn(WanloomWarning(f"W5005: memory: {numbers}; the system may stop this run. {cure}"), stacklevel=3)
