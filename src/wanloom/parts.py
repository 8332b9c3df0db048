"""The parts of one model - encoders, experts, VAE - each brought in when it is needed and let go after.

    parts = Parts(variant, files, device="cuda", dtype="bfloat16")
    with parts.use("text") as encoder: ...
    with parts.use("dit", expert="high_noise_model") as dit: ...

So the peak is the largest part and not their sum: the text encoder has left before a transformer comes, and one expert
is there at a time.  Parts of small models (all together at most a quarter of what is free) stay loaded between uses.

Transformer, text encoder and CLIP are loaded in `dtype`, VAE and audio encoder always in float32, as the reference
runs them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wanloom.budget import part_bytes
from wanloom.checkpoint.find import Files
from wanloom.checkpoint.load import load_into
from wanloom.checkpoint.lora import merge, read_lora
from wanloom.checkpoint.weights import list_files, open_weights
from wanloom.encoders import Tokenizer, build_clip, build_umt5, build_wav2vec2
from wanloom.models.adapters import build_dit
from wanloom.models.vae import CausalVae
from wanloom.runtime import machine
from wanloom.runtime.attention import kernel_for, use_kernel
from wanloom.runtime.compile import compile_blocks
from wanloom.runtime.kernels import require_compiler
from wanloom.variants import Variant

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDE = ("vae", "audio")  # parts that are loaded in float32, whatever the others are
RESIDENT_SHARE = 0.25  # of the free memory that parts may take to stay loaded


class Parts:
    """The modules of `variant` (as `checkpoint.survey` returned it) from `files`.

    device: where they compute; text_device: where the text encoder does (default: the same).  attention: the kernel of
    transformers by its name in `runtime.kernels` (None: torch's best); compile: whether their blocks are compiled.
    resident: whether parts stay loaded after use; None decides by size.

    Errors: E2038 and E8007 an attention kernel that is not known or not here, E8008 no compiler.
    """

    def __init__(
        self,
        variant: Variant,
        files: Files,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        text_device: str | None = None,
        attention: str | None = None,
        compile: bool = False,
        resident: bool | None = None,
    ) -> None:
        self.variant, self.files = variant, files
        self.attention, self.compile = attention, compile
        self.kernel = kernel_for(attention, device)
        if compile:
            require_compiler(on_gpu=device != "cpu")
        self.device, self.dtype, self.text_device = device, dtype, text_device or device
        self.resident = self._small() if resident is None else resident
        self.lora: Path | None = None
        self._loaded: dict[tuple[str, str | None], nn.Module] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text encoder."""
        return Tokenizer(self.files.tokenizer)

    @property
    def precision(self) -> dict[str, str]:
        """Part -> the dtype it computes in, and where the text is encoded: what decides the bits of a result."""
        names = {"dit": self.dtype, "text": self.dtype, "vae": "float32"}
        if self.files.audio is not None:
            names["audio"] = "float32"
        if self.text_device != self.device:
            names["text place"] = self.text_device
        if self.attention is not None:
            names["attention"] = self.attention
        if self.compile:
            names["compile"] = "blocks"
        return names

    @contextmanager
    def use(self, part: str, expert: str | None = None) -> Iterator[Any]:
        """A part ("text", "clip", "audio", "vae", "dit" with its expert) as a module in eval mode, gone afterwards.

        Errors: those of `checkpoint.load_into`.
        """
        key = part, expert
        module = self._loaded.get(key)
        if module is None:
            module = self._load(part, expert)
            if self.resident:
                self._loaded[key] = module
        try:
            yield module
        finally:
            if not self.resident:
                release(module)

    def wear(self, lora: Path | None) -> None:
        """From now on every transformer is loaded with this LoRA in its weights, or with none; others are let go."""
        if lora == self.lora:
            return
        self.lora = lora
        for key in [key for key in self._loaded if key[0] == "dit"]:
            release(self._loaded.pop(key))

    def release(self) -> None:
        """Let go of everything that stayed loaded."""
        while self._loaded:
            release(self._loaded.popitem()[1])

    def weight_files(self) -> Mapping[str, list[Path]]:
        """Part -> its weight files, shards in order; the tokenizer's file and the LoRA's too."""
        files = self.files
        named = {f"dit {name}": (path, "dit") for name, path in files.experts.items()}
        named |= {"vae": (files.vae, "vae"), "text": (files.text, "text")}
        if files.clip is not None:
            named["clip"] = files.clip, "clip"
        if files.audio is not None:
            named["audio"] = files.audio, "audio"
        found = {part: sorted(list_files(path, kind=kind)[0]) for part, (path, kind) in named.items()}
        tokenizer = files.tokenizer
        found["tokenizer"] = [tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer]
        if self.lora is not None:
            found["lora"] = [self.lora]
        return found

    def _load(self, part: str, expert: str | None) -> nn.Module:
        """A part on its device, without gradients."""
        path = self.files.experts[expert] if part == "dit" and expert else getattr(self.files, part)
        assert path is not None, f"{self.variant.name} has no part {part}"
        with torch.device("meta"):
            module = BUILD[part](self.variant)
        dtype = torch.float32 if part in WIDE else DTYPES[self.dtype]
        device = self.text_device if part == "text" else self.device
        load_into(module, open_weights(path, kind=part), dtype=dtype, device=device)
        if part == "dit":
            self._equip(module)
        return module.eval().requires_grad_(False)

    def _equip(self, dit: Any) -> None:
        """What a transformer is given from outside: a LoRA, the attention kernel, compiled blocks."""
        if self.lora is not None:
            merge(dit, read_lora(self.lora))
        use_kernel(dit, self.kernel)
        if self.compile:
            compile_blocks(dit.blocks)

    def _small(self) -> bool:
        """Whether all parts together are small beside the free memory of the device."""
        sizes = part_bytes(self.variant, self.dtype)
        total = sum(size * (len(self.variant.experts) if part == "dit" else 1) for part, size in sizes.items())
        if self.device == "cpu":
            memory = machine.memory()
            free = memory[1] if memory else 0
        else:
            free = torch.cuda.mem_get_info(self.device)[0]
        return total <= RESIDENT_SHARE * free


BUILD: dict[str, Callable[[Variant], nn.Module]] = {
    "dit": lambda variant: build_dit(variant.dit),
    "vae": lambda variant: CausalVae(variant.vae),
    "text": lambda variant: build_umt5(variant.text),
    "clip": lambda variant: build_clip(_there(variant.clip, variant)),
    "audio": lambda variant: build_wav2vec2(_there(variant.audio, variant)),
}


def _there(config: Any, variant: Variant) -> Any:
    assert config is not None, f"{variant.name} has no such part"
    return config


def release(module: nn.Module) -> None:
    """Free a module's memory now, whoever still holds a reference to it."""
    on_gpu = any(tensor.is_cuda for tensor in module.parameters())
    module.to("meta")
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
