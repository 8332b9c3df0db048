"""Texts encoded, and kept in the user's cache: a prompt that was encoded before does not need the encoder again.

A kept text gives the bits that encoding it would give: its key holds everything that decides them, the weights, the
tokenizer, the number format and the machine.  The text itself is in the key as a hash and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from wanloom.budget import part_bytes
from wanloom.durable import atomic_path
from wanloom.encoders import encode_text
from wanloom.errors import InputError, WanloomWarning
from wanloom.jobs import identity, machine_fingerprint
from wanloom.parts import Parts
from wanloom.store import Store

WORTH = 2**28  # bytes of an encoder below which loading it again is as quick as looking in the cache
PROMPTS = Store("prompts", limit=2**30)  # a text of 100 tokens takes 0.8 MB


def encode(parts: Parts, texts: Sequence[str]) -> list[Tensor]:
    """[1, text_len, text_dim] of each text, rows beyond its end zero.  The encoder is loaded when one is not kept."""
    length = parts.variant.dit.text_len
    if part_bytes(parts.variant, parts.dtype)["text"] < WORTH:
        with parts.use("text") as encoder:
            return [encode_text(encoder, parts.tokenizer, [text], length) for text in texts]
    about = _about(parts)
    keys = {text: hashlib.sha256(json.dumps([text, about]).encode()).hexdigest() for text in texts}
    kept = {text: _read(PROMPTS.path(key), key, length) for text, key in keys.items()}
    found = {text: context.to(parts.text_device) for text, context in kept.items() if context is not None}
    if new := [text for text in keys if text not in found]:
        with parts.use("text") as encoder:
            for text in new:
                found[text] = encode_text(encoder, parts.tokenizer, [text], length)
                if bool(found[text].isfinite().all()):  # what is not is refused by who asked
                    _keep(found[text], keys[text])
    return [found[text] for text in texts]


def _about(parts: Parts) -> dict[str, object]:
    """What decides the bits of an encoded text beside the text."""
    files = parts.weight_files()
    return {
        "encoder": [identity(path) for path in files["text"]],
        "tokenizer": [identity(path) for path in files["tokenizer"]],
        "dtype": parts.precision["text"],
        "rows": parts.variant.dit.text_len,
        "machine": machine_fingerprint(parts.text_device, "cpu"),
    }


def _keep(context: Tensor, key: str) -> None:
    """Into the cache, without the zero rows; a cache that cannot be written is said once (W5006)."""
    from safetensors.torch import save_file

    rows = int(context[0].any(-1).nonzero()[-1]) + 1 if bool(context.any()) else 1
    kept = context[:, :rows].contiguous().cpu()
    try:
        PROMPTS.open()
        with atomic_path(PROMPTS.path(key)) as part:
            save_file({"context": kept}, part, metadata={"key": key, "sha256": _digest(kept)})
        PROMPTS.trim()
    except (OSError, InputError) as error:
        text = f"W5006: the prompt could not be kept ({error}). WANLOOM_CACHE names another directory."
        warnings.warn(WanloomWarning(text), stacklevel=3)


def _read(path: Path, key: str, length: int) -> Tensor | None:
    """What was kept under this key, [1, length, text_dim]; None when there is nothing, or something damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about: dict[str, str] = file.metadata() or {}
            kept: Tensor = file.get_tensor("context")
        if about.get("key") != key or about.get("sha256") != _digest(kept) or kept.shape[1] > length:
            return None
        os.utime(path)
    except (OSError, SafetensorError):
        return None
    whole = kept.new_zeros(1, length, kept.shape[-1])
    whole[:, : kept.shape[1]] = kept
    return whole


def _digest(tensor: Tensor) -> str:
    import torch

    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
