"""The transformer: names and sizes of the published models, the reference's numbers, and what breaks them."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wanloom.models.config import DiTConfig
from wanloom.models.dit import DiT, init_for_training, sinusoid
from wanloom.models.layers import PLAIN, Block, context_kv, use_ops
from wanloom.runtime.rows import use_rows

T2V = DiTConfig()
I2V = replace(T2V, in_channels=36)
I2V_21 = replace(I2V, image_dim=1280)
PUBLISHED = {  # manifest -> config, parameters, tensors, sha256 of its sorted "name shape" lines
    "wan2.2-t2v-a14b-dit": (T2V, 14_288_491_584, 1095, "7ca52b13faf083dc"),
    "wan2.2-i2v-a14b-dit": (I2V, 14_288_901_184, 1095, "9dc5a4e7268a050f"),
    "wan2.2-ti2v-5b-dit": (
        replace(T2V, dim=3072, ffn_dim=14336, heads=24, layers=30, in_channels=48, out_channels=48),
        4_999_787_712, 825, "e6aa5b3ad4910537",
    ),
    "wan2.1-t2v-1.3b-dit": (
        replace(T2V, dim=1536, ffn_dim=8960, heads=12, layers=30), 1_418_996_800, 825, "83f3237464a545f0",
    ),
    "wan2.1-t2v-14b-dit": (T2V, 14_288_491_584, 1095, "7ca52b13faf083dc"),
    "wan2.1-i2v-14b-dit": (I2V_21, 16_394_878_784, 1303, "129391da486fe9b9"),
    "wan2.1-flf2v-14b-dit": (replace(I2V_21, image_positions=514), 16_395_536_704, 1304, "bd8c9f752e19444a"),
}  # fmt: skip
SMALL = DiTConfig(dim=64, ffn_dim=96, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=24, text_len=12)
TOLERANCE = 3e-6  # an independent implementation in float32 differs from the reference by 4e-7


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(config: DiTConfig = SMALL, seed: int = 0) -> DiT:
    """A model that has learnt nothing but predicts something."""
    generator = torch.Generator().manual_seed(seed)
    dit = init_for_training(DiT(config), generator)
    with torch.no_grad():
        dit.head.head.weight.normal_(0, 0.1, generator=generator)
    return dit


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---------------------------------------------------------------- sizes


def shapes(config: DiTConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in DiT(config).state_dict().items()}


def fingerprint(tensors: dict[str, list[int]]) -> str:
    lines = "\n".join(f"{name} {shape}" for name, shape in sorted(tensors.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_count_are_the_published_models(name: str) -> None:
    config, parameters, tensors, digest = PUBLISHED[name]
    got = shapes(config)
    assert sum(torch.Size(shape).numel() for shape in got.values()) == parameters
    assert len(got) == tensors
    assert fingerprint(got) == digest


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_manifests(name: str, golden: Path) -> None:
    path = golden.parent / "spec" / "manifests" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no manifests beside {golden.name}")
    assert shapes(PUBLISHED[name][0]) == json.loads(path.read_text())["tensors"]


# ---------------------------------------------------------------- the reference's numbers


def golden_dit(golden: Path, model: str, folder: str) -> DiT:
    """A small checkpoint of the golden set, its weights made anew from their names."""
    spec = importlib.util.spec_from_file_location("materialize", golden / "materialize.py")
    assert spec is not None and spec.loader is not None
    materialize: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(materialize)
    entry = json.loads((golden / "checkpoints.json").read_text())[model][folder]
    c, weights = entry["config"], materialize.state_dict(entry["tensors"], entry["salt"])
    config = DiTConfig(
        dim=c["dim"], ffn_dim=c["ffn_dim"], heads=c["num_heads"], layers=c["num_layers"], in_channels=c["in_dim"],
        out_channels=c["out_dim"], text_len=c["text_len"], text_dim=weights["text_embedding.0.weight"].shape[1],
    )  # fmt: skip
    with torch.device("meta"):
        dit = DiT(config)
    dit.load_state_dict(weights, assign=True)
    return dit


@pytest.fixture
def t2v(golden: Path) -> tuple[DiT, dict[str, Any], Tensor]:
    parts = load_file(golden / "components.safetensors")
    dit = golden_dit(golden, "Wan2.2-T2V-A14B", "low_noise_model")
    request = {"x": parts["dit_t2v_x"][None], "t": torch.tensor([[437.0]]), "context": parts["t5_context"][None]}
    return dit, request, parts["dit_t2v_out"][None]


@torch.no_grad()
def test_t2v_output_is_the_references(t2v: tuple[DiT, dict[str, Any], Tensor]) -> None:
    dit, request, expected = t2v
    got = dit(**request)
    assert relative(got, expected) <= TOLERANCE
    assert (got - expected).abs().max() <= 5 * TOLERANCE * expected.abs().max()


@torch.no_grad()
def test_ti2v_output_with_a_clean_first_frame_is_the_references(golden: Path) -> None:
    parts = load_file(golden / "components.safetensors")
    dit = golden_dit(golden, "Wan2.2-TI2V-5B", ".")
    x = parts["dit_ti2v_x"][None]
    group = torch.tensor([1] + [0] * (x.shape[2] - 1))
    got = dit(x, torch.tensor([[812.0, 0.0]]), parts["t5_ti2v"][None], group=group)[0]
    assert relative(got, parts["dit_ti2v_out"]) <= TOLERANCE
    assert (got - parts["dit_ti2v_out"]).abs().max() <= 5 * TOLERANCE * parts["dit_ti2v_out"].abs().max()


def _blocks(dit: DiT) -> list[Block]:
    return [block for block in dit.blocks if isinstance(block, Block)]


def _gelu_of_ffn(dit: DiT) -> None:
    for block in _blocks(dit):
        block.ffn[1] = nn.GELU()


def _gelu_of_text(dit: DiT) -> None:
    dit.text_embedding[1] = nn.GELU()


def _swap(attention: str) -> Callable[[DiT], None]:
    def mutate(dit: DiT) -> None:
        for block in _blocks(dit):
            part = getattr(block, attention)
            part.q, part.k = part.k, part.q

    return mutate


MUTATIONS: dict[str, Callable[[DiT], None]] = {
    "GELU of the feed-forward": _gelu_of_ffn,
    "GELU of the text": _gelu_of_text,
    "q and k swapped in self-attention": _swap("self_attn"),
    "q and k swapped in cross-attention": _swap("cross_attn"),
}


# A wrong eps of a norm stays below rounding on this data, whose activations are large: see test_dit_parity.
@pytest.mark.parametrize("name", MUTATIONS)
@torch.no_grad()
def test_a_wrong_detail_exceeds_the_tolerance(name: str, t2v: tuple[DiT, dict[str, Any], Tensor]) -> None:
    dit, request, expected = t2v
    mutant = copy.deepcopy(dit)
    MUTATIONS[name](mutant)
    assert relative(mutant(**request), expected) > TOLERANCE


@torch.no_grad()
def test_a_timestep_that_is_not_cut_exceeds_the_tolerance(t2v: tuple[DiT, dict[str, Any], Tensor]) -> None:
    dit, request, expected = t2v
    assert relative(dit(**{**request, "t": torch.tensor([[437.5]])}), expected) > TOLERANCE


# ---------------------------------------------------------------- behaviour


def test_time_embedding_gives_the_published_vector() -> None:
    vector = sinusoid(torch.tensor([[999.0]]), 256)[0, 0]
    cos, sin = (0.99964985, 0.96378248, -0.39899176, 0.70482050), (-0.02646075, -0.26668958, -0.91695451, 0.70938570)
    torch.testing.assert_close(vector[:4], torch.tensor(cos, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(vector[128:132], torch.tensor(sin, dtype=torch.float64), rtol=0, atol=1e-8)


@torch.no_grad()
def test_a_batch_is_its_samples() -> None:
    dit, x, text = small().double(), draw(3, 4, 2, 4, 6).double(), draw(3, 5, 24, seed=1).double()
    t, group = torch.tensor([[900.0, 0.0], [500.0, 10.0], [3.5, 1.0]]), torch.tensor([1, 0])
    together = dit(x, t, text, group=group)
    for i in range(3):
        alone = dit(x[i : i + 1], t[i : i + 1], text[i : i + 1], group=group)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_rows_that_frames_share_equal_one_row_per_frame() -> None:
    dit, x, text = small().double(), draw(1, 4, 3, 4, 6).double(), draw(1, 5, 24, seed=1).double()
    shared = dit(x, torch.tensor([[700.0, 0.0]]), text, group=torch.tensor([1, 0, 0]))
    each = dit(x, torch.tensor([[0.0, 700.0, 700.0]]), text, group=torch.arange(3))
    torch.testing.assert_close(shared, each, rtol=1e-12, atol=1e-12)
    plain = dit(x, torch.tensor([[700.0]]), text)
    torch.testing.assert_close(plain, dit(x, torch.tensor([[700.0, 0.0]]), text), rtol=1e-12, atol=1e-12)
    assert relative(shared, plain) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("image_dim", [None, 16])
def test_what_blocks_read_is_made_once_and_changes_no_bit(image_dim: int | None, rows: int | None) -> None:
    dit = small(replace(SMALL, image_dim=image_dim))
    x, given = draw(2, 4, 2, 4, 6), {"context": draw(2, 5, 24, seed=1)}
    if image_dim is not None:
        given["image"] = draw(2, 257, image_dim, seed=2)
    if rows is not None:
        use_rows(dit, rows)
    times = [torch.tensor([[t]]).expand(2, 1) for t in (900.0, 300.0)]
    wanted = [dit(x, t, **dit.once(given)) for t in times]
    made = []
    ops = replace(PLAIN, context_kv=lambda *args: made.append(args) or context_kv(*args))
    use_ops(dit, ops)
    dit.keeps = True
    once = dit.once(given)
    assert len(made) == len(dit.blocks) * (1 if image_dim is None else 2)
    assert all(torch.equal(dit(x, t, **once), v) for t, v in zip(times, wanted, strict=True))
    assert len(made) == len(dit.blocks) * (1 if image_dim is None else 2)
    other = dit.once(given | {"context": draw(2, 5, 24, seed=3)})
    assert relative(dit(x, times[0], **other), wanted[0]) > 1e-4


@torch.no_grad()
def test_a_short_text_is_padded_with_zeros_that_are_read() -> None:
    dit, x, text = small(), draw(1, 4, 1, 4, 4), draw(1, 5, 24, seed=1)
    t = torch.tensor([[500.0]])
    full = torch.cat((text, torch.zeros(1, 7, 24)), 1)
    assert torch.equal(dit(x, t, text), dit(x, t, full))
    assert relative(dit(x, t, text), dit(x, t, torch.cat((text, draw(1, 7, 24, seed=2)), 1))) > 1e-4


@torch.no_grad()
def test_bfloat16_parameters_give_a_float32_velocity_near_the_exact_one() -> None:
    dit, x, text = small(), draw(1, 4, 2, 4, 6), draw(1, 5, 24, seed=1)
    t, group = torch.tensor([[700.0, 0.0]]), torch.tensor([1, 0])
    exact = dit(x, t, text, group=group)
    low = dit.bfloat16()(x, t, text.bfloat16(), group=group)
    assert low.dtype == torch.float32
    assert relative(low, exact) < 2e-2


class Watch(TorchDispatchMode):
    """Notes the largest tensor that an operation makes, and whether one waits for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.waits.append(str(func))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@torch.no_grad()
