"""The main path: a request becomes a plan, a plan conditioning, noise latents, latents frames, and frames a file.

    pipe = wanloom.load("Wan2.2-T2V-A14B")
    video = pipe(prompt="a red circle moves left", seed=1)
    video.save("a.mp4")

`Pipeline.stream` is that path, one stage after another, and the place to start reading; it yields an `Event` after
every step, so that progress, preview and cancelling need nothing more than a for loop.  With output files the run keeps
its progress in a job folder (`jobs.py`) and can be continued; without, the frames come back in memory.

Several videos (`num`) go through the stages together: the text is encoded once, and at each step every video takes its
turn before the next step, so each expert is loaded once and not once for each video.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wanloom import budget, demo, media
from wanloom.checkpoint.find import Files, resolve
from wanloom.checkpoint.inspect import inspect
from wanloom.checkpoint.load import survey
from wanloom.conditioning import Conditioning, image, text
from wanloom.durable import atomic_path, failpoint, refuse_target, sha256_file, sweep
from wanloom.errors import InputError, NumericalError, WanloomWarning
from wanloom.jobs import (
    Job,
    Memory,
    Record,
    State,
    folder_for,
    identity,
    machine_fingerprint,
    open_job,
    read_record,
    request_texts,
)
from wanloom.media import Picture
from wanloom.parts import Parts
from wanloom.plan import Input, Plan, make_plan
from wanloom.preview import Film, Previewer
from wanloom.request import Request
from wanloom.results import Event, Result, Video, peak_memory, quantise
from wanloom.sampling.samplers import SAMPLERS, Step, Velocity, hold
from wanloom.sampling.velocity import Experts, Forward, conditioned, guided
from wanloom.variants import TASKS, VARIANTS, Variant, variant_for

# What `Variant.conditioner` names.
CONDITIONERS: dict[str, Callable[[Parts, Plan, Mapping[str, Picture]], Conditioning]] = {
    "text": text.condition,
    "image": image.channels,
    "clean_frame": image.clean_frame,
}

ROLES = ("image", "last_image")
PREVIEW_EVERY = 1.0  # seconds between two writings of preview.gif


# ---------------------------------------------------------------- a run


@dataclass(frozen=True)
class Order:
    """A request with everything decided and its pictures read."""

    request: Request
    plan: Plan
    pictures: Mapping[str, Picture]

    @property
    def plans(self) -> tuple[Plan, ...]:
        """One for each video: the seeds follow one another."""
        return tuple(self.plan.with_seed(self.plan.seed + i) for i in range(self.request.num))


class Work:
    """One run under way: the order, where its progress and its files go, and the clock."""

    def __init__(self, order: Order, outputs: Sequence[Path], job: Job | Memory, device: str) -> None:
        self.order, self.outputs, self.job = order, tuple(outputs), job
        self.plan, self.plans = order.plan, order.plans
        self.previewer: Previewer | None = None
        self.videos: list[Video] = []
        self.began_at = 0
        self._device = device
        self._started = self._last = time.monotonic()
        self._drawn = 0.0
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats(device)

    def event(self, stage: str, step: int, steps: int, **more: Any) -> Event:
        """An event now."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        host, gpu = peak_memory(self._device)
        return Event(stage, step, steps, seconds=seconds, peak_host=host, peak_gpu=gpu, **more)

    def draw(self, x0: Tensor, *, last: bool) -> Callable[[], Film] | None:
        """The film of clean latents x0 [1, C, T, h, w], to be made when looked at; now and then also preview.gif."""
        previewer = self.previewer
        if previewer is None:
            return None
        if self.outputs and (last or time.monotonic() - self._drawn > PREVIEW_EVERY):
            fps = max(1, round(self.plan.fps / 4))  # a latent frame stands for four
            previewer(x0[0]).save(self.outputs[0].with_name("preview.gif"), fps)
            self._drawn = time.monotonic()
        return lambda: previewer(x0[0])

    def tensors_file(self, plan: Plan) -> Path | None:
        """Where `save_tensors` puts the tensors of this video: the file named, with the seed when there are several."""
        request = self.order.request
        path = None if request.save_tensors is None else Path(request.save_tensors)
        return path if path is None or request.num == 1 else path.with_name(f"{path.stem}_{plan.seed}{path.suffix}")

    def result(self) -> Result:
        host, gpu = peak_memory(self._device)
        return Result(
            plan=self.plan,
            seeds=tuple(plan.seed for plan in self.plans),
            files=self.outputs,
            videos=tuple(self.videos),
            seconds=time.monotonic() - self._started,
            peak_host_bytes=host,
            peak_gpu_bytes=gpu,
            began_at=self.began_at,
        )


