"""The main path on small models: what comes out, in which order, and what stops it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import wave
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny
import wanloom
from wanloom import media, pipeline
from wanloom.checkpoint.find import resolve
from wanloom.checkpoint.load import survey
from wanloom.errors import InputError, NumericalError, WanloomWarning
from wanloom.models.dit import DiT
from wanloom.models.vae import CausalVae
from wanloom.parts import Parts
from wanloom.pipeline import Pipeline, load
from wanloom.plan import Plan
from wanloom.request import Request
from wanloom.results import quantise
from wanloom.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore::wanloom.errors.WanloomWarning")

SMALL: dict[str, Any] = {"size": "32x32", "frames": 9, "steps": 4, "seed": 7}


@pytest.fixture
def pipe(models: Path) -> Pipeline:
    return load(models / "t2v-A14B", device="cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Every call of a transformer: (which module, t)."""
    seen: list[tuple[int, float]] = []
    right = DiT.forward

    def forward(self: DiT, x: torch.Tensor, t: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        seen.append((id(self), float(t[0, 0])))
        return right(self, x, t, *given, **named)

    monkeypatch.setattr(DiT, "forward", forward)
    return seen


def request(**fields: Any) -> Request:
    return Request(prompt="a red cat", **{**SMALL, **fields})


# ---------------------------------------------------------------- what comes out


def test_a_video_has_frames_tensor_latents_and_its_plan(pipe: Pipeline) -> None:
    video = pipe("a red cat", **SMALL)
    assert video.frames.shape == (9, 32, 32, 3) and video.frames.dtype == np.uint8
    assert video.tensor.shape == (3, 9, 32, 32) and video.tensor.dtype == torch.float32
    assert video.tensor.abs().max() <= 1 and video.latents.shape == (16, 3, 4, 4)
    assert video.plan.seed == 7 and video.plan.steps == 4


@pytest.mark.parametrize("name", sorted(tiny.TINY))
def test_every_variant_makes_a_video(name: str, models: Path, tmp_path: Path) -> None:
    row = VARIANTS[name]
    given = {role: an_input(tmp_path, role) for role, _ in row.inputs}
    counts = {"infer_frames": 8} if row.conditioner == "speech" else {"frames": 5}  # s2v drops 3 of its first clip
    fields = {"size": (64, 64), "steps": 3, "seed": 7, **counts, **given}
    video = load(models / name, task=name, device="cpu")("a red cat", **fields)
    assert video.tensor.shape[:2] == (3, 5) and np.isfinite(video.frames).all()


def an_input(folder: Path, role: str) -> Path:
    """A file for this role: a picture, a quarter of a second of sound, or five frames of 64 x 64."""
    if role == "audio":
        with wave.open(str(folder / "audio.wav"), "wb") as file:
            file.setnchannels(1), file.setsampwidth(2), file.setframerate(16_000)
            file.writeframes((8000 * np.sin(np.arange(4000) / 6)).astype("<i2").tobytes())
        return folder / "audio.wav"
    if role.endswith("_video"):
        ramp = np.arange(5 * 64 * 64 * 3).reshape(5, 64, 64, 3) // 240
        media.save_video(folder / f"{role}.mp4", ramp.astype(np.uint8), fps=16)
        return folder / f"{role}.mp4"
    return tiny.picture(folder / f"{role}.png")


def test_the_same_seed_gives_the_same_bits_and_another_does_not(pipe: Pipeline) -> None:
    one, again, other = (
        pipe("a red cat", **SMALL),
        pipe("a red cat", **SMALL),
        pipe("a red cat", **{**SMALL, "seed": 8}),
    )
    assert torch.equal(one.tensor, again.tensor) and not torch.equal(one.tensor, other.tensor)


def test_noise_is_one_draw_from_the_seed_on_the_cpu(pipe: Pipeline) -> None:
    plan = pipe.prepare(request()).plan
    expected = torch.randn(plan.latent, generator=torch.Generator().manual_seed(7))
    assert torch.equal(pipeline.noise(plan)[0], expected)


def test_pixels_are_cut_and_not_rounded() -> None:
    values = torch.tensor([-1.0, -0.999, 0.0, 0.5, 0.99999, 1.0]).view(1, 1, 1, 6).expand(3, 1, 1, 6)
    assert quantise(values)[0, 0, :, 0].tolist() == [0, 0, 127, 191, 254, 255]


def test_a_saved_video_carries_its_plan(pipe: Pipeline, tmp_path: Path) -> None:
    video = pipe("a red cat", **SMALL)
    for suffix in (".mp4", ".mkv", ".webm", ".gif", ".png"):
        path = video.save(tmp_path / f"a{suffix}")
        assert Plan.from_json(media.read_comment(path)) == video.plan
    with pytest.raises(InputError) as caught:
        video.save(tmp_path / "a.mp4")
    assert caught.value.code == "E5002"
    frames, _ = media.read_video(tmp_path / "a.png")
    assert np.array_equal(frames, video.frames)


def test_a_file_holds_the_frames_that_a_call_returns(pipe: Pipeline, tmp_path: Path) -> None:
    video = pipe("a red cat", **SMALL)
    result = pipe.run(request(save_tensors=tmp_path / "a.safetensors"), out=tmp_path / "a.png")
    assert np.array_equal(media.read_video(tmp_path / "a.png")[0], video.frames)
    tensors = load_file(tmp_path / "a.safetensors")
    assert torch.equal(tensors["latents"], video.latents) and torch.equal(tensors["video"], video.tensor)
    assert result.path == tmp_path / "a.png" and result.seed == 7 and result.peak_host_bytes > 10**7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.safetensors"]


def test_no_path_of_this_machine_is_in_the_file(models: Path, tmp_path: Path) -> None:
    pipe = load(models / "i2v-A14B", device="cpu")
    picture = tiny.picture(tmp_path / "first.png")
    pipe.run(request(image=picture), out=tmp_path / "a.mp4")
    comment = media.read_comment(tmp_path / "a.mp4")
    assert str(tmp_path) not in comment and str(models) not in comment
    item = json.loads(comment)["inputs"][0]
    assert item["name"] == "first.png" and item["sha256"] == media.read_picture(picture).sha256


# ---------------------------------------------------------------- several videos


def test_num_gives_each_seed_its_own_video_and_loads_each_expert_once(
    pipe: Pipeline, tmp_path: Path, calls: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [pipe("a red cat", **{**SMALL, "seed": seed}) for seed in (7, 8, 9)]
    calls.clear()
    loads: list[tuple[str, str | None]] = []
    right = Parts._load
    pipe.parts.release()
    pipe.parts.resident = False
    monkeypatch.setattr(Parts, "_load", lambda self, *part: loads.append(part) or right(self, *part))
    files = [tmp_path / f"{i}.png" for i in range(3)]
    pipe.run(request(num=3), out=files)
    for file, video in zip(files, alone, strict=True):
        assert np.array_equal(media.read_video(file)[0], video.frames)
    assert sorted(loads, key=str) == sorted(
        [("text", None), ("dit", "high_noise_model"), ("dit", "low_noise_model"), ("vae", None)], key=str
    )
    assert len(calls) == 3 * 2 * SMALL["steps"]


def test_a_call_makes_one_video_and_run_makes_all(pipe: Pipeline) -> None:
    with pytest.raises(InputError):
        pipe("a red cat", num=2, **SMALL)
    result = pipe.run(request(num=2))
    assert [video.plan.seed for video in result.videos] == [7, 8] == list(result.seeds)


# ---------------------------------------------------------------- on the way


def test_events_follow_the_stages(pipe: Pipeline) -> None:
    events = list(pipe.stream(request()))
    assert [event.stage for event in events] == ["encode"] * 2 + ["denoise"] * 5 + ["decode"] * 4 + ["done"]
    steps = [event for event in events if event.stage == "denoise"]
    assert [event.step for event in steps] == [0, 1, 2, 3, 4] and {event.steps for event in steps} == {4}
    plan = pipe.prepare(request()).plan
    assert [event.sigma for event in steps[1:]] == list(plan.sigmas[:-1])
    assert [event.t for event in steps[1:]] == list(plan.timesteps)
    assert [event.expert for event in steps[1:]] == [plan.span_at(i).expert for i in range(4)]
    assert all(event.peak_host > 0 for event in events)


def test_closing_the_stream_cancels_and_a_job_can_go_on(pipe: Pipeline, tmp_path: Path) -> None:
    whole = pipe.run(request(), out=tmp_path / "whole.png")
    stream = pipe.stream(request(), out=tmp_path / "a.png")
    for event in stream:
        if event.stage == "denoise" and event.step == 3:
            break
    stream.close()
    assert not (tmp_path / "a.png").exists()
    result = pipe.run(request(), resume=tmp_path / "a.job")
    assert result.began_at == 3 and result.path == tmp_path / "a.png"
    assert (tmp_path / "a.png").read_bytes() == whole.path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "whole.png"]


def test_looking_at_previews_changes_nothing(pipe: Pipeline, tmp_path: Path) -> None:
    plain = pipe.run(request()).videos[0]
    sizes = set()

    def look(event: pipeline.Event) -> None:
        if event.film is not None:
            film = event.film()
            sizes.add((film.width, film.height, len(film.frames), len(film.frames[0])))

    seen = pipe.run(request(preview=True), on_event=look).videos[0]
    assert torch.equal(plain.tensor, seen.tensor) and sizes == {(4, 4, 3, 48)}
    pipe.run(request(preview=True), out=tmp_path / "a.mp4")
    frames, _ = media.read_video(tmp_path / "preview.gif")
    assert max(frames.shape[1:3]) >= 160


def test_the_preview_resembles_the_video(models: Path) -> None:
    from wanloom.preview import Previewer

    files = resolve(VARIANTS["t2v-A14B"], ckpt_dir=models / "t2v-A14B")
    parts = Parts(survey(VARIANTS["t2v-A14B"], files), files)
    z = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with parts.use("vae") as vae:
        film = Previewer.fit(vae)(z[0])
        pixels = torch.nn.functional.avg_pool2d(vae.decode(z)[0][0, :, 0], 8)
    seen = torch.frombuffer(bytearray(film.frames[0]), dtype=torch.uint8).view(8, 8, 3).permute(2, 0, 1).float()
    both = torch.corrcoef(torch.stack((seen.flatten(), pixels.flatten())))
    assert both[0, 1] > 0.3  # weights at random make a decoder that is far less linear than a trained one


# ---------------------------------------------------------------- memory


def test_parts_leave_when_they_are_not_resident(models: Path) -> None:
    files = resolve(VARIANTS["t2v-A14B"], ckpt_dir=models / "t2v-A14B")
    parts = Parts(survey(VARIANTS["t2v-A14B"], files), files, resident=False)
    with parts.use("dit", expert="high_noise_model") as dit:
        assert not any(p.is_meta or p.requires_grad for p in dit.parameters())
    assert all(p.is_meta for p in dit.parameters())  # its memory is free, although we still hold it
    parts.resident = True
    with parts.use("vae") as vae:
        pass
    with parts.use("vae") as again:
        assert again is vae and not any(p.is_meta for p in vae.parameters())
    parts.release()
    assert all(p.is_meta for p in vae.parameters())


def test_the_vae_stays_float32_and_the_rest_takes_the_dtype(models: Path) -> None:
    pipe = load(models / "i2v-14B", task="i2v-14B", device="cpu", dtype="bfloat16")
    for part, dtype in (("vae", torch.float32), ("text", torch.bfloat16), ("clip", torch.bfloat16)):
        with pipe.parts.use(part) as module:
            assert {p.dtype for p in module.parameters()} == {dtype}
    with pipe.parts.use("dit", expert="model") as dit:
        assert {p.dtype for p in dit.parameters()} == {torch.bfloat16}


def test_bfloat16_is_close_to_float32(pipe: Pipeline, models: Path) -> None:
    narrow = load(models / "t2v-A14B", device="cpu", dtype="bfloat16")("a red cat", **SMALL)
    wide = pipe("a red cat", **SMALL)
    error = (narrow.latents - wide.latents).norm() / wide.latents.norm()
    assert 1e-6 < error < 0.1


def test_guidance_one_makes_one_call_a_step(pipe: Pipeline, calls: list[tuple[int, float]]) -> None:
    pipe("a red cat", guidance=1.0, **SMALL)
    assert len(calls) == SMALL["steps"]


def test_each_expert_takes_its_steps(pipe: Pipeline, calls: list[tuple[int, float]]) -> None:
    pipe("a red cat", **SMALL)
    high = {module for module, t in calls if t >= 875}
    low = {module for module, t in calls if t < 875}
    assert len(high) == len(low) == 1 and high != low


# ---------------------------------------------------------------- what stops it


def poison(monkeypatch: pytest.MonkeyPatch, at: int, value: float) -> None:
    """The transformer's answer number `at` (from 0) holds one bad value."""
    right, count = DiT.forward, iter(range(1000))

    def forward(self: DiT, *given: Any, **named: Any) -> torch.Tensor:
        v = right(self, *given, **named)
        if next(count) == at:
            v[0, 0, -1, 0, 0] = value
        return v

    monkeypatch.setattr(DiT, "forward", forward)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sampler", ["unipc", "dpm++", "euler"])
def test_bad_latents_stop_at_their_step_and_name_their_source(
    sampler: str, value: float, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pipe.prepare(request(sampler=sampler)).plan
    for step in range(SMALL["steps"]):
        for branch, words in ((0, "velocity with the prompt"), (1, "velocity without the prompt")):
            with monkeypatch.context() as patch:
                poison(patch, 2 * step + branch, value)
                with pytest.raises(NumericalError) as caught:
                    pipe.run(request(sampler=sampler), out=tmp_path / "a.mp4")
            message = caught.value.message
            assert caught.value.code == "E6001" and f"step {step + 1} of 4" in message and words in message
            assert plan.span_at(step).expert in message and f"{plan.sigmas[step]:.4f}" in message
            assert not list(tmp_path.iterdir())


def test_bad_embeddings_stop_before_a_transformer_is_loaded(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, float]]
) -> None:
    from wanloom import prompts

    right = prompts.encode_text
    monkeypatch.setattr(prompts, "encode_text", lambda *given: right(*given) / 0)
    with pytest.raises(NumericalError) as caught:
        pipe.run(request(), out=tmp_path / "a.mp4")
    assert caught.value.code == "E6002" and "context" in caught.value.message
    assert not calls and not list(tmp_path.iterdir())


