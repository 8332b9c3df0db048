"""A training run as data: one TOML file, checked before anything is built.

A recipe names what is trained and has one or more phases.  A phase has its own optimiser, learning-rate schedule and
average (EMA) and runs one or more stages, which differ only in what a batch is: frames, crop, batch size.
Unknown keys are errors.  `wanloom train RECIPE.toml` starts the run, or goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wanloom.errors import InputError


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Optim(Table):
    """One optimiser: Muon for matrices inside blocks and kernels of a VAE when `muon_lr` is given, AdamW else."""

    lr: float = Field(default=2e-3, gt=0)
    muon_lr: float = Field(default=0.0, ge=0)  # 0: AdamW everywhere
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: int = Field(default=100, ge=0)  # steps from 0 to the full rate
    flat: float = Field(default=0.35, ge=0, le=1)  # share of the phase at the full rate; then down to 0
    decay: Literal["linear", "cosine"] = "linear"
    clip: float = Field(default=2.0, gt=0)  # gradient norm
    ema: float = Field(default=0.998, ge=0, lt=1)


class Stage(Table):
    """What a batch is for `steps` steps. `batch` counts samples per process."""

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    frames: int = Field(default=17, gt=0)  # pixel frames; 1 with flow matching: one latent frame, anywhere in time
    crop: int | None = None  # pixels; only for the VAE
    crops: int = Field(
        default=1, gt=0
    )  # how many are cut from each clip: drawing one takes longer than learning from it


class VaeLoss(Table):
    """Weights of the VAE's loss terms (pixels in [-1, 1])."""

    l1: float = 1.0
    mse: float = 0.5
    gradient: float = 0.4  # L1 of horizontal and vertical differences: edges
    kl: float = 1.5e-3  # per latent element; large enough that the decoder forgives noise
    kl_ramp: int = 500  # steps from 0 to `kl`
    grey: float = Field(default=0.0, ge=0, le=1)  # share of clips that begin with grey frames, as s2v's past does
    figures: float = Field(default=0.3, ge=0, le=1)  # share of clips with heads and figures instead of shapes


class Flow(Table):
    """The flow-matching objective: x_s = (1-s) x0 + s e, target v = e - x0, t = 1000 s."""

    shift: float = Field(default=5.0, gt=0)
    low: float = Field(default=0.0, ge=0, lt=1)  # the range of sigma this phase answers for
    high: float = Field(default=1.0, gt=0, le=1)
    text_dropout: float = Field(default=0.1, ge=0, lt=1)
    heads: float = Field(default=1.0, ge=1)  # animate: how much a place that shows a head counts beside others
    first_frame: float = Field(default=0.0, ge=0, le=1)  # TI2V: share of samples whose first frame is given, clean


class Phase(Table):
    name: str
    init: str | None = None  # the earlier phase whose average this one starts from, or "start:EXPERT" of `start`
    trains: tuple[Literal["dit", "text", "vae", "decoder", "audio", "image"], ...] = ("dit", "text")
    optim: Optim = Optim()
    flow: Flow = Flow()
    loss: VaeLoss = VaeLoss()
    stages: tuple[Stage, ...] = Field(min_length=1)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(step)


class Data(Table):
    """Clips of a procedural world; clip i is a pure function of `seed` and i.

    world: moving shapes; heads that talk; figures that dance, with the stick figures that lead them.
    """

    world: Literal["shapes", "talk", "dance"] = "shapes"
    clips: int = Field(default=10_000, gt=0)  # how many are cached: latents of flow matching, pictures for an encoder
    first: float = Field(default=0.4, gt=0, lt=1)  # people: share of batches of first clips, which have no past
    two_objects: float = Field(default=0.0, ge=0, le=1)
    held_out: int = Field(default=64, gt=0)  # clips for the held-out loss


class Watch(Table):
    """How often to look (steps), and how."""

    log: int = 25
    loss: int = 1000  # held-out loss at fixed noise levels
    sheet: int = 2000  # samples as a picture, judged
    save: int = 500
    prompts: int = 24
    sampler_steps: int = 10
    guidance: float = 3.0


# What the phases of each kind of recipe can train.
PARTS = {"vae": {"vae", "decoder"}, "audio": {"audio"}, "image": {"image"}, "flow": {"dit", "text"}}


class Recipe(Table):
    """One TOML file."""

    name: str
    variant: str  # a row of VARIANTS, whose sizes are trained
    kind: Literal["vae", "audio", "image", "flow"]
    seed: int = 0
    processes: int = Field(default=1, ge=1, le=64)
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the working copy; masters are float32
    compile: bool = False
    checkpointing: bool = False  # recompute blocks in the backward pass
    directions: int | None = Field(default=None, ge=1)  # vae: principal directions of the latents to keep; None: all
    vae: str | None = None  # flow: the checkpoint directory whose VAE is used, frozen
    audio: str | None = None  # flow, speech: the checkpoint directory whose audio encoder is used, frozen
    image: str | None = None  # flow, animate: the checkpoint directory whose CLIP is used, frozen
    start: str | None = None  # a checkpoint directory that phases with init = "start:..." begin from
    data: Data = Data()
    watch: Watch = Watch()
    phases: tuple[Phase, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        seen: set[str] = set()
        for phase in self.phases:
            from_start = phase.init is not None and phase.init.startswith("start:")
            if from_start and (self.start is None or self.kind in ("audio", "image")):
                raise ValueError(
                    f"phase '{phase.name}' begins from a checkpoint; a recipe of flow or vae names it in `start`"
                )
            if phase.init is not None and not from_start and phase.init not in seen:
                raise ValueError(f"phase '{phase.name}' starts from '{phase.init}', which is no earlier phase")
            if phase.name in seen:
                raise ValueError(f"two phases are called '{phase.name}'")
            if phase.flow.low >= phase.flow.high:
                raise ValueError(f"phase '{phase.name}': flow.low must be below flow.high")
            wanted = PARTS[self.kind]
            if not set(phase.trains) <= wanted:
                raise ValueError(f"phase '{phase.name}': a {self.kind} recipe trains {sorted(wanted)}")
            seen.add(phase.name)
        if self.kind == "flow" and self.vae is None:
            raise ValueError("a flow recipe needs `vae`: the directory of a trained VAE")
        return self

    @property
    def digest(self) -> str:
        """What a saved state must agree with to be resumed."""
        return hashlib.sha256(self.model_dump_json(exclude={"watch"}).encode()).hexdigest()[:16]


def read_recipe(path: str | Path) -> Recipe:
    """A checked Recipe from a TOML file; E4032 names the line or the key that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise InputError("E4001", f"recipe: no such file: {path}. Recipes of the demo models are in recipes/.")
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except tomllib.TOMLDecodeError as error:
        raise InputError("E4032", f"{path.name}: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError("E4032", f"{path.name}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise InputError("E4032", f"{path.name}: {where}: {first['msg']}") from None
