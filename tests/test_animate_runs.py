"""Animation from folder to file: frames, rate and sound of the driving video, what is refused, the relighting LoRA."""

from __future__ import annotations

import shutil
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from command_line import run_here
from wanloom import media, parts, pipeline
from wanloom.conditioning import Conditioning, animate
from wanloom.errors import InputError, WanloomWarning
from wanloom.media import read_video
from wanloom.media.sound import RATE, read_sound
from wanloom.pipeline import Pipeline, load
from wanloom.placement import Wishes
from wanloom.plan import Segment
from wanloom.request import Request
from wanloom.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore:W2004")

SIDE, FACE, COUNT = 32, 16, 12
NTSC = Fraction(30000, 1001)
NAME = "animate-14B"


def frames(seed: int, side: int = SIDE, count: int = COUNT) -> np.ndarray:
    t, y, x = np.mgrid[:count, :side, :side].astype(float)
    waves = [np.sin(x / 5 + t + seed), np.cos(y / 4 - t), np.sin((x + y) / 6 + seed)]
    return (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


def put_sound(video: Path, seconds: float) -> None:
    """A tone of one channel at 16 kHz."""
    tone = (8000 * np.sin(np.arange(round(seconds * RATE)) / 6)).astype("<i2")
    with wave.open(str(video.with_suffix(".wav")), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(RATE)
        file.writeframes(tone.tobytes())
    media.add_sound(video, video.with_suffix(".wav"), video, whole=True)


def folder(root: Path, *, count: int = COUNT, sound: float | None = None, masked: bool = True) -> Path:
    """What `wanloom preprocess animate` leaves."""
    root.mkdir(exist_ok=True)
    tiny.picture(root / "src_ref.png")
    box = np.zeros((count, SIDE, SIDE, 3), np.uint8)
    box[:, 8:24, 4:20] = 255 * masked
    films = {"pose": frames(1, count=count), "face": frames(2, FACE, count), "bg": frames(3, count=count), "mask": box}
    for name, film in films.items():
        media.save_video(root / f"src_{name}.mp4", film, fps=NTSC, quality=10, overwrite=True)
    if sound is not None:
        put_sound(root / "src_pose.mp4", sound)
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose driving video sounds; not to be changed."""
    return folder(tmp_path_factory.mktemp("driving") / "process_results", sound=1.0)


@pytest.fixture
def pipe(models: Path) -> Pipeline:
    return load(models / NAME, task=NAME, device="cpu")


def request(source: Path, **fields: Any) -> Request:
    return Request(**{"prompt": "a cat", "src_root_path": source, "frames": 9, "steps": 2, "seed": 3, **fields})


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(parts, "load_into_narrowed", refuse)


def refused(code: str, pipe: Pipeline, wanted: Request) -> str:
    with pytest.raises(InputError) as caught:
        pipe.run(wanted)
    assert caught.value.code == code, caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize(
    "options", [["--refert_num", 1], ["--replace_flag", "--refert_num", 5]], ids=["stand", "scene"]
)
def test_the_official_command_keeps_frames_rate_and_sound(
    options: list[Any], source: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run_here(
        capsys, "generate", "--task", NAME, "--ckpt_dir", models / NAME, "--src_root_path", source, *options,
        "--frame_num", 9, "--sample_steps", 2, "--base_seed", 1, "--device", "cpu", "--save_file", tmp_path / "a.mp4",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    made, driving = read_video(tmp_path / "a.mp4"), read_video(source / "src_pose.mp4")
    assert made.frames.shape == driving.frames.shape and made.rate == driving.rate == NTSC
    heard, given = read_sound(tmp_path / "a.mp4"), read_sound(source / "src_pose.mp4")
    assert abs(len(heard.wave) - len(given.wave)) <= 1024
    assert np.corrcoef(heard.wave[: 6 * RATE // 20], given.wave[: 6 * RATE // 20])[0, 1] > 0.99
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]


def test_a_request_without_words_gets_the_published_ones_and_others_count(source: Path, pipe: Pipeline) -> None:
    plan = pipe.prepare(request(source, prompt=" ")).plan
    assert plan.prompt == VARIANTS[NAME].defaults.prompt == "视频中的人在做动作"
    one, other = pipe.run(request(source)).videos[0], pipe.run(request(source, prompt="the dog jumps")).videos[0]
    assert not torch.allclose(one.latents, other.latents, atol=1e-3)


def test_a_finished_video_is_made_again(
    source: Path, pipe: Pipeline, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(source, tmp_path / "in")
    pipe.run(request(root, replace_flag=True, refert_num=5), out=root / "a.mp4")
    ran = run_here(
        capsys, "generate", "--like", root / "a.mp4", "--ckpt_dir", models / NAME, "--device", "cpu",
        "--out", tmp_path / "b.mp4",
    )  # fmt: skip
    assert ran.code == 0 and "W2033" not in ran.err, ran.err
    one, other = (read_video(path).frames.astype(int) for path in (root / "a.mp4", tmp_path / "b.mp4"))
    assert np.abs(one - other).max() == 0


def test_replacement_makes_another_video_and_fps_another_rate(source: Path, pipe: Pipeline, tmp_path: Path) -> None:
    stands = pipe.run(request(source)).videos[0]
    placed = pipe.run(request(source, replace_flag=True)).videos[0]
    assert not torch.allclose(stands.latents, placed.latents, atol=1e-3)
    pipe.run(request(source, fps=15), out=tmp_path / "slow.mp4")
    made = read_video(tmp_path / "slow.mp4")
    assert made.rate == 15 and len(made.frames) == COUNT  # the sound is over before; the picture goes on
    assert media.has_sound(tmp_path / "slow.mp4")


def test_a_short_sound_does_not_cut_the_picture(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.run(request(folder(tmp_path / "in", sound=0.2)), out=tmp_path / "a.mkv")
    assert len(read_video(tmp_path / "a.mkv").frames) == COUNT
    assert abs(read_sound(tmp_path / "a.mkv").seconds - 0.2) <= 2 * 1024 / RATE


@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_pictures_have_no_sound_and_all_frames(suffix: str, source: Path, pipe: Pipeline, tmp_path: Path) -> None:
    pipe.run(request(source), out=tmp_path / f"a{suffix}")
    assert len(read_video(tmp_path / f"a{suffix}").frames) == COUNT
    assert not media.has_sound(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("name", ["one.mp4", "one.png"])
def test_a_driving_video_of_one_frame_makes_one_in_a_clip_of_77(name: str, pipe: Pipeline, tmp_path: Path) -> None:
    media.save_video(tmp_path / name, frames(1, count=1), fps=NTSC)
    media.save_video(tmp_path / "face.png", frames(1, FACE, 1), fps=1)
    given = {"image": tiny.picture(tmp_path / "ref.png"), "pose_video": tmp_path / name}
    wanted = Request(prompt="a cat", steps=1, seed=1, face_video=tmp_path / "face.png", **given)
    video = pipe.run(wanted).videos[0]
    assert video.tensor.shape == (3, 1, SIDE, SIDE) and video.latents.shape[1] == 20
    assert video.plan.rate == (NTSC if name == "one.mp4" else 30)  # a picture has no rate: the model's


@pytest.mark.parametrize("shared", [1, 5])
def test_a_clip_remembers_the_end_of_the_one_before(
    shared: int, source: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Conditioning]] = []
    right = animate.Clips.clip

    def clip(self: animate.Clips, shared: Conditioning, given: Any, segment: Segment, past: Tensor) -> Conditioning:
        made = right(self, shared, given, segment, past)
        seen.append((past.clone(), made))
        return made

    monkeypatch.setattr(animate.Clips, "clip", clip)
    video = pipe.run(request(source, refert_num=shared, guidance=2.0)).videos[0]
    (none, first), (past, second) = seen
    assert none.shape[2] == 0 and torch.equal(past[0], video.tensor[:, 9 - shared : 9])
    assert [len(c.cond["y"][0, 0, :, 0, 0].nonzero()) for c in (first, second)] == [1, 2 if shared == 1 else 3]
    assert all(c.uncond is not None and bool((c.uncond["face"] == -1).all()) for c in (first, second))
    draws = torch.Generator().manual_seed(3)
    for number in range(2):
        drawn = torch.randn(video.plan.latent, generator=draws)
        assert torch.equal(pipeline.noise(video.plan, number)[0], drawn)


def test_guidance_counts(source: Path, pipe: Pipeline) -> None:
    one, two = (pipe.run(request(source, guidance=value)).videos[0] for value in (1.0, 2.0))
    assert not torch.allclose(one.latents, two.latents, atol=1e-3)


# ---------------------------------------------------------------- what is refused


def test_an_empty_mask_is_said_before_a_weight_is_read(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights(monkeypatch)
    root = folder(tmp_path / "in", masked=False)
    assert "mask-video: empty in all frames" in refused("E3020", pipe, request(root, replace_flag=True))
    with pytest.raises(AssertionError, match="weights are read"):
        pipe.run(request(root))  # without replacement nobody asks for a mask


def test_a_folder_without_its_files_and_clips_too_short_are_refused(
    source: Path, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights(monkeypatch)
    root = shutil.copytree(source, tmp_path / "in")
    (root / "src_bg.mp4").unlink()
    assert "src_bg.mp4" in refused("E3001", pipe, request(root, replace_flag=True))
    assert "Use 9 or 77" in refused("E2005", pipe, request(source, refert_num=5, frames=5))
    assert "Use 5 or 77" in refused("E2005", pipe, request(source, frames=1))


# ---------------------------------------------------------------- the relighting LoRA


def write_lora(pipe: Pipeline, path: Path, seed: int = 0) -> Path:
    """A change of every linear layer of the blocks but those of the face, in PEFT's names."""
    draw = torch.Generator().manual_seed(seed)
    values = {}
    with pipe.parts.use("dit", "model") as dit:
        for name, layer in dit.named_modules():
            if isinstance(layer, torch.nn.Linear) and name.startswith("blocks.") and ".after." not in name:
                rows, columns = layer.weight.shape
                values[f"{name}.lora_A.default.weight"] = torch.randn(2, columns, generator=draw) / columns**0.5
                values[f"{name}.lora_B.default.weight"] = torch.randn(rows, 2, generator=draw)
    torch.save({"state_dict": values}, path)
    return path


def by_hand(pipe: Pipeline, lora: Path, wanted: Request) -> Tensor:
    """Latents of the video when the weights are changed here, by the definition."""
    values = torch.load(lora, weights_only=True)["state_dict"]
    with pipe.parts.use("dit", "model") as dit:
        for name in {key.partition(".lora_")[0] for key in values}:
            down, up = (values[f"{name}.lora_{half}.default.weight"] for half in "AB")
            dit.get_submodule(name).weight.add_(up @ down)
    return pipe.run(wanted).videos[0].latents


@pytest.mark.parametrize("resident", [True, False])
def test_the_relighting_lora_is_merged_once_and_taken_off_again(
    resident: bool, source: Path, pipe: Pipeline, models: Path, tmp_path: Path
) -> None:
    file = write_lora(pipe, tmp_path / "light.ckpt")
    plain = request(source, replace_flag=True, steps=1)
    lit = request(source, replace_flag=True, steps=1, use_relighting_lora=True, relighting_lora=file)
    expected = by_hand(load(models / NAME, task=NAME, device="cpu"), file, plain)
    pipe.parts.release()
    pipe.wishes = Wishes(offload=not resident)
    order = (plain, lit, lit, plain) if resident else (lit,)  # else every use is a load of its own
    made = [pipe.run(wanted).videos[0].latents for wanted in order]
    for wanted, latents in zip(order, made, strict=True):
        assert torch.allclose(latents, expected, atol=1e-4) == (wanted is lit)
    assert torch.equal(made[0], made[-1])


def test_the_lora_of_the_checkpoint_is_found_and_part_of_a_jobs_weights(
    source: Path, pipe: Pipeline, models: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(models / NAME, tmp_path / NAME)
    own = load(root, task=NAME, device="cpu")
    wanted = request(source, replace_flag=True, use_relighting_lora=True, save_every=1)
    assert "relighting_lora.ckpt" in refused("E4001", own, wanted)
    write_lora(pipe, root / "relighting_lora.ckpt")
    stream = own.stream(wanted, out=tmp_path / "a.mp4")
    next(event for event in stream if event.stage == "denoise" and event.step == 1)
    stream.close()
    assert own.parts.weight_files()["lora"] == [root / "relighting_lora.ckpt"] and "lora" in own.weights()
    write_lora(pipe, root / "relighting_lora.ckpt", seed=1)
    with pytest.raises(InputError, match="weights of lora") as caught:
        load(root, task=NAME, device="cpu").run(wanted, resume=tmp_path / "a.job")
    assert caught.value.code == "E2020"
    write_lora(pipe, root / "relighting_lora.ckpt")
    assert load(root, task=NAME, device="cpu").run(wanted, resume=tmp_path / "a.job").began_at == 1


def test_a_lora_that_is_not_there_is_said_before_a_weight_is_read(
    source: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights(monkeypatch)
    torch.save({"state_dict": {"some.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    for more, code in (
        ((), "E4001"),
        (("--relighting_lora", tmp_path / "none.ckpt"), "E4001"),
        (("--relighting_lora", tmp_path / "other.ckpt"), "E4024"),
    ):
        ran = run_here(
            capsys, "generate", "--task", NAME, "--ckpt_dir", models / NAME, "--src_root_path", source,
            "--replace_flag", "--use_relighting_lora", *more, "--device", "cpu", "--save_file", tmp_path / "a.mp4",
        )  # fmt: skip
        assert ran.code == 4 and f"error[{code}]" in ran.err, ran.err
    assert not (tmp_path / "a.mp4").exists()


def test_relighting_without_a_scene_is_warned_of_and_a_file_without_use_refused(
    source: Path, pipe: Pipeline, tmp_path: Path
) -> None:
    file = write_lora(pipe, tmp_path / "light.ckpt")
    with pytest.warns(WanloomWarning, match="W2037"):
        pipe.prepare(request(source, use_relighting_lora=True, relighting_lora=file))
    assert "--use-relighting-lora" in refused("E2016", pipe, request(source, relighting_lora=file))
