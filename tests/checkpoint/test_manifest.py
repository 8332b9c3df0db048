"""`wanloom.sha256.json`: what it records, and what is refused by it (B075)."""

from __future__ import annotations

from pathlib import Path

import pytest

from wanloom.checkpoint import manifest
from wanloom.durable import sha256_file
from wanloom.errors import InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two files, one in a directory, and their manifest."""
    (tmp_path / "expert").mkdir()
    files = [tmp_path / "a.safetensors", tmp_path / "expert" / "b.safetensors"]
    for file in files:
        file.write_bytes(file.name.encode() * 1000)
    manifest.write(tmp_path, files)
    return tmp_path


def refused(call: object) -> str:
    with pytest.raises(InputError) as caught:
        call()  # type: ignore[operator]
    assert caught.value.code == "E4011", caught.value
    return caught.value.message


def test_it_records_every_file_by_its_place(root: Path) -> None:
    records = manifest.read(root / manifest.NAME)
    assert list(records) == ["a.safetensors", "expert/b.safetensors"]
    for name, record in records.items():
        assert record == manifest.Record(sha256_file(root / name), (root / name).stat().st_size)
        assert manifest.recorded(root / name) == record
    assert manifest.recorded(root / "unlisted") is None


def test_writing_again_keeps_what_it_says_of_others(root: Path) -> None:
    (root / "c").write_bytes(b"c")
    manifest.write(root, [root / "c"])
    assert list(manifest.read(root / manifest.NAME)) == ["a.safetensors", "c", "expert/b.safetensors"]


def test_good_files_pass(root: Path) -> None:
    manifest.verify([root / "a.safetensors", root / "expert" / "b.safetensors"])


def test_a_changed_file_is_named(root: Path) -> None:
    file = root / "expert" / "b.safetensors"
    raw = bytearray(file.read_bytes())
    raw[500] ^= 1
    file.write_bytes(raw)
    assert "b.safetensors" in refused(lambda: manifest.verify([root / "a.safetensors", file]))


def test_another_size_is_refused_without_reading(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = root / "a.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    monkeypatch.setattr(manifest, "sha256_file", lambda path: pytest.fail("was read"))
    assert "a.safetensors" in refused(lambda: manifest.check_sizes([file]))
    assert "a.safetensors" in refused(lambda: manifest.verify([file]))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"sha256": 1, "size": 2}}}',
             '{"files": {"a": {"sha256": "x", "size": true}}}', '{"files": {"a": {"sha256": "x"}}}'],
)  # fmt: skip
def test_a_damaged_manifest_is_no_manifest(root: Path, text: str) -> None:
    (root / manifest.NAME).write_text(text)
    assert manifest.NAME in refused(lambda: manifest.recorded(root / "a.safetensors"))
