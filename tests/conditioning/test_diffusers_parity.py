"""The conditioning of I2V, with and without a last picture, against diffusers' own code on the same VAE."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wanloom import media
from wanloom.checkpoint.find import resolve
from wanloom.checkpoint.load import survey
from wanloom.conditioning import image
from wanloom.models.vae import CausalVae
from wanloom.parts import Parts
from wanloom.plan import make_plan
from wanloom.request import Request
from wanloom.variants import VARIANTS

import tiny  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore::wanloom.errors.WanloomWarning")


class Posterior:
    """Our VAE behind the two calls that diffusers makes."""

    def __init__(self, vae: CausalVae) -> None:
        self.vae, self.dtype = vae, torch.float32
        self.config = SimpleNamespace(
            latents_mean=vae.config.mean, latents_std=vae.config.std, z_dim=vae.config.z
        )  # fmt: skip

    def encode(self, video: Tensor) -> Any:
        mean = self.vae.moments(video)[0]
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: mean))


@pytest.mark.parametrize("frames", [5, 17])
@pytest.mark.parametrize(("name", "last"), [("i2v-A14B", False), ("i2v-A14B", True), ("flf2v-14B", True)])
def test_channels_are_those_of_diffusers(
    name: str, last: bool, frames: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as quiet:
        quiet.setattr("warnings.warn", lambda *_, **__: None)  # diffusers has deprecations of its own
        from diffusers.pipelines.wan import pipeline_wan_i2v
    files = resolve(VARIANTS[name], ckpt_dir=models / name)
    parts = Parts(survey(VARIANTS[name], files), files)
    roles = ("image", "last_image") if last else ("image",)
    given = {
        role: media.read_picture(tiny.picture(tmp_path / f"{role}.png", (70, 50), seed=i))
        for i, role in enumerate(roles)
    }
    request = Request(prompt="a red cat", size=(64, 64), frames=frames, steps=4, seed=1, **given)
    plan = make_plan(request, parts.variant, image_size=(70, 50))
    mine = image.channels(parts, plan, given).cond["y"]
    with parts.use("vae") as vae:
        monkeypatch.setattr(pipeline_wan_i2v, "get_module_execution_device", lambda _: torch.device("cpu"))
        pipe = SimpleNamespace(
            vae=Posterior(vae), config=SimpleNamespace(expand_timesteps=False), vae_scale_factor_temporal=4,
            vae_scale_factor_spatial=8,
        )  # fmt: skip
        views = [image.fit(image.to_tensor(picture.pixels), plan.size)[None] for picture in given.values()]
        _, theirs = pipeline_wan_i2v.WanImageToVideoPipeline.prepare_latents(
            pipe, views[0], 1, 16, plan.size[1], plan.size[0], frames, torch.float32, torch.device("cpu"),
            torch.Generator().manual_seed(0), None, views[1] if last else None,
        )  # fmt: skip
    assert mine.shape == theirs.shape
    assert torch.equal(mine[:, :4], theirs[:, :4])
    assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
