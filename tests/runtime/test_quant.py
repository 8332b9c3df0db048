"""What every quantised linear layer keeps to, and what `quantise` makes of a transformer and of a text encoder."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from wanloom.encoders import build_umt5
from wanloom.errors import InputError
from wanloom.models.adapters import build_dit
from wanloom.models.config import DiTConfig, TextConfig
from wanloom.runtime import frozen
from wanloom.runtime.fp8 import Fp8Compute, Fp8Linear
from wanloom.runtime.frozen import FrozenLinear
from wanloom.runtime.ggml import FORMATS, GgufLinear
from wanloom.runtime.int8 import Int8Compute, Int8Linear
from wanloom.runtime.kernels import WEIGHT_METHODS
from wanloom.runtime.quant import METHODS, SKIP, block_linears, quantise, require, size_of

# ---------------------------------------------------------------- the layers and their bounds


@dataclass(frozen=True)
class Kind:
    """A class of layers: how one is made, how far each weight may be off, and each value of what it multiplies by."""

    make: Callable[[Tensor, Tensor | None], FrozenLinear]
    off: Callable[[Tensor], Tensor]  # weights [out, in] -> the largest error of each
    input_off: Callable[[Tensor], Tensor] | None = None  # the same of inputs [n, in], where those are rounded too
    sizes: tuple[tuple[int, int], ...] = ((33, 48), (5, 7), (64, 129), (1, 1))  # (out, in), odd ones among them


def int8_off(values: Tensor) -> Tensor:
    """Half a step of the row; a step is its largest value / 127, and finding the code is itself rounded."""
    return (values.abs().amax(1, keepdim=True) / 127 * 0.5 * (1 + 1e-4)).expand_as(values)


def fp8_off(values: Tensor) -> Tensor:
    """Half a unit of 3 bits of mantissa, 2^-4 of the value; below 2^-6 of the scale the numbers lie 2^-9 apart."""
    scale = values.abs().amax(1, keepdim=True) / 448
    return torch.maximum(values.abs() * 2**-4, scale * 2**-10) * (1 + 1e-4)


def random_blocks(format_: str) -> Callable[[Tensor, Tensor | None], GgufLinear]:
    """A layer whose blocks are random bytes with sensible scales: it is its own original."""

    def make(weight: Tensor, bias: Tensor | None) -> GgufLinear:
        form = FORMATS[format_]
        generator = torch.Generator().manual_seed(0)
        count = weight.shape[0] * weight.shape[1] // form.values
        blocks = torch.randint(0, 256, (count, form.size), dtype=torch.uint8, generator=generator)
        for at in form.halves:
            halves = 1e-3 * torch.randn(count, 1, generator=generator)
            blocks[:, at : at + 2] = halves.half().view(torch.uint8)
        return GgufLinear(blocks.view(weight.shape[0], -1), format_, bias)

    return make


def nothing_off(values: Tensor) -> Tensor:
    return torch.zeros_like(values)


KINDS = {
    "int8": Kind(Int8Linear.of, int8_off),
    "fp8": Kind(Fp8Linear.of, fp8_off),
    "int8-compute": Kind(Int8Compute.of, int8_off, int8_off),
    "fp8-compute": Kind(Fp8Compute.of, fp8_off, fp8_off),
    **{
        f"gguf-{name}": Kind(
            random_blocks(name), nothing_off, sizes=((3, form.values), (33, 3 * form.values), (1, form.values))
        )
        for name, form in FORMATS.items()
    },
}

kinds = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])


@pytest.fixture(autouse=True)
def fp8_anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes 8-bit products on a CPU too, slowly: good enough to test what is made of them."""
    if "refuse" not in request.node.name:
        monkeypatch.setitem(WEIGHT_METHODS, "fp8-compute", None)


def make(kind: str, with_bias: bool = True, size: tuple[int, int] | None = None) -> tuple[FrozenLinear, nn.Linear]:
    """A layer and the nn.Linear it was made of (GGUF: which it is)."""
    out, width = size or KINDS[kind].sizes[0]
    torch.manual_seed(out + width)
    linear = nn.Linear(width, out, bias=with_bias)
    layer = KINDS[kind].make(linear.weight, linear.bias)
    if isinstance(layer, GgufLinear):
        with torch.no_grad():
            linear.weight.copy_(layer.dequantised())
    return layer, linear


