"""How many bytes parts take whose files have their weights in few bits (ComfyUI's fp8, int8, GGUF) and stay so.

From headers alone, without torch: what `packed.load_packed` is going to make of them.
"""

from __future__ import annotations

from math import prod

from wanloom.checkpoint.find import Files
from wanloom.checkpoint.weights import Source, Weights, open_weights

WIDE = 16  # bits of a value from which on a tensor is loaded in the dtype of its part


def stored_bytes(files: Files, each: int) -> dict[str, int]:
    """Part ("dit": its larger expert, "text") -> bytes, for those of which all files have matrices in few bits.

    each: bytes of a value of all other tensors.  Errors: those of `open_weights`.
    """
    paths = {"text": [files.text], "dit": list(files.experts.values())}
    sizes = {part: [_bytes(open_weights(path, kind=part), each) for path in some] for part, some in paths.items()}
    return {part: max(some) for part, some in sizes.items() if all(some)}


def _bytes(weights: Weights, each: int) -> int:
    """Bytes of a part that keeps its matrices in few bits; 0 when it has none."""
    sources = weights.tensors.values()
    if not any(_few(source) for source in sources):
        return 0
    return sum(_kept(source) if _few(source) else prod(source.shape) * each for source in sources)


def _few(source: Source) -> bool:
    return len(source.shape) == 2 and 8 * source.size < WIDE * prod(source.shape)


def _kept(source: Source) -> int:
    return source.size + sum(scale.size for scale in source.scales if scale is not None)
