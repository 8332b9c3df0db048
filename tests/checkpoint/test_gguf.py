"""GGUF files, right and wrong, and loading that keeps weights in few bits.  The reference is the `gguf` package."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny
from wanloom.checkpoint.detect import config_of
from wanloom.checkpoint.gguf import BLOCKS, REFUSED, TEXT_LLAMA, TYPES, open_gguf, read_blocks, read_gguf
from wanloom.checkpoint.load import load_into, read_entry
from wanloom.checkpoint.names import get_format
from wanloom.checkpoint.packed import keepable, load_packed
from wanloom.checkpoint.weights import open_weights
from wanloom.encoders import build_umt5
from wanloom.errors import InputError
from wanloom.models.adapters import build_dit
from wanloom.models.config import DiTConfig, TextConfig
from wanloom.runtime.fp8 import Fp8Compute, Fp8Linear
from wanloom.runtime.frozen import FrozenLinear
from wanloom.runtime.ggml import FORMATS, GgufLinear, dequantise, finite
from wanloom.runtime.int8 import Int8Linear
from wanloom.runtime.kernels import WEIGHT_METHODS
from wanloom.runtime.quant import size_of

gguf: Any = pytest.importorskip("gguf", reason="the reference for GGUF files")

DIT = DiTConfig(dim=256, ffn_dim=512, heads=2, layers=2, text_dim=64, text_len=8, freq_dim=32)
TEXT = TextConfig(dim=64, ffn_dim=96, heads=2, head_dim=32, layers=2, vocab=40, buckets=8)


def random_packed(shape: tuple[int, ...], format_: str, seed: int = 0) -> np.ndarray[Any, Any]:
    """Blocks of random bytes for values of this shape, with scales that are finite: [..., bytes]."""
    form = FORMATS[format_]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // form.values, form.size), dtype=np.uint8)
    for at in form.halves:
        halves = (0.01 * rng.standard_normal(len(blocks))).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*shape[:-1], -1)


def plain_values(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    return tiny._values(module, torch.Generator().manual_seed(seed), torch.float32)


def write(
    path: Path,
    values: Mapping[str, Tensor],
    format_of: Callable[[str, Tensor], str],
    *,
    arch: str = "wan",
    more: Callable[[Any], None] = lambda writer: None,
) -> Path:
    """A GGUF file by the reference's writer; formats that it cannot make get random blocks."""
    writer = gguf.GGUFWriter(path, arch)
    more(writer)
    for name, value in values.items():
        format_ = format_of(name, value)
        type_ = gguf.GGMLQuantizationType[format_]
        if format_.endswith("_K"):
            data = random_packed(tuple(value.shape), format_)
        else:
            data = gguf.quants.quantize(value.numpy(), type_)
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_published(format_: str) -> Callable[[str, Tensor], str]:
    """As converters do it: matrices of blocks packed, the rest of them half, all else in full."""

    def choose(name: str, value: Tensor) -> str:
        if value.dim() != 2 or "modulation" in name:
            return "F32"
        return format_ if name.startswith("blocks.") else "BF16"

    return choose


def widened(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file as the reference reads it, float32."""
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        ).view([int(size) for size in tensor.shape[::-1]])
        for tensor in reader.tensors
    }


@pytest.fixture(scope="module")
def q8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small transformer in Q8_0."""
    return write(tmp_path_factory.mktemp("q8") / "dit-Q8_0.gguf", plain_values(build_dit(DIT)), as_published("Q8_0"))


def built(config: DiTConfig | TextConfig) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = build_dit(config) if isinstance(config, DiTConfig) else build_umt5(config)
    return module


def run_dit(dit: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 16, 1, 4, 4, generator=generator), torch.randn(1, 8, 64, generator=generator)
    with torch.no_grad():
        out: Tensor = dit(x, torch.tensor([[500.0]]), context)
    return out


# ---------------------------------------------------------------- number formats


@pytest.mark.parametrize("format_", FORMATS)
def test_blocks_are_widened_as_the_reference_does(format_: str) -> None:
    """The same operations in the same order: bit for bit."""
    packed = random_packed((7, 3 * FORMATS[format_].values), format_)
    theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[format_])
    assert torch.equal(dequantise(torch.from_numpy(packed), format_), torch.from_numpy(theirs))


