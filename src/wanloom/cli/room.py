"""Is there room: what a run needs beside what this machine has free, without torch."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from wanloom import budget, records
from wanloom.checkpoint.find import Files
from wanloom.checkpoint.stored import stored_bytes
from wanloom.cli.console import bytes_text
from wanloom.cli.doctor import torch_has_gpu_build
from wanloom.cli.several import ALONE, Several
from wanloom.errors import InputError, WanloomWarning
from wanloom.estimate import Seen, learned_bytes
from wanloom.placement import MemoryPlan, Room, Wishes, costs_of, fastest, ways_of
from wanloom.plan import Plan
from wanloom.rates import Rates, device_key, read_rates
from wanloom.request import Request
from wanloom.runtime import machine
from wanloom.runtime.kernels import (
    require_compiler,
    require_fused,
    require_kernel,
    require_method,
    require_vae_dtype,
)
from wanloom.variants import Variant

PLENTY = 2**62  # bytes; what cannot be measured is not held against a run


def check_machine(request: Request) -> None:
    """What was asked for must be there.

    Errors: E8002 a GPU, E2023 two number formats, E2038 and E8007 an attention kernel, E2039 and E8009 8-bit products,
    E8008 a compiler, E2040 blocks that cannot come and go, E2055 numbers of rows that cannot be, E8010 a dtype that the
    VAE cannot decode in, E8014 fused operations.
    """
    _check_gpu(request)
    if request.convert_model_dtype and request.dtype == "float32":
        raise InputError("E2023", "convert-model-dtype: conflicts with --dtype float32. Leave one of them out.")
    on_gpu = runs_on_gpu(request)
    capability = machine.gpus()[_index(request)].capability if on_gpu else None
    if request.attention is not None:
        require_kernel(request.attention, capability)
    if request.fused:
        require_fused(capability)
    if request.quantise is not None:
        require_method(request.quantise, capability)
    if request.vae_dtype is not None and on_gpu:
        require_vae_dtype(request.vae_dtype, capability)
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


@dataclass(frozen=True)
class Basis:
    """What is known of a device: what it does in a second, and what earlier runs took on it."""

    rates: Rates
    seen: tuple[Seen, ...]


def basis_of(request: Request, *, on_gpu: bool) -> Basis:
    """What is known of the device of a run.  Warning: W5007 for files that are damaged."""
    device = device_of(request, on_gpu=on_gpu)
    rates = read_rates(device)
    return Basis(rates, records.read(device_key(device), rates))


def device_of(request: Request, *, on_gpu: bool) -> str:
    """The device by the name under which its rates are kept."""
    return f"cuda:{_index(request)}" if on_gpu else "cpu"


def kind_of(request: Request, variant: Variant, *, on_gpu: bool, several: Several = ALONE) -> str:
    """Model and switches: runs that agree in them are alike."""
    switches = (
        request.attention, request.quantise, request.cache, request.guidance_mode,
        "compile" if request.compile else None, "fused" if request.fused else None, request.vae_dtype,
        "preview" if request.preview else None, None if several.alone else f"{several.world} processes",
        None if several.alone or several.vae_parallel is not False else "vae alone",
        None if request.row_chunks is None else "rows", None if request.vae_rows is None else "stripes",
        None if request.guidance_batch in (None, "off") else f"guidance batch {request.guidance_batch}",
    )  # fmt: skip
    return " ".join((variant.name, dtype_of(request, on_gpu=on_gpu), *(word for word in switches if word)))


def place_of(
    request: Request, plan: Plan, variant: Variant, have: budget.Have, basis: Basis, *, on_gpu: bool,
    files: Files | None = None, several: Several = ALONE,
) -> MemoryPlan:  # fmt: skip
    """Where the parts are during a run, by what was asked for, what is free, and what such runs took beyond plans.

    files: the model's, where they are known: what they have in few bits stays so.  several: the processes of the run,
    each of which has the parts so; their blocks come and go only where that was asked for.
    """
    dtype = dtype_of(request, on_gpu=on_gpu)
    plain = request.quantise is not None or request.resident_blocks is not None
    stored = {} if plain or files is None else stored_bytes(files, budget.DTYPE_BYTES[dtype])
    ways = [
        costs_of(
            plan, variant, dtype, basis.rates, on_gpu=on_gpu, quantise=request.quantise,
            changed=request.use_relighting_lora, t5_cpu=request.t5_cpu, num=request.num, host=have.host,
            row_chunks=request.row_chunks, vae_rows=request.vae_rows, at_once=at_once,
            stored=stored, vae_dtype=request.vae_dtype or "float32", held=several.held(variant, dtype),
            unstreamed=() if several.alone else ("text", *(["dit"] if request.resident_blocks is None else [])),
        )
        for at_once in ways_of(request.guidance_batch, plan)
    ]  # fmt: skip
    wishes = Wishes(resident_blocks=request.resident_blocks, offload=request.offload_model, t5_cpu=request.t5_cpu)
    found = fastest(ways, Room((have.gpu or 0) if on_gpu else None, have.host), wishes)
    more = learned_bytes(basis.seen, kind_of(request, variant, on_gpu=on_gpu, several=several), found.need.host)
    if more and not on_gpu:
        larger = [replace(costs, beside=costs.beside + more) for costs in ways]
        found = fastest(larger, Room(None, have.host), wishes)
    return found


def what_is_free(request: Request, folder: Path, *, on_gpu: bool, processes: int = 1) -> budget.Have:
    """Free bytes of disk, memory and the GPU that would be used; what cannot be known counts as enough.

    processes: how many share the memory of this machine; one has its part.
    """
    memory = machine.memory()
    graphics = machine.gpus() if on_gpu else ()
    index = _index(request)
    return budget.Have(
        disk=machine.disk_free(folder),
        host=(memory[1] if memory else PLENTY) // processes,
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
