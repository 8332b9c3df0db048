"""The fused operations against the plain forms: on a GPU as they are, elsewhere by Triton's interpreter.

The interpreter cuts bfloat16 off where a GPU rounds, so its results lie up to one step lower for each rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wanloom.errors import InputError
from wanloom.models import layers
from wanloom.models.layers import Block, Ops, RMSNorm, Scene, Trunk, use_ops
from wanloom.parts import Parts
from wanloom.pipeline import load
from wanloom.runtime import fused
from wanloom.runtime.fused import FUSED
from wanloom.runtime.kernels import FUSED_FACTS, require_fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEP = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # float32: sums in another order

kernel = pytest.mark.triton
formats = pytest.mark.parametrize("dtype", STEP, ids=str)
sizes = pytest.mark.parametrize(("width", "groups"), [(64, 1), (90, 2), (130, 3)])

Case = tuple[Callable[[Ops], tuple[Tensor, ...]], int]  # an operation of a table, and how often it rounds


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def mod_and_group(width: int, groups: int, length: int = 11) -> tuple[Tensor, Tensor]:
    """Rows [2, G, 6, C] that lie as a block's, and a group for each token, in no order."""
    return numbers(2, groups, 6, width), torch.arange(length, device=DEVICE) * 7 % 5 % groups


def gaps(t: Tensor) -> Tensor:
    """The same values with others between its rows."""
    return torch.cat((t, t), -1)[..., : t.shape[-1]]


