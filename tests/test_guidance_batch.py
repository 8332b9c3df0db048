"""Both passes of guidance in one call of the model: the numbers of two to rounding, for all models and machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from clip_files import three_clips
from wanloom import Pipeline, Request, load, parts
from wanloom.errors import InputError
from wanloom.jobs import stored_request
from wanloom.models.adapters import build_dit
from wanloom.models.dit import DiT
from wanloom.request import request_from_text
from wanloom.runtime.quant import quantise
from wanloom.runtime.rows import use_rows
from wanloom.runtime.streaming import Fill
from wanloom.sampling.velocity import AtOnce, conditioned, guided, joined
from wanloom.variants import Variant

FRAMES, SIDE = 3, 8
PROMPT = "a red circle moves left on sand"


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def a_dit(row: Variant, dtype: torch.dtype) -> DiT:
    dit = build_dit(row.dit).to(dtype).requires_grad_(False)
    dit.load_state_dict(tiny._values(dit, torch.Generator().manual_seed(0), dtype))
    return dit.eval()


def sides(row: Variant, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a conditioner gives for both passes: only text, sound and face are others without the prompt."""
    config, random = row.dit, partial(draw, dtype=dtype)
    shared: dict[str, Tensor] = {}
    own = {"context": [random(1, config.text_len, config.text_dim, seed=seed) for seed in (1, 2)]}
    if row.conditioner in ("clean_frame", "speech"):
        shared["group"] = torch.zeros(FRAMES, dtype=torch.long)
        shared["group"][0] = row.conditioner == "clean_frame"
    if config.image_dim is not None:
        shared["image"] = random(1, config.image_positions or 257, config.image_dim, seed=3)
    if config.in_channels > config.out_channels:
        shared["y"] = random(1, config.in_channels - config.out_channels, FRAMES, SIDE, SIDE, seed=4)
    if (speech := config.speech) is not None:
        shared["reference"] = random(1, 16, 1, SIDE, SIDE, seed=5)
        shared["motion"] = random(1, 16, 4, SIDE, SIDE, seed=6)
        shared["pose"] = random(1, 16, FRAMES, SIDE, SIDE, seed=7)
        own["audio"] = [random(1, speech.audio_states, speech.audio_dim, 4 * FRAMES, seed=seed) for seed in (8, 9)]
    if (animate := config.animate) is not None:
        size = animate.face_size
        shared["pose"] = random(1, 16, FRAMES - 1, SIDE, SIDE, seed=7)
        own["face"] = [random(1, 3, 4 * (FRAMES - 1) - 3, size, size, seed=seed) for seed in (8, 9)]
    cond, uncond = ({**shared, **{name: pair[side] for name, pair in own.items()}} for side in (0, 1))
    return cond, uncond


def never(x: Tensor, t: float) -> Tensor:
    raise AssertionError("the pass with the prompt was made by itself")


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@torch.no_grad()
def apart(dit: DiT, row: Variant, dtype: torch.dtype) -> float:
    """How far the guided velocity of both at once is from that of one after the other."""
    cond, uncond = sides(row, dtype)
    x = draw(1, row.dit.out_channels, FRAMES, SIDE, SIDE, seed=10, dtype=dtype)
    in_turn = guided(conditioned(dit, dit.once(cond)), conditioned(dit, dit.once(uncond)), 4.0)(x, 700.0)
    at_once = guided(never, AtOnce(dit, dit.once(joined(cond, uncond))), 4.0)(x, 700.0)
    swapped = guided(never, AtOnce(dit, dit.once(joined(uncond, cond))), 4.0)(x, 700.0)
    assert distance(swapped, in_turn) > 1e-2, "the passes do not differ"
    return distance(at_once, in_turn)


@pytest.mark.parametrize("name", tiny.TINY)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_both_at_once_are_one_after_the_other_to_rounding(name: str, dtype: torch.dtype, limit: float) -> None:
    row = tiny.TINY[name]
    assert apart(a_dit(row, dtype), row, dtype) < limit


def compile_plainly(dit: DiT) -> None:
    """Traced block by block as `--compile` does, without the compiler's time; what other tests compiled is forgotten,
    as forms of a block are limited."""
    torch.compiler.reset()
    for block in dit.blocks:
        block.compile(backend="eager", fullgraph=True)


# Kept in 8 bits, not computed with: what is rounded while it computes may be rounded to another step.
MACHINES: Mapping[str, Callable[[DiT], object]] = {
    "rows": lambda dit: use_rows(dit, 7),
    "int8": lambda dit: quantise(dit, "int8"),
    "fp8": lambda dit: quantise(dit, "fp8"),
    "compiled": compile_plainly,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["ti2v-5B", "s2v-14B", "animate-14B"])
