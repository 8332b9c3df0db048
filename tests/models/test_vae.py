"""The VAE: published names, the reference's numbers and what breaks them, and streaming that changes nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import wanloom.models.vae as module
from wanloom.models.config import VAE_21, VAE_22, VaeConfig
from wanloom.models.vae import CausalVae, ChannelNorm, Tape, Up, init_for_training

PUBLISHED = {  # manifest -> config, parameters, tensors, sha256 of its sorted "name shape" lines
    "wan2.1-vae": (VAE_21, 126_892_531, 194, "6d12bd5199d9dcd5"),
    "wan2.2-vae": (VAE_22, 704_688_668, 196, "d6eb318580d7756b"),
}
GOLDEN = {  # name in components.safetensors -> config, checkpoint, file
    "vae21": (replace(VAE_21, dim=8, decoder_dim=8), "Wan2.2-T2V-A14B", "Wan2.1_VAE.pth"),
    "vae22": (replace(VAE_22, dim=8, decoder_dim=8), "Wan2.2-TI2V-5B", "Wan2.2_VAE.pth"),
}
SMALL = {
    "2.1": replace(VAE_21, dim=8, decoder_dim=8),
    "2.2": replace(VAE_22, dim=8, decoder_dim=8, z=6, mean=(0.1,) * 6, std=(0.9,) * 6),
    "2.1, one block": replace(VAE_21, dim=8, decoder_dim=8, multipliers=(1, 1, 2, 4), blocks=1),
    "2.2, one block": replace(VAE_22, dim=8, decoder_dim=8, multipliers=(1, 1, 2, 4), blocks=1),
}
TOLERANCE = 1e-5  # relative, against the reference in float32; rounding alone gives 1e-6


def small(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> CausalVae:
    """Matrices of unit gain, gammas near one, biases not zero: nothing may hide."""
    vae = CausalVae(SMALL[name])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in vae.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if key.endswith("gamma"):
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(0.1 * noise if p.dim() == 1 else noise / p[0].numel() ** 0.5)
    return vae.to(dtype)


def clip(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def pieces(x: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """x [B, C, F, H, W] cut in time."""
    assert sum(lengths) == x.shape[2]
    return [x[:, :, a:b] for a, b in pairwise(accumulate(lengths, initial=0))]


def decode_in(vae: CausalVae, z: Tensor, lengths: tuple[int, ...]) -> Tensor:
    state, out = None, []
    for piece in pieces(z, lengths):
        video, state = vae.decode(piece, state)
        out.append(video)
    return torch.cat(out, dim=2)


# ---------------------------------------------------------------- sizes


def shapes(config: VaeConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in CausalVae(config).state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_count_are_the_published_models(name: str) -> None:
    config, parameters, tensors, digest = PUBLISHED[name]
    got = shapes(config)
    assert sum(torch.Size(shape).numel() for shape in got.values()) == parameters
    assert len(got) == tensors
    lines = "\n".join(f"{key} {shape}" for key, shape in sorted(got.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_manifests(name: str, golden: Path) -> None:
    path = golden.parent / "spec" / "manifests" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no manifests beside {golden.name}")
    assert shapes(PUBLISHED[name][0]) == json.loads(path.read_text())["tensors"]


@pytest.mark.parametrize(
    "config",
    [
        *SMALL.values(),
        replace(VAE_21, dim=6, decoder_dim=4, multipliers=(1, 2), temporal=(True,), z=16),
        replace(VAE_22, dim=4, decoder_dim=8, multipliers=(1, 2, 2), temporal=(True, False)),
    ],
    ids=str,
)
@torch.no_grad()
def test_any_config_makes_the_sizes_of_its_stride(config: VaeConfig) -> None:
    vae = CausalVae(config)
    time, height, width = config.stride
    video = clip(1, 3, 1 + 2 * time, 2 * height, 3 * width)
    z, _ = vae.encode(video)
    assert z.shape == (1, config.z, 3, 2, 3)
    assert vae.decode(z)[0].shape == video.shape


# ---------------------------------------------------------------- the reference's numbers


def golden_vae(golden: Path, name: str) -> CausalVae:
    """A small checkpoint of the golden set, its weights made anew from their names."""
    config, model, file = GOLDEN[name]
    spec = importlib.util.spec_from_file_location("materialize", golden / "materialize.py")
    assert spec is not None and spec.loader is not None
    materialize: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(materialize)
    entry = json.loads((golden / "checkpoints.json").read_text())[model][file]
    with torch.device("meta"):
        vae = CausalVae(config)
    vae.load_state_dict(materialize.state_dict(entry["tensors"], entry["salt"]), assign=True)
    return vae


def golden_errors(golden: Path, name: str) -> tuple[float, float]:
    """Relative errors of encode and decode against the reference."""
    parts = load_file(golden / "components.safetensors")
    vae = golden_vae(golden, name)
    with torch.no_grad():
        z, _ = vae.encode(parts[f"{name}_input"][None])
        video, _ = vae.decode(parts[f"{name}_latent"][None])
    return relative(z[0], parts[f"{name}_latent"]), relative(video[0], parts[f"{name}_decoded"])


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_latents_and_frames_are_the_references(name: str, golden: Path) -> None:
    parts = load_file(golden / "components.safetensors")
    vae = golden_vae(golden, name)
    z, _ = vae.encode(parts[f"{name}_input"][None])
    video, _ = vae.decode(parts[f"{name}_latent"][None])
    for got, expected in ((z[0], parts[f"{name}_latent"]), (video[0], parts[f"{name}_decoded"])):
        assert relative(got, expected) <= TOLERANCE
        assert (got - expected).abs().max() <= 5 * TOLERANCE * expected.abs().max()


def _first_frame_visible(self: Up, x: Tensor, conv: nn.Conv3d, tape: Tape) -> Tensor:
    y = module.interleave(module.conv3d(module.extend(x, 2, tape), conv))
    return y[:, 1:]


def _odd_frames_first(x: Tensor) -> Tensor:
    return INTERLEAVE(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1))


def _columns_first(video: Tensor, patch: int) -> Tensor:
    return FOLD(video.transpose(3, 4), patch).transpose(2, 3)


def _zero_frame_behind(x: Tensor, channels: int, ft: int, fs: int) -> Tensor:
    return AVERAGE_DOWN(F.pad(x, (0, 0, 0, 0, 0, 0, 0, -x.shape[1] % ft)), channels, ft, fs)


def _last_frame_dropped(x: Tensor, channels: int, ft: int, fs: int, *, first: bool) -> Tensor:
    y = DUPLICATE_UP(x, channels, ft, fs, first=False)
    return y[:, : y.shape[1] - ft + 1] if first else y


def _padded_above(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 1, padding: int) -> Tensor:
    if stride == 2:
        x = x.roll((1, 1), (2, 3))  # the zero row and column come first
    return CONV2D(x, weight, bias, stride=stride, padding=padding)


INTERLEAVE, FOLD, CONV2D = module.interleave, module.fold, module.conv2d
AVERAGE_DOWN, DUPLICATE_UP = module.average_down, module.duplicate_up
MUTATIONS: dict[str, tuple[Any, str, Any, tuple[str, ...]]] = {  # where, what, wrong form, VAEs that must notice
    "eps of the norm": (ChannelNorm, "eps", 3.0, ("vae21", "vae22")),
    "first frame seen by the others": (Up, "_double_time", _first_frame_visible, ("vae21", "vae22")),
    "odd frames before even ones": (module, "interleave", _odd_frames_first, ("vae21", "vae22")),
    "padding above instead of below": (module, "conv2d", _padded_above, ("vae21", "vae22")),
    "columns before rows in a patch": (module, "fold", _columns_first, ("vae22",)),
    "zero frame behind the clip": (module, "average_down", _zero_frame_behind, ("vae22",)),
    "last frame dropped, not the first": (module, "duplicate_up", _last_frame_dropped, ("vae22",)),
}


@pytest.mark.parametrize(("mutation", "name"), [(m, n) for m, row in MUTATIONS.items() for n in row[3]])
def test_the_golden_figures_notice(mutation: str, name: str, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, what, wrong, _ = MUTATIONS[mutation]
    monkeypatch.setattr(where, what, wrong)
    assert max(golden_errors(golden, name)) > 10 * TOLERANCE


def test_norm_is_the_references_down_to_the_faintest_row() -> None:
    norm = ChannelNorm(12, 3)
    with torch.no_grad():
        norm.gamma.copy_(clip(12, 1, 1, 1))
    rows = clip(4, 12) * torch.tensor([1.0, 1e-8, 1e-13, 0.0])[:, None]  # the last two are below eps = 1e-12
    expected = F.normalize(rows, dim=-1) * 12**0.5 * norm.gamma.flatten()
    torch.testing.assert_close(norm(rows), expected, rtol=2e-6, atol=0)
    out = torch.empty_like(rows)
    with torch.no_grad():
        norm.silu_into(out, rows)
    torch.testing.assert_close(out, F.silu(expected), rtol=2e-6, atol=0)


# ---------------------------------------------------------------- streaming


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@torch.no_grad()
def test_every_legal_chunking_is_the_whole_clip(name: str, dtype: torch.dtype, tolerance: float) -> None:
    vae = small(name, dtype)
    side = 2 * vae.config.stride[1]
    video = clip(2, 3, 13, side, side, dtype=dtype)
    z, _ = vae.encode(video)
    for lengths in ((1, 4, 4, 4), (1, 12), (5, 8), (9, 4), (1, 8, 4)):
        assert relative(torch.cat(list(vae.encode_chunks(pieces(video, lengths))), dim=2), z) <= tolerance, lengths
    whole, _ = vae.decode(z)
    for lengths in ((1, 1, 1, 1), (2, 2), (1, 3), (3, 1), (1, 2, 1)):
        assert relative(decode_in(vae, z, lengths), whole) <= tolerance, lengths
    for latents in (1, 2, 3, 4, 9):
        assert relative(torch.cat(list(vae.decode_chunks(z, latents)), dim=2), whole) <= tolerance, latents


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_a_prefix_in_equal_chunks_is_bit_equal(name: str) -> None:
    vae = small(name)
    side = vae.config.stride[1] * 2
    video = clip(1, 3, 13, side, side)
    long = list(vae.encode_chunks(pieces(video, (1, 4, 4, 4))))
    short = list(vae.encode_chunks(pieces(video[:, :, :9], (1, 4, 4))))
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=False))
    z = torch.cat(long, dim=2)
    frames, fewer = list(vae.decode_chunks(z)), list(vae.decode_chunks(z[:, :, :2]))
    assert all(torch.equal(a, b) for a, b in zip(fewer, frames, strict=False))
    assert [f.shape[2] for f in frames] == [1, 4, 4, 4]


@torch.no_grad()
def test_two_streams_through_one_module_do_not_mix() -> None:
    vae = small("2.2")
    a, b = clip(1, 6, 4, 2, 2, seed=2), clip(1, 6, 4, 2, 2, seed=3)
    alone = torch.cat(list(vae.decode_chunks(a)), dim=2)
    mixed = [x for x, _ in zip(vae.decode_chunks(a), vae.decode_chunks(b), strict=True)]
    assert torch.equal(torch.cat(mixed, dim=2), alone)


@torch.no_grad()
def test_a_state_can_be_used_twice() -> None:
    vae = small("2.1")
    z = clip(1, 16, 3, 2, 2)
    _, state = vae.decode(z[:, :, :1])
    again = [vae.decode(z[:, :, 1:], state)[0] for _ in range(2)]
    assert torch.equal(*again)


@torch.no_grad()
def test_a_stream_lets_go_of_each_tail_when_it_is_read() -> None:
    vae = CausalVae(SMALL["2.1"]).eval().requires_grad_(False)
    state = vae.decode(torch.zeros(1, 16, 1, 2, 2))[1]
    seen = [weakref.ref(tail) for tail in state.tails]
    tape = Tape(state)
    del state
    tape.pull()
    assert seen[0]() is None
    assert seen[1]() is not None


def test_a_later_frame_changes_no_earlier_one() -> None:
    vae = small("2.1")
    video = clip(1, 3, 9, 16, 16)
    other = video.clone()
    other[:, :, 5:] = clip(1, 3, 4, 16, 16, seed=5)
    a, b = vae.encode(video)[0], vae.encode(other)[0]
    assert torch.equal(a[:, :, :2], b[:, :, :2])
    assert relative(a[:, :, 2], b[:, :, 2]) > 0.1


# ---------------------------------------------------------------- one function, several forms


@pytest.mark.parametrize("name", SMALL)
def test_the_form_for_training_is_the_form_for_inference(name: str) -> None:
    vae = small(name, torch.float64)
    side = 2 * vae.config.stride[1]
    video = clip(2, 3, 9, side, side, dtype=torch.float64)
    mu, logvar = vae.moments(video)
    out = vae.render(mu)
    assert mu.requires_grad and logvar.requires_grad and out.requires_grad
    with torch.no_grad():
        assert relative(vae.normalise(mu), vae.encode(video)[0]) <= 1e-12
        assert relative(out.clamp(-1, 1), vae.decode(vae.normalise(mu))[0]) <= 1e-12
    out.square().mean().backward()
    encoder_only = vae.conv1.weight.grad
    assert encoder_only is not None and encoder_only[: vae.config.z].abs().sum() > 0
    missing = [key for key, p in vae.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_a_frozen_vae_passes_gradients_to_the_latents() -> None:
    vae = small("2.2", torch.float64).requires_grad_(False)
    z = clip(1, 6, 2, 2, 2, dtype=torch.float64).requires_grad_()
    step = 1e-6 * clip(1, 6, 2, 2, 2, dtype=torch.float64, seed=4)
    target = clip(1, 3, 5, 32, 32, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((vae.render(z) * target).sum(), z)
    with torch.no_grad():
        change = ((vae.render(z + step) - vae.render(z - step)) * target).sum() / 2
    assert abs((gradient * step).sum() - change) <= 1e-6 * abs(change)


def test_doubling_with_folded_kernels_is_repeating_then_convolving() -> None:
    x, weight, bias = clip(2, 3, 5, 4, 6).double(), clip(7, 6, 3, 3).double(), clip(7).double()
    plain = F.interpolate(x.flatten(0, 1).permute(0, 3, 1, 2), scale_factor=2, mode="nearest-exact")
    plain = F.conv2d(plain, weight, bias, padding=1).permute(0, 2, 3, 1).view(2, 3, 10, 8, 7)
    for form in (module.double_size, module.double_size_folded):
        torch.testing.assert_close(form(x, weight, bias), plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("conv", [nn.Conv3d(4, 6, 3, padding=(0, 1, 1)), nn.Conv3d(4, 4, (3, 1, 1), stride=(2, 1, 1))])
@torch.no_grad()
def test_a_3d_convolution_by_frames_is_the_3d_convolution(conv: nn.Conv3d) -> None:
    conv = conv.double()
    x = clip(1, 7, 5, 6, 4, dtype=torch.float64)
    expected = conv(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    for form in (module.conv3d, module.conv3d_by_frames):
        torch.testing.assert_close(form(x, conv), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("count", [1, 3, 1000])
@torch.no_grad()
def test_the_number_of_pieces_of_a_norm_changes_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_PIECE", 64)
    norm, x = ChannelNorm(16, 3), clip(2, 50, 16)
    norm.pieces = count
    out = torch.empty_like(x)
    norm.silu_into(out, x)
    torch.testing.assert_close(out, F.silu(norm(x)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_clips_of_a_batch_do_not_mix(name: str) -> None:
    vae = small(name)
    side = vae.config.stride[1] * 2
    video = clip(2, 3, 5, side, side)
    z = vae.encode(video)[0]
    out = vae.decode(z)[0]
    for i in (0, 1):
        assert relative(z[i : i + 1], vae.encode(video[i : i + 1])[0]) <= 1e-5
        assert relative(out[i : i + 1], vae.decode(z[i : i + 1])[0]) <= 1e-5


# ---------------------------------------------------------------- dtype, range, errors


@pytest.mark.parametrize("name", ["2.1", "2.2"])
@torch.no_grad()
def test_bfloat16_weights_give_float32_results_near_the_float32_model(name: str) -> None:
    vae, half = small(name), small(name, torch.bfloat16)
    side = vae.config.stride[1] * 2
    video = clip(1, 3, 5, side, side)
    z = vae.encode(video)[0]
    z_half, out_half = half.encode(video)[0], half.decode(z)[0]
    assert z_half.dtype == out_half.dtype == torch.float32
    assert relative(z_half, z) <= 0.03
    assert relative(out_half, vae.decode(z)[0]) <= 0.03


@torch.no_grad()
def test_only_decode_clamps() -> None:
    vae = small("2.1")
    z = 3 * clip(1, 16, 2, 2, 2)
    raw = vae.render(vae.denormalise(z))
    assert raw.abs().max() > 1
    assert torch.equal(vae.decode(z)[0], raw.clamp(-1, 1))


def test_latents_are_normalised_by_the_configs_statistics() -> None:
    vae = small("2.1")
    mu = clip(1, 16, 1, 2, 2)
    mean, std = (torch.tensor(v).view(16, 1, 1, 1) for v in (VAE_21.mean, VAE_21.std))
    torch.testing.assert_close(vae.normalise(mu), (mu - mean) / std)
    torch.testing.assert_close(vae.denormalise(vae.normalise(mu)), mu)


BAD: dict[str, tuple[Callable[[CausalVae], Any], str]] = {
    "four frames at the start": (lambda v: v.encode(clip(1, 3, 4, 16, 16)), "1 \\+ 4k frames at the start"),
    "no frame": (lambda v: v.encode(clip(1, 3, 0, 16, 16)), "0 frames"),
    "five frames later": (
        lambda v: v.encode(clip(1, 3, 5, 16, 16), v.encode(clip(1, 3, 1, 16, 16))[1]),
        "4k frames after its start",
    ),
    "height not a multiple": (lambda v: v.encode(clip(1, 3, 1, 12, 16)), "multiples of 8"),
    "one channel": (lambda v: v.encode(clip(1, 1, 1, 16, 16)), r"\[B, 3, F, H, W\]"),
    "latents of another VAE": (lambda v: v.decode(clip(1, 48, 1, 2, 2)), r"\[B, 16, T >= 1, h, w\]"),
    "chunks of nothing": (lambda v: list(v.decode_chunks(clip(1, 16, 1, 2, 2), 0)), "at least 1"),
}


@pytest.mark.parametrize("case", BAD)
@torch.no_grad()
def test_a_wrong_size_is_refused_with_what_is_possible(case: str) -> None:
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call(small("2.1"))


# ---------------------------------------------------------------- start of training


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_before_training_a_still_clip_stays_still(name: str) -> None:
    vae = CausalVae(SMALL[name]).double()
    init_for_training(vae, torch.Generator().manual_seed(0))
    side = 2 * vae.config.stride[1]
    still = clip(1, 3, 1, side, side, dtype=torch.float64).expand(-1, -1, 9, -1, -1)
    mu, logvar = vae.moments(still)
    out = vae.render(mu[:, :, 1:2].expand(-1, -1, 3, -1, -1))
    assert relative(mu[:, :, 1], mu[:, :, 2]) <= 1e-12
    assert relative(out[:, :, 1:5], out[:, :, 5:]) <= 1e-12
    if not vae.config.residual:  # the shortcuts of 2.2 have no weights: they treat the first frame and sub-frames apart
        assert relative(mu, mu[:, :, :1].expand_as(mu)) <= 1e-12
        assert relative(out, out[:, :, :1].expand_as(out)) <= 1e-12
    assert 0.1 <= mu.std() <= 2 and 0.1 <= logvar.std() <= 2 and 0.1 <= out.std() <= 2


@torch.no_grad()
def test_the_start_of_training_is_a_function_of_the_generator() -> None:
    first, second, other = (CausalVae(SMALL["2.2"]) for _ in range(3))
    for vae, seed in ((first, 7), (second, 7), (other, 8)):
        init_for_training(vae, torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.encoder.conv1.weight, other.encoder.conv1.weight)
