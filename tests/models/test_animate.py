"""The parts of animate: names, golden numbers of the reference, parity with diffusers, what is computed once."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wanloom.checkpoint.names import get_format
from wanloom.models.adapters import build_dit
from wanloom.models.adapters.animate import Animate, Blur, MotionEncoder
from wanloom.models.config import AnimateConfig, DiTConfig
from wanloom.models.dit import DiT


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def motion_encoder(dit: DiT) -> MotionEncoder:
    part = dit.prepare[0]
    assert isinstance(part, Animate)
    return part.motion_encoder


def test_tensors_are_the_manifest(golden: Path) -> None:
    path = golden.parent / "spec" / "manifests" / "wan2.2-animate-14b-dit.json"
    if not path.is_file():
        pytest.skip(f"no manifests beside {golden.name}")
    with torch.device("meta"):
        module = build_dit(DiTConfig(in_channels=36, image_dim=1280, animate=AnimateConfig()))
    state = module.state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == json.loads(path.read_text())["tensors"]
    assert sum(p.numel() for p in module.parameters()) == 17_274_816_884


def test_blurring_keeps_an_even_picture_and_spreads_a_dot() -> None:
    even = Blur(2)(torch.ones(1, 2, 8, 8))
    assert even.shape == (1, 2, 9, 9)
    torch.testing.assert_close(even[:, :, 2:-2, 2:-2], torch.ones(1, 2, 5, 5))
    dot = torch.zeros(1, 1, 8, 8)
    dot[0, 0, 4, 4] = 64
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    torch.testing.assert_close(Blur(1)(dot)[0, 0, 2:6, 2:6], row[:, None] * row)


def test_directions_are_frozen() -> None:
    """A QR that chose other signs would turn expressions into others: these are LAPACK's."""
    encoder = MotionEncoder(AnimateConfig())
    with torch.no_grad():
        weight = torch.linspace(-1, 1, 512 * 20).sin().view(512, 20) * torch.linspace(1, 3, 20).cos()
        encoder.direction.copy_(weight + torch.eye(512, 20))
        q, r = torch.linalg.qr(encoder.direction + 1e-8)
    assert (r.diagonal() < 0).all()  # Householder's: the first entry of each reflected column is negative
    torch.testing.assert_close(q.T @ q, torch.eye(20), rtol=0, atol=1e-5)
    assert q[0, 0] < 0


# ---------------------------------------------------------------- the reference


def test_dit_and_motion_are_those_of_the_reference(golden: Path) -> None:
    spec = importlib.util.spec_from_file_location("materialize", golden / "materialize.py")
    assert spec is not None and spec.loader is not None
    materialize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(materialize)
    case, data = json.loads((golden / "animate_dit.json").read_text()), load_file(golden / "animate_dit.safetensors")
    sizes = case["config"]
    dit = build_dit(
        DiTConfig(
            dim=sizes["dim"], ffn_dim=sizes["ffn_dim"], heads=sizes["num_heads"], layers=sizes["num_layers"],
            in_channels=36, text_dim=sizes["text_dim"], image_dim=1280, animate=AnimateConfig(layers=(0,)),
        )
    )  # fmt: skip
    names = [name for name in case["tensors"] if "kernel" not in name]
    state = {name: materialize.fill(name, case["tensors"][name], case["salt"]) for name in names}
    loaded = dit.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys and all("kernel" in name for name in loaded.missing_keys)

    draw = torch.Generator().manual_seed(case["salt"] + 1)
    for name in ("x", "y", "pose_latents"):
        assert torch.equal(torch.randn(data[name].shape, generator=draw), data[name])
    face = torch.randn(1, 3, 5, 512, 512, generator=draw).clamp(-1, 1)
    with torch.no_grad():
        motion = motion_encoder(dit)(face[0].transpose(0, 1))
        given = dit.once(
            {"context": data["context"][None], "image": data["clip_fea"], "face": face, "pose": data["pose_latents"],
             "y": data["y"][None]}
        )  # fmt: skip
        out = dit(data["x"][None], data["t"].float().view(1, 1), **given)[0]
    assert relative(motion, data["expected_motion"]) <= 3e-6
    assert relative(out, data["expected"]) <= 3e-6
    assert (out - data["expected"]).abs().max() <= 15e-6 * data["expected"].abs().max()


# ---------------------------------------------------------------- diffusers

