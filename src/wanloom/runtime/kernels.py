"""Which attention kernels, products in few bits and compilers this machine has: facts and checks without torch.

`attention.py` has the functions themselves.  Exact kernels differ from one another by rounding alone; near ones compute
in 8 bits.
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from wanloom.errors import InputError, WanloomWarning, did_you_mean
from wanloom.runtime import machine

Capability = tuple[int, int]


def installed(module: str) -> bool:
    """Whether a module could be imported; nothing of it is run."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


@dataclass(frozen=True)
class KernelFacts:
    """An attention kernel: what it is, whether it is exact, and what it needs.

    library: the module that must be installed; least, most: compute capabilities of the GPUs it runs on (None: it also
    runs on a CPU).
    """

    about: str
    exact: bool = True
    library: str | None = None
    package: str = ""
    least: Capability | None = None
    most: Capability | None = None

    def missing(self, capability: Capability | None, there: Callable[[str], bool] = installed) -> str | None:
        """Why it does not run on a GPU of this capability (None: on a CPU), in words; None: it does."""
        if self.least is not None and capability is None:
            return "needs an NVIDIA GPU"
        if self.least is not None and capability is not None and capability < self.least:
            return f"needs compute capability {_text(self.least)}, this GPU has {_text(capability)}"
        if self.most is not None and capability is not None and capability > self.most:
            return f"runs up to compute capability {_text(self.most)}, this GPU has {_text(capability)}"
        if self.library is not None and not there(self.library):
            return f"needs the package {self.package}"
        return None


def _text(capability: Capability) -> str:
    return ".".join(map(str, capability))


AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0)
KERNEL_FACTS: dict[str, KernelFacts] = {
    "sdpa": KernelFacts("torch's attention; cuDNN first on Hopper and later, else as torch chooses"),
    "sdpa-cudnn": KernelFacts("torch's attention by cuDNN and nothing else", least=AMPERE),
    "sdpa-flash": KernelFacts("torch's own FlashAttention 2; on a CPU its blocked form"),
    "sdpa-efficient": KernelFacts("torch's memory-efficient attention", least=(5, 0)),
    "sdpa-math": KernelFacts("two matrix products and a softmax, by torch; holds all scores"),
    "plain": KernelFacts("the same in our own words; trains short sequences faster on a CPU"),
    "flash-2": KernelFacts("FlashAttention 2", library="flash_attn", package="flash-attn", least=AMPERE),
    "flash-3": KernelFacts(
        "FlashAttention 3", library="flash_attn_interface", package="flash-attn-3", least=HOPPER, most=(9, 9)
    ),
    "flash-4": KernelFacts("FlashAttention 4", library="flash_attn.cute", package="flash-attn-4", least=HOPPER),
    "sage": KernelFacts(
        "SageAttention: 8-bit scores", exact=False, library="sageattention", package="sageattention", least=AMPERE
    ),
    "int8": KernelFacts("our own: 8-bit scores", exact=False, library="triton", package="triton", least=AMPERE),
    "int8-fp8": KernelFacts(
        "our own: 8-bit scores, 8-bit values", exact=False, library="triton", package="triton", least=ADA
    ),
}


def check_kernel(name: str) -> str:
    """The name itself.  Error: E2038 when there is no such kernel."""
    if name not in KERNEL_FACTS:
        raise InputError("E2038", f"attention: '{name}' is not known. {did_you_mean(name, KERNEL_FACTS)}")
    return name


def require_kernel(name: str, capability: Capability | None) -> None:
    """Error: E8007 when this machine does not have the kernel."""
    reason = KERNEL_FACTS[check_kernel(name)].missing(capability)
    if reason is not None:
        raise InputError("E8007", f"attention: {name} {reason}. Leave --attention out, or see `wanloom doctor`.")


FUSED_FACTS = KernelFacts("our own fused operations", library="triton", package="triton", least=AMPERE)


def require_fused(capability: Capability | None) -> None:
    """Error: E8014 when this device (None: a CPU) cannot run the fused operations."""
    reason = FUSED_FACTS.missing(capability)
    if reason is not None:
        raise InputError("E8014", f"fused: this {reason}. Leave --fused out, or see `wanloom doctor`.")


# Ways to keep weights in 8 bits (`quant.METHODS` has their layers) -> the least capability of a GPU that has the
# products they compute with, and whether a CPU has them; None: they compute in the model's own format.
WEIGHT_METHODS: dict[str, tuple[Capability, bool] | None] = {
    "int8": None,
    "fp8": None,
    "int8-compute": ((7, 5), True),  # Turing, the first with integer tensor cores
    "fp8-compute": (ADA, False),  # the first with 8-bit floating point tensor cores
}


def require_method(name: str, capability: Capability | None) -> None:
    """Errors: E2039 no such method, E8009 when this device (None: a CPU) has not the products it computes with."""
    if name not in WEIGHT_METHODS:
        raise InputError("E2039", f"quantise: '{name}' is not known. {did_you_mean(name, WEIGHT_METHODS)}")
    needs, how = WEIGHT_METHODS[name], name.partition("-")[0]
    if needs is None or (capability is None and needs[1]):
        return
    cure = f"Use {how}, which computes in the model's own format."
    if capability is None:
        raise InputError("E8009", f"{name}: a CPU has no {how} products. {cure}")
    if capability < needs[0]:
        found = f"this GPU has compute capability {_text(capability)}, {how} products need {_text(needs[0])}"
        raise InputError("E8009", f"{name}: {found}. {cure}")


def require_vae_dtype(dtype: str, capability: Capability | None) -> None:
    """Error: E8010 when a GPU has no convolutions in this dtype.  Warning: W8010 when a CPU has no products in it."""
    if dtype != "bfloat16":
        return
    if capability is None and not any("BF16" in feature for feature in machine.cpu().features):
        text = "W8010: vae-dtype: this CPU has no bfloat16 products; decoding takes less memory and more time."
        warnings.warn(WanloomWarning(text), stacklevel=3)
    if capability is not None and capability < AMPERE:
        found = f"this GPU has compute capability {_text(capability)}, bfloat16 convolutions need {_text(AMPERE)}"
        raise InputError("E8010", f"vae-dtype: {found}. Use float32.")


COMPILERS = ("g++", "clang++", "c++", "cl")


def require_compiler(*, on_gpu: bool) -> None:
    """Error: E8008 when code cannot be compiled here: a CPU's needs a C++ compiler, a GPU's needs Triton."""
    if on_gpu and not installed("triton"):
        raise InputError("E8008", "compile: the package triton is missing. Install it, or leave --compile out.")
    if not on_gpu and not any(map(shutil.which, COMPILERS)):
        named = ", ".join(COMPILERS)
        raise InputError("E8008", f"compile: no C++ compiler is here ({named}). Install one, or leave --compile out.")
