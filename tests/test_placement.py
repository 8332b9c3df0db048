"""Where parts live during a run, over a table of made-up machines and the real sizes of the released models."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest

from wanloom import budget
from wanloom.placement import (
    CPU,
    RESIDENT,
    SMALL,
    STREAMED,
    SWAPPED,
    Costs,
    Part,
    Room,
    Wishes,
    arrange,
    costs_of,
    fastest,
    ways_of,
)
from wanloom.plan import make_plan
from wanloom.rates import guessed_rates
from wanloom.request import Request
from wanloom.variants import VARIANTS

GB = 10**9
HOST = 64 * GB
CARDS = (8, 12, 24, 80)
LARGE = ("t2v-A14B", "i2v-A14B", "ti2v-5B", "s2v-14B", "animate-14B")
LOW = (832, 480)


@cache
def costs(
    name: str, size: tuple[int, int] | None = None, *, on_gpu: bool = True, clips: int = 1, **more: object
) -> Costs:
    """A run of the default length in bfloat16."""
    row = VARIANTS[name]
    given = {"num_clips": clips} if clips > 1 else {}
    plan = make_plan(Request(task=name, size=size, **given), row, draft=True)  # type: ignore[arg-type]
    rates = guessed_rates(8, (), (8, 9) if on_gpu else None)
    return costs_of(plan, row, "bfloat16", rates, on_gpu=on_gpu, host=HOST, **more)  # type: ignore[arg-type]


class Stored(dict[str, int]):
    """Bytes of parts, to be an argument of what is cached."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


def card(gigabytes: float) -> Room:
    """A GPU with so much memory, of which the screen takes some."""
    return Room(int(gigabytes * 0.97 * GB), HOST)


# What a card does: (text, transformer, blocks that stay, fits); T is t2v-A14B at 832x480, a whole transformer 28.6 GB.
WANTED = {
    ("t2v-A14B", LOW, 8): (STREAMED, STREAMED, 1, False),  # the decoder of the VAE alone takes 8.3 GB
    ("t2v-A14B", LOW, 12): (STREAMED, STREAMED, 7, True),
    ("t2v-A14B", LOW, 24): (SWAPPED, STREAMED, 23, True),
    ("t2v-A14B", LOW, 80): (SWAPPED, SWAPPED, None, True),
    ("t2v-A14B", (1280, 720), 12): (SWAPPED, STREAMED, 0, False),
    ("t2v-A14B", (1280, 720), 24): (SWAPPED, STREAMED, 16, True),
    ("t2v-A14B", (1280, 720), 80): (SWAPPED, SWAPPED, None, True),
    ("i2v-A14B", LOW, 24): (SWAPPED, STREAMED, 23, True),
    ("i2v-A14B", LOW, 80): (SWAPPED, SWAPPED, None, True),
    ("ti2v-5B", (1280, 704), 12): (SWAPPED, SWAPPED, None, False),
    ("ti2v-5B", (1280, 704), 24): (SWAPPED, SWAPPED, None, True),
    ("ti2v-5B", (1280, 704), 80): (SWAPPED, SWAPPED, None, True),
    ("s2v-14B", LOW, 24): (SWAPPED, STREAMED, 15, True),
    ("s2v-14B", LOW, 80): (SWAPPED, SWAPPED, None, True),
    ("animate-14B", LOW, 12): (STREAMED, STREAMED, 3, True),
    ("animate-14B", LOW, 24): (SWAPPED, STREAMED, 17, True),
    ("animate-14B", (1280, 720), 80): (SWAPPED, SWAPPED, None, True),
}


@pytest.mark.parametrize(("name", "size", "gigabytes"), WANTED, ids=lambda value: str(value))
def test_each_card_has_its_mode(name: str, size: tuple[int, int], gigabytes: int) -> None:
    room = card(gigabytes)
    memory = arrange(costs(name, size), room)
    fits = room.over(memory.need) == (0, 0)
    assert (memory.modes["text"], memory.modes["dit"], memory.resident_blocks, fits) == WANTED[name, size, gigabytes]


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("on_gpu", [True, False])
def test_more_room_is_never_slower_and_what_fits_is_never_above_what_is_free(name: str, on_gpu: bool) -> None:
    run = costs(name, on_gpu=on_gpu, clips=3 if name == "s2v-14B" else 1)
    frees = [gigabytes * GB for gigabytes in range(2, 400)]
    plans = [arrange(run, Room(free, HOST) if on_gpu else Room(None, free)) for free in frees]
    over = [Room(free, HOST).over(plan.need) if on_gpu else Room(None, free).over(plan.need)
            for free, plan in zip(frees, plans, strict=True)]  # fmt: skip
    assert over[0] != (0, 0) and over[-1] == (0, 0)
    assert all(more <= less for less, more in pairwise(over))
    fitting = [plan for plan, missing in zip(plans, over, strict=True) if missing == (0, 0)]
    assert all(second.extra <= first.extra for first, second in pairwise(fitting))
    assert {plan.modes["dit"] for plan in fitting} >= {SWAPPED, RESIDENT}, "from one after another to all at once"


