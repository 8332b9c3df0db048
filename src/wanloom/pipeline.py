"""The main path: a request becomes a plan, a plan conditioning, noise latents, latents frames, and frames a file.

    pipe = wanloom.load("Wan2.2-T2V-A14B")
    video = pipe(prompt="a red circle moves left", seed=1)
    video.save("a.mp4")

`Pipeline.stream` is that path, one stage after another, and the place to start reading; it yields an `Event` after
every step, so that progress, preview and cancelling need nothing more than a for loop.  With output files the run keeps
its progress in a job folder (`jobs.py`) and can be continued; without, the frames come back in memory.

Several videos (`num`) go through the stages together: the text is encoded once, and at each step every video takes its
turn before the next step, so each expert is loaded once and not once for each video.

Tasks that make a video clip by clip (s2v, animate) go round `_clips`: condition, denoise, decode, and what is shown at
the end of a clip is given to the next one.  Their videos come one after the other, and a clip's frames are written when
it is finished: memory does not grow with their number.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wanloom import budget, demo, media, outputs
from wanloom.checkpoint.find import Files, resolve
from wanloom.checkpoint.inspect import inspect
from wanloom.checkpoint.load import survey
from wanloom.checkpoint.lora import relighting_file
from wanloom.conditioning import Conditioning, animate, image, speech, text
from wanloom.durable import failpoint, refuse_target, sweep
from wanloom.errors import InputError, NumericalError, WanloomWarning
from wanloom.inputs import facts, read_inputs, with_folder
from wanloom.jobs import (
    Job,
    Memory,
    Record,
    State,
    folder_for,
    identity,
    machine_fingerprint,
    open_job,
    place_words,
    request_texts,
)
from wanloom.ladder import Catch, Decoding, Ladder, plainly_said
from wanloom.outputs import OutPaths, Output, files_of, files_to_write
from wanloom.parts import Parts
from wanloom.placement import MemoryPlan, Wishes, costs_of, fastest, ways_of
from wanloom.plan import Plan, Segment, make_plan
from wanloom.preview import Previewer
from wanloom.rates import read_rates
from wanloom.request import Request
from wanloom.results import Event, Result, Video
from wanloom.sampling.samplers import SAMPLERS, Step, Velocity, hold
from wanloom.sampling.velocity import AtOnce, Experts, Forward, conditioned, heard, joined, later
from wanloom.shortcuts import Shortcuts
from wanloom.speaking import spoken
from wanloom.variants import TASKS, VARIANTS, Variant, variant_for
from wanloom.work import Order, Work

# What `Variant.conditioner` names; and for tasks whose videos are made clip by clip, what each clip is given.
CONDITIONERS: dict[str, Callable[[Parts, Plan, Mapping[str, Any]], Conditioning]] = {
    "text": text.condition,
    "image": image.channels,
    "clean_frame": image.clean_frame,
    "speech": speech.condition,
    "animate": animate.condition,
}
CLIPS: dict[str, Callable[[Parts, Plan, Mapping[str, Any]], speech.Clips | animate.Clips]] = {
    "speech": speech.Clips,
    "animate": animate.Clips,
}

Stream = Generator[Event, None, Result]


# ---------------------------------------------------------------- the pipeline


class Pipeline:
    """One model, ready to make videos.  `load` makes it from a path or a name.

    variant and files: what `checkpoint.survey` and `checkpoint.resolve` returned.  device "cpu" or "cuda[:n]" (None: a
    GPU when there is one), dtype "float32" or "bfloat16" (None: bfloat16 on a GPU), text_device: where the text encoder
    runs (None: the same), and how parts are computed and kept: see `Parts`.  Where they are is decided for each run by
    what is free then (`placement.arrange`), within resident_blocks and offload (see `Wishes`); or it is `memory`.
    make_parts: what makes the parts (`together.Together`: on several processes).
    """

    def __init__(
        self,
        variant: Variant,
        files: Files,
        *,
        device: str | None = None,
        dtype: str | None = None,
        text_device: str | None = None,
        attention: str | None = None,
        compile: bool = False,
        fused: bool = False,
        quantise: str | None = None,
        resident_blocks: int | None = None,
        vae_dtype: str | None = None,
        offload: bool | None = None,
        memory: MemoryPlan | None = None,
        make_parts: Callable[..., Parts] = Parts,
        row_chunks: int | None = None,
        vae_rows: int | None = None,
    ) -> None:
        self.device = resolve_device(device)
        dtype = dtype or ("float32" if self.device == "cpu" else "bfloat16")
        self.parts = make_parts(
            variant, files, device=self.device, dtype=dtype, text_device=text_device, attention=attention,
            compile=compile, fused=fused, quantise=quantise, resident_blocks=resident_blocks, vae_dtype=vae_dtype,
            row_chunks=row_chunks, vae_rows=vae_rows,
        )  # fmt: skip
        self.variant, self.memory = variant, memory
        self.wishes = Wishes(
            resident_blocks=resident_blocks, offload=offload, t5_cpu=self.parts.text_device != self.device
        )
        self._identity = cache(identity)
        self.job: Job | Memory = Memory()  # of the run under way
        self.make_shortcuts: Callable[[Plan, Variant, Files], Shortcuts] = Shortcuts  # what measures stands in for it

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
        (exit 7) after Ctrl-C when there is a file to go on with; E5007 when memory runs out and nothing helps.
        Warnings: W5008 and W5009 when it did, and something helped (`ladder.py`).
        """
        folder = None if resume is None else Path(resume)
        with plainly_said(), spoken(request, self.variant, files_of(out), folder) as heard:
            return (yield from self._stream(heard, out, folder))

    def _stream(self, request: Request, out: OutPaths, folder: Path | None) -> Stream:
        """The same for a request that has its sound."""
        order = self.prepare(request)
        self.parts.wear(order.lora)
        memory = self.memory or self.place(order)
        shortcuts = self.make_shortcuts(order.plan, self.variant, self.parts.files)
        outputs = files_to_write(out, folder, len(order.plans))
        self._preflight(order, outputs, memory.need, resuming=folder is not None)
        job, notice = self._open(order, outputs, folder, shortcuts, at_once=memory.at_once)
        self.job = job
        with job, self.parts.arranged(memory), Ladder(self.parts, job, order.plan.size[1]) as ladder:
            work = Work(order, outputs, job, self.device, shortcuts, ladder, at_once=memory.at_once)
            if notice:
                yield work.event("encode", 0, 1, message=notice)
            if order.plan.in_clips:
                yield from self._clips(work)
            else:
                yield from self._together(work)
            job.finish()
            yield work.event("done", 1, 1)
            return work.result()

    def place(self, order: Order) -> MemoryPlan:
        """Where the parts are to be during this run, by what is free now."""
        parts, room = self.parts, self.parts.room()
        plain = parts.quantise is not None or self.wishes.resident_blocks is not None
        costs = partial(
            costs_of,
            order.plan, self.variant, parts.dtype, read_rates(self.device), on_gpu=self.device != "cpu",
            quantise=parts.quantise, changed=order.lora is not None, t5_cpu=self.wishes.t5_cpu, num=order.request.num,
            host=room.host, stored={} if plain else parts.stored, vae_dtype=parts.vae_dtype,
            held=parts.held, row_chunks=parts.row_chunks, vae_rows=parts.vae_rows,
            unstreamed=("text", "dit") if parts.company else (),
        )  # fmt: skip
        ways = ways_of(order.request.guidance_batch, order.plan)
        return fastest([costs(at_once=at_once) for at_once in ways], room, self.wishes)

    # --- plan

    def prepare(self, request: Request) -> Order:
        """Read the inputs and decide every number; all mistakes in the request come out here.

        Errors: those of `make_plan`, `read_inputs` and `relighting_file`.  Warnings: W2004 an unusual size, W2013 a
        text cut off, W2036 a sound encoded in windows.
        """
        request = with_folder(request)
        found = read_inputs(request)
        plan = make_plan(request, self.variant, inputs=facts(found))
        if plan.noise_device != "cpu" and self.device == "cpu":
            raise InputError(
                "E2023", f"noise-device: {plan.noise_device} conflicts with device cpu. Use one of the two."
            )
        for note in plan.notes:
            warnings.warn(WanloomWarning(note), stacklevel=3)
        for name, words in (("prompt", plan.prompt), ("negative-prompt", plan.negative_prompt)):
            count, limit = self.parts.tokenizer.count(words), self.variant.dit.text_len
            if count > limit:
                said = f"W2013: {name}: {count} tokens, this model reads {limit}; the last {count - limit} are cut."
                warnings.warn(WanloomWarning(said), stacklevel=3)
        return Order(request, plan, found, relighting_file(request, self.parts.files))

    def _preflight(self, order: Order, outputs: Sequence[Path], need: budget.Need, *, resuming: bool) -> None:
        """Ask everything that could go wrong after the work: places, disk, encoder, GPU memory."""
        request, plan = order.request, order.plan
        for path in outputs:
            overwrite = request.overwrite or resuming  # a continued job looks at the file itself
            media.check_output(path, overwrite=overwrite, need=need.disk * len(outputs))
        for path in {path.parent for path in outputs}:
            sweep(path)
        if outputs:
            media.try_encoder(outputs[0], size=plan.size, fps=plan.rate, quality=plan.quality)
        if request.save_tensors is not None:
            refuse_target(Path(request.save_tensors), overwrite=request.overwrite or resuming)
        if self.device != "cpu":
            free = self.parts.room().gpu or 0
            if need.gpu > free:
                gib = 2**30
                raise InputError(
                    "E5004",
                    f"GPU memory: needs about {need.gpu / gib:.1f} GiB, {free / gib:.1f} GiB are free. "
                    "Try a smaller size, fewer frames, or device cpu.",
                )

    def _open(
        self, order: Order, outputs: Sequence[Path], resume: Path | None, shortcuts: Shortcuts, *, at_once: bool
    ) -> tuple[Job | Memory, str]:
        """Where this run keeps its progress: a locked job folder, or nowhere."""
        if not outputs:
            return Memory(), ""
        # What "auto" came to is what a continued run is asked for: other memory may be free then.
        request = replace(order.request, guidance_batch="on" if at_once else None)
        if request.num == 1:
            request = replace(request, out=outputs[0])
        bits = {"cache fit": shortcuts.fit, "guidance": "both passes at once" if at_once else None}
        record = Record(
            plan=order.plan,
            seeds=tuple(plan.seed for plan in order.plans),
            outputs=tuple(path.name for path in outputs),
            request=request_texts(request),
            precision={**self.parts.precision, **{name: word for name, word in bits.items() if word}},
            weights=self.weights(),
            machine={**machine_fingerprint(self.device, order.plan.noise_device), **self.parts.company},
        )
        folder = resume or folder_for(outputs[0])
        return open_job(
            folder, record, resume=resume is not None, overwrite=request.overwrite, save_every=request.save_every
        )

    def weights(self) -> dict[str, str]:
        """Part -> identity of its weight files (`jobs.identity`), read once."""
        files = self.parts.weight_files()
        return {part: " ".join(self._identity(path) for path in paths) for part, paths in files.items()}

    # --- the two ways through the stages

    def _together(self, work: Work) -> Generator[Event, None, None]:
        """All videos at once, each one clip: condition, denoise, decode."""
        latents = yield from self._saved_latents(work)
        if latents is None:
            conditioning = yield from self._condition(work)
            with self._experts(work) as velocity:
                latents = yield from self._denoise(work, velocity, conditioning, work.plan.segments[0], work.plans)
        yield from self._decode(work, latents)

    def _clips(self, work: Work) -> Generator[Event, None, None]:
        """Video by video and clip by clip: what a clip shows at its end is the past of the next.

        A continued run decodes again, from their saved latents, the clips that were made before: their frames are
        needed for the file, and as the past of the next one, from which it is conditioned anew.  On an equal machine
        (and no other continues) this gives the bits it gave before.  The transformer is not loaded for it.
        """
        shared = yield from self._condition(work)
        for take, plan in enumerate(work.plans):
            if work.outputs and work.job.published(work.outputs[take]):
                work.began_at += plan.steps * len(plan.segments)
                continue
            clips = CLIPS[self.variant.conditioner](self.parts, plan, work.order.media)
            past, given = clips.begin(), (yield from self._given(work, clips))
            with self._output(work, take) as output, self._experts(work) as velocity:
                work.ladder.beside = velocity
                for segment in plan.segments:
                    work.job.enter(take, segment.index)
                    work.ladder.make_room()
                    conditioning = clips.clip(shared, next(given), segment, past)
                    z = yield from self._clip_latents(work, velocity, conditioning, segment, take)
                    if "dit" not in self.parts.staying:
                        velocity.close()
                    tail = deque(past[0].unbind(1), maxlen=clips.keep)
                    yield from self._decode_clip(work, output, conditioning, z, segment, take, tail)
                    past = torch.stack(tuple(tail), 1)[None]

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    # --- condition

    def _condition(self, work: Work) -> Generator[Event, None, Conditioning]:
        """What the encoders make of prompt and pictures, on the device of the transformer."""
        yield work.event("encode", 0, 1)
        saved = work.job.load("conditioning")
        if saved is not None:
            conditioning = Conditioning.from_tensors(saved)
        else:
            make = CONDITIONERS[self.variant.conditioner]
            conditioning = make(self.parts, work.plan, work.order.media)
            for name, tensor in conditioning.tensors().items():
                require_finite(tensor, "E6002", f"encoding: the {name}")
            work.job.save("conditioning", conditioning.tensors())
        if work.order.request.preview:
            with self.parts.use("vae") as vae:
                work.previewer = Previewer.fit(vae)
        yield work.event("encode", 1, 1)
        return conditioning.map(self._here)

    def _given(
        self, work: Work, clips: speech.Clips | animate.Clips
    ) -> Generator[Event, None, Iterator[dict[str, Tensor]]]:
        """What each clip of a video is given, in turn.

        Where a model makes it, it is made before the first clip and, with a job folder, kept there and not in memory.
        """
        if clips.streams:
            return clips.given()
        job, names = work.job, [f"given-{segment.index:04d}" for segment in work.plan.segments]
        kept: list[dict[str, Tensor]] = []
        if not job.keeps or not all(job.has(name) for name in names):
            yield work.event("sound", 0, len(names))
            for number, (_, given) in enumerate(self._make_given(work, clips, names), start=1):
                if not job.keeps:
                    kept.append(given)
                yield work.event("sound", number, len(names))
        return self._kept_given(work, clips, names) if job.keeps else iter(kept)

    def _kept_given(
        self, work: Work, clips: speech.Clips | animate.Clips, names: Sequence[str]
    ) -> Iterator[dict[str, Tensor]]:
        """The same from the job folder; what is damaged there is made again."""
        for name in names:
            saved = work.job.load(name)
            if saved is None:
                saved = next(given for made, given in self._make_given(work, clips, names) if made == name)
            yield saved

    def _make_given(
        self, work: Work, clips: speech.Clips | animate.Clips, names: Sequence[str]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name and tensors of what each clip is given, saved where the job keeps it."""
        for name, given in zip(names, clips.given(), strict=True):
            for what, tensor in given.items():
                require_finite(tensor, "E6002", f"encoding: the {what}")
            work.job.save(name, given)
            yield name, given

    # --- denoise

    def _saved_latents(self, work: Work) -> Generator[Event, None, list[Tensor] | None]:
        """The final latents of an earlier process, or None."""
        saved = work.job.load("latents")
        if saved is None:
            return None
        work.began_at = steps = work.steps
        yield work.event("denoise", steps, steps, message="denoising was done before; resuming at the decoder")
        return [saved[str(i)].to(self.device) for i in range(len(work.plans))]

    def _clip_latents(
        self, work: Work, velocity: Experts, conditioning: Conditioning, segment: Segment, take: int
    ) -> Generator[Event, None, Tensor]:
        """The latents [C, T, h, w] of a clip: an earlier process saved them, or they are made now.

        Clips behind one that has to be made again are taken as they were saved: it becomes what it was, bit for bit, as
        everything that decides it is the same (`jobs.Record`, `_clips`).
        """
        plan = work.plans[take]
        saved = work.job.load("latents")
        if saved is not None:
            work.began_at += plan.steps
            if segment.index == 0:
                again = "the clips that were made before are decoded again"
                yield work.event("decode", *work.pieces(take, segment), clip=0, message=again)
            return saved["0"]
        conditioning = conditioning.map(self._here)
        made = yield from self._denoise(work, velocity, conditioning, segment, (plan,), take)
        return made[0]

    def _denoise(
        self, work: Work, velocity: Experts, conditioning: Conditioning, segment: Segment, plans: Sequence[Plan],
        first: int = 0,
    ) -> Generator[Event, None, list[Tensor]]:  # fmt: skip
        """From noise to latents, one [C, T, h, w] for each of `plans`, on disk before they are returned.

        first: the number of the first of these videos among all of the run.
        """
        plan, job, takes = work.plan, work.job, len(plans)
        state = job.load_state(takes)
        start = state.done if state else 0
        before = plan.steps * work.place(first, segment)  # steps of the clips before
        work.began_at += start * takes
        where = place_words(plan, first, segment.index, videos=len(work.plans) // takes)
        message = f"resuming at {where}step {start + 1} of {plan.steps}" if work.began_at and not work.resumed else ""
        work.resumed = True
        clip = segment.index if plan.in_clips else None
        yield work.event("denoise", before + start * takes, work.steps, message=message, clip=clip)
        said: dict[str, Tensor] = {}  # what the model answered last
        velocity.take(self._binder(work, conditioning, said))
        runs = self._runs(work, plans, segment, velocity, conditioning, state)
        latest: list[Step] = []
        index = start
        while index < plan.steps:
            latest = []
            with Catch(off=bool(self.parts.company)) as strike:
                for take, run in enumerate(runs):
                    failpoint("step")
                    work.shortcuts.at(index, take)
                    step = next(run)
                    self._require_finite_step(step, plan, segment, said)
                    latest.append(step)
                    film = work.draw(step.x0, last=index + 1 == plan.steps) if take == 0 else None
                    if len(latest) == takes:
                        kept = ({"x": s.x, **s.state, **work.shortcuts.state(i)} for i, s in enumerate(latest))
                        state = State(index + 1, tuple(kept))
                        job.reached(state)
                    yield work.event(
                        "denoise", before + index * takes + take + 1, work.steps, sigma=step.sigma, t=step.t,
                        expert=velocity.name, seed=plans[take].seed, clip=clip, film=film,
                    )  # fmt: skip
                index += 1
            if strike.happened:
                work.ladder.lower_denoising(velocity)
                runs = self._runs(work, plans, segment, velocity, conditioning, state)
        return [step.x[0] for step in latest]

    def _experts(self, work: Work) -> Experts:
        """The experts of this model, of which one is loaded at a time; what they are asked is told by `take`."""

        @contextmanager
        def use(name: str) -> Iterator[Any]:
            with self.parts.use("dit", expert=name) as dit, work.shortcuts.around(dit) as shortened:
                yield shortened

        def of_this_step(t: float) -> str:
            return work.plan.span_at(work.shortcuts.clock.step).expert

        return Experts(self.variant.experts, use, choose=of_this_step)

    def _binder(
        self, work: Work, conditioning: Conditioning, said: dict[str, Tensor]
    ) -> Callable[[str, Forward], Velocity]:
        """How an expert becomes a velocity: under this conditioning, guided; what it answers is put into `said`."""
        scales = {span.expert: span.guidance for span in work.plan.spans}
        names = "velocity with the prompt", "velocity without the prompt"
        with_prompt, without = conditioning.cond, conditioning.uncond

        def bind(name: str, dit: Forward) -> Velocity:
            said.clear()
            guide, scale = work.shortcuts.guide, scales[name]

            def cond() -> Velocity:
                return conditioned(heard(dit, said, names[0]), once(dit, with_prompt))

            if without is None or scale == 1:
                return guide(cond(), None, scale)
            if work.at_once:
                both = AtOnce(heard(dit, said, *names), once(dit, joined(with_prompt, without)))
                return guide(later(cond), both, scale)
            return guide(cond(), conditioned(heard(dit, said, names[1]), once(dit, without)), scale)

        return bind

    def _runs(
        self, work: Work, plans: Sequence[Plan], segment: Segment, velocity: Velocity, conditioning: Conditioning,
        state: State | None,
    ) -> list[Iterator[Step]]:  # fmt: skip
        """A sampler for each video, at its beginning or at the state that was saved."""
        sampler = SAMPLERS[plans[0].sampler]
        if conditioning.clean is not None:
            sampler = hold(sampler, conditioning.clean)
        if state is None:
            starts = [noise(plan, segment.index).to(self.device) for plan in plans]
            return [sampler(velocity, x, plan.schedule) for plan, x in zip(plans, starts, strict=True)]
        runs = []
        for take, (plan, saved) in enumerate(zip(plans, state.takes, strict=True)):
            here = work.shortcuts.resume(take, {name: value.to(self.device) for name, value in saved.items()})
            x = here.pop("x")
            runs.append(sampler(velocity, x, plan.schedule, start=state.done, state=here))
        return runs

    def _require_finite_step(self, step: Step, plan: Plan, segment: Segment, said: Mapping[str, Tensor]) -> None:
        """One look at the latents; only when they are bad, at what they came from."""
        if bool(torch.isfinite(step.x).all()):
            return
        suspects = {**said, "prediction x0": step.x0, "latents": step.x}
        name = next(name for name, tensor in suspects.items() if not bool(torch.isfinite(tensor).all()))
        expert = plan.span_at(step.index).expert
        clip = place_words(plan, 0, segment.index, videos=1)
        where = f"{clip}step {step.index + 1} of {plan.steps}, expert {expert}, sigma {step.sigma:.4f}"
        require_finite(suspects[name], "E6001", f"{where}: the {name}")

    # --- decode

    def _output(self, work: Work, take: int) -> AbstractContextManager[Output]:
        """Where the frames of video `take` go: its file, or memory."""
        plan, request = work.plans[take], work.order.request
        tensors = work.tensors_file(plan)
        if not work.outputs:
            return outputs.in_memory(plan, tensors, work.videos)
        path = work.outputs[take]
        return outputs.in_file(
            plan, path, work.job, overwrite=request.overwrite, tensors_file=tensors,
            sound=self._sound(work.order, path),
        )  # fmt: skip

    def _sound(self, order: Order, path: Path) -> Path | None:
        """The file whose sound the video is to carry: what is spoken, or what the driving video sounds like."""
        if not order.plan.in_clips or not media.can_carry_sound(path):
            return None
        for role in ("audio", "pose_video"):
            source = getattr(order.request, role)
            if source is not None and role in order.media and media.has_sound(Path(source)):
                return Path(source)
        return None

    def _decode(self, work: Work, latents: Sequence[Tensor]) -> Generator[Event, None, None]:
        """Frames of each video, piece by piece into its output."""
        count = latents[0].shape[1]
        total = count * len(latents)
        yield work.event("decode", 0, total)
        with Decoding(self.parts, work.ladder) as decoding:
            for take, (plan, z) in enumerate(zip(work.plans, latents, strict=True)):
                if work.outputs and work.job.published(work.outputs[take]):
                    continue
                with self._output(work, take) as output:
                    output.clip(z)
                    for number, piece in enumerate(self._frames(decoding, z), start=take * count + 1):
                        output.write(piece)
                        yield work.event("decode", number, total, seed=plan.seed)

    def _decode_clip(
        self, work: Work, output: Output, conditioning: Conditioning, z: Tensor, segment: Segment, take: int,
        tail: deque[Tensor],
    ) -> Generator[Event, None, None]:  # fmt: skip
        """The frames of a clip that are shown, into the output; `tail` keeps the last of them, [3, H, W] on the CPU."""
        each, seed = segment.latent[1], work.plans[take].seed
        before, total = work.pieces(take, segment)
        yield work.event("decode", before, total, clip=segment.index)
        z = z[:, conditioning.drop :].to(self.device)
        if conditioning.lead is not None:
            z = torch.cat((conditioning.lead[0].to(z), z), 1)
        output.clip(z)
        skip, left, step = segment.skip, segment.frames, 0
        with Decoding(self.parts, work.ladder) as decoding:
            for number, piece in enumerate(self._frames(decoding, z), start=1):
                shown = piece[:, min(skip, piece.shape[1]) :][:, :left]
                skip, left = max(0, skip - piece.shape[1]), left - shown.shape[1]
                if shown.shape[1]:
                    output.write(shown)
                    tail.extend(shown.cpu().unbind(1))
                if step < number * each // z.shape[1]:  # what stands before the clip's own latents is decoded, too
                    step = number * each // z.shape[1]
                    yield work.event("decode", before + step, total, seed=seed, clip=segment.index)

    def _frames(self, decoding: Decoding, z: Tensor) -> Iterator[Tensor]:
        """Pixels [3, n, H, W] in [-1, 1] of each latent frame in turn."""
        for number, piece in enumerate(decoding.frames(z)):
            require_finite(piece, "E6003", f"decoding, latent frame {number + 1} of {z.shape[1]}: the pixels")
            failpoint("decode")
            yield piece[0].float()


def load(
    source: str | Path | None = None,
    *,
    task: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    t5_cpu: bool = False,
    attention: str | None = None,
    compile: bool = False,
    fused: bool = False,
    quantise: str | None = None,
    resident_blocks: int | None = None,
    vae_dtype: str | None = None,
    offload_model: bool | None = None,
    row_chunks: int | None = None,
    vae_rows: int | None = None,
    **parts: str | Path,
) -> Pipeline:
    """A pipeline from a checkpoint directory, the name of a demo model, or nothing (the demo model of `task`).

    Only headers are read here.  task: what the checkpoint is for, where its form leaves a choice.  device to
    vae_rows: see `Pipeline`; t5_cpu: the text encoder on the CPU; offload_model: whether parts leave after their use
    (None: as is best).  parts: single files beside or instead of the directory: dit, dit_high, dit_low, vae,
    text_encoder, tokenizer, clip.

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
    return Pipeline(
        survey(variant, files), files, device=device, dtype=dtype, text_device="cpu" if t5_cpu else None,
        attention=attention, compile=compile, fused=fused, quantise=quantise, resident_blocks=resident_blocks,
        vae_dtype=vae_dtype, offload=offload_model, row_chunks=row_chunks, vae_rows=vae_rows,
    )  # fmt: skip


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


def noise(plan: Plan, index: int = 0) -> Tensor:
    """The noise [1, C, T, h, w] float32 of a clip: drawn from its seed, on the CPU unless the plan says otherwise."""
    segment = plan.segments[index]
    generator = torch.Generator(plan.noise_device).manual_seed(segment.seed)
    for _ in range(segment.draw + 1):
        drawn = torch.randn(segment.latent, generator=generator, device=plan.noise_device, dtype=torch.float32)
    return drawn[None]


def once(dit: Any, inputs: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """The keywords of the transformer for a clip: what its parts compute once, they compute here."""
    with torch.no_grad():
        given: Mapping[str, Any] = dit.once(inputs)
    return given


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
