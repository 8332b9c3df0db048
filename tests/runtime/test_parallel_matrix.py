"""Every variant and adapter on 2, 3 and 4 processes, in every layout of tokens, guidance and weights."""

from __future__ import annotations

from typing import Any

import parallel_cases as cases
import pytest
import ranks
import torch
from torch import nn

import tiny
from wanloom.encoders import build_umt5
from wanloom.models.adapters import build_dit
from wanloom.runtime.sharding import shard, share_of

pytestmark = pytest.mark.matrix

SECONDS = 1500  # for the processes of one test, on a machine that does other things too


def test_tokens() -> None:
    found = ranks.run(cases.cut_tokens, (4, 3, 2), cases.CASES, seconds=SECONDS)
    for world, layouts in ((2, 2), (3, 2), (4, 3)):
        for result in found[world]:
            cases.check(result, layouts * len(cases.CASES))


def test_guidance_and_tokens() -> None:
    found = ranks.run(cases.cut_guidance, (4, 2), cases.CASES, seconds=SECONDS)
    for world, layouts in ((2, 1), (4, 2)):
        for result in found[world]:
            cases.check(result, layouts * len(cases.CASES))


def test_weights_and_tokens() -> None:
    found = ranks.run(cases.cut_weights, (4, 2), cases.CASES, seconds=SECONDS)
    for results in found.values():
        for result in results:
            cases.check(result, 2 * len(cases.CASES))


def load_shards() -> dict[str, Any]:
    """A model built on meta, cut, and then filled tensor by tensor; and UMT5 cut."""
    case = "s2v-14B"
    source = cases.build(case).requires_grad_(False)
    with torch.device("meta"):
        dit = build_dit(cases.config_of(case))
    shard(dit, "cpu")
    keep = share_of(dit)
    dit.load_state_dict({name: keep(name, value) for name, value in source.state_dict().items()}, assign=True)
    dit.requires_grad_(False)
    held = sum(p.to_local().untyped_storage().nbytes() for p in dit.parameters())
    whole = sum(p.nbytes for p in source.parameters())
    with torch.no_grad():
        far = cases.far(cases.forward(dit, case), cases.forward(source, case))
    dit.to("meta")  # how a part is let go
    return {"held": held / whole, "far": far, "left": sum(p.device.type != "meta" for p in dit.parameters())}


def encode() -> float:
    torch.manual_seed(0)
    encoder: nn.Module = build_umt5(tiny.TEXT).requires_grad_(False)
    ids = torch.tensor([[3, 4, 5, 1, 0, 0]])
    with torch.no_grad():
        one = encoder(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state
        shard(encoder, "cpu", encoder.encoder.block)
        many = encoder(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state
    return float((many != one).sum())


def test_weights_are_loaded_cut() -> None:
    for result in ranks.run(load_shards, (2,), seconds=SECONDS)[2]:
        assert result["far"] < 1e-12
        assert result["held"] < 0.6 and not result["left"]


def test_the_text_encoder_is_cut() -> None:
    assert ranks.run(encode, (2,), seconds=SECONDS)[2] == [0, 0]


def fail() -> None:
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("rank 1 had enough")
    torch.distributed.barrier()


def test_a_process_that_fails_ends_all_and_says_why() -> None:
    with pytest.raises(RuntimeError, match="rank 1 had enough"):
        ranks.run(fail, (2,))