Stream = Generator[Event, None, Result]
OutPaths = str | Path | Sequence[str | Path] | None


# ---------------------------------------------------------------- the pipeline


class Pipeline:
    """One model, ready to make videos.  `load` makes it from a path or a name.

    variant and files: what `checkpoint.survey` and `checkpoint.resolve` returned.  device "cpu" or "cuda[:n]" (None: a
    GPU when there is one), dtype "float32" or "bfloat16" (None: bfloat16 on a GPU), text_device: where the text encoder
    runs (None: the same).
    """

    def __init__(
        self,
        variant: Variant,
        files: Files,
        *,
        device: str | None = None,
        dtype: str | None = None,
        text_device: str | None = None,
    ) -> None:
        self.device = resolve_device(device)
        dtype = dtype or ("float32" if self.device == "cpu" else "bfloat16")
        self.parts = Parts(variant, files, device=self.device, dtype=dtype, text_device=text_device)
        self.variant = variant
        self._weights: dict[str, str] | None = None

    def __call__(self, prompt: str, **fields: Any) -> Video:
        """Make one video; `fields` are those of `Request` (seed=1, size="832x480", image="cat.png", ...)."""
        request = Request(prompt=prompt, **fields)
        if request.num != 1:
            raise InputError("E2029", "num: a call makes one video. Use run(), which returns all of them.")
        return self.run(request).videos[0]

    def run(
        self,
        request: Request,
        *,
        out: OutPaths = None,
        resume: str | Path | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Result:
        """`stream` to its end, `on_event` called with each event."""
        stream = self.stream(request, out=out, resume=resume)
        while True:
            try:
                event = next(stream)
            except StopIteration as end:
                return cast(Result, end.value)
            if on_event is not None:
                on_event(event)

    def stream(self, request: Request, *, out: OutPaths = None, resume: str | Path | None = None) -> Stream:
        """Make what `request` asks for, step by step; the generator's value is the Result.

        out: the file (or files, one a seed) to write; without it the videos are in the Result.  resume: an unfinished
        job's folder, which knows its files.  Closing the generator cancels; a job with steps behind it can be resumed.

        Errors: InputError for what can be mended, NumericalError (exit 6) for values that are not finite, Interrupted
        (exit 7) after Ctrl-C when there is a file to go on with.
        """
        order = self.prepare(request)
        folder = None if resume is None else Path(resume)
        outputs = _outputs(out, folder, order)
        self._preflight(order, outputs, resuming=folder is not None)
        job, notice = self._open(order, outputs, folder)
        with job:
            work = Work(order, outputs, job, self.device)
            if notice:
                yield work.event("encode", 0, 1, message=notice)
            latents = yield from self._saved_latents(work)
            if latents is None:
                conditioning = yield from self._condition(work)
                latents = yield from self._denoise(work, conditioning)
            yield from self._decode(work, latents)
            job.finish()
            yield work.event("done", 1, 1)
            return work.result()

    # --- plan

    def prepare(self, request: Request) -> Order:
        """Read the pictures and decide every number; all mistakes in the request come out here.

        Errors: those of `make_plan` and `media.read_picture`.  Warnings: W2004 an unusual size, W2013 a text cut off.
        """
        pictures = {
            role: media.read_picture(source, role.replace("_", "-"))
            for role in ROLES
            if (source := getattr(request, role)) is not None
        }
        inputs = [Input(role=role, name=p.name, sha256=p.sha256, size=p.size) for role, p in pictures.items()]
        plan = make_plan(request, self.variant, inputs=inputs)
        if plan.noise_device != "cpu" and self.device == "cpu":
            raise InputError(
                "E2023", f"noise-device: {plan.noise_device} conflicts with device cpu. Use one of the two."
            )
        for note in plan.notes:
            warnings.warn(WanloomWarning(f"W2004: {note}"), stacklevel=3)
        for name, words in (("prompt", plan.prompt), ("negative-prompt", plan.negative_prompt)):
            count, limit = self.parts.tokenizer.count(words), self.variant.dit.text_len
            if count > limit:
                said = f"W2013: {name}: {count} tokens, this model reads {limit}; the last {count - limit} are cut."
                warnings.warn(WanloomWarning(said), stacklevel=3)
        return Order(request, plan, pictures)

    def _preflight(self, order: Order, outputs: Sequence[Path], *, resuming: bool) -> None:
        """Ask everything that could go wrong after the work: places, disk, encoder, GPU memory."""
        request, plan = order.request, order.plan
        on_gpu = self.device != "cpu"
        need = budget.need(plan, self.variant, self.parts.dtype, on_gpu=on_gpu)
        for path in outputs:
            overwrite = request.overwrite or resuming  # a continued job looks at the file itself
            media.check_output(path, overwrite=overwrite, need=need.disk * len(outputs))
        for path in {path.parent for path in outputs}:
            sweep(path)
        if outputs:
            media.try_encoder(outputs[0], size=plan.size, fps=plan.fps, quality=plan.quality)
        if request.save_tensors is not None:
            refuse_target(Path(request.save_tensors), overwrite=request.overwrite or resuming)
        if on_gpu:
            free = torch.cuda.mem_get_info(self.device)[0]
            if need.gpu > free:
                gib = 2**30
                raise InputError(
                    "E5004",
                    f"GPU memory: needs about {need.gpu / gib:.1f} GiB, {free / gib:.1f} GiB are free. "
                    "Try a smaller size, fewer frames, or device cpu.",
                )

    def _open(self, order: Order, outputs: Sequence[Path], resume: Path | None) -> tuple[Job | Memory, str]:
        """Where this run keeps its progress: a locked job folder, or nowhere."""
        if not outputs:
            return Memory(), ""
        request = order.request
        if request.num == 1:
            request = replace(request, out=outputs[0])
        record = Record(
            plan=order.plan,
            seeds=tuple(plan.seed for plan in order.plans),
            outputs=tuple(path.name for path in outputs),
            request=request_texts(request),
            precision=self.parts.precision,
            weights=self.weights(),
            machine=machine_fingerprint(self.device, order.plan.noise_device),
        )
        folder = resume or folder_for(outputs[0])
        return open_job(
            folder, record, resume=resume is not None, overwrite=request.overwrite, save_every=request.save_every
        )

    def weights(self) -> dict[str, str]:
        """Part -> identity of its weight files (`jobs.identity`), read once."""
        if self._weights is None:
            files = self.parts.weight_files()
            self._weights = {part: " ".join(identity(path) for path in paths) for part, paths in files.items()}
        return self._weights

    # --- condition

    def _condition(self, work: Work) -> Generator[Event, None, Conditioning]:
        """What the encoders make of prompt and pictures, on the device of the transformer."""
        yield work.event("encode", 0, 1)
        saved = work.job.load("conditioning")
        if saved is not None:
            conditioning = Conditioning.from_tensors(saved)
        else:
            make = CONDITIONERS[self.variant.conditioner]
            conditioning = make(self.parts, work.plan, work.order.pictures)
            for name, tensor in conditioning.tensors().items():
                require_finite(tensor, "E6002", f"encoding: the {name}")
            work.job.save("conditioning", conditioning.tensors())
        if work.order.request.preview:
            with self.parts.use("vae") as vae:
                work.previewer = Previewer.fit(vae)
        yield work.event("encode", 1, 1)
        return conditioning.map(lambda tensor: tensor.to(self.device))

    # --- denoise

    def _saved_latents(self, work: Work) -> Generator[Event, None, list[Tensor] | None]:
        """The final latents of an earlier process, or None."""
        saved = work.job.load("latents")
        if saved is None:
            return None
        work.began_at = steps = work.plan.steps
        yield work.event("denoise", steps, steps, message="denoising was done before; resuming at the decoder")
        return [saved[str(i)].to(self.device) for i in range(len(work.plans))]

    def _denoise(self, work: Work, conditioning: Conditioning) -> Generator[Event, None, list[Tensor]]:
        """From noise to latents, one [C, T, h, w] for each video, on disk before they are returned."""
        plan, job, takes = work.plan, work.job, len(work.plans)
        state = job.load_state()
        work.began_at = start = state.done if state else 0
        message = f"resuming at step {start + 1} of {plan.steps}" if start else ""
        yield work.event("denoise", start * takes, plan.steps * takes, message=message)
        said: dict[str, Tensor] = {}  # what the model answered last
        with self._experts(plan, conditioning, said) as velocity:
            runs = self._runs(work, velocity, conditioning, state)
            latest: list[Step] = []
            for index in range(start, plan.steps):
                latest = []
                for take, run in enumerate(runs):
                    failpoint("step")
                    step = next(run)
                    self._require_finite_step(step, plan, said)
                    latest.append(step)
                    film = work.draw(step.x0, last=index + 1 == plan.steps) if take == 0 else None
                    if len(latest) == takes:
                        job.reached(State(index + 1, tuple({"x": step.x, **step.state} for step in latest)))
                    yield work.event(
                        "denoise", index * takes + take + 1, plan.steps * takes, sigma=step.sigma, t=step.t,
                        expert=velocity.name, seed=work.plans[take].seed, film=film,
                    )  # fmt: skip
        return [step.x[0] for step in latest]

    def _experts(self, plan: Plan, conditioning: Conditioning, said: dict[str, Tensor]) -> Experts:
        """The velocity of this plan: guidance over the experts, of which one is loaded at a time."""
        scales = {span.expert: span.guidance for span in plan.spans}

        def heard(name: str, velocity: Velocity) -> Velocity:
            def listen(x: Tensor, t: float) -> Tensor:
                v = velocity(x, t)
                said[name] = v
                return v

            return listen

        def bind(name: str, forward: Forward) -> Velocity:
            cond = heard("velocity with the prompt", conditioned(forward, conditioning.cond))
            if conditioning.uncond is None:
                return cond
            uncond = heard("velocity without the prompt", conditioned(forward, conditioning.uncond))
            return guided(cond, uncond, scales[name])

        def use(name: str) -> AbstractContextManager[Forward]:
            said.clear()
            return self.parts.use("dit", expert=name)

        return Experts(self.variant.experts, use, bind)

    def _runs(
        self, work: Work, velocity: Velocity, conditioning: Conditioning, state: State | None
    ) -> list[Iterator[Step]]:
        """A sampler for each video, at its beginning or at the state that was saved."""
        sampler = SAMPLERS[work.plan.sampler]
        if conditioning.clean is not None:
            sampler = hold(sampler, conditioning.clean)
        if state is None:
            return [sampler(velocity, noise(plan).to(self.device), plan.schedule) for plan in work.plans]
        runs = []
        for plan, saved in zip(work.plans, state.takes, strict=True):
            here = {name: value.to(self.device) for name, value in saved.items()}
            x = here.pop("x")
            runs.append(sampler(velocity, x, plan.schedule, start=state.done, state=here))
        return runs

    def _require_finite_step(self, step: Step, plan: Plan, said: Mapping[str, Tensor]) -> None:
        """One look at the latents; only when they are bad, at what they came from."""
        if bool(torch.isfinite(step.x).all()):
            return
        suspects = {**said, "prediction x0": step.x0, "latents": step.x}
        name = next(name for name, tensor in suspects.items() if not bool(torch.isfinite(tensor).all()))
        where = (
            f"step {step.index + 1} of {plan.steps}, expert {plan.span_at(step.index).expert}, sigma {step.sigma:.4f}"
        )
        require_finite(suspects[name], "E6001", f"{where}: the {name}")

    # --- decode

    def _decode(self, work: Work, latents: Sequence[Tensor]) -> Generator[Event, None, None]:
        """Frames of each video, streamed into its file, which gets its name when it is whole."""
        count = latents[0].shape[1]
        total = count * len(latents)
        yield work.event("decode", 0, total)
        with self.parts.use("vae") as vae:
            for take, (plan, z) in enumerate(zip(work.plans, latents, strict=True)):
                path = work.outputs[take] if work.outputs else None
                if path is not None and work.job.published(path):
                    continue
                pieces = self._frames(vae, z, plan, work)
                keep = (
                    self._to_memory(work, plan, z, pieces)
                    if path is None
                    else self._to_file(work, plan, z, path, pieces)
                )
                for number, _ in enumerate(keep, start=take * count + 1):
                    yield work.event("decode", number, total, seed=plan.seed)

    def _frames(self, vae: Any, z: Tensor, plan: Plan, work: Work) -> Iterator[Tensor]:
        """Pixels [3, n, H, W] in [-1, 1] of each latent frame in turn."""
        for number, piece in enumerate(vae.decode_chunks(z[None])):
            require_finite(piece, "E6003", f"decoding, latent frame {number + 1} of {z.shape[1]}: the pixels")
            failpoint("decode")
            yield piece[0].float()

    def _to_memory(self, work: Work, plan: Plan, z: Tensor, pieces: Iterator[Tensor]) -> Iterator[None]:
        kept = []
        for piece in pieces:
            kept.append(piece.cpu())
            yield
        video = Video(torch.cat(kept, 1), z.cpu(), plan)
        if (path := work.tensors_file(plan)) is not None:
            video.save_tensors(path)
        work.videos.append(video)

    def _to_file(self, work: Work, plan: Plan, z: Tensor, path: Path, pieces: Iterator[Tensor]) -> Iterator[None]:
        overwrite, tensors_file = work.order.request.overwrite, work.tensors_file(plan)
        kept = []
        with atomic_path(path, overwrite=overwrite) as temporary:
            with media.VideoWriter(temporary, fps=plan.fps, quality=plan.quality, comment=plan.to_json()) as file:
                for piece in pieces:
                    file.write(quantise(piece))
                    failpoint("encode")
                    if tensors_file is not None:
                        kept.append(piece.cpu())
                    yield
            if tensors_file is not None:
                Video(torch.cat(kept, 1), z.cpu(), plan).save_tensors(tensors_file)
            work.job.announce(path.name, sha256_file(temporary))
        failpoint("published")


def load(
    source: str | Path | None = None,
    *,
    task: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    t5_cpu: bool = False,
    **parts: str | Path,
) -> Pipeline:
    """A pipeline from a checkpoint directory, the name of a demo model, or nothing (the demo model of `task`).

    Only headers are read here.  task: what the checkpoint is for, where its form leaves a choice.  parts: single files
    beside or instead of the directory: dit, dit_high, dit_low, vae, text_encoder, tokenizer, clip.

    Errors: E2001 weights are needed, E2002 an unknown task or several that fit, E4xxx what is wrong with the files.
    """
    name = str(source) if source is not None else task or "t2v-A14B"
    if not parts and (source is None or name in VARIANTS or name in TASKS) and not Path(name).exists():
        variant = variant_for(name, demo=True)
        if variant.name not in demo.available():
            raise InputError(
                "E2001", f"{name}: the weights of {variant.name} are not here. Give a checkpoint directory."
            )
        source = demo.path_of(variant.name)
    elif task is not None:
        variant = variant_for(task)
    else:
        variant = _variant_of(Path(name))
    files = resolve(variant, ckpt_dir=source, **parts)
    text_device = "cpu" if t5_cpu else None
    return Pipeline(survey(variant, files), files, device=device, dtype=dtype, text_device=text_device)


def _variant_of(path: Path) -> Variant:
    """The released model that a directory holds.  Error: E2002 when it can be several, or is none."""
    if path.parent == demo.MODELS and path.name in VARIANTS:
        return VARIANTS[path.name]
    names = list(dict.fromkeys(candidate.variant for candidate in inspect(path).candidates))
    if len(names) != 1:
        can = f"can be {' or '.join(names)}" if names else "is no whole model"
        raise InputError("E2002", f"task: {path} {can}. Say which: task=NAME.")
    return VARIANTS[names[0]]


# ---------------------------------------------------------------- helpers


def noise(plan: Plan) -> Tensor:
    """The noise [1, C, T, h, w] float32 of a plan: one draw from its seed, on the CPU unless it says otherwise."""
    generator = torch.Generator(plan.noise_device).manual_seed(plan.seed)
    return torch.randn(plan.latent, generator=generator, device=plan.noise_device, dtype=torch.float32)[None]


def require_finite(tensor: Tensor, code: str, what: str) -> None:
    """NumericalError saying how much of `what` is not finite, when any of it is not."""
    if bool(torch.isfinite(tensor).all()):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    raise NumericalError(
        code,
        f"{what}: {bad} of {tensor.numel()} values are not finite. No video was written. Try another dtype.",
    )


def resolve_device(device: str | None) -> str:
    """The device to compute on.  Error: E8002 when a GPU is asked for and none can be used."""
    there = torch.cuda.is_available()
    if device is None:
        return "cuda" if there else "cpu"
    if device != "cpu":
        index = int(device.partition(":")[2] or 0)
        if not there or index >= torch.cuda.device_count():
            raise InputError("E8002", f"device: {device} was asked for and is not there. Use --device cpu.")
    return device


def _outputs(out: OutPaths, resume: Path | None, order: Order) -> tuple[Path, ...]:
    """The files of a run: those given, or those of the job that is continued."""
    given = () if out is None else (out,) if isinstance(out, str | Path) else tuple(out)
    paths = tuple(Path(path) for path in given)
    if resume is not None:
        stored = tuple(resume.absolute().parent / name for name in read_record(resume).outputs)
        if len(paths) == 1 and paths[0].name != stored[0].name:
            raise InputError(
                "E2020", f"resume: {resume} makes {stored[0].name}, not {paths[0].name}. Nothing was changed."
            )
        return stored
    if paths and len(paths) != len(order.plans):
        raise InputError("E2029", f"num: {len(order.plans)} videos need as many files, got {len(paths)}.")
    return paths
