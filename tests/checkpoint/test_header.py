"""The table of contents of a safetensors file: B066, B068 to B073 and B076 of the bad inputs, and hostile headers."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanloom.checkpoint.header import MAX_HEADER, read_header, stamp, unchanged
from wanloom.errors import InputError
from weight_files import header_of, raw_safetensors

GOOD = {"a": ("F32", [2, 3]), "b": ("BF16", [4]), "c": ("U8", [0])}


def refused(path: Path, code: str) -> str:
    """The message of the refusal, which names the file."""
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert caught.value.code == code, caught.value
    assert caught.value.exit_code == 4
    assert path.name in caught.value.message
    return caught.value.message


def write(folder: Path, header: object, size: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return raw_safetensors(folder / "w.safetensors", text, bytes(size))


def test_a_file_of_the_library_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {
        "x": torch.arange(6.0).view(2, 3),
        "y": torch.ones(5, dtype=torch.bfloat16),
        "z": torch.tensor(3),
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "w.safetensors")
    assert {name: entry.shape for name, entry in header.entries.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert {name: entry.dtype for name, entry in header.entries.items()} == {
        "x": "F32",
        "y": "BF16",
        "z": "I64",
        "f8": "F8_E4M3",
    }
    assert header.metadata == {"format": "pt"}
    raw = (tmp_path / "w.safetensors").read_bytes()
    x = header.entries["x"]
    assert torch.equal(
        torch.frombuffer(bytearray(raw[x.offset : x.offset + x.size]), dtype=torch.float32), torch.arange(6.0)
    )


@pytest.mark.parametrize("size", [0, 7])
def test_b068_a_file_shorter_than_its_length_field_is_truncated(tmp_path: Path, size: int) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(bytes(size))
    assert "truncated header" in refused(path, "E4004")


def test_b068_a_header_longer_than_the_file_is_truncated(tmp_path: Path) -> None:
    refused(raw_safetensors(tmp_path / "w.safetensors", b"{}", length=1000), "E4004")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, MAX_HEADER + 1, 0, 1])
def test_b069_an_impossible_header_length_is_refused_unread(tmp_path: Path, length: int) -> None:
    refused(raw_safetensors(tmp_path / "w.safetensors", b"{}", bytes(100), length=length), "E4005")


@pytest.mark.parametrize("change", [-1, 1, -30, 4096])
def test_b070_data_that_end_early_or_late_are_refused(tmp_path: Path, change: int) -> None:
    header, size = header_of(GOOD)
    message = refused(write(tmp_path, header, size + change), "E4006")
    assert "expected" in message and "found" in message


OFFSETS = {
    "overlap": {"a": [0, 24], "b": [16, 24]},
    "gap": {"a": [0, 24], "b": [32, 40]},
    "negative": {"a": [-24, 0], "b": [0, 8]},
    "reversed": {"a": [24, 0], "b": [24, 32]},
    "overflow": {"a": [2**64 - 24, 2**64], "b": [0, 8]},
    "float": {"a": [0.0, 24.0], "b": [24, 32]},
    "true": {"a": [False, 24], "b": [24, 32]},
    "three": {"a": [0, 12, 24], "b": [24, 32]},
    "size": {"a": [0, 20], "b": [20, 28]},
    "same": {"a": [0, 24], "b": [0, 24]},
    "not from zero": {"a": [8, 32], "b": [32, 40]},
}


@pytest.mark.parametrize("name", OFFSETS)
def test_b071_offsets_that_do_not_tile_the_file_are_refused(tmp_path: Path, name: str) -> None:
    table = {"a": {"dtype": "F32", "shape": [2, 3]}, "b": {"dtype": "BF16", "shape": [4]}}
    header = {key: value | {"data_offsets": OFFSETS[name][key]} for key, value in table.items()}
    assert "tensor " in refused(write(tmp_path, header, 32), "E4007")


@pytest.mark.parametrize(
    "shape", [[-2, -3], [2**62, 2**62], [6.0], [True, 6], "6", None, [[6]], [6, 10**40], [1] * 8 + [6], {"0": 6}]
)
def test_b071_shapes_that_are_no_shapes_are_refused(tmp_path: Path, shape: object) -> None:
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 24]}}
    assert "tensor a" in refused(write(tmp_path, header, 24), "E4007")


@pytest.mark.parametrize("name", ["", "a" * 257, "a\nb", "a\x00b", "\u202eb"])
def test_b071_names_that_cannot_be_shown_are_refused(tmp_path: Path, name: str) -> None:
    header = {name: {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}
    assert "\n" not in refused(write(tmp_path, header, 24), "E4007")


def test_b072_a_name_twice_is_refused(tmp_path: Path) -> None:
    entry = b'{"dtype":"F32","shape":[6],"data_offsets":[0,24]}'
    assert "'a' twice" in refused(write(tmp_path, b'{"a":' + entry + b',"a":' + entry + b"}", 24), "E4008")


def test_b072_a_field_twice_is_refused(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F32","dtype":"F32","shape":[6],"data_offsets":[0,24]}}'
    refused(write(tmp_path, text, 24), "E4008")


@pytest.mark.parametrize("dtype", ["F33", "f32", "F4", "F8_E8M0", "", None, 5, ["F32"]])
def test_b073_an_unknown_number_format_is_refused(tmp_path: Path, dtype: object) -> None:
    header = {"a": {"dtype": dtype, "shape": [6], "data_offsets": [0, 24]}}
    refused(write(tmp_path, header, 24), "E4009")


IMPOSTORS = {
    "w.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "page.safetensors": b"\n <!DOCTYPE html><html><head><title>404</title></head></html>",
    "html.safetensors": b"<html><body>Not found</body></html>",
    "answer.safetensors": b'{"error":"Repository not found"}',
    "w.safetensors.part": b"\x02\0\0\0\0\0\0\0{}",
    "w.incomplete": b"",
    "zip.safetensors": b"PK\x03\x04" + bytes(60),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_b076_what_only_looks_like_weights_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(IMPOSTORS[name])
    assert "looks like" in refused(path, "E4012")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin"])
def test_b066_a_pickle_is_sent_to_convert(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(bytes(64))
    assert "wanloom convert" in refused(path, "E4002")


@pytest.mark.parametrize(
    "text",
    [
        b"not json",
        b"[]",
        b"1",
        b'{"a":NaN}',
        b"\xff\xfe{}",
        b'{"a":1}x',
        b'{"__metadata__":{"a":1}}',
        b'{"__metadata__":[]}',
    ],
)
def test_a_header_that_is_no_table_is_refused(tmp_path: Path, text: bytes) -> None:
    refused(write(tmp_path, text, 8), "E4005")


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "E4001")
    (tmp_path / "folder.safetensors").mkdir()
    refused(tmp_path / "folder.safetensors", "E4001")


ENTRY = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
BOMBS = {
    "many tensors": b"{" + b",".join(ENTRY % i for i in range(140_000)) + b"}",
    "just too many": b"{" + b",".join(ENTRY % i for i in range(20_001)) + b"}",
    "deep lists": b"[" * (MAX_HEADER - 8),
    "deep objects": b'{"a":' * (MAX_HEADER // 5 - 8),
    "long list": b'{"a":[' + b"0," * (MAX_HEADER // 2 - 16) + b"0]}",
    "long number": b'{"a":' + b"9" * (MAX_HEADER - 16) + b"}",
    "long text": b'{"a":"' + b"x" * (MAX_HEADER - 16) + b'"}',
    "many keys": b"{" + b",".join(b'"%d":0' % i for i in range(700_000)) + b"}",
    "metadata": b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(600_000)) + b"}}",
    "spaces": b"{" + b" " * (MAX_HEADER - 16) + b"}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bloated_header_costs_neither_time_nor_memory(tmp_path: Path, name: str) -> None:
    path = raw_safetensors(tmp_path / "w.safetensors", BOMBS[name])
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(InputError):
            read_header(path)
            raise InputError("E4000", "an empty table is no error of the header")
        seconds = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds <= 0.6, "0.3 s, doubled because memory tracing is on"
    assert peak <= 64 * 2**20


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    header, size = header_of(GOOD)
    path = write(tmp_path, header, size)
    before = stamp(path)
    unchanged(path, before)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError) as caught:
        unchanged(path, before)
    assert caught.value.code == "E4011"
    path.unlink()
    with pytest.raises(InputError) as caught:
        unchanged(path, before)
    assert caught.value.code == "E4001"
