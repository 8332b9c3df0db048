"""`wanloom generate` from the words typed to the file: defaults, progress, replaying, continuing."""

from __future__ import annotations

import json
import re
import signal

import pytest
from PIL import Image
from safetensors.torch import load_file

import tiny
from command_line import run_process
from wanloom import media, records
from wanloom.plan import Plan
from wanloom.rates import device_key, read_rates

T2V, I2V, SMALL = "t2v-A14B", "i2v-A14B", "t2v-1.3B"
SHORT = ("--size", "64x64", "--frames", "5", "--steps", "2", "--seed", "1", "--prompt", "a cat runs")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in (T2V, I2V, SMALL):
        tiny.checkpoint(folder, name)
    return folder


def test_a_video_is_made_and_the_last_line_says_what_it_took(run, models, tmp_path, monkeypatch):
    monkeypatch.setenv("WANLOOM_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    ran = run("generate", "--task", SMALL, "--ckpt-dir", models / SMALL, *SHORT, "--out", "a.mp4")
    assert ran.code == 0, ran.err
    first, *_, last = ran.out.splitlines()
    assert first.startswith(
        "plan: t2v-1.3B 64x64, 5 frames at 16 fps, unipc 2 steps, shift 5, guidance 5, seed 1; about"
    )
    assert re.search(r" free; all parts stay; about [\d.]+ s \(uncalibrated\)$", first)
    assert re.fullmatch(r"saved a\.mp4 in [\d.]+ s, peak [\d.]+ [GM]B, seed 1", last)
    (kept,) = records.read(device_key("cpu"), read_rates("cpu"))
    assert kept.kind == "t2v-1.3B float32" and all(count > 10**8 for count in kept.memory)
    assert set(kept.stages) == {"encode", "denoise", "decode"}
    assert all(raw > 0 and took > 0 for raw, took in kept.stages.values())
    again = run("generate", "--task", SMALL, "--ckpt-dir", models / SMALL, *SHORT, "--out", "b.mp4")
    assert again.out.splitlines()[0].endswith(" s (as 1 earlier run took)")
    (tmp_path / "b.mp4").unlink()
    frames, fps = media.read_video(tmp_path / "a.mp4")
    assert (frames.shape, fps) == ((5, 64, 64, 3), 16)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4"]


def test_the_official_spellings_are_the_same_command(run, models):
    ours = run("generate", "--ckpt-dir", models / T2V, *SHORT, "--guidance", "2,3", "--dry-run")
    theirs = run(
        "generate", "--task", "t2v-A14B", "--ckpt_dir", models / T2V, "--size", "64*64", "--frame_num", "5",
        "--sample_steps", "2", "--base_seed", "1", "--prompt", "a cat runs", "--sample_guide_scale", "2,3",
        "--sample_solver", "unipc", "--sample_shift", "12.0", "--offload_model", "False", "--ulysses_size", "1",
        "--dry-run",
    )  # fmt: skip
    assert theirs.code == 0, theirs.err
    assert json.loads(ours.out) == json.loads(theirs.out)


def test_the_official_offloading_is_an_option_and_two_number_formats_conflict(run, models):
    ran = run("generate", "--ckpt-dir", models / T2V, *SHORT, "--offload_model", "maybe", "--dry-run")
    assert ran.code == 2 and "expected true or false" in ran.err
    ran = run("generate", "--ckpt-dir", models / T2V, *SHORT, "--offload_model", "True", "--out", "a.png")
    assert ran.code == 0, ran.err
    assert "; parts come and go; about " in ran.out
    ran = run(
        "generate", "--ckpt-dir", models / T2V, *SHORT, "--convert_model_dtype", "--dtype", "float32", "--dry-run"
    )
    assert ran.code == 2 and "error[E2023]: convert-model-dtype: conflicts with --dtype float32" in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ["--use_prompt_extend"],
        ["--use-prompt-extend", "true"],
    ],
)
def test_what_this_version_cannot_do_is_said_so(run, models, words):
    ran = run("generate", "--ckpt-dir", models / T2V, *SHORT, *words)
    assert ran.code == 2
    assert "not available in this version" in ran.err


def test_apple_gpus_are_refused_with_a_sentence(run, models):
    ran = run("generate", "--ckpt-dir", models / T2V, *SHORT, "--device", "mps")
    assert ran.code == 2
    assert "Apple GPUs (mps) are not available in this version. Use cpu." in ran.err


def test_a_dry_run_prints_the_plan_and_writes_nothing(run, models, tmp_path):
    ran = run("generate", "--ckpt-dir", models / T2V, *SHORT, "--dry-run")
    assert ran.code == 0
    assert Plan.from_json(ran.out).prompt == "a cat runs"
    assert list(tmp_path.iterdir()) == []


