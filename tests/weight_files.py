"""Weight files for tests, right and wrong: written byte by byte, because no library writes the wrong ones."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from wanloom.checkpoint.header import DTYPES
from wanloom.models.config import ClipConfig, DiTConfig, TextConfig, VaeConfig

Shape = tuple[int, ...]

SMALL_DIT = DiTConfig(dim=12, ffn_dim=8, heads=2, layers=1, text_dim=6, text_len=7, freq_dim=4)
SMALL_VAE = VaeConfig(dim=4, decoder_dim=4, multipliers=(1, 2), temporal=(True,), blocks=1)
SMALL_TEXT = TextConfig(dim=6, ffn_dim=8, heads=2, head_dim=4, layers=2, vocab=9, buckets=4)
SMALL_CLIP = ClipConfig(dim=16, ffn_dim=8, heads=2, layers=2, patch=2, image=6, projection=5)


def raw_safetensors(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header text and these data, whatever they say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def header_of(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> tuple[dict[str, object], int]:
    """A right header for tensors (name -> dtype, shape), and how many bytes of data it asks for."""
    header: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = DTYPES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return header, end


def hollow(path: Path, shapes: Mapping[str, Shape], dtype: str = "F32", **metadata: str) -> Path:
    """A file with these tensors and a hole where the data would be: of any size, without disk."""
    header, size = header_of({name: (dtype, shape) for name, shape in shapes.items()})
    if metadata:
        header["__metadata__"] = {key.replace("_", "."): value for key, value in metadata.items()}
    text = json.dumps(header).encode()
    raw_safetensors(path, text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + size)
    return path


def values_for(shapes: Mapping[str, Shape], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random values for each tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def saved_zip(tensors: object) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def zip_with_pickle(path: Path, program: bytes, members: Mapping[str, bytes] | None = None) -> Path:
    """A torch file whose structure is this pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for name, data in (members or {}).items():
            archive.writestr(f"archive/{name}", data)
    return path
