"""What one of several processes holds of a part whose weights are cut among them."""

from __future__ import annotations

from collections.abc import Mapping

from wanloom.budget import DTYPE_BYTES, block_parameters, dit_parameters, text_parameters
from wanloom.variants import Variant

WHOLE_BLOCKS = 2  # one that computes, and the next one, which is being gathered


def held_bytes(variant: Variant, dtype: str, cut: Mapping[str, int]) -> dict[str, int]:
    """Part ("dit", "text") -> bytes, for parts that are cut among so many processes.

    The share of one process, two whole blocks, and whole what is in no block: it is gathered with the first call and
    stays (`runtime/sharding.py`).
    """
    text, held = variant.text, {}
    embedding = text.vocab * text.dim + text.dim
    sizes = {
        "dit": (dit_parameters(variant.dit), variant.dit.layers, block_parameters(variant.dit)),
        "text": (text_parameters(text), text.layers, (text_parameters(text) - embedding) // text.layers),
    }
    for part, processes in cut.items():
        total, blocks, block = sizes[part]
        values = -(-total // processes) + total - blocks * block + WHOLE_BLOCKS * block
        held[part] = min(total, values) * DTYPE_BYTES[dtype]
    return held
