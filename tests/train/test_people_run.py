"""A few steps of everything that makes the demo models of people, from voices to a checkpoint that generates."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import wanloom
from wanloom.demo import talk
from wanloom.demo.figures import CLOTHES, GROUNDS, HAIRS, SKINS, Outfit
from wanloom.errors import InputError
from wanloom.train import people_card
from wanloom.train.audio import heard
from wanloom.train.card import make_card
from wanloom.train.dance import DanceTask
from wanloom.train.data import vae_batch
from wanloom.train.looks import LooksTask, looks
from wanloom.train.loop import run
from wanloom.train.ranks import Ranks
from wanloom.train.recipe import Recipe, read_recipe
from wanloom.train.speech import SpeechTask
from wanloom.train.vae import VaeTask

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


def short(name: str, folder: Path, **data: Any) -> Path:
    """The recipe `name` with its first phase alone, of two steps, uncompiled, on few clips; its file."""
    table = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    table |= {"processes": 1, "compile": False, "dtype": "float32", "data": {**table.get("data", {}), **data}}
    table["watch"] |= {"prompts": 1, "log": 1, "save": 1, "sheet": 2, "loss": 2, "sampler_steps": 2}
    phase = table["phases"][0]
    phase["stages"] = [phase["stages"][0] | {"steps": 2, "batch": 2}]
    table["phases"] = [phase]
    for part in ("vae", "audio", "image", "start"):
        if part in table:
            table[part] = str((folder if table[part].startswith("runs") else ROOT) / table[part])
    path = folder / f"{name}.json"
    path.write_text(Recipe.model_validate(table).model_dump_json())
    toml = folder / f"{name}.toml"
    toml.write_text(_toml(json.loads(path.read_text())))
    return toml


def _toml(table: dict[str, Any], prefix: str = "") -> str:
    """Enough of TOML for a recipe: inline tables everywhere."""

    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{ " + ", ".join(f"{k} = {value(v)}" for k, v in item.items() if v is not None) + " }"
        if isinstance(item, list):
            return "[" + ", ".join(value(v) for v in item) + "]"
        return json.dumps(item)

    return "\n".join(f"{k} = {value(v)}" for k, v in table.items() if v is not None) + "\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VAEs of heads and of figures and the encoders of sound and of pictures, two steps old; not to be changed."""
    folder = tmp_path_factory.mktemp("people")
    for name in ("demo-vae-talk", "demo-vae-dance", "demo-audio", "demo-looks"):
        run(short(name, folder, clips=4), folder / "runs")
    return folder


@pytest.mark.parametrize("name", ["demo-s2v", "demo-animate"])
def test_a_trained_model_generates_and_gets_a_card(name: str, runs: Path) -> None:
    run(short(name, runs, clips=4, held_out=4), runs / "runs")
    home = runs / "runs" / name
    checkpoint = home / "checkpoint"
    assert wanloom.load(checkpoint, task=name).variant.name == name
    card = make_card(checkpoint, name, [home], count=2)
    assert card["status"] == "smoke-test" and card["figures"]["seconds"]["of"] == 2
    assert any(entry.startswith(("mouth", "distance")) for entry in card["missed"])
    assert (checkpoint / "sheets").is_dir()


def test_a_dance_is_learned_on_from_a_checkpoint_and_faces_are_seen_by_its_encoder(runs: Path, tmp_path: Path) -> None:
    file = short("demo-animate", runs, clips=2, held_out=2)
    run(file, tmp_path)
    recipe = read_recipe(file).model_copy(update={"start": str(tmp_path / "demo-animate" / "checkpoint"), "seed": 7})
    task = DanceTask(recipe, Ranks(), tmp_path / "more")
    before = task.held_out.inputs["motion"].clone()
    task.start("dit")
    assert not torch.equal(task.held_out.inputs["motion"], before)
    kept = load_file(tmp_path / "demo-animate" / "checkpoint" / "diffusion_pytorch_model.safetensors")
    direction = kept["motion_encoder.dec.direction.weight"].float()
    assert torch.equal(task.animate.motion_encoder.direction.float(), direction)
    faces = task.held_out.inputs["face"].float() / 127.5 - 1
    assert torch.equal(task.held_out.inputs["motion"], task._motion(faces))


