"""Everything about a run that can be wrong, checked before a weight is read and before torch is imported.

`prepare` turns what was typed into a Prepared run: the request with its seed decided, the model's files with their
headers surveyed, the pictures read, the Plan, the output files. It raises the first thing that a person must mend.
"""

from __future__ import annotations

import secrets
import stat
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wanloom import budget, demo
from wanloom.checkpoint.find import Files, resolve
from wanloom.checkpoint.load import survey
from wanloom.checkpoint.lora import relighting_file
from wanloom.cli.forecast import Forecast, forecast
from wanloom.cli.options import DEFAULT_TASK, typed_values
from wanloom.cli.room import Basis, basis_of, check_machine, check_room, place_of, runs_on_gpu, what_is_free
from wanloom.cli.several import ALONE, Several
from wanloom.durable import free_name, sha256_file
from wanloom.errors import InputError, WanloomWarning
from wanloom.placement import MemoryPlan
from wanloom.plan import Input, Plan, check_request, differences, make_plan, request_like
from wanloom.request import OPTIONS, ROLES, Request, request_from_text
from wanloom.runtime.layouts import Layout
from wanloom.variants import VARIANTS, Variant, variant_for

PARTS = ("ckpt_dir", "dit", "dit_high", "dit_low", "vae", "text_encoder", "tokenizer", "clip", "audio_encoder")


@dataclass(frozen=True)
class Prepared:
    """A run that nothing is known to be wrong with. `variant` has the sizes of the checkpoint's own tensors."""

    request: Request
    variant: Variant
    files: Files
    plan: Plan
    outputs: tuple[Path, ...]
    memory: MemoryPlan
    have: budget.Have
    demo_name: str | None
    resume: Path | None
    time: Forecast
    basis: Basis
    several: Several
    layout: Layout

    @property
    def need(self) -> budget.Need:
        return self.memory.need


def prepare(
    params: Mapping[str, Any], *, like: Path | None, resume: Path | None, dry_run: bool, several: Several = ALONE
) -> Prepared:
    """Check a command line against itself, the model, the pictures and the machine; see the module."""
    from wanloom.inputs import facts, read_inputs, with_folder  # here: `--help` needs no numpy
    from wanloom.speaking import check_speaker

    typed = typed_values(params)
    _refuse_odd_target(typed.get("out"))
    request, replayed = _request(typed, like, resume)
    request = with_folder(request)
    variant, demo_name = choose_model(request)
    check_request(request, variant)
    check_speaker(request, dry_run=dry_run)
    check_machine(request)
    inputs = facts(read_inputs(request))
    request = replace(request, seed=_seed(request))
    make_plan(request, variant, inputs=inputs)  # mistakes in the request are said before those in the files
    request = _with_demo_path(request, demo_name)
    files = resolve(variant, **{name: getattr(request, name) for name in PARTS})
    variant = survey(variant, files)
    relighting_file(request, files)
    plan = make_plan(request, variant, inputs=inputs)
    on_gpu = runs_on_gpu(request)
    layout = several.layout(request, variant, plan, on_gpu=on_gpu)
    outputs = output_files(request, plan) if resume is None else _outputs_of(resume, typed)
    if request.tts_text is not None:
        request = _spoken(request, outputs)
        plan = make_plan(request, variant, inputs=facts(read_inputs(request)))
    if replayed is not None:
        _check_replay(plan, replayed, typed)
    for note in plan.notes:
        warnings.warn(WanloomWarning(note), stacklevel=2)
    if demo_name is not None and not plan.in_clips:
        _warn_of_unknown_words(plan.prompt)
    have = what_is_free(request, outputs[0].parent, on_gpu=on_gpu, processes=several.local)
    basis = basis_of(request, on_gpu=on_gpu)
    memory = place_of(request, plan, variant, have, basis, on_gpu=on_gpu, files=files, several=several)
    expected = forecast(request, plan, variant, memory, basis, on_gpu=on_gpu, several=several)
    if not dry_run:
        check_outputs(outputs, plan, memory.need, overwrite=request.overwrite or resume is not None)
        check_room(memory.need, have)
    return Prepared(
        request, variant, files, plan, outputs, memory, have, demo_name, resume, expected, basis, several, layout
    )


# --- the request ----------------------------------------------------------------------------------------------------


def _request(typed: Mapping[str, str | bool], like: Path | None, resume: Path | None) -> tuple[Request, Plan | None]:
    """What was typed, on top of a finished video's Plan (--like) or an unfinished run's request (--resume)."""
    if resume is not None:
        from wanloom.jobs import stored_request

        return request_from_text({**stored_request(resume), **typed}), None
    if like is None:
        return request_from_text(typed), None
    plan, request = plan_inside(like), request_from_text(typed)
    asked: dict[str, Any] = {name: getattr(request, name) for name in typed}
    if "sigmas" in asked:
        asked = {"steps": None, "shift": None, **asked}
    elif {"steps", "shift"} & set(asked):
        asked = {"sigmas": None, **asked}
    again = replace(request_like(plan), **asked)
    found: dict[str, Any] = {item.role: _find_input(item, getattr(again, item.role), like) for item in plan.inputs}
    return replace(again, **found), plan


def plan_inside(video: Path) -> Plan:
    """The Plan that a finished video carries. Errors: E3001 to E3009 for the file, E3022 when it carries none."""
    from wanloom.media import read_comment

    text = read_comment(video)
    if not text:
        raise InputError("E3022", f"like: {video.name} carries no plan; it was not made by wanloom, or was re-encoded.")
    return Plan.from_json(text)


