"""The whitening of latents, and what is kept of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wanloom.demo.world import render
from wanloom.models.config import VAE_21
from wanloom.models.vae import CausalVae, init_for_training
from wanloom.train.data import HELD_OUT, sample_training_clip, to_video
from wanloom.train.recipe import Data, Phase, Recipe, Stage
from wanloom.train.vae import FLOOR, principal_axes, whiten

SIZE, FRAMES, Z = 32, 5, 16


def recipe(directions: int | None) -> Recipe:
    phase = Phase(name="a", trains=("vae",), stages=(Stage(steps=1, batch=1),))
    return Recipe(name="x", variant="demo-t2v", kind="vae", directions=directions, data=Data(clips=6), phases=(phase,))


@pytest.fixture
def vae() -> CausalVae:
    config = replace(VAE_21, dim=4, decoder_dim=4, multipliers=(1, 2, 2, 2), blocks=1)
    made = CausalVae(config).requires_grad_(False).eval()
    init_for_training(made, torch.Generator().manual_seed(0))
    return made


def clips(count: int) -> Tensor:
    """Clips that the axes come from."""
    scenes = [sample_training_clip(0, HELD_OUT, 100_000 + i, Data()) for i in range(count)]
    return torch.stack([to_video(render(clip, SIZE, FRAMES)) for clip in scenes])


def test_whitened_latents_have_the_variance_meant_and_decode_to_the_same_pixels(vae: CausalVae) -> None:
    video = clips(6)
    before = vae.render(vae.moments(video)[0]).clamp(-1, 1)
    axes = principal_axes(vae, recipe(None), SIZE, FRAMES)
    whiten(vae, axes)
    latents, _ = vae.encode(video)
    torch.testing.assert_close(vae.decode(latents)[0], before, rtol=1e-4, atol=1e-4)
    want = axes.values / (axes.values + FLOOR)
    torch.testing.assert_close(latents.double().var((0, 2, 3, 4), correction=0), want, rtol=1e-3, atol=1e-5)
    assert latents.mean().abs() < 1e-4


def test_only_the_kept_directions_are_coded_and_the_others_are_constant(vae: CausalVae) -> None:
    video, keep = clips(4), 5
    axes = principal_axes(vae, recipe(keep), SIZE, FRAMES)
    want = vae.render(axes.project(vae.moments(video)[0])).clamp(-1, 1)
    whiten(vae, axes)
    latents, _ = vae.encode(video)
    spread = latents.std((0, 2, 3, 4))
    assert (spread[: Z - keep] < 1e-5).all() and (spread[Z - keep :] > 1e-3).all()
    torch.testing.assert_close(vae.decode(latents)[0], want, rtol=1e-4, atol=1e-4)
    noisy = latents.clone()
    noisy[:, : Z - keep] += torch.randn(noisy[:, : Z - keep].shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(vae.decode(noisy)[0], want, rtol=1e-4, atol=1e-4)


def test_projecting_twice_is_projecting_once_and_keeping_all_is_keeping_all(vae: CausalVae) -> None:
    mu = vae.moments(clips(1))[0]
    axes = principal_axes(vae, recipe(3), SIZE, FRAMES)
    once = axes.project(mu)
    torch.testing.assert_close(axes.project(once), once, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(once, mu, atol=1e-3)
    torch.testing.assert_close(replace(axes, keep=Z).project(mu), mu, rtol=1e-5, atol=1e-6)