def test_a_forward_waits_for_nothing_and_makes_no_modulation_per_token() -> None:
    config = replace(SMALL, ffn_dim=64)
    dit, x, text = small(config), draw(1, 4, 4, 16, 16), draw(1, 5, 24, seed=1)
    with Watch() as watch:
        dit(x, torch.tensor([[700.0, 0.0]]), text, group=torch.tensor([1, 0, 0, 0]))
    tokens = 4 * 8 * 8
    assert watch.waits == []
    assert watch.largest <= 2 * tokens * config.dim  # the reference makes 6 * tokens * dim here


def test_training_reaches_every_parameter_and_checkpointing_changes_nothing() -> None:
    from torch.utils.checkpoint import checkpoint

    dit, x, text = small(), draw(2, 4, 2, 4, 6), draw(2, 5, 24, seed=1)
    t = torch.tensor([[900.0], [12.0]])
    plain = torch.autograd.grad(dit(x, t, text).square().mean(), list(dit.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in plain)
    for block in _blocks(dit):
        inner = block.forward
        block.forward = lambda x, scene, inner=inner: checkpoint(inner, x, scene, use_reentrant=False)  # type: ignore
    again = torch.autograd.grad(dit(x, t, text).square().mean(), list(dit.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_initial_weights_follow_the_published_recipe() -> None:
    config = replace(SMALL, dim=256, ffn_dim=512, text_dim=128)
    dit = init_for_training(DiT(config), torch.Generator().manual_seed(5))
    again = init_for_training(DiT(config), torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(dit.parameters(), again.parameters(), strict=True))
    assert dit.head.head.weight.abs().max() == 0
    block = _blocks(dit)[0]
    for weight in (block.self_attn.q.weight, block.ffn[0].weight, dit.time_projection[1].weight,
                   dit.patch_embedding.weight.flatten(1)):  # fmt: skip
        bound = (6 / sum(weight.shape)) ** 0.5
        assert bound * 0.97 < weight.abs().max() <= bound
    for layer in (dit.text_embedding[0], dit.text_embedding[2], dit.time_embedding[0], dit.time_embedding[2]):
        assert 0.019 < layer.weight.std() < 0.021
        assert layer.bias.abs().max() == 0
    for modulation in (block.modulation, dit.head.modulation):
        assert abs(modulation.std().item() * 16 - 1) < 0.1
    with torch.no_grad():
        assert dit(draw(1, 4, 1, 4, 4), torch.tensor([[500.0]]), draw(1, 3, 128)).abs().max() == 0


def test_a_copy_runs_its_own_blocks() -> None:
    dit = small()
    twin = copy.deepcopy(dit)
    assert twin.trunk.blocks is twin.blocks
    assert twin.blocks[0] is not dit.blocks[0]


def test_shapes_that_do_not_fit_are_refused_with_the_numbers() -> None:
    dit, x, t, text = small(), draw(1, 4, 1, 4, 4), torch.tensor([[500.0]]), draw(1, 3, 24)
    for request, word in (
        ({"x": draw(1, 6, 1, 4, 4)}, "6 channels"),
        ({"y": draw(1, 2, 1, 4, 4)}, "6 channels"),
        ({"x": draw(1, 4, 1, 5, 4)}, "patches"),
        ({"t": torch.tensor([500.0])}, r"expected \[1, G\]"),
        ({"context": draw(1, 13, 24)}, "13 rows"),
        ({"image": draw(1, 257, 1280)}, "no image"),
    ):
        with pytest.raises(ValueError, match=word):
            dit(**{"x": x, "t": t, "context": text, **request})
    with pytest.raises(ValueError, match="needs image"):
        small(replace(SMALL, image_dim=20))(x, t, text)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
