"""The layers alone: named operations against their formulas, and the table that replaces them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanloom.models.adapters.frames import FrameCross
from wanloom.models.config import DiTConfig
from wanloom.models.dit import DiT, rope_table
from wanloom.models.layers import (
    PLAIN,
    Attention,
    Block,
    CrossAttention,
    RMSNorm,
    Scene,
    context_kv,
    gate_add,
    gate_add_norm,
    norm_modulate,
    rotate,
    sdpa,
    use_ops,
    wide,
)

SMALL = DiTConfig(dim=48, ffn_dim=64, heads=4, layers=2, in_channels=4, out_channels=4, text_dim=8, text_len=6)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_norm_modulate_is_layer_norm_scaled_and_shifted_by_each_tokens_row(batch: int, rows: int) -> None:
    x, shift, scale = draw(batch, 7, 16), draw(batch, rows, 16, seed=1), draw(batch, rows, 16, seed=2)
    group = torch.tensor([0, 1, 1, 0, 1, 0, 0]) % rows
    got = norm_modulate(x, shift, scale, group, 1e-6, torch.float32)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = expected * (1 + scale[:, group]) + shift[:, group]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_norm_modulate_rounds_only_its_result() -> None:
    x, shift, scale = draw(1, 5, 16), draw(1, 1, 16, seed=1), draw(1, 1, 16, seed=2)
    group = torch.zeros(5, dtype=torch.long)
    low = norm_modulate(x, shift, scale, group, 1e-6, torch.bfloat16)
    assert torch.equal(low, norm_modulate(x, shift, scale, group, 1e-6, torch.float32).bfloat16())


def test_gated_sum_stays_float32_beside_a_bfloat16_branch() -> None:
    x, y, gate = draw(2, 5, 16), draw(2, 5, 16, seed=1, dtype=torch.bfloat16), draw(2, 2, 16, seed=2)
    group = torch.tensor([0, 0, 1, 1, 0])
    with torch.no_grad():
        before = x.clone()
        total = gate_add(x, y, gate, group)
        assert total is x  # without gradients the sum is written over x
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, before + gate[:, group] * y.float())
    norm = torch.nn.LayerNorm(16, 1e-6)
    again, normed = gate_add_norm(before.requires_grad_(), y, gate, group, norm, torch.bfloat16)
    assert again is not before and torch.equal(again, total)
    assert torch.equal(normed, norm(total).bfloat16())


def test_rms_norm_rounds_to_its_input_before_the_weight() -> None:
    x = draw(3, 32, dtype=torch.bfloat16)
    norm = RMSNorm(32, 1e-6)
    norm.weight.data = 1 + 0.1 * draw(32, seed=1)
    exact = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), exact.bfloat16() * norm.weight)  # a float32 weight widens: the reference does so too
    assert norm.bfloat16()(x).dtype == torch.bfloat16


def test_rotation_gives_the_published_vector() -> None:
    # spec core 3.3: head width 128, one head of ones, grid (2, 2, 2), the last token (1, 1, 1)
    table = rope_table((2, 2, 2), 128, torch.zeros(1))
    out = rotate(torch.ones(1, 8, 1, 128), table)[0, 7, 0]
    expected = {
        0: (-0.301169, 1.381773, 0.179775, 1.40274, 0.48828, 1.327246),
        44: (-0.301169, 1.381773, 0.197976, 1.400288),
        86: (-0.301169, 1.381773, 0.197976, 1.400288),
    }
    for start, values in expected.items():
        torch.testing.assert_close(out[start : start + len(values)], torch.tensor(values), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_compilers_form_of_the_rotation_is_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, table = draw(2, 24, 3, 32, dtype=dtype), rope_table((2, 3, 4), 32, torch.zeros(1, dtype=wide(dtype)))
    eager = rotate(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert eager.dtype == rotate(x, table).dtype == dtype
    torch.testing.assert_close(rotate(x, table), eager)


@pytest.mark.parametrize(("head_dim", "widths"), [(128, (44, 42, 42)), (64, (24, 20, 20)), (32, (12, 10, 10))])
def test_axes_share_the_head_as_the_reference_deals_it(head_dim: int, widths: tuple[int, ...]) -> None:
    table = rope_table((3, 4, 5), head_dim, torch.zeros(1, dtype=torch.float64)).view(3, 4, 5, -1, 2)
    parts = torch.view_as_complex(table).split([w // 2 for w in widths], -1)
    for axis, (part, width) in enumerate(zip(parts, widths, strict=True)):
        position = torch.arange(table.shape[axis], dtype=torch.float64)
        angle = position[:, None] * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        shape = [1, 1, 1, width // 2]
        shape[axis] = -1
        expected = torch.polar(torch.ones_like(angle), angle).view(shape).expand_as(part)
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-14)


def test_positions_far_out_keep_their_angle() -> None:
    # position 1023 * frequency 1: float32 angles would be off by 3e-5
    table = rope_table((1024, 1, 1), 128, torch.zeros(1))
    assert abs(table[1023, 0, 0].item() - torch.tensor(1023.0, dtype=torch.float64).cos().item()) < 1e-7


@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_is_softmax_attention(masked: bool) -> None:
    q, k, v = (
        draw(2, 5, 3, 8, dtype=torch.float64),
        draw(2, 7, 3, 8, seed=1).double(),
        draw(2, 7, 3, 8, seed=2).double(),
    )
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / 8**0.5
    if mask is not None:
        assert mask.any(1).all()
        scores = scores.masked_fill(~mask, -torch.inf)
    expected = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)
    torch.testing.assert_close(sdpa(q, k, v, mask), expected, rtol=1e-12, atol=1e-12)


def test_picture_tokens_have_a_softmax_of_their_own() -> None:
    attention = CrossAttention(48, 4, 1e-6, image=True)
    x, text, image = draw(1, 5, 48), draw(1, 6, 48, seed=1), draw(1, 3, 48, seed=2)
    with torch.no_grad():
        both = attention(x, text, image)
        only_text = attention(x, text)
        only_image = attention.leave(sdpa(PLAIN.rms_rotate(attention.q(x), attention.norm_q, 4, None),
                                          *context_kv(attention, image, True)))  # fmt: skip
        # the two are added before the one output projection, whose bias counts once
        torch.testing.assert_close(both, only_text + only_image - attention.o.bias, rtol=1e-5, atol=1e-6)


def test_a_table_of_operations_reaches_every_block_from_dit_and_from_trunk() -> None:
    dit, table = DiT(SMALL), replace(PLAIN)
    for root in (dit, dit.trunk):
        use_ops(dit, PLAIN)
        use_ops(root, table)
        parts = [m for m in dit.modules() if isinstance(m, Block | Attention)]
        assert len(parts) == 3 * SMALL.layers
        assert all(part.ops is table for part in parts)


@torch.no_grad()
def test_keys_and_values_of_the_text_can_be_kept_from_outside() -> None:
    dit, calls, kept = DiT(SMALL), [], {}

    def keep(attention: CrossAttention, context: Tensor, image: bool = False) -> tuple[Tensor, Tensor]:
        if (attention, image) not in kept:
            calls.append(attention)
            kept[attention, image] = context_kv(attention, context, image)
        return kept[attention, image]

    x, text = draw(1, 4, 2, 4, 4), draw(1, 3, 8, seed=1)
    plain = [dit(x, torch.tensor([[t]]), text) for t in (900.0, 100.0)]
    use_ops(dit, replace(PLAIN, context_kv=keep))
    assert all(torch.equal(dit(x, torch.tensor([[t]]), text), p) for t, p in zip((900.0, 100.0), plain, strict=True))
    assert len(calls) == SMALL.layers


@torch.no_grad()
def test_every_named_operation_is_the_one_that_runs() -> None:
    dit, seen = DiT(SMALL), []
    spies = {}
    for name in PLAIN.__dataclass_fields__:

        def spy(*args, _name=name, **kwargs):  # type: ignore[no-untyped-def]
            seen.append(_name)
            return getattr(PLAIN, _name)(*args, **kwargs)

        spies[name] = spy
    use_ops(dit, replace(PLAIN, **spies))
    dit(draw(1, 4, 1, 4, 4), torch.tensor([[500.0]]), draw(1, 3, 8))
    assert set(seen) == set(PLAIN.__dataclass_fields__)


@torch.no_grad()
def test_frame_cross_reads_its_own_frame_and_leaves_strangers_alone() -> None:
    part = FrameCross("speech", 48, 4, 1e-6)
    frame = torch.tensor([0, 0, 1, 1, 2, 2, -1])
    x, speech = draw(1, 7, 48), draw(1, 3, 4, 48, seed=1)
    scene = Scene(rope=draw(1), group=frame, frame=frame, mod=draw(1), context=draw(1), shared={"speech": speech})
    out = part(x, scene)
    assert torch.equal(out[:, 6], x[:, 6])
    for f in range(3):  # a second way: cut the frame out and attend without a mask
        own = frame == f
        normed = F.layer_norm(x[:, own], (48,), eps=1e-6)
        torch.testing.assert_close(out[:, own], x[:, own] + part.attn(normed, speech[:, f]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_mask_off_by_one_frame_is_seen() -> None:
    part = FrameCross("speech", 48, 4, 1e-6)
    frame = torch.tensor([0, 0, 1, 1, 2, 2])
    x, speech = draw(1, 6, 48), draw(1, 3, 4, 48, seed=1)
    scene = Scene(rope=draw(1), group=frame, frame=frame, mod=draw(1), context=draw(1), shared={"speech": speech})
    right, wrong = part(x, scene), part(x, replace(scene, frame=(frame + 1) % 3))
    assert (right - wrong).norm() / right.norm() > 1e-3
