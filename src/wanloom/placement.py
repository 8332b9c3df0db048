"""Where each part of a model lives during a run: the fastest way that fits, of those that change no bit.

    costs = costs_of(plan, variant, "bfloat16", rates, on_gpu=True)   # plain numbers: bytes and seconds
    memory = arrange(costs, Room(gpu=24e9, host=60e9))                # pure: the same numbers, the same MemoryPlan
    memory.modes, memory.resident_blocks, memory.need.gpu

A part is

    resident   brought in once and there until the run ends;
    swapped    brought in for its use and gone after it: the text encoder before a transformer comes, one expert before
               the other, the transformer before a clip is decoded; the next use reads it again, from memory where the
               system still has its file;
    streamed   its blocks come and go while it computes, but for those that stay;
    cpu        the text encoder beside a GPU.  Its bits are another machine's, so only a person chooses it.

What is asked for (`Wishes`) narrows the choice.  Nothing is ever put into fewer bits from here.

Both passes of guidance may be made at once: twice the activations, and blocks that come and go do so once a step.  Of
the `ways_of` doing it that were left open `fastest` takes the one that fits and waits least.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from wanloom import budget
from wanloom.estimate import Work, estimate, passes_of, works
from wanloom.rates import Rates
from wanloom.variants import Variant

RESIDENT, SWAPPED, STREAMED, CPU = "resident", "swapped", "streamed", "cpu"
HURRY = 0.05  # of the computing: an allowance for what reading beside it takes away from it
SMALL = 0.25  # of what is free: so much may stay for the next run without being asked
BEFORE = ("text", "audio")  # stages in which nothing that stays later is there yet
# What a request says of the two passes of guidance -> whether they may be made at once.
AT_ONCE: Mapping[str, tuple[bool, ...]] = {"off": (False,), "on": (True,), "auto": (False, True)}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part: bytes when it is whole, how many there are (experts), how often they are brought in unless they stay.

    blocks of `block` bytes can come and go (0: none can), in `passes` passes through all of them.
    """

    bytes: int
    count: int = 1
    uses: int = 1
    block: int = 0
    blocks: int = 0
    passes: int = 0

    def streamed(self, stay: int) -> int:
        """Bytes with `stay` blocks that stay, and the slots of those that come and go."""
        return self.bytes - max(0, self.blocks - stay - budget.SLOTS) * self.block


@dataclass(frozen=True, kw_only=True)
class Costs:
    """A run in plain numbers.

    stages: with the whole weights of their part; parts: by the stage that is theirs (`PART_OF`).  beside: bytes on the
    device that are there whatever happens; host: bytes of the host beside a GPU, streaming: the same when the
    transformer streams; both 0 on a CPU.  seconds: of arithmetic, part -> seconds; feed: bytes a second at which
    blocks come; disk: at which parts do.  at_once: both passes of guidance are one.
    """

    stages: tuple[budget.StageNeed, ...]
    parts: Mapping[str, Part]
    beside: int
    host: int
    streaming: int
    disk_bytes: int
    on_gpu: bool
    seconds: Mapping[str, float]
    feed: float
    disk: float
    at_once: bool = False


PART_OF = {"text": "text", "audio": "audio", "image": "vae", "denoise": "dit", "decode": "vae"}