def _find_input(item: Input, given: Any, video: Path) -> Path:
    """The file that a Plan was made from: the one given, or one of that name beside the video or here."""
    role, option = item.role, "--" + item.role.replace("_", "-")
    places = [Path(given)] if given is not None else [video.parent / item.name, Path(item.name)]
    there = [place for place in places if place.is_file()]
    for place in there:
        if sha256_file(place) == item.sha256:
            return place
    if there or given is not None:
        raise InputError(
            "E3023", f"{role}: {there[0] if there else given} is not the {item.name} the video was made from."
        )
    raise InputError("E3024", f"{role}: {item.name} is needed again and is not here. Give it with {option} FILE.")


def _check_replay(plan: Plan, replayed: Plan, typed: Mapping[str, str | bool]) -> None:
    """Say it when the same request becomes another video here: another model, or other defaults."""
    about_the_video = {option.name for option in OPTIONS if option.group == "video" and option.name not in ROLES}
    odd = differences(plan, replayed)
    if odd and not about_the_video & set(typed):
        warnings.warn(WanloomWarning(f"W2033: like: this model plans other {', '.join(odd)}."), stacklevel=3)


def _seed(request: Request) -> int:
    """The seed decided here, so that the file's name, the plan line and a resumed run agree on it."""
    return secrets.randbelow(2**32) if request.seed in (None, -1) else int(request.seed or 0)


# --- the model ------------------------------------------------------------------------------------------------------


def choose_model(request: Request) -> tuple[Variant, str | None]:
    """The model of the task, and the demo model's name when no checkpoint was given. Errors: E2001, E2002."""
    if request.task is None and request.ckpt_dir is not None and request.ckpt_dir.is_dir():
        return _model_in(request.ckpt_dir), None
    task = request.task or DEFAULT_TASK
    if any(getattr(request, name) is not None for name in PARTS):
        return variant_for(task), None
    row = variant_for(task, demo=True)
    if row.name not in demo.available():
        raise InputError("E2001", f"--ckpt-dir is required: this installation has no weights of {row.name}.")
    return row, row.name


def _model_in(folder: Path) -> Variant:
    """The released model that a directory holds. Error: E2002 when it can be several; those of a damaged checkpoint."""
    from wanloom.checkpoint.inspect import inspect

    if folder.parent.resolve() == demo.MODELS and folder.name in VARIANTS:
        return VARIANTS[folder.name]
    names = list(dict.fromkeys(candidate.variant for candidate in inspect(folder).candidates))
    if len(names) > 1 and DEFAULT_TASK not in names:
        raise InputError("E2002", f"task: {folder} can be {' or '.join(names)}. Say which with --task.")
    return VARIANTS[DEFAULT_TASK if len(names) != 1 else names[0]]


def _spoken(request: Request, outputs: tuple[Path, ...]) -> Request:
    """The request with its text spoken, and said so; but first whether the videos themselves can be written."""
    from wanloom import media
    from wanloom.cli.console import say
    from wanloom.speaking import speak, speech_file

    for path in outputs:
        media.check_output(path, overwrite=request.overwrite)
    speech = speech_file(outputs[0])
    request = speak(request, speech)
    say(f"spoken: {speech}")
    return request


def _with_demo_path(request: Request, demo_name: str | None) -> Request:
    return request if demo_name is None else replace(request, task=demo_name, ckpt_dir=demo.path_of(demo_name))


def _warn_of_unknown_words(prompt: str) -> None:
    """The demo world has few words; others are read as one unknown word, and the picture will not show them."""
    from wanloom.demo import world

    words = world.unknown_words(prompt)
    if words:
        named = ", ".join(repr(word) for word in words[:6])
        example = world.example_prompts(1)[0]
        text = f"the demo model does not know {named}. It knows plain shapes that move, for example: {example}"
        warnings.warn(WanloomWarning(f"W2034: prompt: {text}"), stacklevel=3)


# --- the output -----------------------------------------------------------------------------------------------------


def _refuse_odd_target(text: str | bool | None) -> None:
    """A directory or a device as output, whatever its name ends in. Error: E5001."""
    if not isinstance(text, str):
        return
    try:
        mode = Path(text).stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError("E5001", f"out: {text} is {what}, expected the name of a video file.")


def output_files(request: Request, plan: Plan) -> tuple[Path, ...]:
    """One file for each seed: the one named, with its seed when there are several, or a fresh name in this folder."""
    seeds = [plan.seed + index for index in range(request.num)]
    if request.out is not None:
        if request.num == 1:
            return (request.out,)
        return tuple(request.out.with_name(f"{request.out.stem}_{seed}{request.out.suffix}") for seed in seeds)
    stamp = time.strftime("%Y%m%d_%H%M%S")
    size = f"{plan.size[0]}x{plan.size[1]}"
    return tuple(free_name(Path(f"{plan.task}_{size}_{seed}_{stamp}.mp4")) for seed in seeds)


def _outputs_of(resume: Path, typed: Mapping[str, str | bool]) -> tuple[Path, ...]:
    """The files that an unfinished run makes. Error: E2020 when another one is named."""
    from wanloom.jobs import read_record

    outputs = tuple(resume.absolute().parent / name for name in read_record(resume).outputs)
    named = typed.get("out")
    if isinstance(named, str) and Path(named).absolute() not in outputs:
        raise InputError("E2020", f"resume: {resume} makes {outputs[0].name}, not {named}. Nothing was changed.")
    return outputs


def check_outputs(outputs: tuple[Path, ...], plan: Plan, need: budget.Need, *, overwrite: bool) -> None:
    """The files can be written and the encoder works. Errors: E2017, E5001, E5002, E5003, E8004."""
    from wanloom import media

    for path in outputs:
        media.check_output(path, overwrite=overwrite, need=need.disk * len(outputs))
    media.try_encoder(outputs[0], size=plan.size, fps=plan.rate, quality=plan.quality)
