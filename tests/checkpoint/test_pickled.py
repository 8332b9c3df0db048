"""`.pth` files: B067, and that reading one executes nothing, whatever it holds."""

from __future__ import annotations

import pickle
import random
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from wanloom.checkpoint.load import read_entry
from wanloom.checkpoint.pickled import read_pickled
from wanloom.errors import InputError
from weight_files import saved_zip, zip_with_pickle


def refused(path: Path, *codes: str) -> str:
    with pytest.raises(InputError) as caught:
        read_pickled(path)
    assert caught.value.code in codes, caught.value
    assert path.name in caught.value.message
    return caught.value.message


def written(path: Path, tensors: object) -> Path:
    path.write_bytes(saved_zip(tensors))
    return path


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "float32": lambda: torch.arange(6.0).view(2, 3),
    "bfloat16": lambda: torch.randn(5).bfloat16(),
    "float16": lambda: torch.randn(2, 2).half(),
    "float64": lambda: torch.randn(3).double(),
    "int64": lambda: torch.tensor([1, -(2**40)]),
    "uint8": lambda: torch.arange(7, dtype=torch.uint8),
    "bool": lambda: torch.tensor([True, False]),
    "scalar": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(0, 3),
    "transposed": lambda: torch.arange(6.0).view(2, 3).T,
    "slice": lambda: torch.arange(20.0)[3:9:2],
    "row of a matrix": lambda: torch.arange(12.0).view(3, 4)[1],
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "view of a storage": lambda: torch.arange(12.0)[5:],
    "parameter": lambda: nn.Parameter(torch.ones(3)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_read_as_torch_reads_it(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "w.pth", {"x": TENSORS[name]()})
    mine = read_entry(read_pickled(path).entries["x"])
    theirs = torch.load(path, weights_only=True)["x"].detach()
    assert mine.dtype == theirs.dtype
    assert torch.equal(mine, theirs)


def test_a_state_dict_of_a_module_is_read(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    state = module.state_dict()
    path = written(tmp_path / "w.pth", state)
    header = read_pickled(path)
    assert list(header.entries) == list(state)
    assert all(torch.equal(read_entry(entry), state[name]) for name, entry in header.entries.items())


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_weights_one_level_down_are_found(tmp_path: Path, key: str) -> None:
    header = read_pickled(written(tmp_path / "w.pth", {key: {"x": torch.ones(2)}, "epoch": 3, "lr": 0.1}))
    assert list(header.entries) == ["x"]


def test_two_names_of_one_storage_are_both_read(tmp_path: Path) -> None:
    base = torch.arange(10.0)
    header = read_pickled(written(tmp_path / "w.pth", {"a": base[:4], "b": base[2:]}))
    assert torch.equal(read_entry(header.entries["b"]), base[2:])


# ---------------------------------------------------------------- code


class Runs:
    """Pickles to a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.function, self.arguments


def payloads(canary: Path) -> dict[str, bytes]:
    """Pickles that write the canary file when they are unpickled, in every way the format has."""
    touch = f"open({str(canary)!r}, 'w').close()"
    protocols = {f"exec, protocol {p}": pickle.dumps(Runs(exec, touch), p) for p in range(6)}
    in_dict = {f"value, protocol {p}": pickle.dumps({"x": Runs(eval, touch)}, p) for p in range(6)}
    nested = {
        "in a list": pickle.dumps({"x": [1, (2, Runs(exec, touch))]}),
        "as a key": pickle.dumps({Runs(getattr, "a", "upper"): 1}),
        "ordered": pickle.dumps(OrderedDict(x=Runs(exec, touch))),
        "behind tensors": pickle.dumps(OrderedDict(a=1, b=2, x=Runs(exec, touch))),
        "getattr chain": pickle.dumps(Runs(getattr, Runs(__import__, "os"), "system")),
    }
    call = b"(V" + touch.encode() + b"\ntR."
    by_hand = {
        "global": b"cbuiltins\nexec\n" + call,
        "inst": b"(S'" + touch.replace("'", '"').encode() + b"'\nibuiltins\nexec\n.",
        "obj": b"(cbuiltins\nexec\nV" + touch.encode() + b"\no.",
        "newobj": b"\x80\x02cbuiltins\nexec\n(V" + touch.encode() + b"\nt\x81.",
        "stack global from memo": b"\x80\x04\x8c\x08builtins\x94\x8c\x04exec\x940h\x00h\x01\x93" + call,
        "extension": b"\x80\x02\x82\x01" + call,
        "hidden after stop": b"\x80\x02}." + b"cbuiltins\nexec\n" + call,
        "build": b"\x80\x02ccollections\nOrderedDict\n)R(S'__class__'\ncbuiltins\nexec\nsb.",
        "persistent text": b"Pbuiltins.exec\n.",
        "torch function": b"\x80\x02ctorch\nload\n" + call,
        "torch dotted": b"\x80\x04\x8c\x05torch\x94\x8c\x0dserialization\x94\x93" + call,
        "numpy": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n" + call,
        "storage of another class": b"\x80\x02(X\x07\x00\x00\x00storagecbuiltins\nexec\nX\x01\x00\x00\x000"
        + b"X\x03\x00\x00\x00cpuK\x01tQ.",
    }
    return protocols | in_dict | nested | by_hand


@pytest.mark.parametrize("name", payloads(Path("canary")))
def test_b067_code_in_a_pickle_is_refused_and_never_runs(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    program = payloads(canary)[name]
    message = refused(zip_with_pickle(tmp_path / "w.pth", program), "E4003", "E4004", "E4009")
    assert not canary.exists()
    if "exec" in name or name in ("global", "inst", "obj", "newobj", "stack global from memo"):
        assert "exec" in message or "eval" in message, "the global is named"
    bare = tmp_path / "bare.pth"
    bare.write_bytes(program)
    refused(bare, "E4003", "E4004", "E4009", "E4012")
    assert not canary.exists()


def test_b067_the_payloads_would_have_run(tmp_path: Path) -> None:
    ran = 0
    for name, program in payloads(tmp_path / "canary").items():
        if name.startswith(("exec", "value")):
            pickle.loads(program)
            ran += (tmp_path / "canary").exists()
            (tmp_path / "canary").unlink()
    assert ran == 12


def test_nothing_is_imported_while_a_pickle_is_read(tmp_path: Path) -> None:
    program = b"\x80\x02cthis_would_be_imported\nname\n)R."
    (tmp_path / "this_would_be_imported.py").write_text("raise SystemExit(3)")
    assert "this_would_be_imported.name" in refused(zip_with_pickle(tmp_path / "w.pth", program), "E4003")
    assert "this_would_be_imported" not in sys.modules


# ---------------------------------------------------------------- what is no dense tensor


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, 2).to_sparse(),
        [torch.ones(2)],
        {"deeper": {"still": torch.ones(1)}},
        "text",
        7,
    ],
    ids=["sparse", "list", "nested", "text", "number"],
)
def test_only_dense_tensors_under_names_are_weights(tmp_path: Path, value: object) -> None:
    refused(written(tmp_path / "w.pth", {"x": value}), "E4003", "E4009")


def test_a_view_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    program = pickletools_of(shape=(1000,), stride=(1,), count=4)
    message = refused(zip_with_pickle(tmp_path / "w.pth", program, {"data/0": bytes(16)}), "E4007")
    assert "outside its storage" in message


def test_a_view_that_repeats_one_value_without_end_is_refused(tmp_path: Path) -> None:
    program = pickletools_of(shape=(2**40,), stride=(0,), count=4)
    refused(zip_with_pickle(tmp_path / "w.pth", program, {"data/0": bytes(16)}), "E4007")


def test_a_missing_storage_is_refused(tmp_path: Path) -> None:
    refused(zip_with_pickle(tmp_path / "w.pth", pickletools_of((4,), (1,), 4)), "E4004")


def pickletools_of(shape: tuple[int, ...], stride: tuple[int, ...], count: int) -> bytes:
    """The pickle of {"x": a float32 tensor of storage "0"}, as torch would write it, with these numbers."""

    def text(word: str) -> bytes:
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    def number(value: int) -> bytes:
        raw = value.to_bytes(9, "little", signed=True)
        return b"\x8a\x09" + raw

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + b"tQ"
    numbers = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride)]
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + b"".join(numbers) + b"\x89"
    return b"\x80\x02}" + text("x") + tensor + b"ccollections\nOrderedDict\n)RtRs."


def nest(levels: int) -> bytes:
    """A tuple of two of the same tuple of two ...: small to write, endless to hash or to print."""
    return b")" + b"q\x00h\x00\x86" * levels


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02}" + nest(60) + b"K\x01s.",
        b"\x80\x04" + nest(60) + nest(60) + b"\x93.",
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + nest(60) + b"X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x80\x02ccollections\nOrderedDict\n" + nest(60) + b"R.",
        b"\x80\x02}" + b"K\x01" * 1_100_000 + b".",
    ],
    ids=["key", "global", "storage", "argument", "long"],
)
def test_a_pickle_cannot_waste_time(tmp_path: Path, program: bytes) -> None:
    started = time.process_time()
    refused(zip_with_pickle(tmp_path / "w.pth", program), "E4003", "E4004", "E4005", "E4009")
    assert time.process_time() - started < 4


# ---------------------------------------------------------------- damage


def test_every_truncation_of_a_torch_file_is_refused(tmp_path: Path) -> None:
    whole = saved_zip({"x": torch.arange(40.0), "y": torch.ones(3)})
    path = tmp_path / "w.pth"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path, "E4003", "E4004", "E4012")


def test_changed_bytes_give_an_error_with_a_code_or_the_same_shapes(tmp_path: Path) -> None:
    whole = saved_zip({f"layer.{i}.weight": torch.full((3, i + 1), float(i)) for i in range(6)})
    chance = random.Random(5)
    path = tmp_path / "w.pth"
    refusals = 0
    for _ in range(500):
        raw = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        path.write_bytes(raw)
        try:
            header = read_pickled(path)
        except InputError as error:
            assert error.exit_code == 4
            refusals += 1
        else:
            for entry in header.entries.values():
                assert entry.offset + entry.size <= len(raw)
                read_entry(entry)
    assert refusals > 100


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\x00" * 100, b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_what_is_no_torch_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    refused(tmp_path / "w.pth", "E4004", "E4012")


@pytest.mark.parametrize("name", TENSORS)
def test_the_format_of_before_2020_is_read_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / "w.pth"
    tensors = {"first": torch.ones(2), "x": TENSORS[name](), "last": torch.zeros(3, dtype=torch.int64)}
    torch.save(OrderedDict(tensors), path, _use_new_zipfile_serialization=False)
    header = read_pickled(path)
    theirs = torch.load(path, weights_only=True)
    for key, entry in header.entries.items():
        assert torch.equal(read_entry(entry), theirs[key].detach())


def test_truncations_of_the_old_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"x": torch.arange(40.0), "y": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 5), len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "E4003", "E4004", "E4012")
    path.write_bytes(whole + b"x")
    refused(path, "E4004")


def test_a_module_in_the_old_format_is_read_with_its_metadata(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Conv3d(2, 3, 1), nn.GroupNorm(1, 3)).state_dict()
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    header = read_pickled(tmp_path / "w.pth")
    assert all(torch.equal(read_entry(header.entries[name]), value) for name, value in state.items())


def test_the_published_pickles_are_read_as_torch_reads_them(golden_models: Path) -> None:
    for file in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        path = golden_models / "Wan2.2-T2V-A14B" / file
        header = read_pickled(path)
        theirs = torch.load(path, weights_only=True)
        assert header.entries.keys() == theirs.keys()
        assert all(torch.equal(read_entry(entry), theirs[name]) for name, entry in header.entries.items())