def test_a_vae_begins_as_another(runs: Path, tmp_path: Path) -> None:
    recipe = read_recipe(short("demo-vae-dance", runs, clips=4))
    task = VaeTask(recipe, Ranks(), tmp_path)
    task.start("vae")
    theirs = load_file(ROOT / "src/wanloom/demo/models/demo-t2v/Wan2.1_VAE.safetensors")
    assert all(torch.equal(p, theirs[name].to(p.dtype)) for name, p in task.vae.named_parameters())
    for other in (recipe, recipe.model_copy(update={"start": str(tmp_path)})):
        task.recipe = other
        with pytest.raises(InputError, match="start:") as caught:
            task.start("vae" if other is not recipe else "low_noise_model")
        assert caught.value.code == "E4032"


def test_small_crops_of_dances_show_who_moves(runs: Path) -> None:
    recipe = read_recipe(short("demo-vae-dance", runs, clips=4))
    stage = recipe.phases[0].stages[0].model_copy(update={"crop": 32, "batch": 8})
    clips = torch.cat([vae_batch(recipe, recipe.phases[0].loss, stage, 128, step, 0) for step in range(3)])
    moving = (clips.amax(2) - clips.amin(2)).mean((1, 2, 3)) > 8 / 127.5
    assert moving.float().mean() > 0.7


def test_samples_of_speech_are_what_the_pipeline_will_have(runs: Path, tmp_path: Path) -> None:
    recipe = read_recipe(short("demo-s2v", runs, clips=4, held_out=4))
    task = SpeechTask(recipe, Ranks(), tmp_path)
    first, later = task.kinds(task.clips)
    assert first == [0, 2] and later == [1, 3]
    batch = task.batch(task.clips, first, task.encode([""] * 2))
    assert "motion" not in batch.inputs and batch.x0.shape == (2, 16, 5, 8, 8)
    batch = task.batch(task.clips, later, task.encode([""] * 2))
    assert batch.inputs["motion"].shape == (2, 16, 19, 8, 8)
    dropped = task.without(dict(batch.inputs), torch.tensor([True, False]))
    assert not dropped["audio"][0].any() and dropped["audio"][1].any()
    who, _, mouth, clip = task._scene(0, 1)
    past = torch.cat((torch.zeros(3, 73, 64, 64), to_video(talk.speak(who, mouth, fps=16)[3:-20])), 1)[:, -73:]
    motion, _ = task.vae.encode(past[None])
    scene = task._sample_tensors(0, 1)
    assert clip > 0
    torch.testing.assert_close(scene["motion"].float(), motion[0].float(), atol=0.05, rtol=0.05)


