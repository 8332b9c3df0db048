"""Out of memory, mended where it strikes: what a run does with less memory, a step at a time.

Denoising   is taken up at the step where it struck, with the blocks of the transformer coming and going: the same bits.
Decoding    begins again from the latents, which are there: without the transformer beside it, in stripes of rows (the
            same numbers to rounding), in smaller stripes, on the CPU.  Frames that were given are not given again.
            Of several processes the first goes on alone, before all that: the others wait for it in the middle of
            something that it can no longer do, and no clip after this one can be denoised without them.

Nothing that was denoised is denoised again, and nothing that a person chose - size, frames, steps - is changed.  Each
step down is said once, is in the Result, and in the job folder: a run that goes on begins where it had come down to.
The next run begins at the top.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from wanloom.errors import InputError, WanloomWarning
from wanloom.jobs import Job, Memory, resume_command
from wanloom.parts import Parts, out_of_memory
from wanloom.sampling.velocity import Experts

SHARES = (4, 16)  # of a frame's rows: stripes, smaller stripes
LEAST = 8  # rows of pixels in a stripe
RECORD = "lowered"  # of the job folder


class Catch:
    """`with Catch() as strike:` ends quietly when memory runs out, and `strike.happened` says so.

    off: it does not, as where other processes are in the middle of the same step.
    The error and all that its frames hold is gone then, so that what comes next has the memory.
    """

    happened = False

    def __init__(self, *, off: bool = False) -> None:
        self._off = off

    def __enter__(self) -> Catch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        self.happened = not self._off and out_of_memory(error)
        return self.happened


@contextmanager
def plainly_said() -> Iterator[None]:
    """Error: E5007 for memory that ran out where nothing can be done about it."""
    with Catch() as strike:
        yield
    if strike.happened:
        raise InputError("E5007", "memory: it ran out. `wanloom plan` says what a run needs, and what would fit.")


class Ladder:
    """The steps down of one run.  Leave the `with` block to put the parts back as they were asked for.

    height: rows of pixels of the video.  `taken`: what was done, in words.
    """

    def __init__(self, parts: Parts, job: Job | Memory, height: int) -> None:
        self.taken: list[str] = []
        self.beside: Experts | None = None  # transformers that may be loaded while the VAE decodes
        self._parts, self._job, self._height = parts, job, height
        self._alone = False
        self._asked = self._settings()

    def __enter__(self) -> Ladder:
        saved = self._job.load(RECORD)
        if saved is not None:
            self._come_down(saved)
        return self

    def __exit__(self, *_: object) -> None:
        if self._settings() != self._asked:
            self._parts.release()
            parts = self._parts
            parts.resident_blocks, parts.vae_rows, parts.vae_device, parts.vae_shared = self._asked

    # --- steps down

    def lower_denoising(self, velocity: Experts) -> None:
        """Take the transformer from memory; its blocks come and go when it is loaded again.

        Error: E5007 when they do already, or cannot.  Warning: W5009.
        """
        velocity.close()
        self._parts.release()
        if not self._parts.stream():
            how = "with all blocks of the transformer coming and going" if self._parts.resident_blocks == 0 else ""
            cure = "Try --row-chunks 4096, a smaller --size or fewer --frames."
            raise InputError("E5007", f"memory: it ran out in denoising{', ' if how else ''}{how}. {cure}")
        self._took("W5009", "denoising", "the blocks of the transformer come and go, which changes no bit")

    def lower_decoding(self) -> None:
        """The next way to decode in less memory.

        Error: E5007 when there is none.  Warning: W5008.
        """
        parts = self._parts
        smaller = [rows for rows in self._stripes() if rows < (parts.vae_rows or self._height)]
        if parts.vae_shared:
            parts.vae_shared, how = False, "by the first process alone"
        elif self.beside is not None and self.beside.name is not None and not self._alone:
            self._alone, how = True, "the transformer leaves before"
        elif smaller:
            parts.vae_rows, how = smaller[0], f"in stripes of {smaller[0]} rows"
        elif parts.vae_device != "cpu":
            parts.vae_device, how = "cpu", "on the CPU"
        else:
            words = f"memory: it ran out in decoding, also in stripes of {parts.vae_rows or self._height} rows."
            cure = " Free some, or take a smaller --size."
            if isinstance(self._job, Job):
                cure = f" The latents are saved. Free some and continue: {resume_command(self._job.folder)}"
            raise InputError("E5007", words + cure)
        self._clear()
        self._took("W5008", "decoding", how)

    def make_room(self) -> None:
        """Before the VAE comes: the transformer leaves, where it has come down to that."""
        if self._alone:
            self._clear()

    def _clear(self) -> None:
        """Let go of whatever is loaded."""
        if self.beside is not None:
            self.beside.close()
        self._parts.release()

    def _stripes(self) -> Iterator[int]:
        """Rows of pixels in a stripe, for each step down."""
        for share in SHARES:
            yield max(LEAST, -(-self._height // share))

    # --- what is remembered

    def _settings(self) -> tuple[int | None, int | None, str, bool]:
        parts = self._parts
        return parts.resident_blocks, parts.vae_rows, parts.vae_device, parts.vae_shared

    def _took(self, code: str, stage: str, how: str) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.taken.append(f"{stage}: {how}")
        blocks, rows, device, shared = self._settings()
        numbers = {
            "alone": int(self._alone), "blocks": blocks, "rows": rows, "on_cpu": int(device == "cpu"),
            "by_first": int(self._asked[3] and not shared),
        }  # fmt: skip
        self._job.save(RECORD, {name: torch.tensor(value) for name, value in numbers.items() if value is not None})
        warnings.warn(WanloomWarning(f"{code}: memory ran out in {stage}; it goes on: {how}."), stacklevel=3)

    def _come_down(self, saved: dict[str, Tensor]) -> None:
        """To where an earlier process had come."""
        parts, numbers = self._parts, {name: int(value) for name, value in saved.items()}
        if numbers.get("blocks") == 0 and parts.resident_blocks != 0 and parts.stream():
            self.taken.append("denoising: the blocks of the transformer come and go")
        if numbers.get("by_first") and parts.vae_shared:
            parts.vae_shared = False
            self.taken.append("decoding: by the first process alone")
        if numbers.get("alone"):
            self._alone = True
        if "rows" in numbers and numbers["rows"] != parts.vae_rows:
            parts.vae_rows = numbers["rows"]
            self.taken.append(f"decoding: in stripes of {parts.vae_rows} rows")
        if numbers.get("on_cpu") and parts.vae_device != "cpu":
            parts.vae_device = "cpu"
            self.taken.append("decoding: on the CPU")
        if self._settings() != self._asked:
            parts.release()


class Decoding:
    """The VAE as a decoder that comes down the ladder when memory runs out; it leaves with the `with` block."""

    def __init__(self, parts: Parts, ladder: Ladder) -> None:
        self._parts, self._ladder = parts, ladder
        self._stack = ExitStack()
        self._vae: Any = None

    def __enter__(self) -> Decoding:
        return self

    def __exit__(self, *_: object) -> None:
        self._vae = None
        self._stack.close()

    def frames(self, z: Tensor) -> Iterator[Tensor]:
        """Pixels [1, 3, n, H, W] in [-1, 1] of each latent frame of z [C, T, h, w] in turn.

        After a step down those that were given are made again and left out.
        """
        given = 0
        while True:
            with Catch() as strike:
                for piece in islice(self._pieces(z), given, None):
                    given += 1
                    yield piece
                return
            assert strike.happened
            self.__exit__()
            self._ladder.lower_decoding()

    def _pieces(self, z: Tensor) -> Iterator[Tensor]:
        if self._vae is None:
            self._ladder.make_room()
            self._vae = self._stack.enter_context(self._parts.use("decoder"))
        pieces: Iterator[Tensor] = self._vae.decode_chunks(z[None].to(self._parts.vae_device))
        return pieces
