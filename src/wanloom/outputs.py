"""A video on its way out: frames are taken as they come, encoded while the next are decoded, and the file gets its name
when it is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wanloom import media
from wanloom.durable import atomic_path, failpoint, free_name, sha256_file
from wanloom.errors import InputError
from wanloom.jobs import Job, Memory, read_record
from wanloom.plan import Plan
from wanloom.results import Video, quantise

OutPaths = str | Path | Sequence[str | Path] | None


def files_of(out: OutPaths) -> tuple[Path, ...]:
    """The files that somebody named: one, several or none."""
    return () if out is None else (Path(out),) if isinstance(out, str | Path) else tuple(map(Path, out))


def files_to_write(out: OutPaths, resume: Path | None, count: int) -> tuple[Path, ...]:
    """The files of a run of `count` videos: those named, or those of the job that is continued.

    Errors: E2020 when the job has others or is none, E2029 when they are not as many.
    """
    paths = files_of(out)
    if resume is not None:
        stored = tuple(resume.absolute().parent / name for name in read_record(resume).outputs)
        if len(paths) == 1 and paths[0].name != stored[0].name:
            raise InputError(
                "E2020", f"resume: {resume} makes {stored[0].name}, not {paths[0].name}. Nothing was changed."
            )
        return stored
    if paths and len(paths) != count:
        raise InputError("E2029", f"num: {count} videos need as many files, got {len(paths)}.")
    return paths


@dataclass
class Output:
    """Where the clips of one video go: `clip` before each one's frames, `write` for these.

    writer: the file's; room: how many frames it still takes; kept: the pixels so far, where they are wanted in memory;
    latents: of each clip, as the decoder got them.
    """

    writer: media.BackgroundWriter | None
    room: int
    keep: bool
    latents: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    def clip(self, latents: Tensor) -> None:
        """A clip begins, decoded from these latents [C, T, h, w]."""
        if self.keep:
            self.latents.append(latents.cpu())

    def write(self, pixels: Tensor) -> None:
        """More frames, [3, n, H, W] in [-1, 1]."""
        if self.writer is not None and self.room > 0:
            self.writer.write(quantise(pixels[:, : self.room]))
            self.room -= pixels.shape[1]
        if self.keep:
            self.kept.append(pixels.cpu())

    def video(self, plan: Plan) -> Video:
        """All of it, in memory."""
        return Video(torch.cat(self.kept, 1), self.latents[0], plan, tuple(self.latents))


@contextmanager
def in_memory(plan: Plan, tensors_file: Path | None, videos: list[Video]) -> Iterator[Output]:
    """An Output that becomes a Video, put into `videos` when the block ends well."""
    output = Output(None, 0, keep=True)
    yield output
    video = output.video(plan)
    if tensors_file is not None:
        video.save_tensors(tensors_file)
    videos.append(video)


@contextmanager
def in_file(
    plan: Plan, path: Path, job: Job | Memory, *, overwrite: bool, tensors_file: Path | None, sound: Path | None
) -> Iterator[Output]:
    """An Output that becomes the file `path` when the block ends well, with `sound` where there is one.

    Error: E5006 when the sound cannot be put in; the silent video is kept then, and named.
    """
    with atomic_path(path, overwrite=overwrite) as temporary:
        # Its name ends as that of the temporary file does, so that `sweep` knows it, too.
        silent = temporary if sound is None else temporary.with_name(f".silent{temporary.name}")
        try:
            comment = plan.to_json()
            with (
                media.VideoWriter(silent, fps=plan.rate, quality=plan.quality, comment=comment) as writer,
                media.BackgroundWriter(writer) as encoder,
            ):
                output = Output(encoder, plan.frames, keep=tensors_file is not None)
                yield output
            if sound is not None:
                failpoint("sound")
                _put_sound(silent, sound, temporary, path, plan)
        finally:
            if silent != temporary:
                silent.unlink(missing_ok=True)
        if tensors_file is not None:
            output.video(plan).save_tensors(tensors_file)
        job.announce(path.name, sha256_file(temporary))
    failpoint("published")


def _put_sound(silent: Path, sound: Path, out: Path, path: Path, plan: Plan) -> None:
    trim = plan.speech.trim if plan.speech is not None else 0.0
    try:
        media.add_sound(silent, sound, out, start=trim, whole=plan.animation is not None)
    except InputError as error:
        kept = free_name(path.with_name(f"{path.stem}.silent{path.suffix}"))
        silent.replace(kept)
        raise InputError(error.code, f"{error.message} The video without sound is kept: {kept}") from error
