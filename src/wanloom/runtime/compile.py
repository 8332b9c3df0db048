"""Compiling a transformer block by block, so that one small program serves all blocks and both experts.

Exact: a compiled block fuses what stands between the matrix products; results differ from the plain ones by rounding.
The first call takes the time of compiling, seconds to minutes.
"""

from __future__ import annotations

from torch import nn


def compile_blocks(blocks: nn.ModuleList, *, dynamic: bool | None = None) -> None:
    """Compile each block in place; names of tensors stay as they are.

    dynamic: whether lengths may change without compiling anew (None: after the second length that is seen).
    """
    for block in blocks:
        block.compile(dynamic=dynamic)