@pytest.mark.parametrize("name", LARGE)
def test_what_does_not_fit_is_planned_as_lean_as_can_be(name: str) -> None:
    run = costs(name)
    least = arrange(run, Room(0, HOST)).need.gpu
    assert arrange(run, Room(least, HOST)).need.gpu == least
    assert Room(least - 1, HOST).over(arrange(run, Room(least - 1, HOST)).need) == (1, 0)


def test_all_parts_stay_only_where_they_are_small_beside_what_is_free() -> None:
    run = costs("ti2v-5B")
    total = sum(part.bytes * part.count for part in run.parts.values())
    assert not arrange(run, Room(int(total / SMALL) - 8, HOST)).keeps
    memory = arrange(run, Room(int(total / SMALL) + 8, HOST))
    assert memory.keeps and set(memory.modes.values()) == {RESIDENT}
    assert memory.need.gpu > total


def test_the_need_of_parts_that_come_and_go_is_that_of_the_budget() -> None:
    for name in LARGE:
        row = VARIANTS[name]
        plan = make_plan(Request(task=name), row, draft=True)
        for on_gpu in (True, False):
            wanted = budget.need(plan, row, "bfloat16", on_gpu=on_gpu)
            room = Room(10**12, 10**12) if on_gpu else Room(None, 10**12)
            assert arrange(costs(name, on_gpu=on_gpu), room, Wishes(offload=True)).need == wanted
            streamed = budget.need(plan, row, "bfloat16", on_gpu=on_gpu, resident_blocks=3)
            got = arrange(costs(name, on_gpu=on_gpu), room, Wishes(resident_blocks=3, offload=True)).need
            assert (got.host, got.gpu) == (streamed.host, streamed.gpu)


def test_the_transformer_of_clips_stays_beside_the_decoder_where_there_is_room() -> None:
    run = costs("s2v-14B", LOW, clips=3)
    assert run.parts["dit"].uses == 3
    memory = arrange(run, card(80))
    assert memory.modes["dit"] == RESIDENT
    decode = memory.need.stages[-1]
    assert decode.name == "decode" and decode.weights == run.parts["dit"].bytes + run.parts["vae"].bytes
    tight = Room(memory.need.gpu - 1, HOST)
    lean = arrange(run, tight)
    assert RESIDENT not in (lean.modes["dit"], lean.modes["vae"]) or tight.over(lean.need) == (0, 0)
    assert lean.extra > memory.extra


def test_wishes_are_kept_even_where_they_do_not_fit() -> None:
    run, room = costs("t2v-A14B", LOW), card(80)
    for count in (0, 5, 40):
        memory = arrange(run, room, Wishes(resident_blocks=count))
        assert memory.modes["dit"] == STREAMED and memory.resident_blocks == count
    everything = arrange(run, room, Wishes(offload=False))
    assert everything.keeps and set(everything.modes.values()) == {RESIDENT}
    assert everything.need.gpu > sum(part.bytes * part.count for part in run.parts.values())
    nothing = arrange(costs("ti2v-5B"), Room(200 * GB, HOST), Wishes(offload=True))
    assert set(nothing.modes.values()) == {SWAPPED} and not nothing.keeps
    helped = costs("t2v-A14B", LOW, t5_cpu=True)
    elsewhere = arrange(helped, card(12), Wishes(t5_cpu=True))
    assert elsewhere.modes["text"] == CPU and elsewhere.need.gpu < 12 * GB
    assert elsewhere.need.host > helped.parts["text"].bytes


def test_the_text_encoder_is_on_the_cpu_only_when_asked_and_nothing_is_ever_quantised() -> None:
    for name in LARGE:
        for gigabytes in CARDS:
            memory = arrange(costs(name), card(gigabytes))
            assert memory.modes["text"] != CPU
            assert set(memory.modes.values()) <= {RESIDENT, SWAPPED, STREAMED}


