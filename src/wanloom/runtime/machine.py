"""What this machine has, asked of the operating system: no torch, so that `doctor` and `plan` answer at once.

Memory and processors come from `/proc` (and the container's own limits), GPUs from NVIDIA's management library, which
the driver installs. On systems without these, fields are None or empty, never guessed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# The CPU flags that decide how fast bf16 and float32 matrix products run, with the names people know.
CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "asimd": "NEON",
    "bf16": "ARM-BF16",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Cpu:
    """The processor: marketing name, threads this process may use, features from `CPU_FEATURES`."""

    name: str
    threads: int
    features: tuple[str, ...]


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU: memory in bytes, compute capability as (major, minor)."""

    index: int
    name: str
    total: int
    free: int
    capability: tuple[int, int]


def cpu() -> Cpu:
    """The processor of this machine."""
    text = _read("/proc/cpuinfo")
    name = _field(text, "model name") or platform.processor() or platform.machine()
    flags = (_field(text, "flags") or _field(text, "Features") or "").split()
    features = tuple(label for flag, label in CPU_FEATURES.items() if flag in flags)
    return Cpu(" ".join(name.split()), threads(), features)


@cache
def fast_bfloat16() -> bool:
    """Whether the processor computes in bfloat16 itself.  Where it does not, a bfloat16 convolution takes about a
    hundred times as long as one in float32, and a matrix product several times."""
    return not {"AVX512-BF16", "AMX-BF16", "ARM-BF16"}.isdisjoint(cpu().features)


def threads() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> tuple[int, int] | None:
    """(total, available) bytes of main memory; a container's limit counts when it is lower. None where unknown."""
    text = _read("/proc/meminfo")
    found = {
        key: int(kib) * 1024 for key, kib in re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", text, re.MULTILINE)
    }
    if len(found) < 2:
        return None
    total, available = found["MemTotal"], found["MemAvailable"]
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        total = int(limit)
        available = min(available, max(0, total - int(used)))
    return total, available


def own_memory() -> int:
    """Bytes of main memory that this process has for itself, files that are only mapped left out; 0 where unknown."""
    match = re.search(r"^RssAnon:\s+(\d+) kB", _read("/proc/self/status"), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def disk_free(path: Path) -> int:
    """Free bytes where `path` is, or would be."""
    place = path.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that the driver shows, without starting a context on any."""
    library = _nvml()
    if library is None or library.nvmlInit_v2() != 0:
        return ()
    try:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return ()
        return tuple(gpu for gpu in (_gpu(library, index) for index in range(count.value)) if gpu is not None)
    finally:
        library.nvmlShutdown()


def driver_version() -> str | None:
    """The version of the NVIDIA driver, or None."""
    match = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", _read("/proc/driver/nvidia/version"))
    return match[1] if match else None


class _Memory(ctypes.Structure):
    """nvmlMemory_t of nvml.h."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _nvml() -> ctypes.CDLL | None:
    if sys.platform == "darwin":
        return None
    try:
        return ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return None


def _gpu(library: ctypes.CDLL, index: int) -> Gpu | None:
    """One device by its index; None when the driver does not answer for it."""
    handle, name, memory_info = ctypes.c_void_p(), ctypes.create_string_buffer(96), _Memory()
    major, minor = ctypes.c_int(), ctypes.c_int()
    asked = (
        library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
        or library.nvmlDeviceGetName(handle, name, 96)
        or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory_info))
        or library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    )
    if asked != 0:
        return None
    label = name.value.decode("utf-8", "replace")
    return Gpu(index, label, int(memory_info.total), int(memory_info.free), (major.value, minor.value))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, key: str) -> str | None:
    match = re.search(rf"^{re.escape(key)}\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else None
