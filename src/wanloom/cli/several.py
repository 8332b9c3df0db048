"""Several processes for one video: their options, which of them this process is, and what does not go together.

    torchrun --nproc_per_node 4 -m wanloom generate ...     torchrun says who is who (RANK, WORLD_SIZE)
    wanloom generate --gpus 4 ...                           `supervise.py` starts them, and says it the same way

Nothing here needs torch: what is wrong is said before it is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from wanloom.errors import InputError
from wanloom.plan import Plan
from wanloom.request import Request, parse_switch
from wanloom.runtime import machine
from wanloom.runtime.layouts import Layout, Place, choose_layout
from wanloom.shares import held_bytes
from wanloom.variants import Variant

FOLDER = "WANLOOM_CREW"  # environment: the private directory in which the processes of `--gpus` meet
MOST = 64  # processes on one machine
SIZES = {"ulysses_size": "ulysses", "ring_size": "ring", "cfg_parallel": "cfg"}  # option -> of choose_layout
CUT = {"dit_fsdp": "dit", "t5_fsdp": "text"}  # option -> the part whose weights are cut
SWITCHES = (*CUT, "vae_parallel")

HELP = {
    "gpus": "start N processes on this machine, a GPU for each (with --device cpu: none)",
    "ulysses_size": "processes that deal out the heads of attention (default: as many as divide them)",
    "ring_size": "processes that pass keys and values round (default: what heads leave over)",
    "cfg_parallel": "2: the two passes of guidance at the same time (default: when the number is even)",
    "dit_fsdp": "cut the transformer's weights among the processes",
    "t5_fsdp": "cut the text encoder's weights among the processes",
    "vae_parallel": "off: the first process encodes and decodes alone (default: each has its rows)",
}

Function = TypeVar("Function", bound=Callable[..., Any])


class SeveralOption(click.Option):
    """An option of this module, in its own section of `--help`; a switch may have an official word as value."""

    section = "Several processes"

    def __init__(self, name: str) -> None:
        dashed = name.replace("_", "-")
        flags = list(dict.fromkeys((f"--{dashed}", f"--{name}")))
        switch = {"is_flag": False, "flag_value": "true"} if name in SWITCHES else {"metavar": "N"}
        super().__init__([*flags, name], type=str, default=None, help=HELP[name], **switch)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        flag = self.opts[0] if self.name in SWITCHES else f"{self.opts[0]} N"
        alias = f" (= {self.opts[1]})" if len(self.opts) > 1 else ""
        return flag, (self.help or "") + alias


def several_options(function: Function) -> Function:
    """A decorator that adds the options of this module."""
    parameters: list[click.Parameter] = getattr(function, "__click_params__", [])
    added = [SeveralOption(name) for name in HELP]
    function.__click_params__ = [*reversed(added), *parameters]  # type: ignore[attr-defined]  # click's own list
    return function


@dataclass(frozen=True)
class Several:
    """How many processes make the video, which of them this one is, and what was said about their layout.

    place: None in a run alone.  local: how many of them are on this machine.  sizes: names of `choose_layout` -> what
    was typed.  cut: parts whose weights are cut.  start: how many this process is to start itself; 0: none.
    vae_parallel: whether each has its rows of what the VAE makes; None: where there are several.
    """

    place: Place | None = None
    local: int = 1
    sizes: Mapping[str, int] = field(default_factory=dict)
    cut: tuple[str, ...] = ()
    start: int = 0
    vae_parallel: bool | None = None

    @property
    def world(self) -> int:
        return self.start or (1 if self.place is None else self.place.world)

    @property
    def alone(self) -> bool:
        return self.world == 1

    def held(self, variant: Variant, dtype: str) -> Mapping[str, int]:
        """Part -> bytes that this process holds of it, of parts that are cut."""
        return held_bytes(variant, dtype, dict.fromkeys(self.cut, self.world))

    def layout(self, request: Request, variant: Variant, plan: Plan, *, on_gpu: bool) -> Layout:
        """Who does what.

        Errors: E2018 sizes that cannot be, E2019 weights that cannot be cut, E2023 options that a run of several
        processes does not have, E8003 fewer GPUs than processes.
        """
        guided = any(span.guidance != 1 for span in plan.spans)
        if self.alone:
            self._refuse_alone()
        layout = choose_layout(self.world, variant.dit.heads, guided, **self.sizes)
        if not self.alone:
            _refuse_options(request, layout)
            self._refuse_cuts(request)
        if on_gpu and not self.alone and self.local > len(machine.gpus()):
            raise InputError("E8003", too_few(self.local, len(machine.gpus())))
        return layout

    def _refuse_alone(self) -> None:
        for option, name in SIZES.items():
            count = self.sizes.get(name, 1)
            if count > 1:
                raise InputError("E2018", f"{option}: got {count}, and this is one process. Start more with --gpus.")
        for option, part in CUT.items():
            if part in self.cut:
                raise InputError("E2019", f"{option}: this is one process. Start more with --gpus, or leave it out.")
        if self.vae_parallel:
            raise InputError("E2023", "vae_parallel: this is one process. Start more with --gpus, or leave it out.")

    def _refuse_cuts(self, request: Request) -> None:
        """What changes weights after they were read cannot change weights of which a process has a part."""
        dit = {
            "quantise": request.quantise is not None,
            "resident-blocks": request.resident_blocks is not None,
            "use-relighting-lora": request.use_relighting_lora,
        }
        text = {"quantise": request.quantise is not None, "t5-cpu": request.t5_cpu}
        for option, part, others in (("dit_fsdp", "dit", dit), ("t5_fsdp", "text", text)):
            for other, asked in others.items():
                if part in self.cut and asked:
                    raise InputError("E2019", f"{option}: conflicts with --{other}. Leave one of them out.")


ALONE = Several()


def _refuse_options(request: Request, layout: Layout) -> None:
    """Options that mean one process, or one GPU, or a kernel where the ring computes attention itself."""
    for option, asked in (
        ("cache", request.cache is not None),
        ("compile", request.compile),
        ("row-chunks", request.row_chunks is not None),
        ("guidance-batch", request.guidance_batch not in (None, "off")),
    ):
        if asked:
            raise InputError("E2023", f"{option}: works in a run of one process. Leave it out.")
    if request.device is not None and ":" in request.device:
        text = f"device: {request.device} is one GPU, and {layout.world} processes take one each."
        raise InputError("E2023", f"{text} Use --device cuda, and CUDA_VISIBLE_DEVICES to choose.")
    if request.attention is not None and layout.ring > 1:
        text = f"attention: a ring of {layout.ring} computes attention itself, without {request.attention}."
        raise InputError("E2023", f"{text} Leave it out, or use --ring-size 1.")


def too_few(processes: int, gpus: int) -> str:
    """The sentence of E8003."""
    return f"{processes} processes need {processes} GPUs, {gpus} are here. Start {gpus}, or use --device cpu."


# ---------------------------------------------------------------- reading


def read_several(params: dict[str, Any], environment: Mapping[str, str] | None = None) -> Several:
    """What was typed, taken out of `params`, and what the environment says.

    Errors: E2018 a number that is none, E2022 a switch, E2023 `--gpus` under torchrun, E8001 the environment.
    """
    typed = {name: params.pop(name, None) for name in HELP}
    sizes = {name: _count(option, typed[option]) for option, name in SIZES.items() if typed[option] is not None}
    cut = tuple(part for option, part in CUT.items() if typed[option] is not None and parse_switch(typed[option]))
    environment = os.environ if environment is None else environment
    place, local = read_place(environment)
    start = 0 if typed["gpus"] is None else _count("gpus", typed["gpus"])
    if start > 1 and place is not None:
        raise InputError(
            "E2023", f"gpus: conflicts with torchrun, which started {place.world} processes. Leave it out."
        )
    rows = None if typed["vae_parallel"] is None else parse_switch(typed["vae_parallel"])
    return Several(place, start if start > 1 else local, sizes, cut, start if start > 1 else 0, rows)


def _count(option: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text.strip()) or not 1 <= int(text) <= MOST:
        raise InputError("E2018", f"{option}: got '{text}', expected a number of processes, 1..{MOST}.")
    return int(text)


def read_place(environment: Mapping[str, str]) -> tuple[Place | None, int]:
    """Which process of how many this is, as torchrun says it, and how many are on this machine.

    (None, 1) for a run alone.  Error: E8001 for numbers that cannot be.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None, 1
    world = _number(environment, "WORLD_SIZE", 1, 1_000_000)
    rank = _number(environment, "RANK", 0, world - 1)
    if world == 1:
        return None, 1
    here = _number({"LOCAL_WORLD_SIZE": str(world), **environment}, "LOCAL_WORLD_SIZE", 1, world)
    local = _number({"LOCAL_RANK": str(rank), **environment}, "LOCAL_RANK", 0, here - 1)
    folder = environment.get(FOLDER)
    if folder is None:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise InputError("E8001", f"{name}: is not set, but RANK and WORLD_SIZE are. Start with torchrun.")
    return Place(rank, world, local, None if folder is None else Path(folder)), here


def _number(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = environment.get(name, "")
    if not re.fullmatch(r"[0-9]{1,7}", text) or not least <= int(text) <= most:
        rest = "Start with torchrun, or unset RANK and WORLD_SIZE."
        raise InputError("E8001", f"{name}: got '{text}' in the environment, expected {least}..{most}. {rest}")
    return int(text)
