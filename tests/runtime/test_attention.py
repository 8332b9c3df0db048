"""Every attention kernel that this machine has against SDPA; libraries of others by what they are called with."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from wanloom.errors import InputError
from wanloom.models.layers import Attention, Block, Scene, Trunk, sdpa
from wanloom.runtime import attention
from wanloom.runtime.attention import KERNELS, kernel_for, use_kernel
from wanloom.runtime.kernels import KERNEL_FACTS, require_compiler, require_kernel

HERE = [name for name, facts in KERNEL_FACTS.items() if facts.missing(None) is None]


def heads(*lengths: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, length, 3, 16, generator=generator).to(dtype) for length in lengths]


def test_the_facts_are_of_the_kernels_that_there_are() -> None:
    assert list(KERNEL_FACTS) == list(KERNELS)
    assert {"sdpa", "sdpa-math", "plain"} <= set(HERE)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("masked", [False, True])
def test_a_kernel_that_is_here_gives_what_sdpa_gives(name: str, masked: bool) -> None:
    q, k, v = heads(7, 9, 9)
    mask = torch.arange(9)[None] <= torch.arange(7)[:, None] if masked else None
    torch.testing.assert_close(kernel_for(name, "cpu")(q, k, v, mask), sdpa(q, k, v, mask), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "module", "function", "answer"),
    [
        ("flash-2", "flash_attn", "flash_attn_func", "tensor"),
        ("flash-3", "flash_attn_interface", "flash_attn_func", "pair"),
        ("flash-4", "flash_attn.cute", "flash_attn_func", "pair"),
        ("sage", "sageattention", "sageattn", "tensor"),
    ],
)
def test_a_library_is_asked_in_its_own_layout(
    name: str, module: str, function: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def library(q: Tensor, k: Tensor, v: Tensor, **options: str) -> Tensor | tuple[Tensor, Tensor]:
        asked.append(options)
        out = sdpa(q, k, v)
        return (out, out[..., 0]) if answer == "pair" else out

    stand_in = ModuleType(module)
    setattr(stand_in, function, library)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module, stand_in)
    attention._function.cache_clear()
    q, k, v = heads(5, 6, 6)
    assert torch.equal(KERNELS[name](q, k, v, None), sdpa(q, k, v))
    assert asked == [{"tensor_layout": "NHD"} if name == "sage" else {}]
    mask = torch.ones(5, 6, dtype=torch.bool)
    assert torch.equal(KERNELS[name](q, k, v, mask), sdpa(q, k, v, mask)) and len(asked) == 1
    attention._function.cache_clear()


@pytest.mark.parametrize(
    ("name", "capability", "reason"),
    [
        ("flash-3", None, "needs an NVIDIA GPU"),
        ("flash-3", (8, 6), "needs compute capability 9.0, this GPU has 8.6"),
        ("flash-3", (10, 0), "runs up to compute capability 9.9, this GPU has 10.0"),
        ("flash-2", (8, 6), "needs the package flash-attn"),
        ("sdpa-cudnn", None, "needs an NVIDIA GPU"),
    ],
)
def test_what_is_missing_is_said(name: str, capability: tuple[int, int] | None, reason: str) -> None:
    assert KERNEL_FACTS[name].missing(capability, lambda module: False) == reason
    with pytest.raises(InputError, match=reason) as caught:
        require_kernel(name, capability)
    assert caught.value.code == "E8007"


def test_with_its_library_and_gpu_a_kernel_is_there() -> None:
    assert KERNEL_FACTS["flash-3"].missing((9, 0), lambda module: module == "flash_attn_interface") is None


def test_an_unknown_kernel_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'flash-2'") as caught:
        kernel_for("flash2", "cpu")
    assert caught.value.code == "E2038"


def test_without_a_compiler_compiling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="no C\\+\\+ compiler") as caught:
        require_compiler(on_gpu=False)
    assert caught.value.code == "E8008"


def test_a_kernel_reaches_every_attention_of_a_trunk() -> None:
    blocks = nn.ModuleList([Block(32, 64, 2, 1e-6, image=True) for _ in range(2)])
    calls = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        calls.append(k.shape[1])
        return sdpa(q, k, v, mask)

    use_kernel(blocks, kernel)
    assert all(m.kernel is kernel for m in blocks.modules() if isinstance(m, Attention))
    one = torch.zeros(5, dtype=torch.long)
    scene = Scene(
        rope=torch.ones(5, 8, 2), group=one, frame=one, mod=torch.zeros(1, 1, 6, 32),
        context=torch.randn(1, 4, 32), image=torch.randn(1, 3, 32),
    )  # fmt: skip
    with torch.no_grad():
        Trunk(blocks)(torch.randn(1, 5, 32), scene)
    assert calls == [5, 4, 3] * 2
