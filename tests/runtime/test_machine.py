"""What the operating system says of the machine."""

from __future__ import annotations

import os

import pytest

from wanloom.runtime import machine

CPUINFO = "processor\t: 0\nmodel name\t: Test  CPU @ 2GHz\nflags\t\t: fpu avx2 avx512f amx_bf16\n"
MEMINFO = "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:   12000000 kB\n"


@pytest.fixture
def proc(monkeypatch):
    """Answers of `/proc` as a dict; a file that is not in it is absent."""
    files: dict[str, str] = {"/proc/cpuinfo": CPUINFO, "/proc/meminfo": MEMINFO}
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    return files


def test_cpu_features_are_named_and_the_name_is_one_line(proc):
    cpu = machine.cpu()
    assert (cpu.name, cpu.features) == ("Test CPU @ 2GHz", ("AVX2", "AVX-512", "AMX-BF16"))
    assert cpu.threads == len(os.sched_getaffinity(0))


def test_memory_is_what_the_system_can_give(proc):
    assert machine.memory() == (16_384_000_000, 12_288_000_000)


def test_a_container_limit_lower_than_the_machine_counts(proc):
    proc |= {"/sys/fs/cgroup/memory.max": "4000000000\n", "/sys/fs/cgroup/memory.current": "1000000000\n"}
    assert machine.memory() == (4_000_000_000, 3_000_000_000)


def test_no_limit_is_no_limit(proc):
    proc |= {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "1000000000\n"}
    assert machine.memory() == (16_384_000_000, 12_288_000_000)


def test_unknown_memory_is_none_not_a_guess(proc):
    proc["/proc/meminfo"] = ""
    assert machine.memory() is None


def test_free_disk_of_a_folder_that_does_not_exist_yet_is_that_of_its_parent(tmp_path):
    below = machine.disk_free(tmp_path / "not" / "yet")
    assert below == pytest.approx(machine.disk_free(tmp_path), rel=0.05)


def test_without_a_driver_there_are_no_gpus(monkeypatch):
    monkeypatch.setattr(machine, "_nvml", lambda: None)
    assert machine.gpus() == ()
