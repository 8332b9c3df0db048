"""The VAE in stripes gives the numbers of the whole, in less memory."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
import torch
from meter import peak_of
from small_vaes import SMALL, a_vae, both_ways, distance, pieces

from wanloom.budget import vae_activations
from wanloom.models.config import VaeConfig
from wanloom.models.vae import CausalVae, ChannelNorm
from wanloom.runtime.stripes import StripedDecoder, StripedEncoder, stripe


@pytest.mark.parametrize("name", [pytest.param("2.1", marks=pytest.mark.matrix), "2.2"])
def test_stripes_give_the_numbers_of_the_whole(name: str) -> None:
    want = both_ways(a_vae(SMALL[name], torch.float64))
    for rows, aside in ((24, None), (32, "cpu"), (10**6, None)):
        got = both_ways(stripe(a_vae(SMALL[name], torch.float64), rows, aside=aside))
        assert max(map(distance, got, want)) <= 1e-12
    want, got = both_ways(a_vae(SMALL[name], torch.float32)), both_ways(stripe(a_vae(SMALL[name], torch.float32), 24))
    assert max(map(distance, got, want)) <= 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_with_fewer_rows_of_the_neighbours_it_would_not(name: str) -> None:
    want = both_ways(a_vae(SMALL[name], torch.float64))
    vae = stripe(a_vae(SMALL[name], torch.float64), 24)
    assert isinstance(vae.decoder, StripedDecoder) and isinstance(vae.encoder, StripedEncoder)
    for section in (vae.decoder.late[-1], vae.encoder.early[0]):
        section.halo -= section.down
    got = both_ways(vae)
    assert min(map(distance, got, want)) > 1e-6


def peak(config: VaeConfig, rows: int | None, side: int, *, decode: bool) -> int:
    """The most bytes that a stream holds, counted without computing it."""
    with torch.device("meta"):
        vae = CausalVae(config).requires_grad_(False)
        if rows is not None:
            stripe(vae, rows)
        small = side // config.stride[1]
        z, video = torch.zeros(1, config.z, 3, small, small), torch.zeros(1, 3, 9, side, side)
        made = (lambda: vae.decode_chunks(z)) if decode else (lambda: vae.encode_chunks(pieces(video)))
        return peak_of(lambda: deque(made(), maxlen=0))


@pytest.mark.parametrize(("name", "decode", "share"), [("2.1", True, 0.75), ("2.1", False, 0.6), ("2.2", True, 0.9)])
def test_stripes_take_less_memory_and_the_estimate_says_so(
    name: str, decode: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChannelNorm, "pieces", 1)  # fewer calls to count; a norm's pieces are small
    config = replace(SMALL[name], dim=32, decoder_dim=32, blocks=2)
    whole, cut = (peak(config, rows, 512, decode=decode) for rows in (None, 32))
    assert cut < share * whole
    estimates = [vae_activations(config, (512, 512), decode=decode, rows=rows) for rows in (None, 32)]
    assert all(0.7 < one / other < 1.3 for one, other in zip(estimates, (whole, cut), strict=True)), (whole, cut)


def test_what_is_remembered_waits_elsewhere() -> None:
    config = SMALL["2.1"]
    here = vae_activations(config, (512, 512), decode=True, rows=32)
    there = vae_activations(config, (512, 512), decode=True, rows=32, aside=True)
    assert there < 0.6 * here
