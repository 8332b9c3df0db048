"""What each clip of s2v is given: features of the sound at its frames, pose latents, and the picture cut to size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from wanloom import clips, media
from wanloom.conditioning import speech
from wanloom.conditioning.speech import States, features_at, fit, fit_like_reference
from wanloom.encoders import build_wav2vec2
from wanloom.inputs import facts, read_inputs
from wanloom.models.vae import CausalVae
from wanloom.plan import Input, Plan, make_plan
from wanloom.request import Request

RATE = 16_000


def voice(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise that swells and fades: no two places sound alike."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    return (rng.normal(0, 0.1, len(t)) * (1.2 + np.sin(1.7 * t))).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build_wav2vec2(tiny.AUDIO).requires_grad_(False)


def as_reference(states: Tensor, frames: int) -> Tensor:
    """What the reference makes of states [S, T, A] for video frames 0, 1, ...: [S, A, frames]."""
    count = int(states.shape[1] / 50 * 30)
    at30 = F.interpolate(states.transpose(1, 2), count, mode="linear", align_corners=True)
    out = torch.zeros(*at30.shape[:2], frames)
    for k in range(frames):
        index = int(np.round(k / 16 * 30))
        if index < count:
            out[..., k] = at30[..., index]
    return out


def some_plan(**fields: Any) -> Plan:
    picture = Input(role="image", name="a.png", sha256="0" * 64, size=(64, 64))
    sound = Input(role="audio", name="a.wav", sha256="1" * 64, samples=fields.pop("samples", RATE))
    request = Request(prompt="a", seed=7, image="a.png", audio="a.wav", **fields)
    return make_plan(request, tiny.TINY["s2v-14B"], inputs=[picture, sound])


# ---------------------------------------------------------------- features


def test_frames_hear_the_feature_nearest_to_them_of_thirty_a_second(model: Any) -> None:
    states = States(model, voice(2.1), tiny.AUDIO, 30, normed=True)
    whole = speech.encode_audio(model, torch.from_numpy(voice(2.1)))
    features = features_at(states, 16, 0, 40)
    assert features.shape == (tiny.AUDIO.layers + 1, tiny.AUDIO.dim, 40)
    torch.testing.assert_close(features, as_reference(whole, 40), rtol=1e-5, atol=1e-5)
    assert not features[..., 33:].any() and features[..., 32].any()  # of 62; frame 33 wants number 62
    assert torch.equal(features_at(states, 16, 24, 16), features[..., 24:])  # a clip hears what its frames hear


def test_indices_are_rounded_to_even() -> None:
    class Ramp:
        """Two seconds: state i is worth i, so a feature tells its own number."""

        count, shape = 100, (1, 1)

        def __getitem__(self, number: int) -> Tensor:
            return torch.full((1, 1), float(number))

    ramp: Any = Ramp()
    features = features_at(ramp, 16, 0, 40)[0, 0]
    heard = (features[:32] * 59 / 99).round().int().tolist()
    assert heard[:12] == [0, 2, 4, 6, 8, 9, 11, 13, 15, 17, 19, 21]
    assert features[32:].eq(0).all()


@pytest.fixture
def near_sighted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An encoder that hears 25 ms and no more, so that windows change nothing; the samples of each call."""
    calls: list[int] = []

    def encode(model: Any, wave: Tensor, **given: Any) -> Tensor:
        calls.append(len(wave))
        pieces = wave.unfold(0, 400, 320)
        return torch.stack((pieces[:, :32], pieces[:, -32:], pieces[:, 100:132]))

    monkeypatch.setattr(speech, "encode_audio", encode)
    monkeypatch.setattr(clips, "WHOLE", 20)
    return calls


