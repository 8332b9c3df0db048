"""A process of several that make one video: the first, which is the run, or another, which follows it."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wanloom.cli.console import report_error
from wanloom.cli.room import runs_on_gpu
from wanloom.cli.supervise import JOB, RESUMABLE, continue_words
from wanloom.errors import Interrupted, WanloomError
from wanloom.jobs import folder_for
from wanloom.runtime.layouts import Place

if TYPE_CHECKING:
    from wanloom.cli.prepare import Prepared
    from wanloom.parts import Parts
    from wanloom.pipeline import Pipeline

RESCUE = 3.0  # seconds in which the last step may be saved when a run waits in vain
FOLLOW = 5.0  # seconds that a process leaves to the first one to end by itself


class Lead:
    """The first process: on which device it computes, and how its parts are made."""

    def __init__(self, device: str, make_parts: Callable[..., Parts], folder: Path) -> None:
        self.device, self.make_parts, self.folder = device, make_parts, folder
        self.pipe: Pipeline | None = None

    def end(self, reason: str) -> None:
        """Called by the watchdog, while the main thread waits for ever: save the last step, say it, and end."""
        if self.pipe is not None:
            rescue = threading.Thread(target=self.pipe.job.rescue, daemon=True)
            rescue.start()
            rescue.join(RESCUE)
        report_error(str(Interrupted("E7003", f"{reason}. {continue_words(self.folder)}")))
        os._exit(RESUMABLE)


@contextmanager
def lead(run: Prepared) -> Iterator[Lead]:
    """The first process among its others, for as long as the block lasts; they are told when it ends.

    Errors: E8001 they did not come, E8003 no GPU for this process, E7002 (exit 7) one of them is gone.
    """
    from wanloom.runtime.crew import Lost, meet
    from wanloom.runtime.watchdog import Watch
    from wanloom.together import Together

    place, layout = run.several.place, run.layout
    assert place is not None, "several processes have places"
    folder = run.resume or folder_for(run.outputs[0])
    if place.folder is not None:
        (place.folder / JOB).write_text(str(folder.absolute()))
    crew, board = meet(place)
    device = crew.compute_on("cuda" if runs_on_gpu(run.request) else "cpu")
    make_parts = partial(
        Together, crew=crew, layout=layout, cut=run.several.cut, vae_parallel=run.several.vae_parallel is not False
    )
    leading = Lead(device, make_parts, folder)
    watch = Watch(board, leading.end, waits=lambda: crew.within)
    watch.hear_signals()
    watch.start()
    try:
        yield leading
    except Lost as lost:
        raise Interrupted("E7002", f"another process of this run is gone. {continue_words(folder)}") from lost
    finally:
        watch.close()
        with suppress(Lost):
            crew.leave()


def follow(place: Place) -> int:
    """Any other process: do what the first one orders until it ends; the exit code.  It says only errors of its own."""
    from wanloom.runtime.crew import Lost, meet
    from wanloom.runtime.watchdog import Watch
    from wanloom.together import serve

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is asked, and decides
    warnings.simplefilter("ignore")  # the first process says them
    crew, board = meet(place)
    watch = Watch(board, _gone, extra=FOLLOW)
    watch.start()
    try:
        serve(crew)
        watch.close()
        crew.leave()
    except Lost:
        _gone("")
    except WanloomError as error:
        raise type(error)(error.code, f"process {place.rank}: {error.message}") from error
    return 0


def _gone(_: str) -> None:
    """The first process is gone, or does nothing: this one has nothing to say or to save."""
    os._exit(RESUMABLE)