def twin(layer: FrozenLinear, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """The nn.Linear with the layer's own, widened weights."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(layer.dequantised(dtype))
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    return linear


# ---------------------------------------------------------------- the contract


@kinds
@both
def test_a_layer_stands_in_for_an_nn_linear(kind: str, with_bias: bool) -> None:
    """Output of the right shape and dtype, and the right numbers.

    Layers that only store give what the nn.Linear of their weights gives, to the bit.  Those that round their input as
    well are held against a sure bound: each rounded input times its weight is off by at most |w| dx.
    """
    for size in KINDS[kind].sizes:
        layer, _ = make(kind, with_bias, size)
        assert (layer.in_features, layer.out_features) == (size[1], size[0])
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 3, size[1], dtype=dtype)
            with torch.no_grad():
                y, plain = layer(x), twin(layer, dtype)(x)
            assert y.shape == (2, 3, size[0]) and y.dtype == dtype
            input_off = KINDS[kind].input_off
            if input_off is None:
                assert torch.equal(y, plain)
                continue
            weight, flat = layer.dequantised(torch.float64), x.flatten(0, 1).double()
            exact = F.linear(flat, weight, None if layer.bias is None else layer.bias.double())
            # Beside the input's error: the result is rounded to bfloat16, and its bias is.
            room = input_off(flat) @ weight.abs().T + 2**-7 * (exact.abs() + 1)
            assert ((y.flatten(0, 1).double() - exact).abs() <= room).all()


@kinds
def test_weights_are_off_by_no_more_than_the_format(kind: str) -> None:
    """Each weight by itself; the bounds are those of the number formats (see the functions)."""
    for size in KINDS[kind].sizes:
        layer, linear = make(kind, size=size)
        off = (layer.dequantised() - linear.weight).abs()
        assert (off <= KINDS[kind].off(linear.weight)).all()
        assert layer.finite()


@kinds
@both
def test_the_gradient_to_the_input_is_that_of_the_widened_weights(kind: str, with_bias: bool) -> None:
    for size in KINDS[kind].sizes:
        layer, _ = make(kind, with_bias, size)
        plain = twin(layer)
        x = torch.randn(2, 3, size[1], requires_grad=True)
        grad = torch.randn(2, 3, size[0])
        (mine,) = torch.autograd.grad(layer(x), x, grad)
        (theirs,) = torch.autograd.grad(plain(x), x, grad)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)  # float32; the sums are grouped otherwise
        assert not any(buffer.requires_grad for buffer in layer.buffers())


@kinds
def test_a_bias_may_learn(kind: str) -> None:
    layer, _ = make(kind)
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    layer(torch.ones(2, 3, layer.in_features)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 6))


@kinds
def test_large_weights_are_widened_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = make(kind)
    x = torch.randn(4, layer.in_features, requires_grad=True)
    whole = layer(x)
    (back,) = torch.autograd.grad(whole.sum(), x)
    monkeypatch.setattr(frozen, "PIECE", 2 * layer.in_features)
    seen: list[int] = []
    rows = layer.rows
    monkeypatch.setattr(layer, "rows", lambda first, last: seen.append(last - first) or rows(first, last))
    pieced = layer(x)
    (back_pieced,) = torch.autograd.grad(pieced.sum(), x)
    assert max(seen) == 2  # rows at once: the backward pass of all kinds, the forward pass of those that store
    # float32: the product may group its sums otherwise in pieces
    torch.testing.assert_close(pieced, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back_pieced, back, rtol=1e-5, atol=1e-5)


@kinds
@pytest.mark.parametrize("change", ["float", "half", "bfloat16", "double"])
def test_changing_the_dtype_of_the_module_leaves_the_storage_alone(kind: str, change: str) -> None:
    layer, _ = make(kind)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    moved = getattr(nn.ModuleDict({"inner": layer}), change)()["inner"]
    for name, tensor in moved.named_buffers():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    dtype = getattr(torch.zeros(1), change)().dtype
    assert moved.bias.dtype == dtype
    assert moved(torch.ones(2, layer.in_features, dtype=dtype)).dtype == dtype


@kinds
def test_moving_the_module_moves_everything(kind: str) -> None:
    """The meta device stands for any other: a tensor that stayed behind would still be on the CPU."""
    layer, _ = make(kind)
    layer.to("meta", torch.bfloat16)
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    # all that a layer holds is among them: nothing hides in a plain attribute
    assert not any(isinstance(value, Tensor) for value in vars(layer).values())


@kinds
@both
def test_a_state_dict_goes_round(kind: str, with_bias: bool, tmp_path: Path) -> None:
    """Through a safetensors file, into a copy with other values."""
    from safetensors.torch import load_file, save_file

    layer, _ = make(kind, with_bias)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    x = torch.randn(3, layer.in_features)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
    assert torch.equal(other(x), layer(x))


class LowRank(nn.Module):
    """base(x) + up(down(x)), as LoRA adds it."""

    def __init__(self, base: FrozenLinear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


@kinds
def test_a_low_rank_branch_learns_on_top(kind: str) -> None:
    """Its gradients are those it has on top of the nn.Linear with the same weights, and its steps bring the loss down.

    Up to what the rounding of the input does to the output, for the layers that round it.
    """
    layer, _ = make(kind)
    ours, theirs = LowRank(layer, 2), LowRank(layer, 2)
    theirs.load_state_dict(ours.state_dict())
    theirs.base = twin(layer)  # type: ignore[assignment]
    x, target = torch.randn(6, layer.in_features), torch.randn(6, layer.out_features)
    loss = [F.mse_loss(model(x), target) for model in (ours, theirs)]
    for each in loss:
        each.backward()
    near = {"rtol": 1e-4, "atol": 1e-5} if KINDS[kind].input_off is None else {"rtol": 0.2, "atol": 0.02}
    torch.testing.assert_close(ours.down.weight.grad, theirs.down.weight.grad, **near)
    torch.testing.assert_close(ours.up.weight.grad, theirs.up.weight.grad, **near)
    with torch.no_grad():
        for weight in (ours.down.weight, ours.up.weight):
            weight -= 0.02 * weight.grad
    assert F.mse_loss(ours(x), target) < loss[0]


@kinds
def test_the_same_input_gives_the_same_bits(kind: str) -> None:
    first, linear = make(kind)
    second = KINDS[kind].make(linear.weight, linear.bias)
    x = torch.randn(5, first.in_features)
    assert torch.equal(first(x), first(x))
    assert torch.equal(first(x), second(x))
    alone = torch.cat([first(row[None]) for row in x])
    torch.testing.assert_close(first(x), alone, rtol=1e-5, atol=1e-5)  # no token's scale depends on its neighbours


@kinds
def test_another_width_is_refused(kind: str) -> None:
    layer, _ = make(kind)
    with pytest.raises(ValueError, match="width"):
        layer(torch.ones(2, layer.in_features + 1))


@pytest.mark.parametrize("kind", ["int8", "fp8-compute", "gguf-Q4_K"])  # the rest differ in arithmetic alone
def test_compiling_meets_no_break(kind: str) -> None:
    layer, _ = make(kind)
    torch._dynamo.reset()  # it counts how often a function was compiled
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler warns of its own deprecations
        assert torch.equal(compiled(x), layer(x))
        (mine,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(mine, torch.autograd.grad(layer(x).sum(), x)[0])


# ---------------------------------------------------------------- extremes


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_zeros_of_tiny_and_of_huge_weights(method: str) -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-44, -1e-42], [1e37, -3e38], [1.0, 1e-30]])
    layer = METHODS[method].layer.of(weight, None)
    assert layer.finite()
    assert torch.isfinite(layer.dequantised()).all()
    assert (layer.dequantised()[0] == 0).all()
    torch.testing.assert_close(layer.dequantised()[2], weight[2], rtol=0.07, atol=3e36)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(method: str, bad: float) -> None:
    """In the weights it is told by `finite`; in an input it comes out, for the caller to see."""
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    assert not METHODS[method].layer.of(weight, None).finite()
    layer = METHODS[method].layer.of(torch.ones(3, 4), None)
    x = torch.ones(2, 4)
    x[1, 0] = bad
    y = layer(x)
    assert torch.isfinite(y[0]).all()
    assert not torch.isfinite(y[1]).any()


# ---------------------------------------------------------------- whole models

DIT = DiTConfig(dim=64, ffn_dim=96, heads=2, layers=2, text_dim=24, text_len=8)
TEXT = TextConfig(dim=24, ffn_dim=32, heads=2, head_dim=8, layers=2, vocab=32)
# Relative error of a tiny model's output.  Rounding errors are random, so a product is off by about as much as its
# weights: a third of a percent for int8, two for e4m3; there are some products one after another, and rounded inputs
# add as much again.  The text encoder's softmax has no 1/sqrt(d) and enlarges them.  These are twice what is found.
BOUNDS = {
    "dit": {"int8": 0.011, "fp8": 0.046, "int8-compute": 0.016, "fp8-compute": 0.06},
    "text": {"int8": 0.03, "fp8": 0.15, "int8-compute": 0.04, "fp8-compute": 0.18},
}


def unit_gain(module: nn.Module, seed: int = 0) -> nn.Module:
    module.load_state_dict(tiny._values(module, torch.Generator().manual_seed(seed), torch.float32))
    return module.eval().requires_grad_(False)


def run_dit(dit: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(1, 8, 24, generator=generator)
    with torch.no_grad():
        out: Tensor = dit(x, torch.tensor([[500.0]]), context)
    return out


def run_text(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=torch.tensor([[4, 9, 11, 1]])).last_hidden_state
    return out


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "dit": (lambda: build_dit(DIT), run_dit),
    "text": (lambda: build_umt5(TEXT), run_text),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_stays_near_and_becomes_smaller(model: str, method: str) -> None:
    build, run = MODELS[model]
    module = unit_gain(build())
    before, size = run(module), size_of(module)
    done = quantise(module, method)
    after = run(module)
    error = float((after - before).norm() / before.norm())
    assert 0 < error <= BOUNDS[model][method]
    assert (done.before, done.after) == (size, size_of(module))
    layers = [layer for layer in module.modules() if isinstance(layer, FrozenLinear)]
    assert len(layers) == done.layers == {"dit": 20, "text": 6}[model]
    saved = sum(3 * layer.in_features * layer.out_features - 4 * layer.out_features for layer in layers)
    assert done.before - done.after == saved  # a byte instead of four, and four for the scale of a row


def test_int8_is_nearer_than_fp8_and_storing_nearer_than_computing() -> None:
    error = {}
    for method in METHODS:
        module = unit_gain(build_dit(DIT))
        before = run_dit(module)
        quantise(module, method)
        error[method] = float((run_dit(module) - before).norm() / before.norm())
    assert error["int8"] < error["fp8"] and error["int8-compute"] < error["fp8-compute"]
    assert error["int8"] < error["int8-compute"] and error["fp8"] < error["fp8-compute"]


def test_layers_go_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory falls as it goes: when a layer is made, all before it have given up their weights."""
    module = build_dit(DIT)
    sizes: list[int] = []
    of = Int8Linear.of
    monkeypatch.setattr(Int8Linear, "of", lambda *given: sizes.append(size_of(module)) or of(*given))
    done = quantise(module, "int8")
    assert len(sizes) == done.layers
    assert all(later < earlier for earlier, later in pairwise(sizes))


def test_only_blocks_are_touched() -> None:
    dit = build_dit(DIT)
    quantise(dit, "fp8")
    for name, layer in dit.named_modules():
        if isinstance(layer, nn.Linear):
            assert not name.startswith("blocks."), name
    assert isinstance(dit.head.head, nn.Linear) and isinstance(dit.text_embedding[0], nn.Linear)
    assert dit.dtype == torch.float32


def test_the_text_encoder_keeps_its_attention_unless_told() -> None:
    model = build_umt5(TEXT)
    done = quantise(model, "fp8")
    assert done.layers == 6
    assert isinstance(model.encoder.block[0].layer[0].SelfAttention.q, nn.Linear)
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, Fp8Linear)