def test_default_names_carry_task_size_seed_and_time_and_never_collide(run, models, tmp_path, monkeypatch):
    monkeypatch.setattr("wanloom.cli.prepare.time.strftime", lambda form: "20260101_120000")
    for _ in range(2):
        assert run("generate", "--task", SMALL, "--ckpt-dir", models / SMALL, *SHORT).code == 0
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["t2v-1.3B_64x64_1_20260101_120000.mp4", "t2v-1.3B_64x64_1_20260101_120000_2.mp4"]


def test_several_videos_have_consecutive_seeds(run, models, tmp_path):
    words = ("--task", SMALL, "--ckpt-dir", models / SMALL, *SHORT, "--out", "a.png")
    ran = run("generate", *words, "--num", "2")
    assert ran.code == 0, ran.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a_1.png", "a_2.png"]
    assert "seed 1 to 2; " in ran.out.splitlines()[0]
    second = tuple("2" if word == "1" else word for word in words[:-1])
    alone = run("generate", *second, "alone.png")
    assert alone.code == 0, alone.err
    assert (media.read_video(tmp_path / "alone.png")[0] == media.read_video(tmp_path / "a_2.png")[0]).all()


def test_tensors_can_be_saved_beside_the_video(run, models, tmp_path):
    words = ("--task", SMALL, "--ckpt-dir", models / SMALL, *SHORT, "--out", "a.mp4", "--save-tensors", "t.safetensors")
    assert run("generate", *words).code == 0
    tensors = load_file(tmp_path / "t.safetensors")
    assert tensors["latents"].shape == (16, 2, 8, 8)
    assert tensors["video"].shape == (3, 5, 64, 64)


# --- again, and further


@pytest.fixture
def finished(run, models, tmp_path):
    """A finished i2v video, its picture beside it."""
    tiny.picture(tmp_path / "cat.png")
    words = ("--task", I2V, "--ckpt-dir", models / I2V, *SHORT, "--image", "cat.png", "--out", "a.png")
    ran = run("generate", *words)
    assert ran.code == 0, ran.err
    return tmp_path / "a.png"


def test_like_makes_the_same_video_again(run, models, finished, tmp_path):
    ran = run("generate", "--like", finished, "--ckpt-dir", models / I2V, "--out", "b.png")
    assert ran.code == 0, ran.err
    assert (media.read_video(finished)[0] == media.read_video(tmp_path / "b.png")[0]).all()
    assert media.read_comment(finished) == media.read_comment(tmp_path / "b.png")


def test_like_with_another_option_changes_only_that(run, models, finished):
    before = json.loads(run("generate", "--like", finished, "--ckpt-dir", models / I2V, "--dry-run").out)
    after = json.loads(run("generate", "--like", finished, "--ckpt-dir", models / I2V, "--steps", "3", "--dry-run").out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"steps", "sigmas", "timesteps", "spans"}


def test_like_names_a_picture_that_is_missing_or_another_one(run, models, finished, tmp_path):
    words = ("generate", "--like", finished, "--ckpt-dir", models / I2V, "--dry-run")
    (tmp_path / "cat.png").rename(tmp_path / "moved.png")
    ran = run(*words)
    assert ran.code == 3
    assert "image: cat.png is needed again and is not here. Give it with --image FILE." in ran.err
    assert run(*words, "--image", "moved.png").code == 0
    tiny.picture(tmp_path / "cat.png", seed=5)
    ran = run(*words)
    assert ran.code == 3
    assert "cat.png is not the cat.png the video was made from" in ran.err


def test_like_of_a_video_that_is_not_ours(run, models, tmp_path):
    import numpy as np

    media.save_video(tmp_path / "other.mp4", np.zeros((2, 64, 64, 3), np.uint8), fps=8)
    ran = run("generate", "--like", "other.mp4", "--ckpt-dir", models / T2V)
    assert ran.code == 3
    assert "other.mp4 carries no plan" in ran.err


def test_a_killed_run_continues_where_it_was(models, tmp_path):
    four = tuple("4" if word == "2" else word for word in SHORT)
    words = ("generate", "--task", SMALL, "--ckpt-dir", models / SMALL, *four, "--save-every", "1")
    assert run_process(tmp_path, *words, "--out", "whole.png").code == 0
    killed = run_process(tmp_path, *words, "--out", "a.png", WANLOOM_FAILPOINT="state:2")
    assert killed.code == -signal.SIGKILL
    ran = run_process(tmp_path, "generate", "--resume", "a.job")
    assert ran.code == 0, ran.err
    assert "resuming at step 3 of 4" in ran.out
    assert (media.read_video(tmp_path / "a.png")[0] == media.read_video(tmp_path / "whole.png")[0]).all()
    assert not (tmp_path / "a.job").exists()


