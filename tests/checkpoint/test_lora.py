"""LoRA files: what is read, what is refused, and that a merged model computes what the low-rank branch does."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wanloom.checkpoint.lora import merge, read_lora
from wanloom.errors import InputError
from wanloom.models.adapters import build_dit
from wanloom.models.config import AnimateConfig, DiTConfig
from wanloom.models.dit import DiT, init_for_training
from weight_files import zip_with_pickle

SIZES = DiTConfig(
    dim=24, ffn_dim=40, heads=2, layers=2, in_channels=36, text_dim=10, text_len=5, freq_dim=32, image_dim=16,
    animate=AnimateConfig(layers=(1,), face_dim=8, motion_dim=12, directions=3, widths=(4, 4, 8)),
)  # fmt: skip
RANK = 3
Values = dict[str, Tensor]


def refused(code: str, call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code, caught.value
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.fixture
def dit() -> DiT:
    made = init_for_training(build_dit(SIZES), torch.Generator().manual_seed(1))
    with torch.no_grad():
        made.head.head.weight.normal_(generator=torch.Generator().manual_seed(2))
    return made.eval().requires_grad_(False)


def targets(dit: DiT) -> list[str]:
    """The layers of the published LoRA: every Linear of the blocks but those of the face."""
    found = (name for name, layer in dit.named_modules() if isinstance(layer, torch.nn.Linear))
    return [name for name in found if name.startswith("blocks.") and ".after." not in name]


def change(dit: DiT, seed: int = 3) -> Values:
    """PEFT's tensors of a change of every target, without wrapper."""
    draw = torch.Generator().manual_seed(seed)
    layers = dict(dit.named_modules())
    out: Values = {}
    for name in targets(dit):
        weight = layers[name].weight
        assert isinstance(weight, Tensor)
        rows, columns = weight.shape
        out[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw) / columns**0.5
        out[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=draw) / RANK**0.5
    return out


def as_published(values: Values) -> Values:
    """With the wrapper and the adapter's name that PEFT puts in."""
    return {f"base_model.model.{name.replace('.weight', '.default.weight')}": v for name, v in values.items()}


def forward(dit: DiT) -> Tensor:
    draw = torch.Generator().manual_seed(9)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    given = {
        "context": noise(1, 5, 10), "image": noise(1, 257, 16), "y": noise(1, 20, 3, 4, 4),
        "face": noise(1, 3, 5, 16, 16).clamp(-1, 1), "pose": noise(1, 16, 2, 4, 4),
    }  # fmt: skip
    with torch.no_grad():
        return dit(noise(1, 16, 3, 4, 4), torch.tensor([[500.0]]), **dit.once(given))


def with_branches(dit: DiT, values: Values, scale: float) -> Tensor:
    """The forward with the low-rank branches beside the layers."""
    handles = []
    for name in targets(dit):
        down, up = values[f"{name}.lora_A.weight"], values[f"{name}.lora_B.weight"]
        handles.append(
            dit.get_submodule(name).register_forward_hook(
                lambda _, args, out, down=down, up=up: out + scale * (args[0] @ down.T) @ up.T
            )
        )
    out = forward(dit)
    for handle in handles:
        handle.remove()
    return out


def test_the_published_count_of_layers_and_parameters() -> None:
    with torch.device("meta"):
        dit = build_dit(DiTConfig(in_channels=36, image_dim=1280, animate=AnimateConfig()))
    layers = dict(dit.named_modules())
    sizes = [layers[name].weight.shape for name in targets(dit)]  # type: ignore[union-attr]
    assert len(sizes) == 480
    assert sum(128 * (rows + columns) for rows, columns in sizes) == 718_274_560  # type: ignore[misc]


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("container", ["ckpt", "safetensors"])
def test_both_namings_are_read_from_both_containers(tmp_path: Path, dit: DiT, container: str, published: bool) -> None:
    values = change(dit)
    stored = as_published(values) if published else values
    path = tmp_path / f"relighting_lora.{container}"
    if container == "ckpt":
        torch.save({"state_dict": stored}, path)
    else:
        save_file(stored, path)
    lora = read_lora(path)
    assert sorted(lora) == sorted(targets(dit))
    for name, (down, up, scale) in lora.items():
        assert torch.equal(down, values[f"{name}.lora_A.weight"]) and torch.equal(up, values[f"{name}.lora_B.weight"])
        assert scale == 1.0


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_a_merged_model_computes_what_the_branches_do(
    tmp_path: Path, dit: DiT, strength: float, alpha: float | None
) -> None:
    values = change(dit)
    alphas = {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha) for name in targets(dit)}
    torch.save({"state_dict": values | alphas}, tmp_path / "lora.ckpt")
    scale = 1.0 if alpha is None else alpha / RANK
    plain, expected = forward(dit), with_branches(dit, values, strength * scale)
    lora = read_lora(tmp_path / "lora.ckpt")
    assert merge(dit, lora, strength) == 24
    found = forward(dit)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (found - plain).norm() > 0.1 * plain.norm(), "the change is no small one"
    merge(dit, lora, -strength)
    assert (forward(dit) - plain).norm() < 1e-5 * plain.norm()