FROM_DIFFUSERS = {
    r"motion_encoder\.conv_in\.weight": "motion_encoder.enc.net_app.convs.0.0.weight",
    r"motion_encoder\.conv_in\.act_fn\.bias": "motion_encoder.enc.net_app.convs.0.1.bias",
    r"motion_encoder\.res_blocks\.(\d+)\.conv1\.weight": "motion_encoder.enc.net_app.convs.{}.conv1.0.weight",
    r"motion_encoder\.res_blocks\.(\d+)\.conv1\.act_fn\.bias": "motion_encoder.enc.net_app.convs.{}.conv1.1.bias",
    r"motion_encoder\.res_blocks\.(\d+)\.conv2\.weight": "motion_encoder.enc.net_app.convs.{}.conv2.1.weight",
    r"motion_encoder\.res_blocks\.(\d+)\.conv2\.act_fn\.bias": "motion_encoder.enc.net_app.convs.{}.conv2.2.bias",
    r"motion_encoder\.res_blocks\.(\d+)\.conv_skip\.weight": "motion_encoder.enc.net_app.convs.{}.skip.1.weight",
    r"motion_encoder\.conv_out\.weight": "motion_encoder.enc.net_app.convs.8.weight",
    r"motion_encoder\.motion_synthesis_weight": "motion_encoder.dec.direction.weight",
}


def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' state dict under the published names."""
    common = get_format("dit", "diffusers")
    state: dict[str, Tensor] = {}
    for name, value in theirs.items():
        if "blur_kernel" in name:
            continue
        if (found := common.official(name)) is not None:
            state[found[0]] = value
            continue
        for pattern, target in FROM_DIFFUSERS.items():
            if match := re.fullmatch(pattern, name):
                block = int(match[1]) + 1 if match.groups() else ""
                state[target.format(block)] = value.view(1, -1, 1, 1) if name.endswith("act_fn.bias") else value
                break
        else:
            name = name.replace("motion_encoder.motion_network.", "motion_encoder.enc.fc.")
            name = re.sub(r"face_encoder\.(conv\w+)\.", r"face_encoder.\1.conv.", name)
            name = re.sub(r"face_adapter\.(\d+)\.to_q", r"face_adapter.fuser_blocks.\1.linear1_q", name)
            name = re.sub(r"face_adapter\.(\d+)\.to_out", r"face_adapter.fuser_blocks.\1.linear2", name)
            name = re.sub(r"face_adapter\.(\d+)\.norm_([qk])", r"face_adapter.fuser_blocks.\1.\2_norm", name)
            state[name] = value
    for i in range(sum(name.endswith("linear1_q.weight") for name in state)):
        for p in ("weight", "bias"):
            halves = [state.pop(f"face_adapter.{i}.to_{x}.{p}") for x in "kv"]
            state[f"face_adapter.fuser_blocks.{i}.linear1_kv.{p}"] = torch.cat(halves)
    return state


@pytest.mark.parametrize(("frames", "height", "width"), [(2, 4, 4), (3, 6, 10), (4, 8, 2)])
def test_dit_is_that_of_diffusers(frames: int, height: int, width: int) -> None:
    from diffusers import WanAnimateTransformer3DModel

    torch.manual_seed(frames)
    theirs = WanAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=10, freq_dim=32, ffn_dim=40, num_layers=4, image_dim=16,
        added_kv_proj_dim=24, face_encoder_hidden_dim=8, inject_face_latents_blocks=2, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    dit = build_dit(
        DiTConfig(
            dim=24, ffn_dim=40, heads=2, layers=4, in_channels=36, text_dim=10, freq_dim=32, image_dim=16,
            animate=AnimateConfig(layers=(0, 2), face_dim=8),
        )
    ).eval()  # fmt: skip
    loaded = dit.load_state_dict(ours(theirs.state_dict()), strict=False)
    assert not loaded.unexpected_keys and all("kernel" in name for name in loaded.missing_keys)
    x = torch.randn(1, 36, frames, height, width)
    context, image = torch.randn(1, 512, 10), torch.randn(1, 257, 16)  # it takes the last 512 rows for the text
    pose = torch.randn(1, 16, frames - 1, height, width)
    face = torch.rand(1, 3, 4 * (frames - 1) - 3, 512, 512) * 2 - 1
    with torch.no_grad():
        want = theirs(x, torch.tensor([417]), context, image, pose.clone(), face, return_dict=False)[0]
        given = dit.once({"context": context, "image": image, "pose": pose, "face": face})
        got = dit(x, torch.tensor([[417.0]]), **given)
    assert relative(got, want) <= 1e-5