def test_the_tables_are_the_reference_s() -> None:
    types = gguf.GGMLQuantizationType
    for number, (name, values, size) in TYPES.items():
        assert types(number).name == name
        assert gguf.GGML_QUANT_SIZES[types(number)] == (values, size)
    assert {name: (form.values, form.size) for name, form in FORMATS.items()} == BLOCKS
    for number, name in REFUSED.items():
        assert types(number).name == name


@pytest.mark.parametrize("format_", FORMATS)
def test_a_scale_that_is_not_finite_is_found(format_: str) -> None:
    form = FORMATS[format_]
    for at in form.halves:
        packed = torch.from_numpy(random_packed((4, 2 * form.values), format_))
        assert finite(packed, format_)
        packed.view(8, form.size)[5, at : at + 2] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # infinity
        assert not finite(packed, format_)
        assert not torch.isfinite(dequantise(packed, format_)).all()


# ---------------------------------------------------------------- the header


def test_the_table_of_contents_is_the_reference_s(q8: Path) -> None:
    header, reader = read_gguf(q8), gguf.GGUFReader(q8)
    assert [entry.name for entry in header.entries.values()] == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        entry = header.entries[tensor.name]
        assert entry.dtype == tensor.tensor_type.name
        assert entry.shape == tuple(int(size) for size in tensor.shape[::-1])
        assert (entry.offset, entry.size) == (tensor.data_offset, tensor.n_bytes)
    assert header.metadata["general.architecture"] == "wan"


@pytest.mark.parametrize("name", [*FORMATS, "F32", "F16", "BF16"])
def test_values_are_the_reference_s(name: str, tmp_path: Path) -> None:
    value = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    path = write(tmp_path / "x.gguf", {"a": value, "b": value}, lambda *given: name)
    for key, entry in read_gguf(path).entries.items():
        mine = read_blocks(entry) if name in BLOCKS else read_entry(entry).float()
        assert torch.equal(mine, widened(path)[key])
        if name in BLOCKS:
            assert torch.equal(read_blocks(entry, torch.bfloat16), mine.bfloat16())


