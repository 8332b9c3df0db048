"""A prompt, and the text to stay away from: the conditioning of every task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wanloom.conditioning import Conditioning
from wanloom.parts import Parts
from wanloom.plan import Plan
from wanloom.prompts import encode


def condition(parts: Parts, plan: Plan, pictures: Mapping[str, Any]) -> Conditioning:
    """context [1, text_len, text_dim] of the prompt, and of the negative prompt when some step is guided.

    Rows beyond the end of a text are zero; the transformer reads them too (official wan/text2video.py).
    """
    guided = any(span.guidance != 1 for span in plan.spans)
    texts = (plan.prompt, plan.negative_prompt) if guided else (plan.prompt,)
    contexts = encode(parts, texts)
    return Conditioning({"context": contexts[0]}, {"context": contexts[1]} if guided else None)
