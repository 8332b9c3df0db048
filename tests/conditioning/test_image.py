"""What the image conditioners give the transformer, against the official rules written down a second way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiny
from wanloom import media
from wanloom.checkpoint.find import resolve
from wanloom.checkpoint.load import survey
from wanloom.conditioning import Conditioning, image, text
from wanloom.encoders import encode_image
from wanloom.errors import InputError
from wanloom.media import Picture
from wanloom.parts import Parts
from wanloom.plan import Plan, make_plan
from wanloom.request import Request
from wanloom.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore::wanloom.errors.WanloomWarning")


def parts_of(models: Path, name: str) -> Parts:
    files = resolve(VARIANTS[name], ckpt_dir=models / name)
    return Parts(survey(VARIANTS[name], files), files)


def pictures(folder: Path, *sizes: tuple[int, int]) -> dict[str, Picture]:
    roles = ("image", "last_image")
    files = [tiny.picture(folder / f"{i}.png", size, seed=i) for i, size in enumerate(sizes)]
    return {role: media.read_picture(file) for role, file in zip(roles, files, strict=False)}


def plan_for(parts: Parts, given: dict[str, Picture], frames: int, **fields: object) -> Plan:
    request = Request(prompt="a red cat", size=(64, 64), frames=frames, steps=4, seed=1, **given, **fields)  # type: ignore[arg-type]
    first = given.get("image")
    return make_plan(request, parts.variant, image_size=first.size if first else None)


def official_mask(frames: int, height: int, width: int, *, last: bool) -> torch.Tensor:
    """As wan/image2video.py and wan/first_last_frame2video.py write it, for any number of frames."""
    mask = torch.ones(1, frames, height, width)
    mask[:, 1 : frames - 1 if last else frames] = 0
    mask = torch.concat([torch.repeat_interleave(mask[:, 0:1], repeats=4, dim=1), mask[:, 1:]], dim=1)
    return mask.view(1, mask.shape[1] // 4, 4, height, width).transpose(1, 2)


def official_video(given: dict[str, Picture], size: tuple[int, int], frames: int) -> torch.Tensor:
    """The whole conditioning video [1, 3, F, H, W] at once."""
    views = []
    for picture in given.values():
        tensor = (
            torch.from_numpy(picture.pixels.astype(np.float32) / np.float32(255)).permute(2, 0, 1).sub(0.5).div(0.5)
        )
        views.append(F.interpolate(tensor[None], size=size[::-1], mode="bicubic").transpose(0, 1))
    first, others = views[0], views[1:]
    grey = torch.zeros(3, frames - 1 - len(others), size[1], size[0])
    return torch.concat([first, grey, *others], dim=1)[None]


@pytest.mark.parametrize("frames", [5, 9, 17])
@pytest.mark.parametrize(
    ("name", "count"), [("i2v-A14B", 1), ("i2v-A14B", 2), ("i2v-14B", 1), ("flf2v-14B", 2)]
)  # fmt: skip
def test_channels_are_the_official_mask_and_the_encoded_video(
    name: str, count: int, frames: int, models: Path, tmp_path: Path
) -> None:
    parts = parts_of(models, name)
    given = pictures(tmp_path, (90, 70), (60, 80))
    given = dict(list(given.items())[:count])
    plan = plan_for(parts, given, frames)
    made = image.channels(parts, plan, given)
    with parts.use("vae") as vae:
        latent, _ = vae.encode(official_video(given, plan.size, frames))
    expected = torch.cat((official_mask(frames, *latent.shape[3:], last=count == 2), latent), 1)
    assert made.cond["y"].shape == expected.shape == (1, 20, *plan.latent[1:])
    assert torch.equal(made.cond["y"][:, :4], expected[:, :4])
    assert (made.cond["y"] - expected).norm() <= 1e-5 * expected.norm()
    assert made.uncond is not None and made.uncond["y"] is made.cond["y"]
    assert ("image" in made.cond) == (parts.variant.clip is not None)


def test_the_mask_says_the_last_frame_in_its_last_channel_only() -> None:
    mask = image.given_mask(torch.zeros(1, 16, 21, 2, 2), 4, last=True)
    assert mask[0, :, 0, 0, 0].tolist() == [1, 1, 1, 1] and mask[0, :, -1, 0, 0].tolist() == [0, 0, 0, 1]
    assert mask[:, :, 1:-1].abs().sum() == 0
    assert torch.equal(mask, official_mask(81, 2, 2, last=True))


def test_clip_sees_each_picture_at_its_own_size_first_then_last(models: Path, tmp_path: Path) -> None:
    parts = parts_of(models, "flf2v-14B")
    given = pictures(tmp_path, (90, 70), (60, 80))
    made = image.channels(parts, plan_for(parts, given, 5), given)
    with parts.use("clip") as tower:
        each = [encode_image(tower, image.to_tensor(picture.pixels)[None]) for picture in given.values()]
    assert made.cond["image"].shape == (1, 514, parts.variant.dit.image_dim)
    assert torch.equal(made.cond["image"], torch.cat(each, 1))


def test_a_last_picture_needs_more_than_one_frame(models: Path, tmp_path: Path) -> None:
    parts = parts_of(models, "flf2v-14B")
    given = pictures(tmp_path, (64, 64), (64, 64))
    with pytest.raises(InputError) as caught:
        image.channels(parts, plan_for(parts, given, 1), given)
    assert caught.value.code == "E2005"


def test_one_frame_with_one_picture_works(models: Path, tmp_path: Path) -> None:
    parts = parts_of(models, "i2v-A14B")
    given = pictures(tmp_path, (64, 64))
    made = image.channels(parts, plan_for(parts, given, 1), given)
    assert made.cond["y"].shape[2] == 1 and (made.cond["y"][:, :4] == 1).all()


def test_the_grey_video_is_never_whole_in_memory(models: Path) -> None:
    parts = parts_of(models, "i2v-A14B")
    with parts.use("vae") as vae:
        pieces = image.clip_frames([torch.ones(3, 64, 64)], 4001, vae)
        assert next(pieces).shape[2] == 1
        for _, piece in zip(range(5), pieces, strict=False):
            assert piece.shape[2] == 4 and piece.untyped_storage().nbytes() == 3 * 64 * 64 * 4


def test_the_clean_frame_is_the_encoded_picture_and_its_group(models: Path, tmp_path: Path) -> None:
    parts = parts_of(models, "ti2v-5B")
    given = pictures(tmp_path, (90, 70))
    plan = plan_for(parts, given, 9)
    made = image.clean_frame(parts, plan, given)
    assert made.clean is not None and made.clean.shape == (1, 48, 1, *plan.latent[2:])
    pixels = media.cover_crop(given["image"].pixels, plan.size)
    with parts.use("vae") as vae:
        expected, _ = vae.encode(image.to_tensor(pixels)[None, :, None])
    assert torch.equal(made.clean, expected)
    assert made.cond["group"].tolist() == [1, 0, 0]
    assert made.uncond is not None and torch.equal(made.uncond["group"], made.cond["group"])


def test_without_a_picture_the_clean_frame_task_is_text(models: Path) -> None:
    parts = parts_of(models, "ti2v-5B")
    plan = plan_for(parts, {}, 9)
    made = image.clean_frame(parts, plan, {})
    assert made.clean is None and set(made.cond) == {"context"}
    assert torch.equal(made.cond["context"], text.condition(parts, plan, {}).cond["context"])


def test_a_prompt_does_not_depend_on_the_negative_one(models: Path) -> None:
    parts = parts_of(models, "t2v-A14B")
    one = text.condition(parts, plan_for(parts, {}, 5, negative_prompt="a dog"), {})
    other = text.condition(parts, plan_for(parts, {}, 5, negative_prompt="the blue street"), {})
    assert torch.equal(one.cond["context"], other.cond["context"])
    assert one.uncond is not None and other.uncond is not None
    assert not torch.equal(one.uncond["context"], other.uncond["context"])
    assert one.cond["context"].shape == (1, 512, 24) and (one.cond["context"][0, 4:] == 0).all()


def test_without_guidance_the_negative_prompt_is_not_encoded(models: Path) -> None:
    parts = parts_of(models, "t2v-A14B")
    assert text.condition(parts, plan_for(parts, {}, 5, guidance=1.0), {}).uncond is None
    assert text.condition(parts, plan_for(parts, {}, 5, guidance=(1.0, 2.0)), {}).uncond is not None


def test_conditioning_survives_as_flat_tensors() -> None:
    y, group = torch.ones(2), torch.zeros(3, dtype=torch.long)
    made = Conditioning(
        {"context": torch.ones(1), "y": y, "group": group}, {"context": torch.zeros(1), "y": y, "group": group}, y
    )
    assert set(made.tensors()) == {"cond.context", "cond.y", "cond.group", "uncond.context", "clean"}
    again = Conditioning.from_tensors(made.tensors())
    assert again.uncond is not None and set(again.uncond) == set(again.cond) == {"context", "y", "group"}
    assert again.uncond["context"] == 0 and again.uncond["y"] is again.cond["y"]
    assert Conditioning.from_tensors(Conditioning({"context": y}).tensors()).uncond is None
    moved = made.map(torch.clone)
    assert moved.uncond is not None and moved.cond["y"] is moved.uncond["y"] is moved.clean