def test_the_sum_is_made_in_float32_and_rounded_once(dit: DiT) -> None:
    name = targets(dit)[0]
    dit.to(torch.bfloat16)
    weight = dit.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    down, up = torch.full((1, 24), 1e-4), torch.full((24, 1), 1.0)
    expected = (weight.float() + 1e-4).bfloat16()
    merge(dit, {name: (down, up, 1.0)})
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected)


def test_what_does_not_fit_is_refused_and_nothing_is_changed(dit: DiT) -> None:
    name, *others = targets(dit)
    right = (torch.ones(1, 24), torch.ones(24, 1), 1.0)
    before = {key: value.clone() for key, value in dit.state_dict().items()}
    for key in ("blocks.7.self_attn.q", "blocks.0.norm3", "blocks.0.self_attn.norm_q", "nothing"):
        assert key in refused("E4024", lambda key=key: merge(dit, {name: right, key: right}))  # type: ignore[misc]
    wrong = (torch.ones(1, 25), torch.ones(24, 1), 1.0)
    assert "[24, 25]" in refused("E4024", lambda: merge(dit, {others[0]: right, name: wrong}))
    assert all(torch.equal(before[key], value) for key, value in dit.state_dict().items())


A, B = torch.ones(2, 4), torch.ones(5, 2)
DAMAGED: dict[str, tuple[Values, str, str]] = {
    "a stranger": ({"x.lora_A.weight": A, "x.lora_B.weight": B, "x.weight": A}, "E4024", "x.weight"),
    "another naming": ({"x.lora_down.weight": A, "x.lora_up.weight": B}, "E4024", "PEFT"),
    "whole numbers": ({"x.lora_A.weight": A.long(), "x.lora_B.weight": B}, "E4024", "I64"),
    "one half": ({"x.lora_A.weight": A}, "E4024", "one half"),
    "two ranks": ({"x.lora_A.weight": A, "x.lora_B.weight": B.T.contiguous()}, "E4024", "rank"),
    "a vector": ({"x.lora_A.weight": torch.ones(2), "x.lora_B.weight": B}, "E4024", "rank"),
    "twice": (
        {"x.lora_A.weight": A, "base_model.model.x.lora_A.weight": A, "x.lora_B.weight": B}, "E4024", "twice",
    ),
    "many alphas": ({"x.lora_A.weight": A, "x.lora_B.weight": B, "x.alpha": torch.ones(3)}, "E4024", "alpha"),
    "not finite": ({"x.lora_A.weight": A / 0, "x.lora_B.weight": B}, "E4010", "lora_A"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_lora_is_named(tmp_path: Path, name: str) -> None:
    values, code, word = DAMAGED[name]
    torch.save({"state_dict": values}, tmp_path / "x.ckpt")
    message = refused(code, lambda: read_lora(tmp_path / "x.ckpt"))
    assert word in message and "x.ckpt" in message


def test_pefts_own_directory_says_its_alpha(tmp_path: Path) -> None:
    save_file(as_published({"x.lora_A.weight": A, "x.lora_B.weight": B}), tmp_path / "adapter_model.safetensors")
    config = tmp_path / "adapter_config.json"
    config.write_text('{"lora_alpha": 8, "r": 2, "use_dora": false}')
    assert read_lora(tmp_path)["x"][2] == read_lora(tmp_path / "adapter_model.safetensors")["x"][2] == 4.0
    for text, word in (('{"lora_alpha": 8, "use_rslora": true}', "use_rslora"), ('{"r": 2}', "lora_alpha")):
        config.write_text(text)
        assert word in refused("E4024", lambda: read_lora(tmp_path))


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    bad = zip_with_pickle(tmp_path / "bad.ckpt", pickle.dumps({"state_dict": {"x": print}}))
    assert "print" in refused("E4003", lambda: read_lora(bad))
    assert "none.ckpt" in refused("E4001", lambda: read_lora(tmp_path / "none.ckpt"))
