"""Safetensors files written as a stream: sizes are known before values, so no more than one tensor is in memory.

    write_model(folder, "diffusion_pytorch_model", items, metadata)

A model larger than `SHARD` bytes becomes shards with an index, named as the hub's libraries do; each file appears
complete or not at all, and the index last.  Values that are not finite are refused (E4010): better here than at use.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from wanloom.checkpoint.header import DTYPES
from wanloom.checkpoint.weights import INDEX
from wanloom.durable import atomic_path, write_atomic
from wanloom.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHARD = 9_900_000_000  # bytes of tensors in one file, as the published shards

NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
# What people call them on a command line.
DTYPE_WORDS = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16", "half": "float16",
    "fp32": "float32", "float32": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A tensor to be written: its name, number format and shape now, its values when `make` is called."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        return DTYPES[self.dtype] * prod(self.shape)


def dtype_named(word: str) -> torch.dtype:
    """torch's dtype of a word of `DTYPE_WORDS`.  Errors: E2028."""
    import torch

    if word not in DTYPE_WORDS:
        raise InputError("E2028", f"dtype: '{word}' is not known. There are: {', '.join(sorted(DTYPE_WORDS))}.")
    found = getattr(torch, DTYPE_WORDS[word])
    assert isinstance(found, torch.dtype)
    return found


def write_model(
    folder: Path,
    stem: str,
    items: Sequence[Item],
    metadata: Mapping[str, str],
    *,
    shard: int = SHARD,
    overwrite: bool = True,
) -> list[Path]:
    """Write one model as `stem.safetensors`, or as shards with their index; the files, index not among them."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = split(items, shard)
    if len(groups) == 1:
        path = folder / f"{stem}.safetensors"
        write_file(path, items, metadata, overwrite=overwrite)
        return [path]
    paths = []
    where: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        path = folder / f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        write_file(path, group, metadata, overwrite=overwrite)
        where |= {item.name: path.name for item in group}
        paths.append(path)
    index = {"metadata": {"total_size": sum(item.size for item in items)}, "weight_map": dict(sorted(where.items()))}
    write_atomic(folder / f"{stem}{INDEX}", (json.dumps(index, indent=1) + "\n").encode(), overwrite=overwrite)
    return paths


def split(items: Iterable[Item], shard: int) -> list[list[Item]]:
    """Items in their order, in groups of at most `shard` bytes (a larger tensor stands alone)."""
    groups: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        if groups[-1] and filled + item.size > shard:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += item.size
    return groups


def write_file(path: Path, items: Sequence[Item], metadata: Mapping[str, str], *, overwrite: bool = True) -> None:
    """One safetensors file.  Wide number formats come first, so that every tensor is aligned to its values."""
    ordered = sorted(items, key=lambda item: (-DTYPES[item.dtype], item.name))
    header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    end = 0
    for item in ordered:
        header[item.name] = {"dtype": item.dtype, "shape": item.shape, "data_offsets": [end, end + item.size]}
        end += item.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path, overwrite=overwrite) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for item in ordered:
            file.write(_bytes(path, item))


def _bytes(path: Path, item: Item) -> memoryview:
    """An item's values as bytes, once they are what was announced."""
    import torch

    value = item.make().detach().cpu()
    if NAMES.get(str(value.dtype).removeprefix("torch.")) != item.dtype or tuple(value.shape) != item.shape:
        raise AssertionError(
            f"{item.name}: announced {item.dtype} {item.shape}, got {value.dtype} {tuple(value.shape)}"
        )
    if value.is_floating_point() and not torch.isfinite(value.sum(dtype=torch.float64)):
        raise InputError("E4010", f"{path}: tensor {item.name}: has values that are not finite; nothing was written.")
    return memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
