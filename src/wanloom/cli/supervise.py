"""`--gpus N`: starts N processes on this machine, watches them, and ends them all when one is gone.

The first of them is the run: it prints, writes and fails as a run alone does, and its exit code is this one's.  Each is
in a process group of its own, so that Ctrl-C comes here and is passed on to the first alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from wanloom.cli.console import report_error, report_warning, warning_line
from wanloom.cli.doctor import torch_has_gpu_build
from wanloom.cli.several import FOLDER, too_few
from wanloom.errors import InputError, Interrupted
from wanloom.jobs import resume_command
from wanloom.runtime import machine
from wanloom.runtime.watchdog import FileBoard, Standstill

LOOK = 0.1  # seconds between two looks
LEAVE = 4.0  # seconds in which the first process may notice by itself that another is gone
END = 9.5  # seconds after which all are gone
SPEAK_LAST = 10.0  # seconds after which this process ends what its processes should have ended themselves
JOB = "job"  # file in the common folder: where the run keeps its progress
RESUMABLE = 7  # exit code


def supervise(words: Sequence[str], count: int, device: str | None) -> int:
    """Run `wanloom generate WORDS` in `count` processes; the exit code.  Errors: E8002, E8003."""
    _check_gpus(count, device)
    with tempfile.TemporaryDirectory(prefix="wanloom-") as folder:
        crew = _Crew(Path(folder), [*_program(), "generate", *words], count, on_gpu=device != "cpu")
        try:
            with crew.hearing_signals():
                return crew.watch()
        finally:
            crew.kill()


def continue_words(folder: Path) -> str:
    """What a person does after a run of which only its job folder is left."""
    if (folder / "plan.json").is_file():
        return f"What was saved is not lost. Continue: {resume_command(folder)}"
    return "No step was saved: run the command again."


def _check_gpus(count: int, device: str | None) -> None:
    if device == "cpu":
        return
    graphics = machine.gpus()
    if not graphics or not torch_has_gpu_build():
        why = "no NVIDIA GPU is here" if not graphics else "this torch is the CPU build"
        raise InputError(
            "E8002", f"gpus: {count} were asked for, and {why}. --device cpu starts processes without one."
        )
    if count > len(graphics):
        raise InputError("E8003", too_few(count, len(graphics)))


def _program() -> list[str]:
    """This command as another process; -P: a file of the working directory is not taken for a module."""
    debug = ["--debug"] if "--debug" in sys.argv else []
    return [sys.executable, "-P", "-m", "wanloom", *debug]


class _Crew:
    """The processes that were started here."""

    def __init__(self, folder: Path, command: Sequence[str], count: int, *, on_gpu: bool) -> None:
        self.folder, self.count = folder, count
        self._board, self._still = FileBoard(folder / "board"), Standstill(SPEAK_LAST)
        self._pending: list[int] = []
        self._told = 0
        environment = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), FOLDER: str(folder)}
        if not on_gpu:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, machine.threads() // count)))
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(count):
            self._processes.append(
                subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    process_group=0,
                )
            )

    @contextmanager
    def hearing_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM are passed on."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, lambda number, _: self._pending.append(number)) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def watch(self) -> int:
        """Until the first process has ended, the others with it; the exit code of the run."""
        first, *others = self._processes
        while True:
            time.sleep(LOOK)
            if self._pass_on():
                return 130
            if first.poll() is not None:
                self._wait(others, LEAVE)
                return self._outcome(first.returncode)
            gone = next((rank for rank, process in enumerate(self._processes) if process.poll()), None)
            if gone is not None:
                return self._end_without(gone)
            still = self._still.look(self._board.read())
            if still is not None:
                return self._give_up(f"no process of this run did anything for {still:.0f} s")

    def _pass_on(self) -> bool:
        """Pass signals on to the first process; whether a second one says that all is to end at once."""
        while self._pending:
            self._told += 1
            if self._told > 1:
                report_error("stopped.")
                return True
            self._processes[0].send_signal(self._pending.pop(0))
        return False

    def _end_without(self, rank: int) -> int:
        """A process is gone: the first saves what it has, by itself or when it is told to, or is ended."""
        first, code = self._processes[0], self._processes[rank].returncode
        if code < 0:
            report_warning(warning_line(f"W7002: process {rank} of {self.count} was killed by signal {-code}."))
        self._wait([first], LEAVE)
        if first.poll() is None:
            first.send_signal(signal.SIGTERM)
            self._wait([first], END - LEAVE)
        if first.poll() is None:
            return self._give_up(f"process {rank} of {self.count} is gone")
        return code if code > 0 and code != RESUMABLE else self._outcome(first.returncode)

    def _outcome(self, code: int) -> int:
        """The exit code of a run whose first process ended with this one."""
        if code >= 0:
            return code
        return 130 if self._told else self._give_up(f"process 0 of {self.count} was killed by signal {-code}")

    def _give_up(self, why: str) -> int:
        """End all, and say how to go on."""
        self.kill()
        file = self.folder / JOB
        end = continue_words(Path(file.read_text())) if file.is_file() else "Run the command again."
        report_error(str(Interrupted("E7002", f"{why}. {end}")))
        return RESUMABLE

    def _wait(self, processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
        """At most so long for processes to end."""
        until = time.monotonic() + seconds
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            if self._pass_on():
                return
            time.sleep(LOOK)

    def kill(self) -> None:
        """End all that are left."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
