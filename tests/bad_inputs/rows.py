"""What all rows of bad input share: which there are, the models they use, the form of a refusal, forged files."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from command_line import Ran

# The rows of the catalogue that this version answers for.
OWNED = (*range(1, 28), 31, *range(33, 39), *range(40, 50), *range(66, 88), 94, 95, 96)
T2V, I2V, TI2V, SMALL, I2V_21 = "t2v-A14B", "i2v-A14B", "ti2v-5B", "t2v-1.3B", "i2v-14B"
SHORT = ("--size", "64x64", "--frames", "5", "--steps", "2", "--seed", "1")
SHARD = "diffusion_pytorch_model.safetensors"


def check_refusal(ran: Ran, code: str) -> None:
    """The form that every refusal has."""
    *warnings, error = ran.err.splitlines() or [""]
    assert error.startswith(f"error[{code}]: "), ran.err
    assert ran.code == int(code[1])
    assert all(line.startswith("warning[W") for line in warnings)
    assert "Traceback" not in ran.err
    assert not re.search(r"0x[0-9a-f]{6,}", ran.err)


def safetensors(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with any header: a dict, or the text of one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], Any], **metadata: str) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt", **metadata})
