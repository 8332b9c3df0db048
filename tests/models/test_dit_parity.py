"""Our transformer against diffusers' WanTransformer3DModel: same random weights, same numbers.

The weights are "quiet": what enters each norm has a variance near its eps, so that a wrong eps shows (with ordinary
weights, and in the golden data, it is lost in rounding).  The mutations at the end prove that it would.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wanloom.models.config import DiTConfig
from wanloom.models.dit import DiT, init_for_training
from wanloom.models.layers import Block

diffusers = pytest.importorskip("diffusers")

RELATIVE = 1e-5  # ||a - b|| / ||b||; rounding alone gives about 1e-6
WORST = 5e-5  # max|a - b| / max|b|

T2V = DiTConfig(dim=96, ffn_dim=160, heads=3, layers=2, in_channels=16, out_channels=16, text_dim=40, text_len=24)
I2V_21 = replace(T2V, in_channels=36, image_dim=32, text_len=512)  # diffusers takes the last 512 rows for the text
CONFIGS = {
    "t2v": T2V,
    "i2v": replace(T2V, in_channels=36),
    "ti2v": replace(T2V, in_channels=48, out_channels=48, heads=1, dim=128),
    "i2v with a picture": I2V_21,
    "first and last frame": replace(I2V_21, image_positions=514),
}
GRIDS = ((1, 2, 2), (3, 4, 6), (2, 6, 10))  # frames, height, width of the latents

RULES = (  # official -> diffusers (spec core 2.5), applied in order
    (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"^time_projection\.1", "condition_embedder.time_proj"),
    (r"^head\.modulation", "scale_shift_table"),
    (r"^head\.head", "proj_out"),
    (r"^img_emb\.proj\.0", "condition_embedder.image_embedder.norm1"),
    (r"^img_emb\.proj\.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"^img_emb\.proj\.3", "condition_embedder.image_embedder.ff.net.2"),
    (r"^img_emb\.proj\.4", "condition_embedder.image_embedder.norm2"),
    (r"^img_emb\.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    (r"(^blocks\.\d+)\.modulation", r"\1.scale_shift_table"),
    (r"\.norm3\.", ".norm2."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])\.(weight|bias)", r".to_\1.\2"),
    (r"\.o\.(weight|bias)", r".to_out.0.\1"),
    (r"\.([kv])_img\.", r".add_\1_proj."),
    (r"\.norm_k_img\.", ".norm_added_k."),
    (r"\.ffn\.0", ".ffn.net.0.proj"),
    (r"\.ffn\.2", ".ffn.net.2"),
)


def diffusers_name(name: str) -> str:
    for pattern, target in RULES:
        name = re.sub(pattern, target, name)
    return name


def quiet(config: DiTConfig) -> DiT:
    """Random weights with everything that enters a norm scaled down to where eps counts."""
    generator = torch.Generator().manual_seed(3)
    dit = init_for_training(DiT(config), generator)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)  # norms
            elif name.endswith(("bias", "emb_pos")):
                parameter.copy_(0.05 * noise)
        dit.head.head.weight.normal_(0, 0.1, generator=generator)
        small: list[tuple[Any, float]] = [(dit.patch_embedding, 3e-3)]
        for block in dit.blocks:
            assert isinstance(block, Block)
            small += [(block.ffn[2], 1e-2)]
            block.norm3.bias.mul_(20)  # norm_q after it takes out a scale, so only a bias lets an eps of norm3 through
            for attention in (block.self_attn, block.cross_attn):
                small += [(attention.q, 3e-3), (attention.k, 3e-3), (attention.o, 1e-2)]
            if config.image_dim is not None:
                small += [(block.cross_attn.k_img, 3e-3)]
        if config.image_dim is not None:
            small += [(dit.img_emb.proj[3], 3e-3)]
            if config.image_positions is not None:
                dit.img_emb.emb_pos.mul_(2e-2)
        for layer, scale in small:
            layer.weight.mul_(scale)
            layer.bias.mul_(10 * scale)
    return dit.eval()


def theirs(dit: DiT) -> Any:
    c = dit.config
    model = diffusers.WanTransformer3DModel(
        patch_size=c.patch, num_attention_heads=c.heads, attention_head_dim=c.head_dim, in_channels=c.in_channels,
        out_channels=c.out_channels, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim,
        num_layers=c.layers, eps=c.eps, image_dim=c.image_dim, added_kv_proj_dim=c.dim if c.image_dim else None,
        rope_max_seq_len=1024, pos_embed_seq_len=c.image_positions,
    )  # fmt: skip
    model.load_state_dict({diffusers_name(name): tensor for name, tensor in dit.state_dict().items()})
    return model.eval()


def request(config: DiTConfig, grid: tuple[int, int, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(grid))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    out: dict[str, Any] = {
        "x": draw(1, config.out_channels, *grid),
        "context": draw(1, config.text_len, config.text_dim),
    }
    if config.in_channels > config.out_channels:
        out["y"] = draw(1, config.in_channels - config.out_channels, *grid)
    if config.image_dim is not None:
        out["image"] = 3e-3 * draw(1, config.image_positions or 257, config.image_dim)
    if config.out_channels == 48:  # a clean first frame
        out["t"] = torch.tensor([[612.0, 0.0]])
        out["group"] = torch.tensor([1] + [0] * (grid[0] - 1))
    else:
        out["t"] = torch.tensor([[612.0]])
    return out


def ask_theirs(model: Any, dit: DiT, ask: dict[str, Any]) -> Tensor:
    x = ask["x"] if "y" not in ask else torch.cat((ask["x"], ask["y"]), 1)
    t = ask["t"][:, 0]
    if "group" in ask:
        per_frame = (x.shape[3] // 2) * (x.shape[4] // 2)
        t = ask["t"][:, ask["group"].repeat_interleave(per_frame)]
    image = ask.get("image")
    if image is not None and dit.config.image_positions is not None:
        image = image.view(2, 257, -1)
    with torch.no_grad():
        out: Tensor = model(
            hidden_states=x, timestep=t, encoder_hidden_states=ask["context"], encoder_hidden_states_image=image
        ).sample
    return out


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_output_is_diffusers(name: str) -> None:
    dit = quiet(CONFIGS[name])
    model = theirs(dit)
    for grid in GRIDS:
        ask = request(dit.config, grid)
        ours, expected = dit(**ask), ask_theirs(model, dit, ask)
        assert relative(ours, expected) <= RELATIVE
        assert (ours - expected).abs().max() <= WORST * expected.abs().max()


@torch.no_grad()
def test_rounding_is_as_near_to_float64_as_diffusers() -> None:
    dit = quiet(T2V)
    ask = request(T2V, (3, 4, 6))
    exact = copy.deepcopy(dit).double()(**{k: v.double() for k, v in ask.items()})
    assert relative(dit(**ask), exact) <= max(1e-6, relative(ask_theirs(theirs(dit), dit, ask), exact))


# ---------------------------------------------------------------- mutations


def _each_block(change: Callable[[Block], None]) -> Callable[[DiT], None]:
    def mutate(dit: DiT) -> None:
        for block in dit.blocks:
            assert isinstance(block, Block)
            change(block)

    return mutate


def _eps(path: str, eps: float = 1e-5) -> Callable[[DiT], None]:
    """Another eps for a norm: `path` from the block, or from the whole model when it starts with a dot."""

    def change(root: nn.Module) -> None:
        for part in path.strip(".").split(".")[:-1]:
            root = getattr(root, part)
        last = path.rsplit(".", 1)[-1]
        target = root if last == "" else getattr(root, last)
        assert target.eps != eps
        target.eps = eps

    return change if path.startswith(".") else _each_block(change)  # type: ignore[return-value]


def _block_eps(block: Block) -> None:
    block.eps = 1e-5


def _erf(block: Block) -> None:
    block.ffn[1] = nn.GELU()


def _tanh_for_pictures(dit: DiT) -> None:
    dit.img_emb.proj[2] = nn.GELU("tanh")


MUTATIONS: dict[str, tuple[str, Callable[[DiT], None]]] = {
    "eps of the modulated norms": ("t2v", _each_block(_block_eps)),
    "eps of norm3": ("t2v", _eps("norm3")),
    "eps of the head": ("t2v", _eps(".head")),
    "eps of self norm_q": ("t2v", _eps("self_attn.norm_q")),
    "eps of self norm_k": ("t2v", _eps("self_attn.norm_k")),
    "eps of cross norm_q": ("t2v", _eps("cross_attn.norm_q")),
    "eps of cross norm_k": ("t2v", _eps("cross_attn.norm_k")),
    "eps of norm_k_img": ("i2v with a picture", _eps("cross_attn.norm_k_img")),
    "eps of the first picture norm": ("i2v with a picture", _eps(".img_emb.proj.0", 1e-6)),
    "eps of the last picture norm": ("i2v with a picture", _eps(".img_emb.proj.4", 1e-6)),
    "GELU of the feed-forward": ("t2v", _each_block(_erf)),
    "GELU of the picture branch": ("i2v with a picture", _tanh_for_pictures),
}


@pytest.mark.parametrize("name", MUTATIONS)
@torch.no_grad()
def test_a_wrong_detail_exceeds_the_tolerance_of_parity(name: str) -> None:
    config, mutate = MUTATIONS[name]
    dit = quiet(CONFIGS[config])
    ask = request(dit.config, (3, 4, 6))
    right = dit(**ask)
    mutate(dit)
    assert relative(dit(**ask), right) > RELATIVE