def test_the_text_encoder_is_nearer_with_its_attention_in_full() -> None:
    """The reason for the default: its attention makes several times as much error as all else together."""
    for seed in range(3):
        error = {}
        for skip in ((), SKIP):
            model = unit_gain(build_umt5(TEXT), seed)
            before = run_text(model)
            quantise(model, "fp8", skip=skip)
            error[skip] = float((run_text(model) - before).norm() / before.norm())
        assert 2 * error[SKIP] < error[()]


def test_a_layer_that_is_skipped_stays() -> None:
    dit = build_dit(DIT)
    quantise(dit, "int8", skip=("blocks.0.", "ffn"))
    assert block_linears(dit, ()) == [
        name for name, layer in dit.named_modules() if isinstance(layer, nn.Linear) and name.startswith("blocks.")
    ]
    assert isinstance(dit.blocks[0].self_attn.q, nn.Linear) and isinstance(dit.blocks[1].ffn[0], nn.Linear)
    assert isinstance(dit.blocks[1].self_attn.q, Int8Linear)


@pytest.mark.parametrize("name", ["s2v-14B", "animate-14B"])
def test_parts_of_adapters_in_blocks_become_8_bit_and_keep_their_published_names(name: str) -> None:
    first, second = (unit_gain(build_dit(tiny.TINY[name].dit), seed) for seed in (0, 1))
    for dit in (first, second):
        quantise(dit, "fp8")
    state = first.state_dict()
    sign = {
        "s2v-14B": "audio_injector.injector.0.q.codes",
        "animate-14B": "face_adapter.fuser_blocks.0.linear1_q.codes",
    }
    assert sign[name] in state
    second.load_state_dict(state, strict=True)
    for mine, theirs in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert mine[0] == theirs[0] and torch.equal(mine[1].view(torch.uint8), theirs[1].view(torch.uint8))


