"""Weights narrowed once into the cache: the same bits as reading the checkpoint, and nothing that can fail a run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny
from wanloom.checkpoint import manifest, narrowed
from wanloom.checkpoint.load import load_into
from wanloom.checkpoint.narrowed import Blocks, find_or_make, key_of, load_into_narrowed, load_streamed_narrowed, pays
from wanloom.checkpoint.weights import Weights, open_weights
from wanloom.durable import sweep
from wanloom.encoders import build_umt5
from wanloom.errors import InputError, WanloomWarning
from wanloom.models.adapters import build_dit
from wanloom.models.dit import DiT
from wanloom.runtime.streaming import Streamed
from wanloom.store import clear, sizes

T2V = replace(tiny.TINY["t2v-A14B"].dit, layers=2)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, into which small models go as well; its folder of weights."""
    monkeypatch.setenv("WANLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WANLOOM_NARROWED", raising=False)
    monkeypatch.setattr(narrowed, "WORTH", 1000)
    monkeypatch.setattr(narrowed.machine, "disk_free", lambda path: 10**12)
    return tmp_path / "cache" / "weights"


def values(seed: int = 0) -> dict[str, Tensor]:
    return tiny._values(build_dit(T2V), torch.Generator().manual_seed(seed), torch.float32)


def written(folder: Path, tensors: dict[str, Tensor] | None = None, name: str = "w.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(values() if tensors is None else tensors, folder / name)
    return folder / name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "checkpoint")


def empty() -> DiT:
    with torch.device("meta"):
        return build_dit(T2V).eval().requires_grad_(False)


def opened(path: Path) -> Weights:
    return open_weights(path, kind="dit")


def plainly(path: Path, dtype: torch.dtype = BF16) -> dict[str, Tensor]:
    dit = empty()
    load_into(dit, opened(path), dtype=dtype)
    return dict(dit.state_dict())


def loaded(path: Path, dtype: torch.dtype = BF16) -> dict[str, Tensor]:
    dit = empty()
    load_into_narrowed(dit, opened(path), dtype=dtype)
    return dict(dit.state_dict())


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left.values(), right.values(), strict=True))