def rope_of(length: int, width: int) -> Tensor:
    angle = numbers(length, width // 2)
    return torch.stack((angle.cos(), angle.sin()), -1)


def near(found: Tensor, wanted: Tensor, steps: int = 1) -> None:
    """Equal up to so many steps of the format; what is much smaller than its row is held against the row."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    room = steps * STEP[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=room, atol=room)


def norms(width: int, dtype: torch.dtype) -> tuple[nn.LayerNorm, RMSNorm]:
    layer, rms = nn.LayerNorm(width, 1e-6).to(DEVICE), RMSNorm(width, 1e-6).to(DEVICE)
    with torch.no_grad():
        for number, parameter in enumerate((layer.weight, layer.bias, rms.weight)):
            parameter.copy_(numbers(width, seed=number))
    return layer.to(dtype).requires_grad_(False), rms.to(dtype).requires_grad_(False)


# ---------------------------------------------------------------- each operation


@kernel
@formats
@sizes
def test_a_norm_is_modulated_as_in_the_plain_form(dtype: torch.dtype, width: int, groups: int) -> None:
    mod, group = mod_and_group(width, groups)
    shift, scale = mod.unbind(2)[:2]
    x = gaps(3 * numbers(2, 11, width) + 1)
    wanted = layers.norm_modulate(x, shift, scale, group, 1e-6, dtype)
    near(fused.norm_modulate(x, shift, scale, group, 1e-6, dtype), wanted, 2)  # float32: terms that cancel


@kernel
@formats
@sizes
def test_a_gated_sum_is_that_of_the_plain_form_and_written_over(dtype: torch.dtype, width: int, groups: int) -> None:
    mod, group = mod_and_group(width, groups)
    x, y, gate = gaps(numbers(2, 11, width)), gaps(numbers(2, 11, width, seed=1)).to(dtype), mod[:, :, 2]
    wanted = layers.gate_add(x.clone(), y, gate, group)
    out = fused.gate_add(x, y, gate, group)
    assert out is x
    near(out, wanted)


@kernel
@formats
@sizes
def test_a_gated_sum_and_its_norm_are_those_of_the_plain_form(dtype: torch.dtype, width: int, groups: int) -> None:
    mod, group = mod_and_group(width, groups)
    x, y, gate = numbers(2, 11, width), numbers(2, 11, width, seed=1).to(dtype), mod[:, :, 2]
    norm, _ = norms(width, dtype)
    wanted = layers.gate_add_norm(x.clone(), y, gate, group, norm, dtype)
    out, normed = fused.gate_add_norm(x, y, gate, group, norm, dtype)
    assert out is x
    near(out, wanted[0])
    near(normed, wanted[1], 2)


@kernel
@formats
@pytest.mark.parametrize(("width", "heads"), [(64, 2), (90, 3), (130, 1)])
@pytest.mark.parametrize("turned", [True, False], ids=["turned", "not turned"])
def test_queries_are_normed_and_turned_as_in_the_plain_form(
    dtype: torch.dtype, width: int, heads: int, turned: bool
) -> None:
    _, norm = norms(width, dtype)
    x = gaps(numbers(2, 11, width)).to(dtype)
    rope = rope_of(11, width // heads) if turned else None
    wanted = layers.rms_rotate(x, norm, heads, rope)
    found = fused.rms_rotate(x, norm, heads, rope)
    # Two roundings without the rotation, three with it, which mixes two values of a pair that are off.
    room = STEP[dtype] * (5 if turned else 2)
    pairs = wanted.float().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(-1, -1, -1, -1, 2).flatten(-2)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert ((found.float() - wanted.float()).abs() <= room * pairs + 1e-6).all()


@kernel
def test_half_precision_is_rounded_where_the_plain_form_rounds() -> None:
    """Of float16, which the interpreter rounds rightly, nearly all values are those of the plain form to the bit."""
    _, norm = norms(128, torch.float16)
    x, rope = numbers(2, 40, 128).half(), rope_of(40, 64)
    same = fused.rms_rotate(x, norm, 2, rope) == layers.rms_rotate(x, norm, 2, rope)
    assert same.float().mean() > 0.99


def test_float64_and_values_with_gaps_between_them_take_the_plain_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_gate_add_", None)
    monkeypatch.setattr(fused, "_norm_modulate", None)
    mod, group = mod_and_group(8, 2)
    x = numbers(2, 11, 8).double()
    rows = [mod[:, :, place].double() for place in range(3)]
    assert torch.equal(
        fused.norm_modulate(x, *rows[:2], group, 1e-6, x.dtype),
        layers.norm_modulate(x, *rows[:2], group, 1e-6, x.dtype),
    )
    wide = numbers(2, 11, 16)
    wanted = layers.gate_add(wide[..., ::2].clone(), x.float(), mod[:, :, 2], group)
    assert torch.equal(fused.gate_add(wide[..., ::2], x.float(), mod[:, :, 2], group), wanted)
    assert torch.equal(wide[..., ::2], wanted)


# ---------------------------------------------------------------- as operations of torch


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each custom operation with small inputs, of which autograd wants gradients."""
    mod, group = mod_and_group(12, 2, 5)
    x, y = numbers(2, 5, 12).requires_grad_(), numbers(2, 5, 12, seed=1).requires_grad_()
    shift, scale, gate = (mod[:, :, place].clone().requires_grad_() for place in range(3))
    weight, bias = numbers(12).requires_grad_(), numbers(12, seed=1).requires_grad_()
    return {
        "norm_modulate": (fused._norm_modulate, (x, shift, scale, group, 1e-6, torch.float32)),
        "gate_add": (fused._gate_add, (x, y, gate, group)),
        "gate_add_norm": (fused._gate_add_norm, (x, y, gate, group, weight, bias, 1e-6, torch.float32)),
        "rms_rotate": (fused._rms_rotate, (x, weight, 1e-6, 3, rope_of(5, 4))),
        "rms_rotate, not turned": (fused._rms_rotate, (x, weight, 1e-6, 3, None)),
    }


PLAIN_FORMS = {
    "norm_modulate": fused._plain_norm_modulate, "gate_add": fused._plain_gate_add,
    "gate_add_norm": fused._plain_gate_add_norm, "rms_rotate": fused._plain_rms_rotate,
}  # fmt: skip


@kernel
@pytest.mark.parametrize("name", list(cases()))
def test_torch_finds_no_fault_with_an_operation(name: str) -> None:
    """Its schema, its shapes without values, its gradient and its place in compiled programs."""
    operation, inputs = cases()[name]
    found = torch.library.opcheck(operation, inputs)
    assert set(found.values()) == {"SUCCESS"} and len(found) >= 4


@kernel
@pytest.mark.parametrize("name", ["gate_add_", "gate_add_norm_"])
def test_torch_finds_no_fault_with_an_operation_in_place(name: str) -> None:
    _, inputs = cases()[name[:-1]]
    given = tuple(value.detach() if isinstance(value, Tensor) else value for value in inputs)
    found = torch.library.opcheck(getattr(fused, f"_{name}"), given)
    assert set(found.values()) == {"SUCCESS"} and len(found) >= 3


@kernel
@pytest.mark.parametrize("name", list(cases()))
def test_gradients_are_those_of_the_plain_form(name: str) -> None:
    operation, inputs = cases()[name]
    plain = PLAIN_FORMS[name.partition(",")[0]]
    wanted_of = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]

    def gradients(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        out = function(*inputs)
        outs = (out,) if isinstance(out, Tensor) else out
        return torch.autograd.grad(outs, wanted_of, [numbers(*one.shape, seed=3) for one in outs])

    for found, wanted in zip(gradients(operation), gradients(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert found.abs().max() > 0.01


# ---------------------------------------------------------------- in a block


def block_and_scene(dtype: torch.dtype = torch.float32) -> tuple[Trunk, Scene, Tensor]:
    torch.manual_seed(0)
    block = Block(32, 64, 2, 1e-6, image=True).to(DEVICE, dtype)
    mod, group = mod_and_group(32, 2, 7)
    scene = Scene(
        rope=rope_of(7, 16), group=group, frame=group, mod=mod,
        context=numbers(2, 4, 32).to(dtype), image=numbers(2, 3, 32).to(dtype),
    )  # fmt: skip
    return Trunk(nn.ModuleList([block])), scene, numbers(2, 7, 32)


@kernel
def test_a_block_with_fused_operations_gives_what_it_gave() -> None:
    trunk, scene, x = block_and_scene()
    with torch.no_grad():
        before = trunk(x, scene)
        use_ops(trunk, FUSED)
        after = trunk(x, scene)
    assert 0 < (after - before).abs().max() < 1e-5


@kernel
def test_a_block_with_fused_operations_learns_what_it_learned() -> None:
    trunk, scene, x = block_and_scene()
    parameters = list(trunk.blocks.parameters())
    plain = torch.autograd.grad(trunk(x, scene).square().mean(), parameters)
    use_ops(trunk, FUSED)
    found = torch.autograd.grad(trunk(x, scene).square().mean(), parameters)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("learning", [False, True], ids=["generating", "learning"])
def test_a_block_with_fused_operations_is_one_program(learning: bool) -> None:
    """Dynamo takes it whole (`fullgraph`), and what it traced gives what the block gives."""
    trunk, scene, x = block_and_scene()
    use_ops(trunk, FUSED)
    block = trunk.blocks[0].requires_grad_(learning)
    program = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(learning):
        wanted, found = block(x.clone(), scene), program(x.clone(), scene)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        if learning:
            parameters = list(block.parameters())
            pairs = zip(*(torch.autograd.grad(y.sum(), parameters) for y in (found, wanted)), strict=True)
            assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs)


# ---------------------------------------------------------------- asking for them


@pytest.mark.parametrize(
    ("capability", "there", "reason"),
    [
        (None, True, "this needs an NVIDIA GPU"),
        ((7, 5), True, "this needs compute capability 8.0, this GPU has 7.5"),
        ((9, 0), False, "this needs the package triton"),
    ],
)
def test_where_they_cannot_be_had_that_is_said(
    capability: tuple[int, int] | None, there: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = partial(FUSED_FACTS.missing, there=lambda module: there)
    monkeypatch.setattr("wanloom.runtime.kernels.FUSED_FACTS", type("Facts", (), {"missing": staticmethod(missing)}))
    with pytest.raises(InputError, match=reason) as caught:
        require_fused(capability)
    assert caught.value.code == "E8014"


def test_a_cpu_has_none() -> None:
    with pytest.raises(InputError, match="Leave --fused out") as caught:
        load(task="demo-t2v", device="cpu", fused=True)
    assert caught.value.code == "E8014"


@kernel
def test_asked_for_they_are_put_on_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanloom.parts.require_fused", lambda capability: None)
    parts: Parts = load(task="demo-t2v", device="cpu", fused=True).parts
    assert parts.precision["operations"] == "fused"
    with parts.use("dit", next(iter(parts.files.experts))) as dit:
        tables = {module.ops for module in dit.modules() if hasattr(module, "ops")}
    assert tables == {FUSED}