def test_a_text_encoder_in_bfloat16_computes_in_bfloat16() -> None:
    """transformers casts to the dtype of a layer's weight; 8-bit storage must not be what it sees."""
    for method in METHODS:
        model = unit_gain(build_umt5(TEXT)).to(torch.bfloat16)
        before = run_text(model).float()
        quantise(model, method)
        after = run_text(model)
        assert after.dtype == torch.bfloat16
        # and bfloat16's own rounding
        assert (after.float() - before).norm() / before.norm() < BOUNDS["text"][method] + 0.02


# ---------------------------------------------------------------- what is refused


def test_the_facts_are_of_the_methods_that_there_are() -> None:
    assert list(WEIGHT_METHODS) == list(METHODS)


def test_refuse_an_unknown_method() -> None:
    with pytest.raises(InputError, match="Did you mean 'fp8'") as caught:
        quantise(build_dit(DIT), "fp16")
    assert caught.value.code == "E2039"


def test_refuse_a_module_without_blocks() -> None:
    with pytest.raises(ValueError, match="no linear layers"):
        quantise(nn.Sequential(nn.Linear(4, 4)), "int8")


def test_refuse_fp8_products_on_a_cpu_and_change_nothing() -> None:
    dit = build_dit(DIT)
    with pytest.raises(InputError, match="Use fp8,") as caught:
        quantise(dit, "fp8-compute")
    assert caught.value.code == "E8009"
    assert not any(isinstance(layer, FrozenLinear) for layer in dit.modules())
    layer = Fp8Compute.of(torch.ones(16, 16), None)  # made for a GPU, and then called here
    with pytest.raises(InputError, match="a CPU has no fp8 products"):
        layer(torch.ones(2, 16))


@pytest.mark.parametrize(
    ("method", "found", "fits"),
    [
        ("fp8-compute", (8, 6), False),
        ("fp8-compute", (8, 9), True),
        ("fp8-compute", (9, 0), True),
        ("int8-compute", (7, 0), False),
        ("int8-compute", (7, 5), True),
        ("fp8", (6, 1), True),
    ],
)
def test_refuse_a_gpu_that_has_not_the_product(
    method: str, found: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    if fits:
        assert require(method, "cuda") is METHODS[method]
    else:
        with pytest.raises(InputError, match="compute capability") as caught:
            require(method, "cuda")
        assert caught.value.code == "E8009"


@pytest.mark.gpu
@kinds
def test_a_gpu_gives_what_the_cpu_gives(kind: str) -> None:
    """Products of 8-bit numbers are the same ones there; the sums are made in another order and precision."""
    if kind.endswith("-compute"):
        require(kind, "cuda")
    for size in KINDS[kind].sizes:
        layer, _ = make(kind, size=size)
        x = torch.randn(40, size[1], dtype=torch.bfloat16)
        here = layer(x).float()
        there = layer.to("cuda")(x.to("cuda")).cpu().float()
        torch.testing.assert_close(there, here, rtol=2e-2, atol=2e-2)