def test_metadata_of_a_tokenizer_is_passed_over_quickly(tmp_path: Path) -> None:
    """UMT5's: 256 384 texts, scores and types.  (The reference's reader takes a hundred times as long.)"""
    path = tmp_path / "x.gguf"
    raw = header(
        kv(b"tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 256384) + (struct.pack("<Q", 9) + b"some text") * 256384),
        kv(b"tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, 256384) + bytes(4 * 256384)),
        kv(b"general.name", 8, text(b"UMT5")),
        kv(b"general.alignment", 4, struct.pack("<I", 64)),
        kv(b"a.flag", 7, b"\x01"),
        kv(b"a.float", 6, struct.pack("<f", 0.5)),
    )
    path.write_bytes(raw)
    begin = time.process_time()
    metadata = read_gguf(path).metadata
    assert time.process_time() - begin < 2
    assert metadata == {"general.name": "UMT5", "general.alignment": "64", "a.flag": "True", "a.float": "0.5"}


def test_a_shape_that_was_noted_is_given_back(tmp_path: Path) -> None:
    """Tensors of five dimensions are stored flat by some converters, as they are by others."""
    value = torch.randn(8, 4, 1, 2, 2)
    noted = write(
        tmp_path / "flat.gguf",
        {"patch_embedding.weight": value.reshape(8, 16)},
        lambda *given: "F16",
        more=lambda writer: writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", [8, 4, 1, 2, 2]),
    )
    assert read_gguf(noted).entries["patch_embedding.weight"].shape == (8, 4, 1, 2, 2)
    plain = write(tmp_path / "five.gguf", {"patch_embedding.weight": value}, lambda *given: "F32")
    assert read_gguf(plain).entries["patch_embedding.weight"].shape == (8, 4, 1, 2, 2)


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("format_", FORMATS)
def test_a_transformer_keeps_its_blocks_packed(format_: str, tmp_path: Path) -> None:
    """The same numbers, to the bit, as the transformer of the widened weights; and no more bytes than the file."""
    path = write(tmp_path / "dit.gguf", plain_values(build_dit(DIT)), as_published(format_))
    weights = open_gguf(path, kind="dit")
    assert config_of(weights) == DiTConfig(**{**vars(DIT), "text_len": 512})
    dit = built(DIT)
    packed = load_packed(dit, weights, dtype=torch.float32)
    assert (packed.kept, packed.quantised) == (20, 0)
    assert all(isinstance(dit.get_submodule(f"blocks.{i}.ffn.0"), GgufLinear) for i in range(2))
    wide = build_dit(DIT)
    wide.load_state_dict(widened(path))
    assert torch.equal(run_dit(dit), run_dit(wide))
    matrices = sum(source.size for source in weights.tensors.values() if source.dtype == format_)
    assert packed.bytes == matrices < size_of(wide) / 2


def text_names(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> llama.cpp's."""
    ours, theirs = get_format("text", "transformers"), TEXT_LLAMA
    out = {}
    for name, value in values.items():
        official = ours.official(name)
        assert official is not None
        foreign = theirs.foreign(official[0])
        assert foreign is not None
        out[foreign[0][0]] = value
    return out


def test_a_text_encoder_in_llama_cpp_s_names(tmp_path: Path) -> None:
    values = text_names(plain_values(build_umt5(TEXT)))
    assert {"token_embd.weight", "enc.blk.1.attn_rel_b.weight", "enc.blk.0.ffn_gate.weight"} <= values.keys()
    assert len(values) == 2 + 10 * TEXT.layers
    path = write(
        tmp_path / "umt5.gguf",
        values,
        lambda name, value: "F32" if "norm" in name or "rel_b" in name else "Q8_0" if "attn" in name else "Q5_1",
        arch="t5encoder",
        more=lambda writer: writer.add_token_list(["a", "b"]),
    )
    weights = open_gguf(path, kind="text")
    found = config_of(weights)
    assert isinstance(found, TextConfig)
    assert (found.dim, found.heads, found.layers, found.vocab) == (64, 2, 2, 40)
    model = built(TEXT)
    packed = load_packed(model, weights, dtype=torch.float32)
    assert packed.kept == 14  # the file's attention is in 8 bits already: keeping it so loses nothing
    reference = build_umt5(TEXT)
    wide = widened(path)
    reference.load_state_dict(
        {name: wide[theirs] for name, theirs in zip(plain_values(reference), values, strict=True)}
    )
    ids = torch.tensor([[4, 9, 11, 1]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).last_hidden_state, reference(input_ids=ids).last_hidden_state)


def test_a_text_encoder_in_transformers_names_with_marks_beside(tmp_path: Path) -> None:
    values = plain_values(build_umt5(TEXT))
    values["encoder.embed_tokens.weight"] = values["shared.weight"]
    path = write(tmp_path / "x.gguf", values, lambda name, value: "F32", arch="pig")
    weights = open_gguf(path)
    assert weights.kind == "text" and weights.ignored == ("encoder.embed_tokens.weight",)


def test_other_models_are_refused_by_name(q8: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this is a transformer, expected a text encoder") as caught:
        open_gguf(q8, kind="text")
    assert caught.value.code == "E4020"
    other = write(tmp_path / "llama.gguf", {"blk.0.attn_q.weight": torch.ones(2, 32)}, lambda *given: "F32")
    with pytest.raises(InputError, match="not a Wan model") as caught:
        open_gguf(other)
    assert caught.value.code == "E4016"
    values = {**plain_values(build_dit(DIT)), "stranger": torch.ones(3)}
    with pytest.raises(InputError, match=r"1 tensors .* stranger") as caught:
        config_of(open_gguf(write(tmp_path / "more.gguf", values, as_published("Q8_0"))))
    assert caught.value.code == "E4013"


def test_weights_that_are_not_finite_are_refused_and_the_module_stays(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", plain_values(build_dit(DIT)), as_published("Q8_0"))
    entry = read_gguf(path).entries["blocks.1.ffn.2.weight"]
    raw = bytearray(path.read_bytes())
    raw[entry.offset : entry.offset + 2] = b"\x00\x7c"
    path.write_bytes(raw)
    dit = built(DIT)
    with pytest.raises(InputError, match=r"blocks\.1\.ffn\.2\.weight") as caught:
        load_packed(dit, path)
    assert caught.value.code == "E4010"
    assert not any(isinstance(layer, FrozenLinear) for layer in dit.modules())
    assert all(tensor.is_meta for tensor in dit.state_dict().values())


# ---------------------------------------------------------------- ComfyUI's 8-bit files


def fp8_file(path: Path, scale: str, *, dtype: torch.dtype = torch.float8_e4m3fn) -> Path:
    """One as ComfyUI has it: the matrices of the blocks in fp8, with one scale, one a row, or none (a plain cast)."""
    out: dict[str, Tensor] = {}
    for name, value in plain_values(build_dit(DIT)).items():
        if not name.startswith("blocks.") or value.dim() != 2:
            out[name] = value.to(torch.bfloat16)
            continue
        amax = value.abs().amax(1) if scale == "rows" else value.abs().amax()
        factor = torch.ones(()) if scale == "none" else amax / 448
        out[name] = (value / (factor[:, None] if factor.dim() else factor)).to(dtype)
        if scale != "none":
            suffix = ".weight_scale" if scale == "rows" else ".scale_weight"
            out[name.removesuffix(".weight") + suffix] = factor.reshape(-1, 1) if scale == "rows" else factor
    if scale == "one":
        out["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    save_file(out, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["one", "rows", "none", "e5m2"])
def test_comfyui_s_fp8_stays_8_bit_and_means_what_it_meant(scale: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The weights of the kept layers, and the output of the model, are those of `load_into`, to the bit."""
    kind = torch.float8_e5m2 if scale == "e5m2" else torch.float8_e4m3fn
    path = fp8_file(tmp_path / "x.safetensors", "none" if scale == "e5m2" else scale, dtype=kind)
    wide, kept = built(DIT), built(DIT)
    load_into(wide, path, dtype=dtype)
    packed = load_packed(kept, path, dtype=dtype)
    assert (packed.kept, packed.quantised) == (20, 0)
    for name, layer in kept.named_modules():
        if isinstance(layer, Fp8Linear):
            assert layer.codes.dtype == kind
            assert torch.equal(layer.dequantised(dtype), wide.get_submodule(name).weight)
            assert torch.equal(layer.bias, wide.get_submodule(name).bias)
    assert torch.equal(run_dit(kept), run_dit(wide))
    assert size_of(kept) < 0.7 * size_of(wide)


def test_keeping_to_a_method(tmp_path: Path) -> None:
    """Layers in the method's own format are kept; of all others the values are taken."""
    path = fp8_file(tmp_path / "x.safetensors", "one")
    for how, kept, layer in (("fp8", 20, Fp8Linear), ("int8", 0, Int8Linear)):
        dit = built(DIT)
        packed = load_packed(dit, path, dtype=torch.float32, how=how)
        assert (packed.kept, packed.quantised) == (kept, 20 - kept)
        assert type(dit.get_submodule("blocks.0.self_attn.q")) is layer
    wide = built(DIT)
    load_into(wide, path, dtype=torch.float32)
    off = (dit.get_submodule("blocks.0.self_attn.q").dequantised() - wide.blocks[0].self_attn.q.weight).abs()
    assert (off <= wide.blocks[0].self_attn.q.weight.abs().amax(1, keepdim=True) / 253).all()


def test_the_codes_of_a_file_serve_fp8_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fp8_file(tmp_path / "x.safetensors", "rows")
    with pytest.raises(InputError, match="a CPU has no fp8 products") as caught:
        load_packed(built(DIT), path, how="fp8-compute")
    assert caught.value.code == "E8009"
    monkeypatch.setitem(WEIGHT_METHODS, "fp8-compute", None)
    dit = built(DIT)
    assert load_packed(dit, path, how="fp8-compute").kept == 20
    assert isinstance(dit.get_submodule("blocks.0.self_attn.q"), Fp8Compute)


def test_any_file_can_become_8_bit_as_it_comes(q8: Path, tmp_path: Path) -> None:
    """From bfloat16 and from GGUF; what is skipped is loaded in full."""
    plain = tmp_path / "x.safetensors"
    save_file({name: value.bfloat16() for name, value in plain_values(build_dit(DIT)).items()}, plain)
    for path in (plain, q8):
        dit = built(DIT)
        packed = load_packed(dit, path, dtype=torch.bfloat16, how="fp8", skip=("blocks.0.",))
        assert (packed.kept, packed.quantised) == (0, 10)
        assert type(dit.get_submodule("blocks.0.ffn.0")) is nn.Linear
        assert type(dit.get_submodule("blocks.1.ffn.0")) is Fp8Linear
        assert torch.isfinite(run_dit(dit)).all()
    assert not any(keepable(source) for source in open_weights(plain).tensors.values())


def test_published_names_of_adapters_find_their_layers(tmp_path: Path) -> None:
    config = tiny.TINY["s2v-14B"].dit
    with torch.device("meta"):
        dit = build_dit(config)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: value.contiguous() for name, value in plain_values(build_dit(config)).items()}, path)
    said = '{"num_heads": 2, "audio_inject_layers": [0, 1], "audio_dim": 32}'
    (tmp_path / "config.json").write_text(said)
    packed = load_packed(dit, path, how="int8")
    assert packed.quantised == 30  # ten of each block, five of each of its ears
    assert isinstance(dit.get_submodule("blocks.0.after.0.attn.q"), Int8Linear)
    assert not any(tensor.is_meta for tensor in dit.state_dict().values())


# ---------------------------------------------------------------- wrong files


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def kv(key: bytes, type_: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", type_) + value


def line(name: bytes = b"a", sizes: tuple[int, ...] = (32,), type_: int = 0, offset: int = 0) -> bytes:
    sized = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + sized + struct.pack("<IQ", type_, offset)


def header(
    *keys: bytes, lines: tuple[bytes, ...] = (), version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    tensors, count = counts or (len(lines), len(keys))
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + b"".join(keys) + b"".join(lines)


def whole(*keys: bytes, lines: tuple[bytes, ...] = (), data: int = 128, **rest: Any) -> bytes:
    raw = header(*keys, lines=lines, **rest)
    return raw + bytes(-len(raw) % 32) + bytes(data)


HUGE = 2**63 - 1
NOTE = b"comfy.gguf.orig_shape.a"
SHAPE = kv(NOTE, 9, struct.pack("<IQ3i", 5, 3, 2, 4, 4))
WRONG: dict[str, tuple[str, bytes]] = {
    "empty": ("E4012", b""),
    "a page": ("E4012", b"<!DOCTYPE html>" + bytes(100)),
    "cut in the magic": ("E4012", b"GGU"),
    "cut after it": ("E4004", b"GGUF"),
    "cut in the counts": ("E4004", header()[:20]),
    "version 1": ("E4005", header(version=1)),
    "big-endian": ("E4005", header(version=3 << 24)),
    "too many tensors": ("E4005", header(counts=(HUGE, 0))),
    "too many keys": ("E4005", header(counts=(0, HUGE))),
    "keys that are not there": ("E4004", header(counts=(0, 3))),
    "tensors that are not there": ("E4004", header(counts=(3, 0))),
    "a key of all bytes": ("E4005", header(struct.pack("<Q", HUGE) + b"x", counts=(0, 1))),
    "a text of all bytes": ("E4004", header(kv(b"k", 8, struct.pack("<Q", 2**64 - 1)))),
    "a list of all numbers": ("E4004", header(kv(b"k", 9, struct.pack("<IQ", 0, 2**64 - 1)))),
    "a list of all texts": ("E4005", header(kv(b"k", 9, struct.pack("<IQ", 8, 2**64 - 1)))),
    "a list of texts that are not there": ("E4004", header(kv(b"k", 9, struct.pack("<IQ", 8, 500_000)))),
    "a list of a text that is too long": ("E4004", header(kv(b"k", 9, struct.pack("<IQQ", 8, 1, 2**64 - 1)))),
    "a list of lists": ("E4005", header(kv(b"k", 9, struct.pack("<IQ", 9, 1) + bytes(64)))),
    "an unknown type": ("E4005", header(kv(b"k", 77, bytes(8)))),
    "a key twice": ("E4008", header(kv(b"k", 0, b"\x01"), kv(b"k", 0, b"\x01"))),
    "a key of no text": ("E4005", header(kv(b"\xff\xfe", 0, b"\x01"))),
    "no power of two": ("E4005", header(kv(b"general.alignment", 4, struct.pack("<I", 48)))),
    "alignment of zero": ("E4005", header(kv(b"general.alignment", 4, struct.pack("<I", 0)))),
    "a vast alignment": ("E4005", header(kv(b"general.alignment", 10, struct.pack("<Q", 2**62)))),
    "an alignment in words": ("E4005", header(kv(b"general.alignment", 8, text(b"wide")))),
    "one part of several": ("E4013", header(kv(b"split.count", 2, struct.pack("<H", 3)))),
    "a tensor twice": ("E4008", whole(lines=(line(), line(offset=128)), data=256)),
    "a name of nothing": ("E4007", whole(lines=(line(b""),))),
    "a name that does not print": ("E4007", whole(lines=(line(b"a\n"),))),
    "a long name": ("E4005", whole(lines=(line(b"a" * 300),))),
    "many dimensions": ("E4007", whole(lines=(line(sizes=(1,) * 9),))),
    "a vast dimension": ("E4007", whole(lines=(line(sizes=(2**64 - 1,)),))),
    "vast dimensions": ("E4006", whole(lines=(line(sizes=(HUGE,) * 8),))),
    "IQ4_NL": ("E4009", whole(lines=(line(type_=20),))),
    "an unknown format": ("E4009", whole(lines=(line(type_=999),))),
    "no whole block": ("E4007", whole(lines=(line(sizes=(33, 2), type_=8),))),
    "blocks without dimensions": ("E4007", whole(lines=(line(sizes=(), type_=8),))),
    "an overlap": ("E4007", whole(lines=(line(), line(b"b", offset=64)), data=256)),
    "a gap": ("E4007", whole(lines=(line(), line(b"b", offset=192)), data=512)),
    "a gap before the first": ("E4007", whole(lines=(line(offset=32),), data=160)),
    "cut in the data": ("E4006", whole(lines=(line(),), data=127)),
    "more behind": ("E4006", whole(lines=(line(),), data=128 + 32)),
    "a noted shape of other size": ("E4007", whole(kv(NOTE, 9, struct.pack("<IQ2i", 5, 2, 4, 4)), lines=(line(),))),
    "a noted shape below zero": ("E4007", whole(kv(NOTE, 9, struct.pack("<IQ2i", 5, 2, -4, -8)), lines=(line(),))),
    "a noted shape of fractions": ("E4005", whole(kv(NOTE, 9, struct.pack("<IQ2f", 6, 2, 4, 8)), lines=(line(),))),
    "a noted shape of many": ("E4005", whole(kv(NOTE, 9, struct.pack("<IQ9i", 5, 9, *(1,) * 9)), lines=(line(),))),
    "a noted shape twice": ("E4008", whole(SHAPE, SHAPE, lines=(line(),))),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_an_error_in_one_line_and_quickly(what: str, tmp_path: Path) -> None:
    code, raw = WRONG[what]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    begin = time.process_time()
    with pytest.raises(InputError) as caught:
        open_gguf(path)
    assert time.process_time() - begin < 2
    assert caught.value.code == code, caught.value
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_is_right_beside_the_wrong(tmp_path: Path) -> None:
    """The same hand-made files without their faults: the faults are what is refused."""
    path = tmp_path / "x.gguf"
    for data in (256, 255 - 31 + 32):
        path.write_bytes(whole(SHAPE, lines=(line(), line(b"b", offset=128)), data=data))
        assert read_gguf(path).entries["a"].shape == (2, 4, 4)
    path.write_bytes(whole(lines=(line(sizes=(33,)),), data=160, version=2))  # 132 bytes, filled up
    assert read_gguf(path).entries["a"].size == 132
    path.write_bytes(header())
    assert read_gguf(path).entries == {}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "x.gguf", tmp_path):
        with pytest.raises(InputError) as caught:
            read_gguf(path)
        assert caught.value.code == "E4001"


def test_a_file_cut_anywhere_is_an_error(q8: Path, tmp_path: Path) -> None:
    raw, path = q8.read_bytes(), tmp_path / "x.gguf"
    start = read_gguf(q8).start
    for end in (*range(0, start, 97), start, start + 1, len(raw) // 2, len(raw) - 33):
        path.write_bytes(raw[:end])
        with pytest.raises(InputError) as caught:
            open_gguf(path)
        assert caught.value.code in ("E4004", "E4006", "E4012")


def test_a_damaged_header_is_an_error_or_read(q8: Path, tmp_path: Path) -> None:
    """Any byte may be any other: an InputError of exit code 4, or a table that still lies within the file."""
    raw, path = bytearray(q8.read_bytes()), tmp_path / "x.gguf"
    start = read_gguf(q8).start
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        at, value = int(rng.integers(start)), int(rng.integers(256))
        kept, raw[at] = raw[at], value
        path.write_bytes(raw)
        raw[at] = kept
        try:
            weights = open_gguf(path)
            config_of(weights)
        except InputError as error:
            refused += 1
            assert error.exit_code == 4
        else:
            assert all(entry.offset + entry.size <= len(raw) for entry in weights.headers[0].entries.values())
    assert refused > 200
