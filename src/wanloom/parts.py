"""The parts of one model - encoders, experts, VAE - each brought in when it is needed and let go after.

    parts = Parts(variant, files, device="cuda", dtype="bfloat16")
    with parts.use("text") as encoder: ...
    with parts.use("dit", expert="high_noise_model") as dit: ...

So the peak is the largest part and not their sum: the text encoder has left before a transformer comes, and one expert
is there at a time.  Parts of small models (all together at most a quarter of what is free) stay loaded between uses.
`arranged` says it part by part, as a MemoryPlan has it (`placement.py`).

Transformer, text encoder and CLIP are loaded in `dtype`, VAE and audio encoder in float32, as the reference runs them.
What decodes may be in bfloat16 (`vae_dtype`); what encodes never is, for its errors would stand in every later frame.
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

from wanloom.budget import DTYPE_BYTES, GPU_BASE, check_blocks, check_rows, part_bytes
from wanloom.checkpoint.blocks import TEXT_LAYER, load_streamed
from wanloom.checkpoint.find import Files
from wanloom.checkpoint.lora import merge, read_lora
from wanloom.checkpoint.narrowed import load_into_narrowed, load_streamed_narrowed
from wanloom.checkpoint.packed import holds_packed, load_packed
from wanloom.checkpoint.stored import stored_bytes
from wanloom.checkpoint.weights import Weights, list_files, open_weights
from wanloom.encoders import Tokenizer, build_clip, build_umt5, build_wav2vec2
from wanloom.models.adapters import build_dit
from wanloom.models.layers import use_ops
from wanloom.models.vae import CausalVae
from wanloom.placement import RESIDENT, SMALL, STREAMED, MemoryPlan, Room
from wanloom.request import check_dtype
from wanloom.runtime import machine
from wanloom.runtime.attention import capability_of, kernel_for, use_kernel
from wanloom.runtime.compile import compile_blocks
from wanloom.runtime.fused import FUSED
from wanloom.runtime.kernels import require_compiler, require_fused, require_method, require_vae_dtype
from wanloom.runtime.quant import quantise
from wanloom.runtime.rows import use_rows
from wanloom.runtime.sharding import is_cut
from wanloom.runtime.streaming import Fill, HostBlocks, Streamed, StreamedLayers
from wanloom.runtime.stripes import stripe
from wanloom.variants import Variant

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKED = ("dit", "text")  # parts whose weights may be kept in few bits
WIDE = ("vae", "audio")  # parts that are loaded in float32, whatever the others are


class Parts:
    """The modules of `variant` (as `checkpoint.survey` returned it) from `files`.

    device: where they compute; text_device: where the text encoder does (default: the same).  attention: the kernel of
    transformers by its name in `runtime.kernels` (None: torch's best); compile: whether their blocks are compiled;
    fused: whether what stands between their matrix products runs as fused kernels.
    quantise: how transformers and text encoder keep their weights, a name of `runtime.quant.METHODS`; None: as their
    files do (what is there in 8 bits or in GGUF's blocks stays so, which gives the bits that widening it gives).
    resident_blocks: how many blocks of a transformer stay in memory while the others come and go; None: all.
    vae_dtype: in which the VAE decodes; None: float32.  row_chunks: how many tokens a block works on at a time;
    vae_rows: of how many rows of pixels the VAE's stripes are; None: all.  resident: whether parts stay loaded after
    use; None decides by size.  `arranged` says both anew.

    Errors: E2038, E8007 an attention kernel that is not known or not here, E2039, E8009 the same of a way to quantise,
    E2040 blocks that cannot come and go, E2055 numbers of rows that cannot be, E8008 no compiler, E8014 no fused
    operations, E2028, E8010 a dtype that the VAE cannot decode in.
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
        fused: bool = False,
        quantise: str | None = None,
        resident_blocks: int | None = None,
        vae_dtype: str | None = None,
        row_chunks: int | None = None,
        vae_rows: int | None = None,
        resident: bool | None = None,
    ) -> None:
        self.variant, self.files = variant, files
        self.attention, self.compile, self.fused, self.quantise = attention, compile, fused, quantise
        self.kernel = kernel_for(attention, device)
        if fused:
            require_fused(capability_of(device))
        if compile:
            require_compiler(on_gpu=device != "cpu")
        if quantise is not None:
            require_method(quantise, capability_of(device))
        self.asked_blocks = self.resident_blocks = check_blocks(
            resident_blocks, changed=None if quantise is None else "quantise", on_gpu=device != "cpu"
        )
        self.vae_dtype = check_dtype(vae_dtype or "float32", "vae-dtype")
        require_vae_dtype(self.vae_dtype, capability_of(device))
        self.row_chunks, self.vae_rows = check_rows("row-chunks", row_chunks), check_rows("vae-rows", vae_rows)
        self.device, self.dtype, self.text_device = device, dtype, text_device or device
        self.vae_device = device  # the CPU when nothing else is left: see `Ladder`
        self.vae_shared = False  # whether other processes have their rows of it: see `Together`
        small = self._small() if resident is None else resident
        self.staying = frozenset(BUILD) if small else frozenset[str]()  # parts that are kept between uses
        self.text_streamed = False
        self.lora: Path | None = None
        self._loaded: dict[tuple[str, str | None], nn.Module] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text encoder."""
        return Tokenizer(self.files.tokenizer)

    @cached_property
    def stored(self) -> dict[str, int]:
        """Bytes of the parts whose files have few bits."""
        return stored_bytes(self.files, DTYPE_BYTES[self.dtype])

    @property
    def precision(self) -> dict[str, str]:
        """Part -> the dtype it computes in, and where the text is encoded: what decides the bits of a result."""
        names = {"dit": self.dtype, "text": self.dtype, "vae": "float32"}
        if self.vae_dtype != "float32":
            names["vae"] += f", decoding {self.vae_dtype}"
        if self.files.audio is not None:
            names["audio"] = "float32"
        if self.text_device != self.device:
            names["text place"] = self.text_device
        if self.attention is not None:
            names["attention"] = self.attention
        if self.compile:
            names["compile"] = "blocks"
        if self.fused:
            names["operations"] = "fused"
        if self.quantise is not None:
            names["weights"] = self.quantise
        if self.row_chunks is not None:
            names["row chunks"] = str(self.row_chunks)
        if self.vae_rows is not None:
            names["vae rows"] = str(self.vae_rows)
        return names

    @property
    def held(self) -> Mapping[str, int]:
        """Part -> bytes, of parts of which this process holds less than all; nothing here."""
        return {}

    @property
    def company(self) -> dict[str, str]:
        """What else decides the bits where several processes compute together; nothing here."""
        return {}

    @contextmanager
    def use(self, part: str, expert: str | None = None) -> Iterator[Any]:
        """A part ("text", "clip", "audio", "vae", "dit" with its expert) as a module in eval mode, gone afterwards.

        "decoder" is the VAE, too, in the dtype it decodes in.  Errors: those of `checkpoint.load_into`.
        """
        if part == "decoder" and self.vae_dtype == "float32":
            part = "vae"
        key, stays = (part, expert), {"decoder": "vae"}.get(part, part) in self.staying
        module = self._loaded.get(key)
        if module is None:
            module = self._load(part, expert)
            if stays:
                self._loaded[key] = module
        try:
            yield module
        finally:
            if not stays:
                release(module)

    @contextmanager
    def arranged(self, memory: MemoryPlan) -> Iterator[None]:
        """Inside, parts come, stay and go as `memory` says; what is there in another way is let go first.  Same bits.

        What stays for this run alone is let go at the end.
        """
        staying = frozenset(part for part, mode in memory.modes.items() if mode == RESIDENT)
        if memory.keeps:
            staying = frozenset(BUILD)
        streamed = memory.modes["text"] == STREAMED
        self.keep(staying, memory.resident_blocks, text_streamed=streamed)
        try:
            yield
        except BaseException:
            self.drop()
            raise
        if not memory.keeps:
            self.release()

    def keep(self, staying: frozenset[str], resident_blocks: int | None, *, text_streamed: bool) -> None:
        """From now on these parts stay between uses, and so many blocks of a transformer that is streamed."""
        if (staying, resident_blocks, text_streamed) != (self.staying, self.resident_blocks, self.text_streamed):
            self.drop()
        self.staying, self.resident_blocks, self.text_streamed = staying, resident_blocks, text_streamed

    def room(self) -> Room:
        """Bytes that are free for this process, with those it has already."""
        memory = machine.memory()
        host = memory[1] + machine.own_memory() if memory else 2**62
        if self.device == "cpu":
            return Room(None, host)
        own = torch.cuda.memory_reserved(self.device)
        return Room(torch.cuda.mem_get_info(self.device)[0] + own + (GPU_BASE if own else 0), host)

    def wear(self, lora: Path | None) -> None:
        """From now on every transformer is loaded with this LoRA in its weights, or with none; others are let go.

        Error: E2040 where blocks come and go and cannot be changed.
        """
        if lora == self.lora:
            return
        check_blocks(self.asked_blocks, changed=None if lora is None else "a LoRA", on_gpu=self.device != "cpu")
        self.lora = lora
        for key in [key for key in self._loaded if key[0] == "dit"]:
            release(self._loaded.pop(key))

    def stream(self) -> bool:
        """Let the blocks of transformers that are loaded from now on come and go, all of them.

        False when they do already, or cannot (`check_blocks`).
        """
        if self.resident_blocks == 0 or (self.device == "cpu" and (self.quantise or self.lora)):
            return False
        self.resident_blocks = 0
        return True

    def release(self) -> None:
        """Let go of everything that stayed loaded."""
        self.drop()

    def drop(self) -> None:
        """The same on this process alone, where there are others."""
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
        dtype = torch.float32 if part in WIDE else DTYPES[self.dtype]
        if part == "decoder":
            part, dtype = "vae", DTYPES[self.vae_dtype]
        path = self.files.experts[expert] if part == "dit" and expert else getattr(self.files, part)
        assert path is not None, f"{self.variant.name} has no part {part}"
        with torch.device("meta"):
            module = BUILD[part](self.variant)
        device = {"text": self.text_device, "vae": self.vae_device}.get(part, self.device)
        weights = open_weights(path, kind=part)
        if part == "dit":
            self._fill_dit(module, weights, dtype)
        elif part == "text" and self.text_streamed:
            source = load_streamed(module, weights, dtype=dtype, device=device, block=TEXT_LAYER)
            module.streamed = StreamedLayers(module.get_submodule("encoder.block").children(), source, device)
        else:
            self._fill(part, module, weights, dtype, device)
        if isinstance(module, CausalVae):
            self._cut_rows(module, aside=None if device == "cpu" else "cpu")
        return module.eval().requires_grad_(False)

    def _cut_rows(self, vae: CausalVae, aside: str | None) -> None:
        """The VAE's layers as they go through the rows of a frame."""
        if self.vae_rows is not None:
            stripe(vae, self.vae_rows, aside=aside)

    def _fill(self, part: str, module: nn.Module, weights: Weights, dtype: torch.dtype, device: str) -> None:
        """Any other part with its weights."""
        if part in PACKED and (self.quantise or holds_packed(weights)):
            load_packed(module, weights, dtype=dtype, device=device, how=self.quantise)
        else:
            load_into_narrowed(module, weights, dtype=dtype, device=device)

    def _fill_dit(self, dit: Any, weights: Weights, dtype: torch.dtype) -> None:
        """A transformer with its weights, and what it is given from outside.

        Blocks that come and go are read from their files; quantised or changed by a LoRA, from the host's memory.
        """
        source: Fill | HostBlocks | None = None
        if self.resident_blocks is None:
            self._fill_whole(dit, weights, dtype, self.device)
        elif self.quantise is None and self.lora is None:
            source = load_streamed_narrowed(dit, weights, dtype=dtype, device=self.device)
        else:
            self._fill_whole(dit, weights, dtype, "cpu")
            source = HostBlocks(dit.blocks, pinned=True)
            for name, child in dit.named_children():
                if name not in ("blocks", "trunk"):
                    child.to(self.device)
        dit.eval().requires_grad_(False)
        dit.keeps = source is None
        if source is not None:
            dit.trunk = Streamed(dit.trunk, source, self.device, resident=self.resident_blocks or 0)
        use_kernel(dit, self.kernel)
        if self.fused:
            use_ops(dit, FUSED)
        if self.row_chunks is not None:
            use_rows(dit, self.row_chunks)
        if self.compile:
            compile_blocks(dit.blocks)

    def _fill_whole(self, dit: nn.Module, weights: Weights, dtype: torch.dtype, device: str) -> None:
        """All weights of a transformer on a device; a LoRA goes into whole weights, which are quantised after it."""
        if self.lora is not None:
            load_into_narrowed(dit, weights, dtype=dtype, device=device)
            merge(dit, read_lora(self.lora))
            if self.quantise is not None:
                quantise(dit, self.quantise, device=self.device)
        elif self.quantise is not None or holds_packed(weights):
            load_packed(dit, weights, dtype=dtype, device=device, how=self.quantise)
        else:
            load_into_narrowed(dit, weights, dtype=dtype, device=device)

    def _small(self) -> bool:
        """Whether all parts together are small beside the free memory of the device."""
        sizes = part_bytes(self.variant, self.dtype)
        total = sum(size * (len(self.variant.experts) if part == "dit" else 1) for part, size in sizes.items())
        room = self.room()
        return total <= SMALL * (room.host if room.gpu is None else room.gpu)


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


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory was refused, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def release(module: nn.Module) -> None:
    """Free a module's memory now, whoever still holds a reference to it."""
    for part in module.modules():
        if isinstance(part, Streamed | StreamedLayers):
            part.close()
    on_gpu = any(tensor.is_cuda for tensor in module.parameters())
    if not is_cut(module):  # which cannot be moved in the middle of an exchange; it goes with the last reference
        module.to("meta")
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