def test_quantised_or_changed_blocks_are_streamed_on_a_gpu_only() -> None:
    for change in ({"quantise": "int8"}, {"changed": True}):
        assert costs("t2v-A14B", on_gpu=False, **change).parts["dit"].blocks == 0
        assert costs("t2v-A14B", **change).parts["dit"].blocks == 40
        memory = arrange(costs("t2v-A14B", on_gpu=False, **change), Room(None, 20 * GB))
        assert memory.modes["dit"] == SWAPPED
    assert costs("t2v-A14B", quantise="int8").parts["dit"].bytes < costs("t2v-A14B").parts["dit"].bytes


def test_what_files_have_in_few_bits_stays_whole_and_takes_their_bytes() -> None:
    run = costs("t2v-A14B", LOW, stored=Stored({"dit": 9 * GB}))
    assert run.parts["dit"].bytes == 9 * GB and run.parts["dit"].blocks == 0
    memory = arrange(run, card(16))
    assert memory.modes["dit"] == SWAPPED and card(16).over(memory.need) == (0, 0)
    assert next(stage for stage in memory.need.stages if stage.name == "denoise").weights == 9 * GB


def test_a_host_without_room_is_no_reason_to_stream() -> None:
    run = costs("t2v-A14B", LOW)
    memory = arrange(run, Room(80 * GB, 4 * GB))
    assert memory.modes["dit"] == SWAPPED and Room(80 * GB, 4 * GB).over(memory.need)[1] > 0


def test_blocks_that_come_more_slowly_cost_more_and_those_that_stay_save_it() -> None:
    run = costs("t2v-A14B", LOW)
    slow = replace(run, feed=run.feed / 1000)
    few, many = (arrange(slow, card(80), Wishes(resident_blocks=count)).extra for count in (0, 30))
    assert few > many > arrange(slow, card(80)).extra
    assert arrange(run, card(80), Wishes(resident_blocks=0)).extra < few


def test_the_words_say_what_is_unusual() -> None:
    run = costs("t2v-A14B", LOW)
    assert arrange(run, card(80)).words(40) == "parts come and go"
    assert arrange(run, card(24)).words(40) == "23 of 40 blocks stay, the others are streamed"
    assert arrange(run, card(12)).words(40).endswith(", the text encoder is streamed")
    assert arrange(run, card(80), Wishes(offload=False)).words(40) == "all parts stay"
    assert Part(bytes=100, block=10, blocks=8).streamed(2) == 100 - (8 - 2 - budget.SLOTS) * 10


# ---------------------------------------------------------------- both passes of guidance at once


def guided_runs(name: str, size: tuple[int, int] = LOW) -> list[Costs]:
    return [costs(name, size, at_once=at_once) for at_once in (False, True)]


def test_a_request_says_how_passes_may_be_made_and_one_pass_is_never_two() -> None:
    row = VARIANTS["t2v-A14B"]
    guided, plain = (make_plan(Request(prompt="a", guidance=scale), row) for scale in (4.0, 1.0))
    assert [ways_of(asked, guided) for asked in (None, "off", "on", "auto")] == [(False,)] * 2 + [
        (True,),
        (False, True),
    ]
    assert {ways_of(asked, plain) for asked in (None, "off", "auto")} == {(False,)}


@pytest.mark.parametrize("name", ["t2v-A14B", "i2v-A14B", "ti2v-5B", "s2v-14B"])
def test_passes_are_made_at_once_only_where_that_fits_and_is_no_slower(name: str) -> None:
    size = (1280, 704) if name == "ti2v-5B" else LOW
    ways, chosen = guided_runs(name, size), set()
    for gigabytes in range(8, 120, 2):
        room = card(gigabytes)
        alone, free = arrange(ways[0], room), fastest(ways, room)
        assert fastest(ways[:1], room) == alone
        assert room.over(free.need) <= room.over(alone.need) and free.extra <= alone.extra
        assert not free.at_once or room.over(free.need) == (0, 0)
        chosen.add(free.at_once)
    assert chosen == {True, False}
    assert fastest(ways, card(200)).at_once
    assert fastest(ways, card(200)).words(40).endswith(", both passes of guidance at once")


def test_streamed_blocks_are_read_once_a_step_in_place_of_twice() -> None:
    ways = guided_runs("t2v-A14B")
    assert [run.parts["dit"].passes for run in ways] == [80, 40]
    assert ways[0].seconds == ways[1].seconds, "the arithmetic is that of two passes"
    slow = [replace(run, feed=GB / 10) for run in ways]
    waits = [arrange(run, card(80), Wishes(resident_blocks=0)).waits["dit"] for run in slow]
    assert waits[1] < 0.5 * waits[0]
    assert fastest(slow, card(24), Wishes(resident_blocks=0)).at_once
