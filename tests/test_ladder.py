"""Out of memory, mended where it strikes: the same video, nothing denoised twice, each step down said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clip_files import three_clips
from wanloom.errors import InputError, WanloomWarning
from wanloom.jobs import Memory
from wanloom.ladder import Ladder, out_of_memory
from wanloom.models.dit import DiT
from wanloom.models.layers import Block
from wanloom.models.vae import Decoder, ResidualBlock
from wanloom.pipeline import Pipeline, load
from wanloom.request import Request
from wanloom.results import Result, Video
from wanloom.runtime.streaming import Streamed

pytestmark = pytest.mark.filterwarnings("ignore::wanloom.errors.WanloomWarning")

SIZE: dict[str, Any] = {"size": "64x64", "frames": 9, "steps": 3, "seed": 7}
CALLS = 3 * 2  # of the transformer: steps, and the passes of guidance


def request(**fields: Any) -> Request:
    return Request(prompt="a red cat", **{**SIZE, **fields})


@pytest.fixture
def pipe(models: Path) -> Pipeline:
    return load(models / "t2v-A14B", device="cpu")


@pytest.fixture(scope="module")
def whole(models: Path) -> Video:
    return load(models / "t2v-A14B", device="cpu").run(request()).videos[0]


class Fault:
    """In front of a function: raises out of memory at the calls that are named, counted from 0."""

    def __init__(self, right: Callable[..., Any], strikes: set[int]) -> None:
        self.right, self.strikes, self.calls = right, strikes, 0

    def __get__(self, owner: Any, kind: Any = None) -> Callable[..., Any]:
        return lambda *given, **named: self(owner, *given, **named)

    def __call__(self, *given: Any, **named: Any) -> Any:
        number, self.calls = self.calls, self.calls + 1
        if number in self.strikes:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return self.right(*given, **named)


def fault(monkeypatch: pytest.MonkeyPatch, kind: type, strikes: set[int]) -> Fault:
    made = Fault(kind.forward, strikes)
    monkeypatch.setattr(kind, "forward", made)
    return made


def run_with_warnings(pipe: Pipeline, asked: Request, **more: Any) -> tuple[Result, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = pipe.run(asked, **more)
    return result, [str(w.message)[:5] for w in said if str(w.message).startswith("W50")]


# ---------------------------------------------------------------- denoising


@pytest.mark.parametrize("strike", [0, 1, 3, CALLS - 1])
def test_denoising_goes_on_with_streamed_blocks_to_the_same_bits(
    strike: int, pipe: Pipeline, whole: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed: list[bool] = []
    made = fault(monkeypatch, DiT, {strike})
    right = made.right
    made.right = lambda dit, *given, **named: (
        streamed.append(isinstance(dit.trunk, Streamed)) or right(dit, *given, **named)
    )
    result, said = run_with_warnings(pipe, request())
    assert torch.equal(result.videos[0].tensor, whole.tensor)
    assert said == ["W5009"] and len(result.lowered) == 1 and "come and go" in result.lowered[0]
    assert streamed[:strike] == [False] * strike and all(streamed[strike:])
    assert len(streamed) == CALLS + strike % 2  # the step where it struck, and no other, is made again
    assert pipe.parts.resident_blocks is None  # the next run begins at the top


def test_denoising_with_a_cache_goes_on_to_the_same_bits(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(cache="easycache", cache_threshold=0.5, steps=8)
    want = pipe.run(asked).videos[0]
    made = fault(monkeypatch, Block, {13})
    result, said = run_with_warnings(pipe, asked)
    assert torch.equal(result.videos[0].tensor, want.tensor) and said == ["W5009"]
    assert made.calls > 14


def test_memory_that_runs_out_again_is_an_error_with_a_way_out(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch, DiT, {1, 2})
    with pytest.warns(WanloomWarning, match="W5009"), pytest.raises(InputError, match="--row-chunks") as caught:
        pipe.run(request())
    assert caught.value.code == "E5007"


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("strikes", "how"),
    [({0}, ["16"]), *(pytest.param(*row, marks=pytest.mark.matrix) for row in (({2}, ["16"]), ({1, 2}, ["16", "8"])))],
    ids=str,
)
def test_decoding_comes_down_and_denoising_is_not_repeated(
    strikes: set[int], how: list[str], pipe: Pipeline, whole: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoised = fault(monkeypatch, DiT, set())
    fault(monkeypatch, Decoder if strikes == {0} else ResidualBlock, strikes)
    result, said = run_with_warnings(pipe, request())
    video = result.videos[0]
    assert denoised.calls == CALLS
    assert torch.equal(video.latents, whole.latents)
    assert torch.allclose(video.tensor, whole.tensor, atol=1e-5)
    assert result.lowered == tuple(f"decoding: in stripes of {rows} rows" for rows in how)
    assert said == ["W5008"] * len(how) and pipe.parts.vae_rows is None


@pytest.mark.matrix
def test_frames_are_given_once_whatever_happens_between(
    pipe: Pipeline, whole: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch, Decoder, {1})  # when the first frame has gone out
    result, said = run_with_warnings(pipe, request())
    assert result.videos[0].tensor.shape == whole.tensor.shape and said == ["W5008"]
    assert torch.equal(result.videos[0].tensor[:, :1], whole.tensor[:, :1])
    assert torch.allclose(result.videos[0].tensor, whole.tensor, atol=1e-5)


def test_when_nothing_helps_the_latents_are_kept_and_the_run_goes_on_from_them(
    pipe: Pipeline, whole: Video, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, tensors = tmp_path / "a.mp4", tmp_path / "a.safetensors"
    with monkeypatch.context() as broken:
        fault(broken, ResidualBlock, set(range(1000)))
        with pytest.warns(WanloomWarning, match="W5008"), pytest.raises(InputError, match="--resume") as caught:
            pipe.run(request(save_tensors=tensors), out=out)
    assert caught.value.code == "E5007" and "stripes of 8 rows" in str(caught.value)
    assert not out.exists() and (tmp_path / "a.job" / "lowered.safetensors").is_file()
    denoised = fault(monkeypatch, DiT, set())
    result, said = run_with_warnings(pipe, request(save_tensors=tensors), resume=tmp_path / "a.job")
    assert denoised.calls == 0 and said == [] and out.is_file() and not (tmp_path / "a.job").exists()
    assert result.lowered == ("decoding: in stripes of 8 rows",)
    assert torch.allclose(load_file(tensors)["video"], whole.tensor, atol=1e-5)


class PartsOnAGpu:
    """What a ladder knows of parts, as if a GPU were there."""

    resident_blocks: int | None = None
    vae_rows: int | None = None
    vae_device = "cuda"
    vae_shared = False
    released = 0

    def release(self) -> None:
        self.released += 1

    def stream(self) -> bool:
        return False


def test_the_last_step_is_the_cpu_and_the_parts_are_put_back() -> None:
    parts: Any = PartsOnAGpu()
    with Ladder(parts, Memory(), 480) as ladder, pytest.warns(WanloomWarning, match="W5008"):
        for rows, place in ((120, "cuda"), (30, "cuda"), (30, "cpu")):
            ladder.lower_decoding()
            assert (parts.vae_rows, parts.vae_device) == (rows, place)
        with pytest.raises(InputError, match="E5007"):
            ladder.lower_decoding()
        assert ladder.taken[-1] == "decoding: on the CPU"
    assert (parts.vae_rows, parts.vae_device) == (None, "cuda") and parts.released == 4


def test_other_errors_pass_and_memory_is_known_by_its_errors(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert out_of_memory(MemoryError()) and out_of_memory(torch.cuda.OutOfMemoryError("x"))
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not out_of_memory(RuntimeError("shapes do not fit")) and not out_of_memory(None)

    def wrong(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Decoder, "forward", wrong)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        pipe.run(request())


def test_elsewhere_it_is_said_in_one_line(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    monkeypatch.setattr("wanloom.pipeline.CONDITIONERS", {"text": full})
    with pytest.raises(InputError, match="wanloom plan") as caught:
        pipe.run(request())
    assert caught.value.code == "E5007"


def test_between_clips_the_transformer_leaves_first_and_every_bit_stays(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(models / "animate-14B", task="animate-14B", device="cpu")
    fields = {**three_clips(tmp_path)["animate"], "steps": 2}
    want = pipe.run(Request(prompt="a red cat", seed=7, **fields)).videos[0]
    fault(monkeypatch, Decoder, {2})
    result, said = run_with_warnings(pipe, Request(prompt="a red cat", seed=7, **fields))
    assert result.lowered == ("decoding: the transformer leaves before",) and said == ["W5008"]
    assert torch.equal(result.videos[0].tensor, want.tensor)