@pytest.mark.parametrize("seconds", [20.1, 30.0, 47.31])
def test_windows_have_the_count_and_the_times_of_the_whole(seconds: float, near_sighted: list[int]) -> None:
    wave, frames = voice(seconds), int(seconds * 16) + 20
    whole = features_at(States(None, wave, tiny.AUDIO, 0, normed=True), 16, 0, frames)
    assert near_sighted == [len(wave)]
    near_sighted.clear()
    states = States(None, wave, tiny.AUDIO, 10, normed=True)
    pieces = [features_at(states, 16, start, 80) for start in range(0, frames, 80)]  # clip by clip
    assert torch.equal(torch.cat(pieces, -1)[..., :frames], whole)
    assert len(near_sighted) == -(-states.count // 500)  # each window is encoded once
    assert max(near_sighted) <= 20 * RATE  # 10 s and 5 more on both sides


def test_one_window_is_held_and_none_while_the_next_is_made(
    near_sighted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    states = States(None, voice(60), tiny.AUDIO, 10, normed=True)
    encode, held = speech.encode_audio, []

    def watched(*given: Any, **more: Any) -> Tensor:
        held.append(states._states.untyped_storage().nbytes())
        return encode(*given, **more)

    monkeypatch.setattr(speech, "encode_audio", watched)
    for number in range(0, states.count, 50):
        assert states[number].shape == (3, 32)
        assert states._states.untyped_storage().nbytes() <= 3 * 500 * 32 * 4
    assert held == [0] * 6


def test_up_to_a_minute_and_on_demand_a_sound_is_encoded_whole(near_sighted: list[int]) -> None:
    for seconds, window in ((20, 10), (25, 0), (25, 30)):
        features_at(States(None, voice(seconds), tiny.AUDIO, window, normed=True), 16, 0, 400)
        assert near_sighted == [seconds * RATE]
        near_sighted.clear()
    assert clips.in_windows(20 * RATE + 1, 10)


def test_windows_of_a_model_that_hears_everything_are_near_the_whole(model: Any) -> None:
    wave = voice(61)
    whole = States(model, wave, tiny.AUDIO, 0, normed=True)
    windows = States(model, wave, tiny.AUDIO, 30, normed=True)
    assert windows.step == 1500 and whole.step == whole.count == windows.count
    far = States(model, voice(61, seed=1), tiny.AUDIO, 0, normed=True)
    for number in (10, 750, 1499, 1500, 2250, 3000):  # the beginning, middles, and a border
        error = (windows[number] - whole[number])[1:].norm() / (far[number] - whole[number])[1:].norm()
        assert error < 0.05, number
        assert torch.allclose(windows[number][0], whole[number][0], atol=1e-4)  # the first states hear only nearby


# ---------------------------------------------------------------- the picture


def restated(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The reference's resize and crop: shorter side to the shorter of the size, then the middle, black around it."""
    from PIL import Image

    height, width = pixels.shape[:2]
    short = min(size)
    scale = short / min(width, height)
    scaled = (short, int(scale * height + 1e-9)) if width <= height else (int(scale * width + 1e-9), short)
    image = np.array(Image.fromarray(pixels).resize(scaled, Image.Resampling.BILINEAR))
    for axis, want in ((0, size[1]), (1, size[0])):
        have = image.shape[axis]
        if have < want:
            around = [(0, 0)] * 3
            around[axis] = ((want - have) // 2, (want - have + 1) // 2)
            image = np.pad(image, around)
        first = round((image.shape[axis] - want) / 2)
        image = np.take(image, range(first, first + want), axis)
    return image


@pytest.mark.parametrize(
    ("picture", "size", "strip"),
    [((100, 90), (128, 64), 57), ((60, 100), (64, 128), 22), ((64, 64), (128, 128), 0), ((300, 100), (128, 64), 0)],
)
def test_pictures_are_fitted_as_the_reference_or_without_strips(
    picture: tuple[int, int], size: tuple[int, int], strip: int
) -> None:
    rng = np.random.default_rng(3)
    pixels = rng.integers(30, 256, (picture[1], picture[0], 3), dtype=np.uint8)
    made = fit_like_reference(pixels, size)
    assert np.array_equal(made, restated(pixels, size))
    black = (made == 0).all(-1)
    assert int(black.all(0).sum() + black.all(1).sum()) == strip
    covered = fit(pixels, size)
    assert covered.shape == made.shape == (size[1], size[0], 3)
    assert covered.min() >= 30


def test_resize_chooses_between_them(tmp_path: Path) -> None:
    path = tiny.picture(tmp_path / "a.png", (100, 90))
    found = {"image": media.read_picture(path, "image")}
    for how, make in (("cover", fit), ("reference", fit_like_reference)):
        plan = some_plan(resize=how)
        want = torch.from_numpy(make(found["image"].pixels, plan.size).copy()).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(speech._picture(plan, found)[0, :, 0], want)
    assert some_plan().speech.resize == "cover"  # type: ignore[union-attr]


# ---------------------------------------------------------------- the pose


@pytest.fixture(scope="module")
def vae() -> CausalVae:
    torch.manual_seed(1)
    made = CausalVae(tiny.TINY["s2v-14B"].vae)
    for tensor in made.parameters():
        torch.nn.init.normal_(tensor, std=0.1)
    return made.eval().requires_grad_(False)


def with_vae(vae: CausalVae) -> Any:
    @contextmanager
    def use(part: str) -> Iterator[CausalVae]:
        assert part == "vae"
        yield vae

    return SimpleNamespace(use=use, variant=tiny.TINY["s2v-14B"])


def test_poses_are_taken_by_time_eight_frames_a_clip_and_black_behind_the_end(vae: CausalVae, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    media.save_video(tmp_path / "pose.mp4", rng.integers(0, 256, (18, 64, 64, 3), dtype=np.uint8), fps=25)
    decoded = media.read_video(tmp_path / "pose.mp4").frames  # 18 frames at 25 a second: 0.72 s, 12 frames at 16
    nearest = [min(range(18), key=lambda k: (abs(k / 25 - i / 16), k)) for i in range(12)]
    assert nearest[:6] == [0, 2, 3, 5, 6, 8]
    shown = [torch.from_numpy(decoded[k].copy()).permute(2, 0, 1) / 127.5 - 1 for k in nearest]
    shown += [torch.full((3, 64, 64), -1.0)] * 12

    plan = some_plan(infer_frames=8, samples=int(1.3 * RATE), size=(64, 64))
    assert len(plan.segments) == 3 and plan.size == (64, 64)
    found = read_inputs(Request(pose_video=tmp_path / "pose.mp4"))
    assert facts(found)[0].frames == 18
    poses = speech.Clips(with_vae(vae), plan, found)._poses()
    for clip in range(3):
        own = shown[8 * clip : 8 * clip + 8]
        want = vae.encode(torch.stack([own[0], *own], 1)[None])[0][:, :, 1:]
        got = next(poses)["pose"]
        assert got.shape == (1, 16, 2, 8, 8)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_without_a_pose_video_clips_are_given_none(vae: CausalVae) -> None:
    poses = speech.Clips(with_vae(vae), some_plan(), {})._poses()
    assert [next(poses), next(poses)] == [{}, {}]
