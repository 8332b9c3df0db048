"""A text is spoken before anything else is decided: how long it lasts says how many clips the video has.

What is spoken goes beside the video, as `a.speech.wav` beside `a.mp4`, and stays there.  From then on it is the audio
of the request, so that a run that is continued hears the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from wanloom import media
from wanloom.durable import refuse_target
from wanloom.errors import InputError
from wanloom.inputs import with_folder
from wanloom.jobs import read_record
from wanloom.plan import check_request
from wanloom.request import Request
from wanloom.variants import Variant


def check_speaker(request: Request, *, dry_run: bool = False) -> None:
    """Say before any work that a text cannot be spoken: E2023 and E2025, of options that `check_request` found well.

    A dry run makes nothing and asks nobody, so it has no length to plan with: E2023.
    """
    if request.tts_text is None:
        return
    if dry_run:
        raise InputError(
            "E2023",
            "dry-run: how long the video becomes is known when its text was spoken. "
            "Leave --dry-run out, or speak it first and give --audio FILE.",
        )
    _speaker(request)


def speech_file(video: Path) -> Path:
    """Where the speech of a video is kept: a.speech.wav for a.mp4."""
    return video.with_name(f"{video.stem}.speech.wav")


def speak(request: Request, path: Path, *, keep: bool = False) -> Request:
    """The request with its text spoken into the file `path`, which becomes its audio.

    keep: speech that is there already is taken as it is (of a run that is continued).

    Errors: E5001 and E5003 for the place, E5002 when it is there and neither `keep` nor the request's `overwrite` is
    given, E8006 when the speaker fails.
    """
    if not (keep and path.is_file()):
        if path.is_file() and not request.overwrite:
            said = f"{path}: was spoken before. Use it with --audio {path.name}, or speak again with --overwrite."
            raise InputError("E5002", said)
        refuse_target(path, overwrite=request.overwrite)
        assert request.tts_text is not None
        _speaker(request).speak(request.tts_text, path)
    return replace(
        request, audio=path, tts_text=None, tts_command=None, tts_url=None, tts_voice=None, tts_model=None
    )  # fmt: skip


@contextmanager
def spoken(request: Request, variant: Variant, videos: Sequence[Path], resume: Path | None) -> Iterator[Request]:
    """The request with its text spoken: beside the first of `videos`, beside what the job `resume` makes, where it may
    be there already, or without files into one that goes with the block.

    Errors, before anything is spoken: those of `check_request`, `check_speaker` and `media.check_output`.
    """
    if request.tts_text is None:
        yield request
        return
    check_request(with_folder(request), variant)
    check_speaker(request)
    if resume is not None:
        video = resume.absolute().parent / read_record(resume).outputs[0]
        yield speak(request, speech_file(video), keep=True)
    elif videos:
        for path in videos:
            media.check_output(path, overwrite=request.overwrite)
        yield speak(request, speech_file(videos[0]))
    else:
        with tempfile.TemporaryDirectory(prefix="wanloom-speech-") as folder:
            yield speak(request, Path(folder) / "speech.wav")


def _speaker(request: Request) -> media.Speaker:
    return media.Speaker(request.tts_command, request.tts_url, request.tts_voice, request.tts_model)