def to_video(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float().div(127.5).sub(1)


def test_samples_of_dances_are_what_the_pipeline_will_have(runs: Path, tmp_path: Path) -> None:
    recipe = read_recipe(short("demo-animate", runs, clips=6, held_out=2))
    task = DanceTask(recipe, Ranks(), tmp_path)
    batch = task.batch(task.clips, [0, 1, 2, 3], task.encode([""] * 4))
    assert batch.x0.shape == (4, 16, 6, 12, 12) and batch.inputs["y"].shape == (4, 20, 6, 12, 12)
    assert batch.inputs["motion"].shape == (4, 17, 32) and "face" not in batch.inputs
    masks = batch.inputs["y"][:, :4]
    assert set(masks.unique().tolist()) <= {0.0, 1.0} and masks[:, :, 0].all()
    for i in range(4):
        _, room, known = task.scene(0, i)
        assert masks[i, :, 1].all() == (known > 0)
        if known == 5:
            assert masks[i, :, 2].all()
        if room is None and known == 0:
            assert not masks[i, :, 1:].any()


def test_a_picture_of_a_dance_is_a_place_of_its_clip(runs: Path, tmp_path: Path) -> None:
    recipe = read_recipe(short("demo-animate", runs, clips=6, held_out=2))
    task = DanceTask(recipe, Ranks(), tmp_path)
    batch = task.batch(task.clips, [0, 1], task.encode([""] * 2))
    one = task.picture(batch, 2)
    assert torch.equal(one.x0, batch.x0[:, :, [0, 3]]) and torch.equal(one.inputs["y"], batch.inputs["y"][:, :, [0, 3]])
    assert torch.equal(one.inputs["pose"], batch.inputs["pose"][:, :, 2:3])
    assert torch.equal(one.inputs["motion"], batch.inputs["motion"][:, 7:8])
    phase = recipe.phases[0]
    losses = [float(task.loss(phase, phase.stages[0].model_copy(update={"frames": n}), 0)[0].detach()) for n in (1, 17)]
    assert all(0.1 < loss < 10 for loss in losses) and task.at_frame.places == ()


def test_latents_that_show_a_head_count_more(runs: Path, tmp_path: Path) -> None:
    """Where the head is in the frames that a latent stands for; nowhere in the picture's own, which is given."""
    recipe = read_recipe(short("demo-animate", runs, clips=6, held_out=2))
    task = DanceTask(recipe, Ranks(), tmp_path)
    shown = task.heads([3])
    assert shown.shape == (1, 1, 6, 12, 12) and not shown[:, :, 0].any()
    x, y = task.scene(0, 3)[0].pose["head"]
    for latent, frames in enumerate((slice(0, 1), *(slice(k, k + 4) for k in range(1, 17, 4))), 1):
        rows, columns = (shown[0, 0, latent].any(dim).nonzero().flatten() * 64 / 12 for dim in (1, 0))
        for low, high, place in ((rows[0], rows[-1], y[frames]), (columns[0], columns[-1], x[frames])):
            assert low - 3 <= place.min() and place.max() <= high + 64 / 12 + 3 and high - low < 25
    phase = recipe.phases[0].model_copy(update={"flow": recipe.phases[0].flow.model_copy(update={"heads": 8.0})})
    stage = phase.stages[0].model_copy(update={"frames": 17})
    alike, seen = (float(task.loss(p, stage, 0)[0].detach()) for p in (recipe.phases[0], phase))
    assert 0.1 < seen < 10 and abs(seen - alike) > 1e-4
    speech = SpeechTask(read_recipe(short("demo-s2v", runs, clips=4, held_out=4)), Ranks(), tmp_path / "s")
    with pytest.raises(InputError, match="where heads are") as caught:
        speech.loss(phase, stage, 0)
    assert caught.value.code == "E4032"


def test_a_head_is_not_learned_from_pictures(runs: Path, tmp_path: Path) -> None:
    recipe = read_recipe(short("demo-s2v", runs, clips=4, held_out=4))
    task = SpeechTask(recipe, Ranks(), tmp_path)
    with pytest.raises(InputError, match="whole clips") as caught:
        task.loss(recipe.phases[0], recipe.phases[0].stages[0].model_copy(update={"frames": 1}), 0)
    assert caught.value.code == "E4032"


def test_the_probe_is_told_of_loudness() -> None:
    wave = np.zeros(16_000, np.float32)
    wave[8000:] = np.sin(np.arange(8000) * 0.3)
    said = heard(wave, 49)
    assert said.shape == (49, 5) and said[:20, 0].max() == 0 and said[30:, 0].min() > 0.9
    assert (said[30:, 1:].mean(0) > said[:20, 1:].mean(0)).any()


def test_a_head_that_speaks_as_it_should_is_judged_so() -> None:
    who = talk.sample_talk(np.random.default_rng(0), split="held_out")
    from wanloom.demo.voices import opening, sample_voice

    sound = sample_voice(np.random.default_rng(1), 4.0)
    frames = talk.speak(who, opening(sound, 64), fps=16)[3:]
    verdict = people_card.spoken(frames, sound, who)
    assert verdict.correlation > 0.95 and abs(verdict.lag) <= 1 and verdict.colours
    late = people_card.spoken(np.concatenate((frames[:1].repeat(4, 0), frames[:-4])), sound, who)
    assert late.lag == 4 and late.correlation < 0.6


def test_looks_are_colours_by_their_place_in_the_palette() -> None:
    outfit = Outfit(
        ground=GROUNDS[2], floor=None, skin=SKINS[1], hair=HAIRS[4], top=CLOTHES[3], bottom=CLOTHES[0],
        shoes=CLOTHES[9], skirt=True, long_hair=False,
    )  # fmt: skip
    assert looks(outfit, GROUNDS[6]) == [1, 4, 3, 0, 9, 1, 0, 6]


def test_the_picture_encoder_learns_the_wall_first(tmp_path: Path) -> None:
    recipe = read_recipe(short("demo-looks", tmp_path))
    task = LooksTask(recipe, Ranks(), tmp_path)
    drawn, answers = task._draw(0, 8)
    assert drawn.shape == (8, 3, 64, 64) and answers.shape == (8, 8)
    assert torch.equal(drawn, task._draw(0, 8)[0])
    pictures = drawn.float()
    optim = torch.optim.Adam([*task.tower.parameters(), *task.probe.parameters()], lr=3e-3)
    before = float(task._asked(pictures, answers)[0].detach())
    for _ in range(30):
        loss, _ = task._asked(pictures, answers)
        optim.zero_grad()
        loss.backward()
        optim.step()
    after, right = task._asked(pictures, answers)
    assert float(after.detach()) < 0.5 * before
    assert right[:, -1].float().mean() > 0.8
    with pytest.raises(InputError, match="cannot begin") as caught:
        task.start("model")
    assert caught.value.code == "E4032"
