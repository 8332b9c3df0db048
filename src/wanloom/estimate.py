"""How long a run takes: its operations over what the machine does in a second, corrected by what earlier runs took.

    work = works(plan, variant, "bfloat16")                         # stage -> plain numbers
    seconds = {stage: estimate(w, rates) for stage, w in work.items()}
    ratio, runs = learned(seen, "denoise", kind, seconds["denoise"])

Pure functions of plain numbers; `records.py` keeps what runs took.  Stages are those that a person sees pass: encode
(texts, pictures, pasts), sound, denoise, decode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from wanloom import budget, vae_cost
from wanloom.rates import Rates
from wanloom.variants import Variant

STAGES = ("encode", "sound", "denoise", "decode")
# Of the plain rates, what a transformer and the VAE reach (docs/performance.md): the rest are norms, sums, copies.
SHARE = {"encode": 0.8, "sound": 0.8, "denoise": 0.7, "decode": 0.9}
# Operations of torch that are called for each of these, whatever their size: counted in a profile, rounded.
BLOCK_CALLS, TEXT_CALLS, CONV_CALLS = 60, 45, 10

NEAREST = 7  # earlier runs that are asked
NEWEST = 60  # of them all
ALIKE = math.log(8)  # runs of another kind count when they were at most so much shorter or longer
BOUNDS = (0.05, 20.0)  # no correction is larger: behind it stands another mistake


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage does: operations of matrix products and attention in `dtype`, of convolutions, calls of torch."""

    dtype: str
    matrix: float = 0
    attention: float = 0
    conv: float = 0
    calls: float = 0
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What an earlier run took: stage -> (seconds estimated, seconds measured); bytes of the host, likewise.

    kind: model and switches; runs of the same kind are the best to ask.
    """

    kind: str
    stages: Mapping[str, tuple[float, float]]
    memory: tuple[float, float]


def works(plan: budget.Sized, variant: Variant, dtype: str, *, num: int = 1) -> dict[str, Work]:
    """Stage -> work of `num` videos of a plan; stages without any are left out."""
    flops = budget.flops(plan, variant)
    prompts = 2 if any(span.guidance != 1 for span in plan.spans) else 1
    latents = sum(clip.latent[1] for clip in plan.segments)
    passes = passes_of(plan)
    own = passes * sum(_self_attention(variant, clip.latent, _remembers(clip, variant)) for clip in plan.segments)
    convolutions = len(tuple(vae_cost.decoder_layers(variant.vae, 2, 64)))
    seen = latents * convolutions if flops["image"] else 0
    found = {
        "encode": Work(
            dtype=dtype, matrix=flops["text"], conv=flops["image"] * _clips_share(plan, num),
            calls=prompts * variant.text.layers * TEXT_CALLS + seen * CONV_CALLS, share=SHARE["encode"],
        ),
        "sound": Work(dtype="float32", matrix=flops["audio"], share=SHARE["sound"]),
        "denoise": Work(
            dtype=dtype, matrix=num * max(0, flops["denoise"] - own), attention=num * own,
            calls=num * passes * len(plan.segments) * variant.dit.layers * BLOCK_CALLS, share=SHARE["denoise"],
        ),
        "decode": Work(
            dtype="float32", conv=num * flops["decode"], calls=num * latents * convolutions * CONV_CALLS,
            share=SHARE["decode"],
        ),
    }  # fmt: skip
    return {stage: work for stage, work in found.items() if work.matrix or work.attention or work.conv}


def passes_of(plan: budget.Sized, *, at_once: bool = False) -> int:
    """Forward passes of the transformer for one clip: two a step where it is guided, unless both are made at once."""
    return sum((span.stop - span.start) * (1 if span.guidance == 1 or at_once else 2) for span in plan.spans)


def _clips_share(plan: budget.Sized, num: int) -> int:
    """How often pictures are encoded: once for all videos, but clips have pasts of their own."""
    return num if len(plan.segments) > 1 else 1


def _remembers(clip: budget.Clip, variant: Variant) -> bool:
    return variant.dit.speech is not None and clip.skip >= variant.dit.speech.history


def _self_attention(variant: Variant, latent: Sequence[int], past: bool) -> int:
    """Operations of the attention of all tokens to each other, of one pass."""
    config = variant.dit
    length = budget.tokens(latent, config.patch) + budget.beside_tokens(config, latent, past=past)
    return config.layers * 4 * length * length * config.dim


def estimate(work: Work, rates: Rates) -> float:
    """Seconds of a stage from plain numbers."""
    arithmetic = work.matrix / rates.matrix[work.dtype] + work.attention / rates.attention[work.dtype]
    return (arithmetic + work.conv / rates.conv) / work.share + work.calls * rates.call


def learned(seen: Sequence[Seen], stage: str, kind: str, seconds: float) -> tuple[float, int]:
    """What an estimate of `seconds` is to be multiplied by, and how many earlier runs say so (0: 1.0).

    seen: the newest last, all estimated from the same rates.  Of the runs of this kind the nearest in length are asked;
    when there is none, those of other kinds of about the same length.  The answer is the median of measured over
    estimated, so that single odd runs do not count.
    """
    same: list[tuple[float, float]] = []
    others: list[tuple[float, float]] = []
    for run in seen[-NEWEST:]:
        raw, measured = run.stages.get(stage, (0.0, 0.0))
        if raw > 0 and measured > 0 and seconds > 0:
            apart = abs(math.log(raw / seconds))
            (same if run.kind == kind else others).append((apart, measured / raw))
    chosen = sorted(same) or sorted(pair for pair in others if pair[0] <= ALIKE)
    ratios = [ratio for _, ratio in chosen[:NEAREST]]
    if not ratios:
        return 1.0, 0
    return min(max(median(ratios), BOUNDS[0]), BOUNDS[1]), len(ratios)


def learned_bytes(seen: Sequence[Seen], kind: str, need: int) -> int:
    """Bytes by which runs of this kind took more than was estimated: the median of the nearest, 0 or more.

    At most half of `need`: behind more stands another mistake, or another program's memory.
    """
    same = sorted(
        (abs(run.memory[0] - need), run.memory[1] - run.memory[0]) for run in seen[-NEWEST:] if run.kind == kind
    )
    if not same:
        return 0
    return int(min(max(0.0, median(more for _, more in same[:NEAREST])), need / 2))
