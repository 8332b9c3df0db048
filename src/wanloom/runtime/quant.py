"""8-bit weights for the blocks of a transformer or of the text encoder.

    done = quantise(dit, "fp8")        # in place, one layer after another, so memory falls as it goes
    done.layers, done.before, done.after

The linear layers of the blocks hold 98 % of the weights and are replaced.  Embeddings, the head, modulation, norms and
biases stay: they are small, and an error in them reaches every token.  All methods are near, not exact: `METHODS` says
how far off each is.

A low-rank branch goes on top of a replaced layer as it does on an nn.Linear, and after it: a LoRA that is merged into
the weights has to be merged before.  What a file holds in 8 bits already is kept so by `checkpoint/packed.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from wanloom.runtime.attention import capability_of
from wanloom.runtime.fp8 import Fp8Compute, Fp8Linear
from wanloom.runtime.int8 import Int8Compute, Int8Linear
from wanloom.runtime.kernels import require_method

# A layer lies in a block when its name says so; the text encoder's are `encoder.block.N`.
BLOCK = re.compile(r"(?:^|\.)blocks?\.\d+\.")
# The text encoder's attention has no 1/sqrt(d) before its softmax, so errors in q and k grow into other words: it keeps
# its weights, 35 % of those in its blocks.  (vllm-omni PR 7825 found a T5 of 8-bit attention to misread prompts.)
SKIP = ("SelfAttention",)


@dataclass(frozen=True)
class Method:
    """A way to keep weights in 8 bits; `kind` says how its results compare with those of the weights themselves."""

    layer: type[Fp8Linear | Int8Linear]
    about: str
    kind: str = "near"


METHODS = {
    "int8": Method(Int8Linear, "int8 weights with a scale for each row; computes in the model's own format"),
    "fp8": Method(Fp8Linear, "e4m3 weights with a scale for each row; computes in the model's own format"),
    "int8-compute": Method(Int8Compute, "int8 weights and activations; integer products (CPU, NVIDIA from Turing on)"),
    "fp8-compute": Method(Fp8Compute, "e4m3 weights and activations; 8-bit products (NVIDIA from Ada and Hopper on)"),
}


@dataclass(frozen=True)
class Quantised:
    """What was done: how many layers were replaced, and the bytes of the whole module before and after."""

    method: str
    layers: int
    before: int
    after: int


def require(how: str, device: torch.device | str) -> Method:
    """The row of METHODS.  Errors: E2039 no such method, E8009 a device without the products it computes with."""
    require_method(how, capability_of(str(device)))
    return METHODS[how]


def quantise(
    module: nn.Module, how: str, *, skip: Sequence[str] = SKIP, device: torch.device | str | None = None
) -> Quantised:
    """Replace the linear layers in the blocks of a transformer or text encoder, in place.

    how: a name of METHODS.  skip: a layer stays when its name holds one of these.  device: where the module will
    compute, when that is not where it is now.  Errors: E2039 an unknown method, E8009 the device cannot do it;
    ValueError for a module without such layers (they may have been replaced already).
    """
    method = require(how, first_device(module) if device is None else device)
    names = block_linears(module, skip)
    if not names:
        raise ValueError("there are no linear layers in blocks here that could be replaced")
    before = size_of(module)
    for name in names:
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        module.set_submodule(name, method.layer.of(linear.weight, linear.bias))
    return Quantised(how, len(names), before, size_of(module))


def block_linears(module: nn.Module, skip: Sequence[str] = SKIP) -> list[str]:
    """Names of the nn.Linears that lie in blocks and are not skipped."""
    return [
        name
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and BLOCK.search(name) and not any(part in name for part in skip)
    ]


def size_of(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def first_device(module: nn.Module) -> torch.device:
    """Where a module is, told by its first parameter."""
    return next(module.parameters()).device