def test_bad_frames_stop_and_the_latents_are_kept(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, float]]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(CausalVae, "decode_chunks", lambda self, z: iter([torch.full((1, 3, 1, 32, 32), torch.nan)]))
        with pytest.raises(NumericalError) as caught:
            pipe.run(request(), out=tmp_path / "a.mp4")
    assert caught.value.code == "E6003" and "latent frame 1 of 3" in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["a.job"]
    calls.clear()
    result = pipe.run(request(), resume=tmp_path / "a.job")
    assert not calls and result.began_at == 4 and [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_failed_decode_never_repeats_denoising(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, float]]
) -> None:
    def out_of_memory(self: CausalVae, z: torch.Tensor) -> Iterator[torch.Tensor]:
        yield torch.zeros(1, 3, 1, 32, 32)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(CausalVae, "decode_chunks", out_of_memory)
        with pytest.raises(InputError, match="E5007"):
            pipe.run(request(), out=tmp_path / "a.mp4")
    done = len(calls)
    pipe.run(request(), resume=tmp_path / "a.job")
    assert len(calls) == done == 2 * SMALL["steps"]


def test_a_full_disk_keeps_what_was_done(pipe: Pipeline, tmp_path: Path, calls: list[tuple[int, float]]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event: pipeline.Event) -> None:
        if event.stage == "decode":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

    try:
        with pytest.raises(InputError) as caught:
            pipe.run(request(), out=tmp_path / "a.mp4", on_event=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.code == "E5003" and [path.name for path in tmp_path.iterdir()] == ["a.job"]
    calls.clear()
    pipe.run(request(), resume=tmp_path / "a.job")
    assert not calls and [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_full_disk_before_the_first_step_leaves_nothing(pipe: Pipeline, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError) as caught:
            pipe.run(request(), out=tmp_path / "a.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.code == "E5003" and not list(tmp_path.iterdir())


def test_what_would_fail_late_is_said_first(pipe: Pipeline, tmp_path: Path, calls: list[tuple[int, float]]) -> None:
    (tmp_path / "there.mp4").touch()
    for out, code in (("none/a.mp4", "E5001"), ("there.mp4", "E5002"), ("a.exe", "E2017")):
        with pytest.raises(InputError) as caught:
            pipe.run(request(), out=tmp_path / out)
        assert caught.value.code == code
    assert not calls and [path.name for path in tmp_path.iterdir()] == ["there.mp4"]


def test_resuming_another_request_changes_nothing(pipe: Pipeline, tmp_path: Path) -> None:
    stream = pipe.stream(request(save_every=1), out=tmp_path / "a.mp4")
    next(event for event in stream if event.stage == "denoise" and event.step == 3)
    stream.close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "a.job").iterdir()}
    for change, named in (({"steps": 5}, "steps"), ({"seed": 1}, "seed"), ({"guidance": 2.0}, "guidance")):
        with pytest.raises(InputError) as caught:
            pipe.run(request(**change), resume=tmp_path / "a.job")
        assert caught.value.code == "E2020" and named in caught.value.message
    other = load(tiny.checkpoint(tmp_path / "other", "t2v-A14B", seed=1), device="cpu")
    with pytest.raises(InputError) as caught:
        other.run(request(), resume=tmp_path / "a.job")
    assert caught.value.code == "E2020" and "weights of dit" in caught.value.message
    assert {path.name: path.read_bytes() for path in (tmp_path / "a.job").iterdir()} == before


def test_a_cut_prompt_is_said(pipe: Pipeline) -> None:
    with pytest.warns(WanloomWarning, match="W2013: prompt: 601 tokens, this model reads 512; the last 89 are cut"):
        pipe.prepare(replace(request(), prompt="cat " * 600))


# ---------------------------------------------------------------- loading


def test_a_directory_says_what_it_is_where_its_form_does(models: Path) -> None:
    assert load(models / "t2v-A14B", device="cpu").variant.name == "t2v-A14B"
    assert load(models / "flf2v-14B", device="cpu").variant.name == "flf2v-14B"
    with pytest.raises(InputError) as caught:
        load(models / "t2v-14B", device="cpu")  # small t2v-14B and t2v-1.3B look alike
    assert caught.value.code == "E2002" and "t2v-14B or t2v-1.3B" in caught.value.message.replace(
        "t2v-1.3B or t2v-14B", "t2v-14B or t2v-1.3B"
    )
    assert load(models / "t2v-14B", task="t2v-14B", device="cpu").variant.name == "t2v-14B"


def test_parts_can_be_named_one_by_one(models: Path, pipe: Pipeline) -> None:
    root = models / "t2v-A14B"
    single = load(
        task="t2v-A14B", dit_high=root / "high_noise_model", dit_low=root / "low_noise_model",
        vae=root / "Wan2.1_VAE.pth", text_encoder=root / "models_t5_umt5-xxl-enc-bf16.pth",
        tokenizer=root / "google" / "umt5-xxl", device="cpu",
    )  # fmt: skip
    assert torch.equal(single("a red cat", **SMALL).tensor, pipe("a red cat", **SMALL).tensor)


def test_a_gpu_that_is_not_there_is_said(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as caught:
        load(models / "t2v-A14B", device="cuda:3")
    assert caught.value.code == "E8002"
    with pytest.raises(InputError) as caught:
        load(models / "t2v-A14B")("a red cat", noise_device="cuda", **SMALL)
    assert caught.value.code == "E2023"


def test_the_public_face_is_lazy_and_complete() -> None:
    program = (
        "import sys, wanloom; assert 'torch' not in sys.modules; "
        "print([getattr(wanloom, name) is not None for name in dir(wanloom)], wanloom.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert "False" not in done.stdout
    assert set(dir(wanloom)) >= {"load", "Pipeline", "Request", "VARIANTS", "InputError"}
    with pytest.raises(AttributeError):
        wanloom.nothing  # noqa: B018 - the access is the test
