"""Attention kernels: functions (q, k, v, mask) -> out on [B, L, H, D], for the seam `Attention.kernel`.

SDPA is the default of the models and the reference for every kernel here.  Libraries of kernels know no mask; a masked
attention (of speech and faces, which is small) always goes through SDPA.  `kernels.py` says which there are and what
they need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanloom.models.layers import Kernel, sdpa
from wanloom.runtime.int8_attention import int8_attention, int8_fp8_attention
from wanloom.runtime.kernels import HOPPER, Capability, require_kernel


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Two matrix products and a softmax.

    On a CPU the backward pass of SDPA is slow for short sequences; with about 100 tokens this form trains faster.
    It holds the [L, M] scores, so it is not for long ones.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    out: Tensor = scores.softmax(-1) @ v
    return out.transpose(1, 2)


def by_backend(*backends: SDPBackend) -> Kernel:
    """SDPA by the first of these backends that can; with a mask by whichever torch takes."""
    order = list(backends)

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return sdpa(q, k, v, mask)
        with sdpa_kernel(order, set_priority=True):
            return sdpa(q, k, v)

    return kernel


def by_library(module: str, function: str, **options: str) -> Kernel:
    """A library's kernel for [B, L, H, D]; some also give the logarithm of the sums, which is left.

    The library is imported when the kernel first runs.
    """

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return sdpa(q, k, v, mask)
        out: Tensor | tuple[Tensor, ...] = _function(module, function)(q, k, v, **options)
        return out if isinstance(out, Tensor) else out[0]

    return kernel


@cache
def _function(module: str, function: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    found: Callable[..., Tensor | tuple[Tensor, ...]] = getattr(import_module(module), function)
    return found


KERNELS: dict[str, Kernel] = {
    "sdpa": sdpa,
    "sdpa-cudnn": by_backend(SDPBackend.CUDNN_ATTENTION),
    "sdpa-flash": by_backend(SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": by_backend(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-math": by_backend(SDPBackend.MATH),
    "plain": plain,
    "flash-2": by_library("flash_attn", "flash_attn_func"),
    "flash-3": by_library("flash_attn_interface", "flash_attn_func"),
    "flash-4": by_library("flash_attn.cute", "flash_attn_func"),
    "sage": by_library("sageattention", "sageattn", tensor_layout="NHD"),
    "int8": int8_attention,
    "int8-fp8": int8_fp8_attention,
}
HOPPER_ORDER: Sequence[SDPBackend] = (
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
)  # fmt: skip


def capability_of(device: str) -> Capability | None:
    """The compute capability of a GPU, None for other devices."""
    return torch.cuda.get_device_capability(device) if device.startswith("cuda") else None


def kernel_for(name: str | None, device: str) -> Kernel:
    """The kernel of that name, or the best exact one that torch has.  Errors: E2038 unknown, E8007 not to be had."""
    capability = capability_of(device)
    if name is not None:
        require_kernel(name, capability)
    if name in (None, "sdpa") and capability is not None and capability >= HOPPER:
        return by_backend(*HOPPER_ORDER)
    return KERNELS[name or "sdpa"]


def use_kernel(model: nn.Module, kernel: Kernel) -> None:
    """Give every attention of `model` (whatever has a `kernel` that is no tensor) this kernel."""
    for module in model.modules():
        if not isinstance(getattr(module, "kernel", None), Tensor | None):
            setattr(module, "kernel", kernel)  # noqa: B010 (an attribute that nn.Module does not declare)