def test_machines_do_not_mind_two_samples(name: str, machine: str) -> None:
    row = tiny.TINY[name]
    dit = a_dit(row, torch.float32)
    MACHINES[machine](dit)
    assert apart(dit, row, torch.float32) < 1e-5


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return load("demo-t2v", device="cpu")


def request(**fields: Any) -> Request:
    return Request(**{"prompt": PROMPT, "steps": 4, "frames": 5, "seed": 3, **fields})


def latents(pipe: Pipeline, folder: Path, **fields: Any) -> Tensor:
    path = folder / "t.safetensors"
    pipe.run(request(save_tensors=path, overwrite=True, **fields))
    return torch.cat([value for name, value in load_file(path).items() if "latents" in name], -3)


def test_unless_asked_for_nothing_changes(pipe: Pipeline, tmp_path: Path) -> None:
    plain = latents(pipe, tmp_path)
    assert torch.equal(latents(pipe, tmp_path, guidance_batch="off"), plain)
    at_once = latents(pipe, tmp_path, guidance_batch="on")
    assert distance(at_once, plain) < 1e-4
    assert torch.equal(latents(pipe, tmp_path, guidance_batch="auto"), at_once), "a small model has room"
    assert torch.equal(
        latents(pipe, tmp_path, guidance_batch="auto", guidance=1.0), latents(pipe, tmp_path, guidance=1.0)
    )


@pytest.mark.parametrize("mode", ["late", "late-off", "zero-star"])
def test_a_way_of_guidance_is_the_same_at_once(mode: str, pipe: Pipeline, tmp_path: Path) -> None:
    in_turn = latents(pipe, tmp_path, guidance_mode=mode)
    assert distance(latents(pipe, tmp_path, guidance_mode=mode, guidance_batch="on"), in_turn) < 1e-4


def test_blocks_that_come_and_go_are_read_half_as_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    source = parts.load_streamed_narrowed

    def counted(*args: Any, **options: Any) -> Fill:
        fill = source(*args, **options)

        def count(block: int, tensors: Mapping[str, Tensor]) -> None:
            reads.append(block)
            fill(block, tensors)

        return count

    monkeypatch.setattr(parts, "load_streamed_narrowed", counted)
    streamed, made, counts = load("demo-t2v", device="cpu", resident_blocks=0), [], []
    for asked in ("off", "on"):
        reads.clear()
        made.append(latents(streamed, tmp_path, guidance_batch=asked))
        counts.append(len(reads))
    layers, ahead = streamed.variant.dit.layers, 2 * 2  # each expert may have read two blocks that nobody waited for
    assert 2 * 4 * layers <= counts[0] <= 2 * 4 * layers + ahead
    assert 4 * layers <= counts[1] <= 4 * layers + ahead
    assert distance(made[1], made[0]) < 1e-4


@pytest.mark.filterwarnings("ignore:W2004")
@pytest.mark.parametrize(("task", "name"), [("s2v", "s2v-14B"), ("animate", "animate-14B")])
def test_videos_in_clips_are_guided_at_once(task: str, name: str, models: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"guidance": 3.0, "steps": 2, "frames": None, **three_clips(tmp_path)[task]}
    small = load(models / name, task=name, device="cpu")
    in_turn, at_once = (latents(small, tmp_path, guidance_batch=asked, **fields) for asked in ("off", "on"))
    assert distance(at_once, in_turn) < 1e-4


def test_what_auto_came_to_is_how_a_run_goes_on(pipe: Pipeline, tmp_path: Path) -> None:
    whole = latents(pipe, tmp_path, guidance_batch="on")
    path = tmp_path / "b.safetensors"
    stream = pipe.stream(request(save_every=1, save_tensors=path, guidance_batch="auto"), out=tmp_path / "a.mp4")
    for event in stream:
        if event.stage == "denoise" and event.step == 2:
            break
    stream.close()
    stored = stored_request(tmp_path / "a.job")
    assert stored["guidance_batch"] == "on"
    with pytest.raises(InputError, match="precision of guidance") as caught:
        pipe.run(request(save_tensors=path), resume=tmp_path / "a.job")
    assert caught.value.code == "E2020"
    assert pipe.run(request_from_text(stored), resume=tmp_path / "a.job").began_at == 2
    assert torch.equal(load_file(path)["latents"], whole)


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"guidance_batch": "no"}, "E2056", "on"),
        ({"guidance_batch": "auto", "cache": "taylor"}, "E2023", "taylor decides about each pass"),
        ({"guidance_batch": "on", "guidance": 1.0}, "E2023", "one pass"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], code: str, said: str, pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=said) as caught:
        pipe.run(request(**fields))
    assert caught.value.code == code
