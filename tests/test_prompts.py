"""A prompt that was encoded before is not encoded again, and a kept one gives the same bits."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wanloom import load, prompts
from wanloom.errors import WanloomWarning
from wanloom.parts import Parts
from wanloom.prompts import encode
from wanloom.store import clear, sizes

TEXTS = ("a red circle moves left on sand", "")


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    monkeypatch.setenv("WANLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prompts, "WORTH", 0)
    return load("demo-t2v", device="cpu").parts


def count_loads(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    used: list[str] = []
    use = parts.use
    monkeypatch.setattr(parts, "use", lambda part, expert=None: used.append(part) or use(part, expert))
    return used


def test_the_second_time_no_encoder_is_loaded_and_the_bits_are_the_same(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = count_loads(parts, monkeypatch)
    first = encode(parts, TEXTS)
    again = encode(parts, tuple(reversed(TEXTS)))
    assert used == ["text"]
    assert torch.equal(first[0], again[1]) and torch.equal(first[1], again[0])
    monkeypatch.setattr(prompts, "WORTH", 2**40)
    plain = encode(parts, TEXTS)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, plain, strict=True))
    assert sizes()["prompts"][0] == 2


def test_a_small_encoder_leaves_nothing_in_the_cache(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "WORTH", 2**28)
    encode(parts, TEXTS)
    assert sizes()["prompts"] == (0, 0)


def test_another_text_or_number_format_is_encoded_anew(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    used = count_loads(parts, monkeypatch)
    encode(parts, TEXTS[:1])
    encode(parts, ("a blue square",))
    monkeypatch.setattr(parts, "dtype", "bfloat16")
    encode(parts, TEXTS[:1])
    assert used == ["text"] * 3 and sizes()["prompts"][0] == 3


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_made_again(damage: str, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    used = count_loads(parts, monkeypatch)
    (first,) = encode(parts, TEXTS[:1])
    (file,) = (Path(os.environ["WANLOOM_CACHE"]) / "prompts").iterdir()
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes({"cut": data[: len(data) // 2], "flip": data, "empty": b""}[damage])
    (again,) = encode(parts, TEXTS[:1])
    assert used == ["text", "text"] and torch.equal(first, again)


def test_a_text_that_came_out_wrong_is_not_kept(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    right = prompts.encode_text
    monkeypatch.setattr(prompts, "encode_text", lambda *given: right(*given) / 0)
    assert not encode(parts, TEXTS[:1])[0].isfinite().all()
    assert sizes()["prompts"] == (0, 0)


def test_what_was_not_used_for_longest_goes_first(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(parts, TEXTS[:1])
    encode(parts, ("a blue square",))
    folder = Path(os.environ["WANLOOM_CACHE"]) / "prompts"
    old, new = sorted(folder.iterdir())
    os.utime(old, (1, 1))
    monkeypatch.setattr(prompts, "PROMPTS", prompts.Store("prompts", limit=new.stat().st_size))
    prompts.PROMPTS.trim()
    assert list(folder.iterdir()) == [new]


def test_the_directory_is_its_owners_alone_and_knows_no_words(parts: Parts) -> None:
    encode(parts, TEXTS[:1])
    folder = Path(os.environ["WANLOOM_CACHE"]) / "prompts"
    (file,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert b"circle" not in file.read_bytes() and "circle" not in file.name


def test_a_cache_that_cannot_be_written_costs_a_warning(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.warns(WanloomWarning, match="W5006"):
        (found,) = encode(parts, TEXTS[:1])
    assert isinstance(found, Tensor) and found.shape[1] == parts.variant.dit.text_len


def test_clearing_leaves_other_files(parts: Parts, tmp_path: Path) -> None:
    encode(parts, TEXTS[:1])
    (tmp_path / "cache" / "mine.txt").write_text("mine")
    assert clear() > 0 and sizes()["prompts"] == (0, 0)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["mine.txt"]
