"""Runs command lines of wanloom in forked children, so that each of hundreds of killed runs need not import torch anew.

Reads one JSON object a line on stdin, {"argv", "env", "cwd", "calls", "kill_after", "interrupt_after"}, and answers
with one on stdout, {"status", "seconds"}.  `calls` is a file that gets one letter for each call of a transformer.
`kill_after` is a number of seconds after which the child gets SIGKILL, `interrupt_after` a number of transformer calls
after which it gets SIGINT.  The child's output goes to out.txt and err.txt beside `cwd`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from wanloom.cli import main
from wanloom.encoders import build_clip, build_umt5, build_wav2vec2
from wanloom.models.config import AudioConfig, ClipConfig, TextConfig
from wanloom.models.dit import DiT


def warm() -> None:
    """Import what the commands import when they run."""
    import av  # noqa: F401
    import PIL.Image  # noqa: F401

    import wanloom.cli.run
    import wanloom.pipeline

    with torch.device("meta"):
        build_umt5(TextConfig(dim=8, ffn_dim=8, heads=1, head_dim=8, layers=1, vocab=8))
        build_clip(ClipConfig(dim=80, ffn_dim=8, heads=1, layers=1, projection=8))
        build_wav2vec2(AudioConfig(dim=32, ffn_dim=8, heads=1, layers=1, conv_dim=(8,) * 7, positions=8, groups=4))
    assert wanloom.cli.run and wanloom.pipeline


def count_calls(file: str) -> None:
    """Note every call of a transformer in `file`, one letter each."""
    right = DiT.forward

    def forward(self: DiT, *given: Any, **named: Any) -> Any:
        with Path(file).open("a") as log:
            log.write("x")
        return right(self, *given, **named)

    DiT.forward = forward  # type: ignore[method-assign]


def child(job: dict[str, Any]) -> None:
    folder = Path(job["cwd"])
    for name, handle in (("out.txt", 1), ("err.txt", 2)):
        file = os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, handle)
    os.chdir(folder)
    os.environ.update(job.get("env", {}))
    count_calls(job["calls"])
    code = 70
    try:
        code = main(job["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, job: dict[str, Any], started: float) -> int:
    """The child's exit status, after the signals that the job asks for."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if job.get("kill_after") is not None and time.monotonic() - started > job["kill_after"]:
            os.kill(pid, signal.SIGKILL)
        if job.get("interrupt_after") is not None:
            log = Path(job["calls"])
            if log.exists() and log.stat().st_size >= job["interrupt_after"]:
                os.kill(pid, signal.SIGINT)
                job["interrupt_after"] = None
        time.sleep(0.002)


def serve() -> None:
    warm()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(job)
        status = wait(pid, job, started)
        print(json.dumps({"status": status, "seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    serve()