@dataclass(frozen=True)
class Room:
    """Free bytes: of the GPU (None: the run is on the CPU) and of the host."""

    gpu: int | None
    host: int

    def over(self, need: budget.Need) -> tuple[int, int]:
        """Bytes that are missing, on the GPU and on the host."""
        return max(0, need.gpu - (self.gpu or 0)), max(0, need.host - self.host)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a person asked for: blocks of the transformer that stay; whether parts leave after their use (True), all
    stay (False), or whatever is best (None); the text encoder on the CPU.
    """

    resident_blocks: int | None = None
    offload: bool | None = None
    t5_cpu: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """modes: part -> mode; resident_blocks: of a streamed transformer; need: bytes at the peak, with the stages.

    waits: part -> seconds that bringing it or its blocks in takes beyond the arithmetic; keeps: everything stays, for
    the next run as well; at_once: both passes of guidance are one.
    """

    modes: Mapping[str, str]
    resident_blocks: int | None
    need: budget.Need
    waits: Mapping[str, float]
    keeps: bool = False
    at_once: bool = False

    @property
    def extra(self) -> float:
        """Seconds of all waits."""
        return sum(self.waits.values())

    def stays(self, part: str) -> bool:
        return self.modes.get(part) == RESIDENT

    @property
    def streams(self) -> int:
        """How many parts are streamed."""
        return list(self.modes.values()).count(STREAMED)

    def words(self, layers: int) -> str:
        """'text encoder and transformer one after the other', '3 of 40 blocks stay, the others are streamed'."""
        said = []
        if self.modes["dit"] == STREAMED:
            said.append(f"{self.resident_blocks} of {layers} blocks stay, the others are streamed")
        if self.modes["text"] == STREAMED:
            said.append("the text encoder is streamed")
        elif self.modes["text"] == CPU:
            said.append("the text encoder is on the CPU")
        if not said:
            said.append("all parts stay" if self.keeps else "parts come and go")
        if self.at_once:
            said.append("both passes of guidance at once")
        return ", ".join(said)


# ---------------------------------------------------------------- the choice


def arrange(costs: Costs, room: Room, wishes: Wishes | None = None) -> MemoryPlan:
    """The fastest MemoryPlan that fits into `room`; when none does, the one that is missing least.

    More room never makes it slower, and what fits never takes more than is free.
    """
    wishes = wishes or Wishes()
    found = list(_candidates(costs, room, wishes))
    if wishes.offload is None and wishes.resident_blocks is None:
        kept = next(plan for plan in found if plan.keeps)
        if _is_small(costs, room) and room.over(kept.need) == (0, 0):
            return kept
        found = [plan for plan in found if not plan.keeps]
    return min(
        found, key=lambda plan: (room.over(plan.need), plan.extra, plan.streams, plan.need.gpu or plan.need.host)
    )


def fastest(ways: Sequence[Costs], room: Room, wishes: Wishes | None = None) -> MemoryPlan:
    """Of several ways to make the same run the one that waits least of those that fit; of equal ones the last.

    When none fits, the one that is missing least; of equal ones the first.
    """
    found = [arrange(costs, room, wishes) for costs in ways]
    fitting = [plan for plan in reversed(found) if room.over(plan.need) == (0, 0)]
    if fitting:
        return min(fitting, key=lambda plan: (plan.extra, plan.streams, not plan.keeps))
    return min(found, key=lambda plan: room.over(plan.need))


def ways_of(asked: str | None, plan: budget.Sized) -> tuple[bool, ...]:
    """Whether both passes of guidance may be made at once, as `--guidance-batch` says; one pass never is."""
    guided = any(span.guidance != 1 for span in plan.spans)
    return AT_ONCE[asked or "off"] if guided else AT_ONCE["off"]


def _is_small(costs: Costs, room: Room) -> bool:
    """Whether all parts together are small beside what is free."""
    free = room.host if room.gpu is None else room.gpu
    return sum(part.bytes * part.count for part in costs.parts.values()) <= SMALL * free


def _candidates(costs: Costs, room: Room, wishes: Wishes) -> Iterator[MemoryPlan]:
    """All ways that the wishes leave."""
    stay = dict.fromkeys(costs.parts, RESIDENT)
    text = [CPU] if wishes.t5_cpu and costs.on_gpu else [SWAPPED, *([STREAMED] if costs.parts["text"].blocks else [])]
    count = wishes.resident_blocks
    if wishes.offload is not True and (wishes.offload is False or count is None):
        dit = RESIDENT if count is None else STREAMED
        yield _weigh(costs, {**stay, "text": CPU if text == [CPU] else RESIDENT, "dit": dit}, count, keeps=True)
        if wishes.offload is False:
            return
    dits = [STREAMED] if count is not None else [SWAPPED]
    vaes = [SWAPPED]
    if wishes.offload is None:
        vaes += [RESIDENT] * (costs.parts["vae"].uses > 1)
        dits += [RESIDENT] * (costs.parts["dit"].uses > costs.parts["dit"].count and count is None)
    if costs.parts["dit"].blocks and count is None:
        dits.append(STREAMED)
    for first, dit, vae in product(text, dits, vaes):
        modes = {**dict.fromkeys(costs.parts, SWAPPED), "text": first, "dit": dit, "vae": vae}
        blocks = count if count is not None or dit != STREAMED else _most_blocks(costs, modes, room)
        yield _weigh(costs, modes, blocks)


def _most_blocks(costs: Costs, modes: Mapping[str, str], room: Room) -> int:
    """How many blocks can stay: what the stage has left beside none of them."""
    part = costs.parts["dit"]
    none = next(_bytes(costs, modes, 0, stage) for stage in costs.stages if stage.name == "denoise")
    left = (room.host if room.gpu is None else room.gpu) - costs.beside - none
    return min(max(0, left // part.block), max(0, part.blocks - budget.SLOTS - 1))


def _weigh(costs: Costs, modes: Mapping[str, str], blocks: int | None, *, keeps: bool = False) -> MemoryPlan:
    """Bytes and seconds of one way."""
    stages = tuple(
        replace(stage, weights=_bytes(costs, modes, blocks, stage, keeps=keeps) - stage.activations)
        for stage in costs.stages
    )
    peak = costs.beside + max(stage.bytes for stage in stages if not _elsewhere(modes, stage.name))
    need = budget.Need(costs.disk_bytes, peak, 0, stages)
    if costs.on_gpu:
        host = costs.streaming if modes["dit"] == STREAMED else costs.host
        need = budget.Need(costs.disk_bytes, host, peak, stages)
    return MemoryPlan(
        modes=modes, resident_blocks=blocks, need=need, keeps=keeps, at_once=costs.at_once,
        waits={name: _wait(costs, name, modes[name], (blocks or 0) if name == "dit" else 0, keeps) for name in modes},
    )  # fmt: skip


def _elsewhere(modes: Mapping[str, str], stage: str) -> bool:
    return stage == "text" and modes["text"] == CPU


def _bytes(
    costs: Costs, modes: Mapping[str, str], blocks: int | None, stage: budget.StageNeed, *, keeps: bool = False
) -> int:
    """Bytes of a stage on its device: what it works with, its part, and the parts that stay."""
    own = PART_OF[stage.name]
    total = stage.activations
    for name, part in costs.parts.items():
        size = part.bytes
        if modes[name] == STREAMED:
            size = part.streamed((blocks or 0) if name == "dit" else 0)
        if name == own:  # the image stage's weights are those of CLIP or of the VAE, whichever has more
            size += max(0, stage.weights - part.bytes)
            total += size * (part.count if keeps else 1)
        elif _elsewhere(modes, name):
            continue
        elif keeps or (modes[name] == RESIDENT and stage.name not in BEFORE):
            total += size * (part.count if keeps else 1)
    return total


def _wait(costs: Costs, name: str, mode: str, stay: int, keeps: bool) -> float:
    """Seconds to bring a part in, to wait for blocks that come more slowly than others compute, and what that costs.

    Every block is read once in each way; passes behind the first read those again that do not stay.  Both passes of
    guidance at once compute as long as two, and half as much is read beside it.
    """
    part = costs.parts[name]
    uses = part.count if keeps or mode == RESIDENT else max(part.uses, part.count)
    seconds = uses * part.bytes / costs.disk
    if mode == STREAMED and part.blocks:
        computing = costs.seconds.get(name, 0.0)
        away = part.blocks - min(stay, part.blocks)
        again = max(0, part.passes - uses) * away * part.block / costs.feed
        hurry = HURRY / 2 if costs.at_once else HURRY
        seconds += max(0.0, again - computing) + hurry * computing * away / part.blocks
    return seconds


# ---------------------------------------------------------------- the numbers


def costs_of(
    plan: budget.Sized, variant: Variant, dtype: str, rates: Rates, *, on_gpu: bool, quantise: str | None = None,
    changed: bool = False, t5_cpu: bool = False, num: int = 1, host: int = 0, stored: Mapping[str, int] | None = None,
    vae_dtype: str = "float32", row_chunks: int | None = None, vae_rows: int | None = None,
    held: Mapping[str, int] | None = None, unstreamed: Collection[str] = (), at_once: bool = False,
) -> Costs:  # fmt: skip
    """The numbers of `num` videos of a plan for one model.

    changed: the transformer's blocks are not those of its files (a LoRA); such and quantised ones can come and go on a
    GPU only, from the host's memory.  host: free bytes there, which keep files that are read again and again.  stored:
    part -> its bytes where its files have few bits; such stays whole, as blocks of it would come in full width.
    vae_dtype, row_chunks, vae_rows, at_once: as for `budget.need`.  held: part -> bytes that this process has of it,
    where several share its weights.  unstreamed: parts whose blocks do not come and go.
    """
    stored = stored or {}
    whole, flowing = (
        budget.need(
            plan, variant, dtype, on_gpu=on_gpu, t5_cpu=t5_cpu, quantise=quantise, resident_blocks=blocks,
            vae_dtype=vae_dtype, held=held, row_chunks=row_chunks, vae_rows=vae_rows, at_once=at_once,
        )
        for blocks in (None, 0)
    )  # fmt: skip
    sizes = {**budget.part_bytes(variant, dtype, quantise=quantise), **stored, **(held or {})}
    parts = _parts(plan, variant, sizes, num, at_once)
    fixed = {"dit"} if (quantise is not None or changed) and not on_gpu else set()
    fixed |= {"text"} if quantise is not None or t5_cpu else set()
    blocks = {
        "dit": (variant.dit.layers, budget.block_bytes(variant.dit, dtype, quantise)),
        "text": (variant.text.layers, _text_layer(variant) * budget.DTYPE_BYTES[dtype]),
    }
    for name in blocks.keys() - fixed - set(unstreamed) - stored.keys():
        parts[name] = replace(parts[name], blocks=blocks[name][0], block=blocks[name][1])
    return Costs(
        stages=tuple(_narrowed(stage, stored) for stage in whole.stages), parts=parts, on_gpu=on_gpu,
        beside=budget.GPU_BASE if on_gpu else whole.host - max(stage.bytes for stage in whole.stages),
        host=whole.host if on_gpu else 0, streaming=flowing.host if on_gpu else 0, disk_bytes=whole.disk,
        seconds=_arithmetic(works(plan, variant, dtype, num=num), rates), disk=rates.disk,
        feed=rates.copy if on_gpu and host > 2 * sizes["dit"] else min(rates.copy, rates.disk), at_once=at_once,
    )  # fmt: skip


def _parts(
    plan: budget.Sized, variant: Variant, sizes: Mapping[str, int], num: int, at_once: bool
) -> dict[str, Part]:  # fmt: skip
    """The parts with how often each is used: in clips, the transformer and the VAE take turns."""
    clips, experts = len(plan.segments), len(variant.experts)
    images = int(variant.conditioner != "text" and (bool(plan.inputs) or variant.conditioner != "clean_frame"))
    prompts = 2 if any(span.guidance != 1 for span in plan.spans) else 1
    in_clips = variant.dit.speech is not None or variant.dit.animate is not None
    uses = clips * num * (1 + images) + images if in_clips else 1 + images
    return {
        **{name: Part(bytes=size) for name, size in sizes.items()},
        "text": Part(bytes=sizes["text"], passes=prompts),
        "dit": Part(
            bytes=sizes["dit"], count=experts, uses=clips * num if in_clips else experts,
            passes=passes_of(plan, at_once=at_once) * clips * num,
        ),
        "vae": Part(bytes=sizes["vae"], uses=uses),
    }  # fmt: skip


def _text_layer(variant: Variant) -> int:
    """Parameters of a layer of the text encoder."""
    one, none = (budget.text_parameters(replace(variant.text, layers=count)) for count in (1, 0))
    return one - none


def _narrowed(stage: budget.StageNeed, stored: Mapping[str, int]) -> budget.StageNeed:
    """A stage whose part's files have few bits, with the bytes of these."""
    part = PART_OF[stage.name]
    return replace(stage, weights=stored[part]) if part in stored else stage


def _arithmetic(work: Mapping[str, Work], rates: Rates) -> dict[str, float]:
    """Part that can be streamed -> seconds it computes; the text encoder's are too few to hide anything behind."""
    seconds = {stage: estimate(one, rates) for stage, one in work.items()}
    return {"text": 0.0, "dit": seconds.get("denoise", 0.0)}
