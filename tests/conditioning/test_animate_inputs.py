"""What a clip of animate is given, against the rules written down again with numpy; only the VAE is shared."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import tiny
from wanloom.checkpoint.find import resolve
from wanloom.checkpoint.load import survey
from wanloom.conditioning import Conditioning, animate
from wanloom.errors import InputError
from wanloom.inputs import VideoFile, facts, read_inputs
from wanloom.media import save_video
from wanloom.parts import Parts
from wanloom.plan import Input, Plan, make_plan
from wanloom.request import Request
from wanloom.variants import VARIANTS

Array = NDArray[Any]

WIDTH, HEIGHT, FACE, CLIP, LENGTH = 64, 48, 16, 9, 12
TOLERANCE = 1e-5


def film(seed: int, frames: int = LENGTH, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Array:
    """Frames [n, h, w, 3] uint8, smooth and each another."""
    t, y, x = np.mgrid[:frames, : size[1], : size[0]].astype(float)
    waves = [np.sin(x / 9 + t / 2 + seed), np.cos(y / 7 - t / 3 + 2 * seed), np.sin((x + y) / 11 + t + seed)]
    return (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


def mask_film() -> Array:
    """A box that wanders, white with an edge of greys on both sides of one half, as a lossy video leaves it."""
    t, y, x = np.mgrid[:LENGTH, :HEIGHT, :WIDTH]
    inside = (abs(x - 10 - 3 * t) < 13) & (abs(y - 24) < 17)
    edge = (abs(x - 10 - 3 * t) < 17) & (abs(y - 24) < 21) & ~inside
    value = np.where(inside, 249, np.where(edge, np.where((x // 8 + y // 8) % 2, 127, 128), 6))
    return np.repeat(value[..., None], 3, -1).astype(np.uint8)


# ---------------------------------------------------------------- the rules again


def frame_numbers(count: int, start: int) -> list[int]:
    """Frames start, start + 1, ... of a video that runs to and fro."""
    order = [*range(count), *range(count - 2, 0, -1)] or [0]
    return [order[i % len(order)] for i in range(start, start + CLIP)]


def span(pixels: Array) -> Array:
    """uint8 -> [-1, 1]."""
    return pixels.astype(np.float64) / 127.5 - 1


def channels_first(frames: Array) -> Array:
    return np.moveaxis(frames, -1, 0)  # [n, h, w, 3] -> [3, n, h, w]


def encode(parts: Parts, frames: Array) -> Array:
    """[3, n, h, w] -> latents [16, n', h / 8, w / 8], all frames at once."""
    with parts.use("vae") as vae:
        latents: Tensor = vae.encode(torch.from_numpy(frames).float()[None])[0][0]
    return latents.double().numpy()


def boxed(picture: Array) -> Array:
    """Half of an 80 x 96 picture is 40 x 48: in the middle of 64 x 48 it leaves 12 black columns on both sides."""
    assert picture.shape == (96, 80, 3)
    out = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    out[:, 12:52] = picture.reshape(48, 2, 40, 2, 3).mean((1, 3))
    return out


def folded(mask: Array) -> Array:
    """A mask [n, h, w] of frames as four channels of latent frames; the first frame stands for all four."""
    whole = np.concatenate((np.repeat(mask[:1], 4, 0), mask[1:]))
    return np.stack([whole[channel::4] for channel in range(4)])


class Given(NamedTuple):
    mask: Array  # [4, F + 1, h, w]
    latents: Array  # [16, F + 1, h, w]
    pose: Array
    face: Array


def restated(parts: Parts, films: dict[str, Array], picture: Array, clip: int, shared: int, past: Array) -> Given:
    """Clip number `clip`, from the films as they are; past [3, n, h, w]: what was shown before."""
    numbers = frame_numbers(LENGTH, clip * (CLIP - shared))
    grid = HEIGHT // 8, WIDTH // 8
    if "mask_video" in films:
        video = channels_first(span(films["background_video"][numbers]))
        person = films["mask_video"][numbers][..., 0] / 255 >= 0.5
        rows, columns = (np.arange(n) * side // n for n, side in zip(grid, (HEIGHT, WIDTH), strict=True))
        mask = 1.0 - person[:, rows][:, :, columns]
    else:
        video, mask = np.zeros((3, CLIP, HEIGHT, WIDTH)), np.zeros((CLIP, *grid))
    known = past.shape[1]
    video[:, :known], mask[:known] = past, 1
    reference = encode(parts, channels_first(span(boxed(picture))[None]))
    return Given(
        np.concatenate((np.ones((4, 1, *grid)), folded(mask)), 1),
        np.concatenate((reference, encode(parts, video)), 1),
        encode(parts, channels_first(span(films["pose_video"][numbers]))),
        channels_first(span(films["face_video"][numbers])),
    )


def squeezed(image: Array, side: int) -> Array:
    """[3, h, w] -> [3, side, side] by cubic interpolation between four neighbours (a = -3/4), edges repeated."""

    def weights(length: int) -> Array:
        matrix = np.zeros((side, length))
        for row in range(side):
            place = (row + 0.5) * length / side - 0.5
            first = int(np.floor(place))
            for near in range(first - 1, first + 3):
                d = abs(place - near)
                w = (1.25 * d - 2.25) * d * d + 1 if d <= 1 else -0.75 * (((d - 5) * d + 8) * d - 4)
                matrix[row, min(max(near, 0), length - 1)] += w
        return matrix

    return np.einsum("yh,chw,xw->cyx", weights(image.shape[1]), image, weights(image.shape[2]))


# ---------------------------------------------------------------- ours


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    root = tiny.checkpoint(tmp_path_factory.mktemp("animate"), "animate-14B")
    files = resolve(VARIANTS["animate-14B"], ckpt_dir=root)
    return Parts(survey(VARIANTS["animate-14B"], files), files, resident=True)


class Scene(NamedTuple):
    plan: Plan
    media: dict[str, Any]
    films: dict[str, Array]
    picture: Array


def scene(folder: Path, parts: Parts, *, replace: bool = False, shared: int = 1, **fields: Any) -> Scene:
    """Lossless films in a folder, read and planned."""
    films = {"pose_video": film(1), "face_video": film(2, size=(FACE, FACE))}
    if replace:
        films |= {"background_video": film(3), "mask_video": mask_film()}
    paths = {}
    for role, frames in films.items():
        paths[role] = folder / f"{role}.png"
        save_video(paths[role], frames, fps=Fraction(30000, 1001))
    picture = film(4, 1, (80, 96))[0] // 4 * 4  # so that four of its pixels have a whole number as their mean
    save_video(folder / "ref.png", picture[None], fps=1)
    request = Request(
        prompt="a cat walks", seed=3, image=folder / "ref.png", refert_num=shared, frames=CLIP, steps=2, **paths,
        **fields,
    )  # fmt: skip
    media = read_inputs(request)
    return Scene(make_plan(request, parts.variant, inputs=facts(media)), media, films, picture)


def error(mine: Tensor, theirs: Array) -> float:
    ours = mine.double().cpu().numpy()
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("shared", [1, 5])
@pytest.mark.parametrize("replace", [False, True])
def test_both_clips_are_given_what_the_rules_say(replace: bool, shared: int, parts: Parts, tmp_path: Path) -> None:
    made = scene(tmp_path, parts, replace=replace, shared=shared)
    assert len(made.plan.segments) == 2
    shared_by_all = animate.condition(parts, made.plan, made.media)
    clips = animate.Clips(parts, made.plan, made.media)
    past = clips.begin()
    for number, (given, segment) in enumerate(zip(clips.given(), made.plan.segments, strict=True)):
        conditioning = clips.clip(shared_by_all, given, segment, past)
        expected = restated(parts, made.films, made.picture, number, shared, past[0].double().numpy())
        y = conditioning.cond["y"][0]
        assert np.array_equal(y[:4].numpy(), expected.mask)
        assert error(y[4:], expected.latents) <= TOLERANCE
        assert error(conditioning.cond["pose"][0], expected.pose) <= TOLERANCE
        assert error(conditioning.cond["face"][0], expected.face) <= TOLERANCE
        assert sorted(conditioning.cond) == ["context", "face", "image", "pose", "y"] and conditioning.uncond is None
        assert conditioning.drop == 1 and conditioning.lead is None and conditioning.clean is None
        past = torch.rand(1, 3, clips.keep, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5)) * 2 - 1


def test_a_clip_of_77_frames_has_20_latent_frames_behind_the_picture(parts: Parts, tmp_path: Path) -> None:
    made = scene(tmp_path, parts)
    request = Request(prompt="a", seed=1, image="r", **{role: role for role in made.films})
    plan = make_plan(request, parts.variant, inputs=facts(made.media))
    clips = animate.Clips(parts, plan, made.media)
    assert clips.frames == 77 and plan.latent[1] == 21 and len(plan.segments) == 1
    (given,) = clips.given()
    assert given["drawn"].shape[2] == given["face"].shape[2] == 77
    last = np.array(frame_numbers(LENGTH, 77 - CLIP))
    assert error(given["drawn"][0, :, -CLIP:], channels_first(span(made.films["pose_video"][last]))) < 1e-6


def test_clip_sees_the_letterboxed_picture_squeezed(parts: Parts, tmp_path: Path) -> None:
    made = scene(tmp_path, parts)
    seen: list[Tensor] = []
    with parts.use("clip") as tower:
        handle = tower.embeddings.patch_embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
        conditioning = animate.condition(parts, made.plan, made.media)
        handle.remove()
    assert len(seen) == 1 and conditioning.cond["image"].shape == (1, 257, tiny.CLIP.dim)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    square = squeezed(np.moveaxis(span(boxed(made.picture)), -1, 0), 224) / 2 + 0.5
    assert error(seen[0], (square - mean[:, None, None]) / std[:, None, None]) <= TOLERANCE


def test_a_wide_picture_has_black_above_and_below(parts: Parts, tmp_path: Path) -> None:
    made = scene(tmp_path, parts)
    save_video(tmp_path / "wide.png", film(6, 1, (64, 22)), fps=1)
    media = read_inputs(Request(image=tmp_path / "wide.png"))
    conditioning = animate.condition(parts, made.plan, media)
    view = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    view[13:35] = media["image"].pixels
    assert error(conditioning.cond["reference"][0], encode(parts, channels_first(span(view)[None]))) <= TOLERANCE


def test_guidance_compares_with_a_face_that_is_nothing(parts: Parts, tmp_path: Path) -> None:
    made = scene(tmp_path, parts, guidance=3.0)
    clips = animate.Clips(parts, made.plan, made.media)
    conditioning = clips.clip(
        animate.condition(parts, made.plan, made.media), next(clips.given()), made.plan.segments[0], clips.begin()
    )
    cond, uncond = conditioning.cond, conditioning.uncond
    assert uncond is not None and sorted(uncond) == sorted(cond)
    assert bool((uncond["face"] == -1).all()) and uncond["face"].shape == cond["face"].shape
    for name in ("image", "pose", "y"):
        assert uncond[name] is cond[name]
    assert not torch.equal(uncond["context"], cond["context"])
    again = Conditioning.from_tensors(animate.condition(parts, made.plan, made.media).tensors())
    assert again.uncond is not None and torch.equal(again.uncond["image"], cond["image"])


# ---------------------------------------------------------------- long videos, damaged ones


class Counted(VideoFile):
    """A driving video whose frames, [1, 1, 3] with their number, are counted as long as anybody holds them."""

    def open(self, fps: int | None = None) -> AbstractContextManager[Any]:
        alive: weakref.WeakValueDictionary[int, Array] = weakref.WeakValueDictionary()

        def frames() -> Iterator[Array]:
            for i in range(self.count):
                frame = np.full((1, 1, 3), i)
                alive[i] = frame
                seen.append(len(alive))
                yield frame

        seen: list[int] = []
        object.__setattr__(self, "seen", seen)
        return nullcontext(frames())


def windows(parts: Parts, count: int, decoded: int, shared: int) -> tuple[list[list[int]], list[int]]:
    """The frames of all clips, and how many were there at each moment, of a video with `decoded` of `count` frames."""
    inputs = [
        Input(role=role, name=role, sha256="", size=(16, 16), frames=count, rate=(30, 1))
        for role in ("pose_video", "face_video")
    ]
    request = Request(prompt="a", seed=1, image="i", pose_video="p", face_video="f", frames=CLIP, refert_num=shared)
    plan = make_plan(request, parts.variant, inputs=inputs, image_size=(16, 16))
    video = Counted(Path("p.mp4"), "pose-video", "p.mp4", "", (16, 16), decoded, Fraction(30))
    found = [[int(frame[0, 0, 0]) for frame in frames] for frames in animate.Clips(parts, plan, {})._windows(video)]
    return found, video.seen  # type: ignore[attr-defined]


@pytest.mark.parametrize("shared", [1, 5])
@pytest.mark.parametrize("count", [1, 4, 9, 10, 12, 13, 14, 17, 18, 120, 121, 122, 123])
def test_of_a_long_video_only_what_may_come_again_is_kept(count: int, shared: int, parts: Parts) -> None:
    found, seen = windows(parts, count, count, shared)
    assert found == [frame_numbers(count, i * (CLIP - shared)) for i in range(len(found))]
    assert len(seen) == count and max(seen) <= 2 * CLIP


def test_a_video_that_ends_early_is_said_to(parts: Parts) -> None:
    with pytest.raises(InputError, match=r"pose-video: p.mp4 ends before frame 17 of 30") as caught:
        windows(parts, 30, 15, 1)
    assert caught.value.code == "E3009"
