"""The parts of s2v: names, positions, who hears what when, and a whole run against the reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wanloom.models.adapters import build_dit
from wanloom.models.adapters.speech import AudioEncoder, FramePacker, spread
from wanloom.models.config import DiTConfig, SpeechConfig
from wanloom.models.dit import DiT, init_for_training
from wanloom.models.layers import Scene

SMALL = DiTConfig(
    dim=48, ffn_dim=96, heads=2, layers=3, text_dim=10, text_len=5, freq_dim=32,
    speech=SpeechConfig(audio_dim=6, audio_states=3, layers=(0, 2)),
)  # fmt: skip
FRAMES, SIDE = 3, 8


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def dit() -> DiT:
    made = init_for_training(build_dit(SMALL), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, p in made.named_parameters():  # nothing may be hidden by a zero
            if not p.any():
                p.copy_(0.1 * draw(*p.shape, seed=len(name)))
    return made.eval().requires_grad_(False)


def inputs(**more: Tensor) -> dict[str, Tensor]:
    return {
        "context": draw(1, 4, 10),
        "audio": draw(1, 3, 6, 4 * FRAMES, seed=2),
        "reference": draw(1, 16, 1, SIDE, SIDE, seed=3),
        "group": torch.zeros(FRAMES, dtype=torch.long),
        **more,
    }


def run(dit: DiT, given: Mapping[str, Tensor], t: float = 600.0) -> Tensor:
    x = draw(1, 16, FRAMES, SIDE, SIDE, seed=9, dtype=next(iter(given.values())).dtype)
    return dit(x, torch.tensor([[t, 0.0]], dtype=x.dtype), **dit.once(given))


def seen(dit: DiT, given: Mapping[str, Tensor]) -> Scene:
    """The scene that the blocks get."""
    scenes: list[Scene] = []
    handle = dit.blocks[0].register_forward_pre_hook(lambda module, args: scenes.append(args[1]))
    run(dit, given)
    handle.remove()
    return scenes[0]


# ---------------------------------------------------------------- names


def test_tensors_are_the_manifest(golden: Path) -> None:
    path = golden.parent / "spec" / "manifests" / "wan2.2-s2v-14b-dit.json"
    if not path.is_file():
        pytest.skip(f"no manifests beside {golden.name}")
    with torch.device("meta"):
        module = build_dit(DiTConfig(speech=SpeechConfig()))
    state = module.state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == json.loads(path.read_text())["tensors"]
    assert (len(state), sum(p.numel() for p in module.parameters())) == (1260, 16_295_755_609)


def test_a_state_goes_out_and_comes_back_under_the_published_names(dit: DiT) -> None:
    state = dit.state_dict()
    assert "audio_injector.injector.1.q.weight" in state
    assert not any("after" in name or "prepare" in name for name in state)
    other = build_dit(SMALL)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(dit.parameters(), other.parameters(), strict=True))
    del state["cond_encoder.bias"]
    with pytest.raises(RuntimeError, match="Missing"):
        other.load_state_dict(state)


# ---------------------------------------------------------------- the sequence


@pytest.mark.parametrize(("first", "last", "count", "want"), [
    (0, 27, 7, [0, 4, 9, 13, 18, 22, 27]), (19, 4, 4, [19, 14, 9, 4]), (3, 2, 1, [3]), (0, 0, 1, [0]),
])  # fmt: skip
def test_coarse_positions_are_cut_and_not_rounded(first: int, last: int, count: int, want: list[int]) -> None:
    assert spread(first, last, count) == want


def test_the_farther_back_the_coarser() -> None:
    packer = FramePacker(16, 8)
    tokens, places = packer(draw(1, 16, 19, 16, 24))  # a fine grid of 8 x 12
    assert tokens.shape[1] == len(places) == 8 * 12 + 4 * 6 + 4 * (2 * 3)
    assert places[: 8 * 12, 0].eq(-1).all()
    assert places[8 * 12 : 8 * 12 + 24, 0].eq(-3).all()
    assert places[-24:, 0].tolist() == [t for t in (-19, -14, -9, -4) for _ in range(6)]
    assert places[-3:, 1:].tolist() == [[7, 0], [7, 5], [7, 11]]


def test_a_short_past_is_padded_with_nothing_in_front() -> None:
    packer, latents = FramePacker(16, 8), draw(1, 16, 5, 16, 16)
    padded = torch.cat((torch.zeros(1, 16, 14, 16, 16), latents), 2)
    for short, whole in zip(packer(latents), packer(padded), strict=True):
        assert torch.equal(short, whole)


def test_reference_and_past_are_clean_tokens_outside_the_clip(dit: DiT) -> None:
    per_frame = (SIDE // 2) ** 2
    alone = seen(dit, inputs())
    assert alone.frame.tolist() == [f for f in range(FRAMES) for _ in range(per_frame)] + [-1] * per_frame
    assert alone.group.tolist() == [0] * FRAMES * per_frame + [1] * per_frame
    after = seen(dit, inputs(motion=draw(1, 16, 19, SIDE, SIDE)))
    assert len(after.frame) == len(alone.frame) + per_frame + 4 + 4
    assert torch.equal(after.rope[: len(alone.rope)], alone.rope)
    # A reference at time 30 is turned as the frame 30 of a clip is.
    still = alone.rope[FRAMES * per_frame :]
    assert torch.equal(still[:, :, 0].acos()[0, 0], torch.tensor(30.0).cos().acos())


def test_no_pose_is_a_pose_of_zeros(dit: DiT) -> None:
    zeros = torch.zeros(1, 16, FRAMES, SIDE, SIDE)
    torch.testing.assert_close(run(dit, inputs()), run(dit, inputs(pose=zeros)), rtol=0, atol=1e-6)
    assert not torch.allclose(run(dit, inputs()), run(dit, inputs(pose=zeros + 1)))


def test_what_a_clip_needs_is_computed_once_and_the_inputs_stay(dit: DiT) -> None:
    given = inputs(motion=draw(1, 16, 19, SIDE, SIDE))
    before = {name: value.clone() for name, value in given.items()}
    calls: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in dit.named_modules()
        if isinstance(module, AudioEncoder | FramePacker)
    ]
    ready = dit.once(given)
    x = draw(1, 16, FRAMES, SIDE, SIDE)
    outs = [dit(x, torch.tensor([[t, 0.0]]), **ready) for t in (900.0, 900.0, 100.0)]
    for handle in handles:
        handle.remove()
    assert len(calls) == 2
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert given.keys() == before.keys()
    assert all(torch.equal(given[name], before[name]) for name in given)


# ---------------------------------------------------------------- sound


def test_a_latent_frame_hears_its_four_frames_and_five_before_and_nothing_later() -> None:
    encoder = AudioEncoder(SpeechConfig(audio_dim=6, audio_states=3), 16).double().requires_grad_(False)
    states = draw(1, 3, 6, 32, dtype=torch.float64)
    plain, _ = encoder(states)
    assert plain.shape == (1, 8, 5, 16)
    heard: dict[int, list[int]] = {i: [] for i in range(8)}
    for j in range(1, 32):  # the first frame stands for all before it
        louder = states.clone()
        louder[..., j] += 1
        moved = (encoder(louder)[0] - plain).abs().amax((0, 2, 3)) > 1e-12
        for i in moved.nonzero().flatten().tolist():
            heard[i].append(j)
    for i in range(8):
        assert heard[i] == list(range(max(1, 4 * i - 5), 4 * i + 4))


def test_sound_moves_the_frame_it_belongs_to_first(dit: DiT) -> None:
    """One block hears before frames mix: with the later blocks' hearing taken away, only frame 2 differs after it."""
    given = inputs()
    louder = {**given, "audio": given["audio"].clone()}
    louder["audio"][..., 11] += 3
    after: list[Tensor] = []
    handle = dit.blocks[0].register_forward_hook(lambda module, args, out: after.append(out.clone()))
    run(dit, given), run(dit, louder)
    handle.remove()
    moved = (after[0] - after[1]).abs().amax((0, 2)).unflatten(0, (FRAMES + 1, -1)).amax(1) > 0
    assert moved.tolist() == [False, False, True, False]
