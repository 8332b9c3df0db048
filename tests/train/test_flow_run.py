"""From a recipe to a model that the pipeline loads, for each task: a few steps of everything, on random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wanloom
from wanloom.models.vae import CausalVae, init_for_training
from wanloom.train import run
from wanloom.train.vae import write_vae
from wanloom.variants import VARIANTS

RECIPE = """
name = "{variant}"
variant = "{variant}"
kind = "flow"
seed = 5
vae = "{vae}"
{start}
[data]
clips = 4
held_out = 2
[watch]
log = 1
loss = 100
sheet = 100
save = 100
prompts = 1
sampler_steps = 1
"""
SHARED = """
[[phases]]
name = "shared"
optim = {{ muon_lr = 0.02, warmup = 1 }}
flow = {{ first_frame = {first_frame} }}
stages = [{{ steps = 1, batch = 2, frames = 1 }}, {{ steps = 2, batch = 2 }}]
"""
EXPERT = """
[[phases]]
name = "{name}"
init = "{init}"
trains = ["dit"]
flow = {{ low = {low}, high = {high} }}
stages = [{{ steps = 1, batch = 2 }}]
"""


def random_vae(folder: Path, variant: str) -> Path:
    vae = CausalVae(VARIANTS[variant].vae)
    init_for_training(vae, torch.Generator().manual_seed(0))
    write_vae(vae, folder)
    return folder


def experts(init: str, boundary: float) -> str:
    high = EXPERT.format(name="high_noise_model", init=init.format("high_noise_model"), low=boundary, high=1.0)
    return high + EXPERT.format(name="low_noise_model", init=init.format("low_noise_model"), low=0.0, high=boundary)


def trained(folder: Path, variant: str, text: str, start: str = "") -> Path:
    path = folder / f"{variant}.toml"
    vae = random_vae(folder / f"vae-{variant}", variant)
    path.write_text(RECIPE.format(variant=variant, vae=vae, start=start) + text)
    return run(path, folder / "runs") / "checkpoint"


def test_t2v_then_i2v_from_its_experts(tmp_path: Path) -> None:
    t2v = trained(tmp_path, "demo-t2v", SHARED.format(first_frame=0.0) + experts("shared", 0.875))
    pipe = wanloom.load(t2v, task="demo-t2v")
    video = pipe(prompt="a red circle moves left on white", seed=1, steps=2)
    assert video.frames.shape == (17, 64, 64, 3)
    sheets = {p.name for p in (t2v.parent / "sheets").iterdir()}
    assert sheets == {"shared-000003.png", "high_noise_model-000001.png", "low_noise_model-000001.png"}

    i2v = trained(tmp_path, "demo-i2v", experts("start:{}", 0.9), start=f'start = "{t2v}"')
    other = wanloom.load(i2v, task="demo-i2v")
    assert other.variant.dit.in_channels == 36
    with other.parts.use("dit", expert="high_noise_model") as wide, pipe.parts.use("dit", "high_noise_model") as narrow:
        begun = wide.patch_embedding.weight[:, :16] - narrow.patch_embedding.weight
        assert begun.abs().max() < 0.02  # one step away from the weights it began with
        assert wide.patch_embedding.weight[:, 16:].abs().max() < 0.02


def test_ti2v_learns_with_and_without_a_given_frame(tmp_path: Path) -> None:
    folder = trained(tmp_path, "demo-ti2v", SHARED.format(first_frame=0.5))
    pipe = wanloom.load(folder, task="demo-ti2v")
    assert pipe.variant.vae.stride == (4, 16, 16)
    video = pipe(prompt="a red circle moves left on white", seed=1, steps=1)
    assert video.frames.shape == (17, 128, 128, 3)
    assert (folder.parent / "sheets" / "shared-image-000003.png").exists()


def test_a_model_of_other_latents_takes_the_trunk_and_the_text_encoder(tmp_path: Path) -> None:
    t2v = trained(tmp_path, "demo-t2v", SHARED.format(first_frame=0.0))
    phase = SHARED.replace('name = "shared"', 'name = "model"\ninit = "start:low_noise_model"')
    folder = trained(tmp_path, "demo-ti2v", phase.format(first_frame=0.5), start=f'start = "{t2v}"')
    ours, theirs = wanloom.load(folder, task="demo-ti2v"), wanloom.load(t2v, task="demo-t2v")
    with ours.parts.use("dit", "model") as dit, theirs.parts.use("dit", "low_noise_model") as other:
        block = dit.blocks[2].ffn[0].weight - other.blocks[2].ffn[0].weight
        assert 0 < block.abs().max() < 0.2  # three steps away from the weights it began with
        assert dit.patch_embedding.weight.shape[1] == 48 and other.patch_embedding.weight.shape[1] == 16


@pytest.mark.parametrize("captions", [["a red circle moves left", ""]])
def test_captions_encode_in_training_as_in_the_pipeline(tmp_path: Path, captions: list[str]) -> None:
    from wanloom.encoders import encode_text
    from wanloom.train.flow import FlowTask
    from wanloom.train.ranks import Ranks
    from wanloom.train.recipe import read_recipe

    path = tmp_path / "recipe.toml"
    text = RECIPE.format(variant="demo-t2v", vae=random_vae(tmp_path / "vae", "demo-t2v"), start='dtype = "float32"')
    path.write_text(text + SHARED.format(first_frame=0.0))
    task = FlowTask(read_recipe(path), Ranks(), tmp_path / "run")
    with torch.no_grad():
        ours = task.encode(captions)
    theirs = encode_text(task.text, task.tokenizer, captions, 24)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
    assert ours[1, 1:].abs().max() == 0


def test_recomputed_blocks_give_the_same_gradients() -> None:
    from wanloom.models.dit import DiT, init_for_training
    from wanloom.train.flow import recompute

    config = VARIANTS["demo-t2v"].dit
    gradients = []
    for again in (False, True):
        dit = init_for_training(DiT(config), torch.Generator().manual_seed(0))
        torch.nn.init.normal_(dit.head.head.weight, generator=torch.Generator().manual_seed(1))
        for block in dit.blocks if again else ():
            recompute(block)
        x = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(2))
        dit(x, torch.tensor([[500.0]]), torch.ones(1, 3, config.text_dim)).square().mean().backward()
        gradients.append({n: p.grad for n, p in dit.named_parameters()})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[n], recomputed[n]) for n in plain)