def made(path: Path, kept: Path) -> Path:
    """The one folder that the weights of `path` are narrowed into."""
    with pytest.warns(WanloomWarning, match="W5003"):
        loaded(path)
    (folder,) = [each for each in kept.iterdir() if not each.name.startswith(".")]
    return folder


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that `load_into` is given."""
    seen: list[str] = []
    right = narrowed.load_into

    def noted(module: nn.Module, weights: Weights, **options: Any) -> None:
        seen.append(weights.headers[0].path.name)
        right(module, weights, **options)

    monkeypatch.setattr(narrowed, "load_into", noted)
    return seen


# ---------------------------------------------------------------- the same bits


def test_the_first_load_makes_it_and_the_second_reads_it(
    path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, seen = plainly(path), reads(monkeypatch)
    with pytest.warns(WanloomWarning, match="W5003: weights: kept in 16 bits from now on"):
        first = loaded(path)
    written_at = (small / key_of(opened(path), BF16) / "model.safetensors").stat().st_mtime_ns
    second = loaded(path)  # without a warning: pytest makes an error of one
    assert same(first, expected) and same(second, expected)
    assert seen == ["model.safetensors"] * 2
    assert (small / key_of(opened(path), BF16) / "model.safetensors").stat().st_mtime_ns == written_at


@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_shards_in_the_names_of_diffusers(tmp_path: Path, stored: torch.dtype) -> None:
    from wanloom.checkpoint.convert import convert

    wide = {name: value.to(stored) for name, value in values().items()}
    file = written(tmp_path / "w", wide, "model.safetensors")
    (tmp_path / "w" / "config.json").write_text('{"num_heads": 2, "text_len": 512}')
    source = convert(file, tmp_path / "diffusers", "diffusers", shard=60_000)
    folder = next(file.parent for file in source.files if file.name.endswith(".safetensors"))
    assert len(opened(folder).headers) > 1
    with pytest.warns(WanloomWarning, match="W5003"):
        first = loaded(folder)
    assert same(first, plainly(folder)) and same(loaded(folder), first)


def test_a_text_encoder_in_half_the_bytes(tmp_path: Path) -> None:
    tensors = tiny._official("text", tiny._values(build_umt5(tiny.TEXT), torch.Generator(), torch.float32))
    torch.save(tensors, tmp_path / "t5.pth")
    weights = open_weights(tmp_path / "t5.pth", kind="text")

    def modules() -> Iterator[nn.Module]:
        for load in (load_into, load_into_narrowed, load_into_narrowed):
            with torch.device("meta"):
                module = build_umt5(tiny.TEXT)
            load(module, weights, dtype=BF16)
            yield module

    with pytest.warns(WanloomWarning, match="W5003"):
        plain, first, second = (module.state_dict() for module in modules())
    assert same(first, plain) and same(second, plain) and sizes()["weights"][0] == 1


def test_blocks_that_come_and_go_are_read_from_it(path: Path, small: Path) -> None:
    made(path, small)
    dit, plain = empty(), empty()
    blocks = load_streamed_narrowed(dit, opened(path), dtype=BF16)
    load_into(plain, opened(path), dtype=BF16)
    assert blocks._now.weights.path.parent.parent == small
    dit.trunk = Streamed(dit.trunk, blocks)
    x, context = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 3, T2V.text_dim)
    with torch.no_grad():
        assert torch.equal(dit(x, torch.tensor([[500.0]]), context), plain(x, torch.tensor([[500.0]]), context))
    dit.trunk.close()


def test_a_lora_merged_into_it_stays_out_of_the_file(path: Path, small: Path) -> None:
    from wanloom.checkpoint.lora import merge

    folder = made(path, small)
    before = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    dit = empty()
    load_into_narrowed(dit, opened(path), dtype=BF16)
    merge(dit, {"blocks.0.self_attn.q": (torch.ones(1, T2V.dim), torch.ones(T2V.dim, 1), 1.0)})
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == before


# ---------------------------------------------------------------- where it does not pay


def test_what_does_not_pay_is_read_as_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = opened(path)
    assert pays(weights, BF16)
    assert not pays(weights, torch.float32)
    narrow = {name: value.to(torch.float16) for name, value in values().items()}
    assert not pays(opened(written(path.parent, narrow, "half.safetensors")), BF16)
    codes = dict(narrow, **{"blocks.0.ffn.0.weight": values()["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)})
    assert not pays(opened(written(path.parent, codes, "fp8.safetensors")), BF16)
    monkeypatch.setattr(narrowed, "WORTH", sum(source.size for source in weights.tensors.values()) + 1)
    assert not pays(weights, BF16)
    assert same(loaded(path), plainly(path)) and sizes()["weights"] == (0, 0)


@pytest.mark.parametrize(
    ("setting", "free", "said"),
    [
        (None, 10**6, "GB are free in"),
        ("0.00001", 10**12, "above the limit of 1e-05 GB"),
        ("much", 10**12, "WANLOOM_NARROWED: got 'much'"),
        ("-1", 10**12, "WANLOOM_NARROWED: got '-1'"),
        ("nan", 10**12, "WANLOOM_NARROWED: got 'nan'"),
    ],
)
def test_where_there_is_no_room_one_line_says_so(
    setting: str | None, free: int, said: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrowed.machine, "disk_free", lambda place: free)
    if setting is not None:
        monkeypatch.setenv("WANLOOM_NARROWED", setting)
    with pytest.warns(WanloomWarning) as caught:
        found = loaded(path)
    (line,) = [str(each.message) for each in caught]
    assert line.startswith("W5006: ") and said in line and "\n" not in line
    assert same(found, plainly(path)) and sizes()["weights"] == (0, 0)


def test_the_setting_turns_it_off_without_a_word(path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(path, small)
    monkeypatch.setenv("WANLOOM_NARROWED", "0")
    seen = reads(monkeypatch)
    assert same(loaded(path), plainly(path)) and seen == ["w.safetensors"]


def test_a_cache_that_cannot_be_written_costs_a_line(path: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.warns(WanloomWarning, match="W5006") as caught:
        found = loaded(path)
    assert len(caught) == 1 and same(found, plainly(path))


def test_a_disk_that_fills_up_on_the_way(path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wanloom.durable._sync", full)
    with pytest.warns(WanloomWarning, match="W5006.*the disk is full"):
        found = loaded(path)
    assert same(found, plainly(path)) and [each.name for each in small.iterdir()] == [".lock"]


def test_the_longest_unused_goes_when_the_limit_is_reached(
    path: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = made(path, small)
    os.utime(old, (1, 1))
    monkeypatch.setenv("WANLOOM_NARROWED", str(1.5 * sizes()["weights"][1] / 1e9))
    other = written(tmp_path / "other", values(seed=1))
    with pytest.warns(WanloomWarning, match="W5003"):
        loaded(other)
    assert not old.exists() and sizes()["weights"][0] == 1


# ---------------------------------------------------------------- which weights


def test_other_weights_have_another_key(path: Path, tmp_path: Path) -> None:
    key = key_of(opened(path), BF16)
    assert key != key_of(opened(path), torch.float16)
    changed = values()
    changed["blocks.1.ffn.2.weight"].mul_(1.01)  # one tensor, and the time put back
    other = written(tmp_path / "other", changed)
    os.utime(other, ns=(1, path.stat().st_mtime_ns))
    assert key != key_of(opened(other), BF16)
    again = written(tmp_path / "again")
    os.utime(again, ns=(1, path.stat().st_mtime_ns))
    assert key == key_of(opened(again), BF16)  # the place does not matter


def test_an_edit_that_no_sample_shows_moves_the_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrowed, "SAMPLE", 4)
    key, stat = key_of(opened(path), BF16), path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, stat.st_mtime_ns))
    assert key == key_of(opened(path), BF16)
    os.utime(path, ns=(1, stat.st_mtime_ns + 1))
    assert key != key_of(opened(path), BF16)


def test_with_a_manifest_the_time_does_not_matter_and_damage_is_not_kept(path: Path, small: Path) -> None:
    manifest.write(path.parent, [path])
    key = key_of(opened(path), BF16)
    os.utime(path, ns=(1, 5))
    assert key == key_of(opened(path), BF16)
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:  # what the checkpoint itself says, and no word about the cache
        loaded(path)
    assert caught.value.code == "E4011" and path.name in caught.value.message
    assert sizes()["weights"] == (0, 0)


def test_values_that_are_not_finite_are_said_of_the_checkpoint(tmp_path: Path) -> None:
    bad = values()
    bad["head.head.bias"][0] = 3.4e38  # finite in float32, not in bfloat16
    with pytest.raises(InputError) as caught:
        loaded(written(tmp_path / "bad", bad))
    assert caught.value.code == "E4010" and "w.safetensors" in caught.value.message
    assert sizes()["weights"] == (0, 0)


# ---------------------------------------------------------------- damage


def damage(folder: Path, what: str) -> None:
    file, table = folder / "model.safetensors", folder / "table.json"
    data = bytearray(file.read_bytes())
    if what == "bit":
        data[-9] ^= 1
        file.write_bytes(data)
    elif what == "cut":
        file.write_bytes(data[:-100])
    elif what == "header":
        at = data.index(b"blocks.0.")
        data[at : at + 9] = b"blocks.7."
        file.write_bytes(data)
    elif what == "gone":
        file.unlink()
    elif what == "table":
        table.write_text("{")
    elif what == "other table":
        said = json.loads(table.read_text())
        table.write_text(json.dumps({**said, "sha256": dict.fromkeys(said["sha256"], "0" * 64)}))


@pytest.mark.parametrize("what", ["bit", "cut", "header", "gone", "table", "other table"])
def test_what_is_damaged_is_made_anew(what: str, path: Path, small: Path) -> None:
    folder = made(path, small)
    damage(folder, what)
    with pytest.warns(WanloomWarning) as caught:
        found = loaded(path)
    assert [str(each.message)[:5] for each in caught] == ["W4011", "W5003"]
    assert same(found, plainly(path)) and same(loaded(path), found)


def filled(blocks: Blocks, dit: DiT, block: int) -> dict[str, Tensor]:
    tensors = {
        name: torch.empty(tensor.shape, dtype=BF16)
        for name, tensor in dit.blocks[block].state_dict().items()
    }  # fmt: skip
    blocks(block, tensors)
    return tensors


@pytest.mark.parametrize("what", ["bit", "cut", "gone", "cleared"])
def test_blocks_go_on_from_the_checkpoint_when_it_is_damaged_or_cleared(what: str, path: Path, small: Path) -> None:
    folder, expected = made(path, small), plainly(path)
    dit = empty()
    blocks = load_streamed_narrowed(dit, opened(path), dtype=BF16)
    filled(blocks, dit, 0)
    last = max(entry.offset + entry.size for entry in blocks._now.weights.headers[0].entries.values())
    assert last == (folder / "model.safetensors").stat().st_size
    if what == "cleared":
        clear()
    elif what == "bit":  # of a tensor in the second block, its size and time as before
        name = next(name for name in blocks._now.places[1] if name.endswith("ffn.2.weight"))
        entry, stat = blocks._now.places[1][name].entries[0], (folder / "model.safetensors").stat()
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(entry.offset)
            byte = file.read(1)[0]
            file.seek(entry.offset)
            file.write(bytes([byte ^ 1]))
        os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        damage(folder, what)
    with pytest.warns(WanloomWarning, match="W4011"):
        found = filled(blocks, dit, 1)
    assert all(torch.equal(value, expected[f"blocks.1.{name}"]) for name, value in found.items())
    assert blocks._now.weights.path == path and not folder.exists()
    assert filled(blocks, dit, 0).keys() == found.keys()  # and no second word


# ---------------------------------------------------------------- several processes, and one that is killed


def test_while_another_process_writes_the_checkpoint_is_read(path: Path, small: Path) -> None:
    small.mkdir(parents=True)
    handle = os.open(small / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert same(loaded(path), plainly(path)) and sizes()["weights"] == (0, 0)
    os.close(handle)
    assert made(path, small).is_dir()


def child(path: Path, **setting: str) -> int:
    """Another process that narrows the weights at `path`: its number.  It ends with 0 where it has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of later Pythons: there may be other threads
        number = os.fork()
    if number == 0:
        code = 9
        try:
            os.environ |= setting
            torch.set_num_threads(1)  # a team of threads is not there any more
            warnings.simplefilter("ignore")
            code = find_or_make(opened(path), BF16) is None
        finally:
            os._exit(code)
    return number


def end_of(number: int) -> int:
    """How a process ended: its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def test_two_processes_at_once_and_one_that_was_killed_before(path: Path, small: Path) -> None:
    assert end_of(child(path, WANLOOM_FAILPOINT="rename folder")) == -9
    (left,) = [each for each in small.iterdir() if each.is_dir()]
    assert left.name.startswith(".") and sizes()["weights"][0] == 1
    both = [child(path), child(path)]
    ends = {end_of(number) for number in both}
    assert 0 in ends and ends <= {0, 1}  # 1: it came while the other was writing, and reads the checkpoint
    assert sorted(each.name for each in small.iterdir()) == sorted([".lock", key_of(opened(path), BF16)])
    assert sweep(small) == [] and same(loaded(path), plainly(path))