# --- without a checkpoint


@pytest.fixture
def demos(models, tmp_path_factory, monkeypatch):
    """The small random models in the place of the demo weights."""
    from wanloom import demo

    home = tmp_path_factory.mktemp("demos")
    for name, task in (("demo-t2v", T2V), ("demo-i2v", I2V)):
        (home / name).symlink_to(models / task)
    monkeypatch.setattr(demo, "MODELS", home)
    return home


def test_without_a_checkpoint_the_demo_model_runs_and_says_so(run, demos):
    ran = run("generate", "--prompt", "a red circle moves left on white", "--steps", "1", "--out", "a.png")
    assert ran.code == 0, ran.err
    first, plan, *_ = ran.out.splitlines()
    assert first.startswith("No --ckpt-dir: using demo-t2v, the small model inside this package (a smoke-test model")
    assert plan.startswith("plan: demo-t2v 64x64, 17 frames at 8 fps")


def test_the_demo_model_has_its_own_defaults(run, demos):
    plan = json.loads(run("generate", "--prompt", "a red circle", "--dry-run").out)
    assert (plan["size"], plan["frames"], plan["fps"], plan["demo"]) == ([64, 64], 17, 8, True)


def test_words_the_demo_model_does_not_know_are_named(run, demos):
    ran = run("generate", "--prompt", "a red cat moves left on the moon", "--dry-run")
    assert ran.code == 0
    assert "warning[W2034]: prompt: the demo model does not know 'cat', 'the', 'moon'." in ran.err


def test_a_task_whose_demo_is_absent_asks_for_a_checkpoint(run, demos):
    ran = run("generate", "--task", "ti2v-5B", "--prompt", "x")
    assert ran.code == 2
    assert ran.err.startswith("error[E2001]: --ckpt-dir is required")


def test_the_demo_command_makes_a_video_and_says_where_it_is(run, demos, tmp_path, monkeypatch):
    ran = run("demo")
    assert ran.code == 0, ran.err
    assert "saved outputs/demo-t2v_7.mp4" in ran.out
    assert "not a Wan checkpoint" in ran.out
    frames, fps = media.read_video(tmp_path / "outputs" / "demo-t2v_7.mp4")
    assert (len(frames), fps) == (17, 8)


def test_the_demo_command_can_show_all_models_on_one_page(run, demos, tmp_path):
    ran = run("demo", "--all", "--seed", "1")
    assert ran.code == 0, ran.err
    page = (tmp_path / "outputs" / "demo.html").read_text()
    for name in ("demo-t2v_1.mp4", "demo-i2v_1.mp4"):
        assert f'src="{name}"' in page
        assert (tmp_path / "outputs" / name).is_file()
    assert (tmp_path / "outputs" / "demo-i2v_inputs" / "start.png").is_file()
    with Image.open(tmp_path / "outputs" / "demo.png") as sheet:
        assert sheet.width > sheet.height / 2 > 60


def test_without_demo_weights_the_demo_command_says_so(run, tmp_path, monkeypatch):
    from wanloom import demo

    monkeypatch.setattr(demo, "MODELS", tmp_path)
    ran = run("demo")
    assert ran.code == 4
    assert ran.err.startswith("error[E4001]: demo: this installation has no demo weights")


def test_ctrl_c_while_the_screen_is_drawn_also_keeps_the_work(run, models, tmp_path, monkeypatch):
    from wanloom.cli import run as runner

    real, seen = runner.show, []

    def show(event, stage, view):
        seen.append(event.stage)
        if seen.count("denoise") == 2:
            raise KeyboardInterrupt
        return real(event, stage, view)

    monkeypatch.setattr(runner, "show", show)
    ran = run("generate", "--task", SMALL, "--ckpt-dir", models / SMALL, *SHORT, "--out", "a.mp4")
    assert ran.code == 7
    assert "Continue: wanloom generate --resume" in ran.err
    monkeypatch.setattr(runner, "show", real)
    assert run("generate", "--resume", "a.job").code == 0
    assert (tmp_path / "a.mp4").is_file()


def test_without_a_task_the_checkpoint_says_what_it_is(run, models, tmp_path):
    tiny.picture(tmp_path / "cat.png")
    words = ("generate", "--ckpt-dir", models / I2V, *SHORT, "--image", "cat.png", "--dry-run")
    assert json.loads(run(*words).out)["variant"] == I2V
    ran = run("generate", "--ckpt-dir", models / SMALL, *SHORT, "--dry-run")
    assert ran.code == 2
    assert "can be t2v-1.3B or t2v-14B. Say which with --task." in ran.err
