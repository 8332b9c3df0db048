"""Blocks that come and go: the same bits as a model that stays, in the memory of two blocks, and nothing ever hangs."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from wanloom.checkpoint.blocks import PIECE, FileBlocks, fill, load_streamed
from wanloom.checkpoint.header import Entry
from wanloom.checkpoint.load import load_into, read_source
from wanloom.checkpoint.names import get_format
from wanloom.checkpoint.weights import Source, open_weights
from wanloom.errors import InputError
from wanloom.models.adapters import build_dit
from wanloom.models.config import DiTConfig
from wanloom.models.dit import DiT
from wanloom.runtime import streaming
from wanloom.runtime.streaming import HostBlocks, Streamed, spread, tensors_of

LAYERS, FRAMES, SIDE = 3, 3, 4
CONFIGS = {name: replace(tiny.TINY[name].dit, layers=LAYERS) for name in ("t2v-A14B", "i2v-14B", "s2v-14B")}
CONFIGS["animate-14B"] = replace(tiny.TINY["animate-14B"].dit, layers=LAYERS)  # a part in the second block only
T2V = CONFIGS["t2v-A14B"]


# ---------------------------------------------------------------- models and files


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values_of(config: DiTConfig, seed: int = 0) -> dict[str, Tensor]:
    return tiny._values(build_dit(config), torch.Generator().manual_seed(seed), torch.float32)


def written(folder: Path, config: DiTConfig = T2V, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(values_of(config, seed), folder / "w.safetensors")
    return folder / "w.safetensors"


def empty(config: DiTConfig = T2V) -> DiT:
    with torch.device("meta"):
        return build_dit(config).eval().requires_grad_(False)


def loaded(path: Path, config: DiTConfig = T2V, dtype: torch.dtype = torch.bfloat16) -> DiT:
    dit = empty(config)
    load_into(dit, open_weights(path, kind="dit"), dtype=dtype)
    return dit


def streamed(path: Path, config: DiTConfig = T2V, dtype: torch.dtype = torch.bfloat16, **options: Any) -> DiT:
    dit = empty(config)
    dit.trunk = Streamed(dit.trunk, load_streamed(dit, path, dtype=dtype), **options)
    return dit


def inputs(config: DiTConfig, seed: int = 0) -> dict[str, Tensor]:
    """What a conditioner gives for a clip."""
    given = {"context": draw(1, 5, config.text_dim, seed=seed)}
    if config.image_dim is not None:
        given["image"] = draw(1, 17, config.image_dim, seed=seed)
    if config.in_channels > 16:
        given["y"] = draw(1, config.in_channels - 16, FRAMES, SIDE, SIDE, seed=seed)
    if (speech := config.speech) is not None:
        given["audio"] = draw(1, speech.audio_states, speech.audio_dim, 4 * FRAMES, seed=seed)
        given["reference"] = draw(1, 16, 1, SIDE, SIDE, seed=seed)
        given["group"] = torch.zeros(FRAMES, dtype=torch.long)
    if (animate := config.animate) is not None:
        size = animate.face_size
        given["pose"] = draw(1, 16, FRAMES - 1, SIDE, SIDE, seed=seed)
        given["face"] = draw(1, 3, 4 * (FRAMES - 1) - 3, size, size, seed=seed)
    return given


@torch.no_grad()
def run(dit: DiT, seed: int = 0) -> Tensor:
    """One forward pass."""
    times = [600.0, 0.0] if dit.config.speech is not None else [600.0]
    x = draw(1, 16, FRAMES, SIDE, SIDE, seed=seed + 100)
    return dit(x, torch.tensor([times]), **dit.once(inputs(dit.config, seed)))


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "blocks"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    if readers():
        gc.collect()
    assert readers() == []


def soon(true: Callable[[], bool]) -> bool:
    """Whether something becomes true within ten seconds."""
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


class Counted:
    """A source that remembers what it was asked for, and may fail or be slow."""

    def __init__(self, source: Callable[[int, Mapping[str, Tensor]], None]) -> None:
        self.source, self.asked = source, []
        self.fail: BaseException | None = None
        self.fail_at, self.wait = -1, 0.0

    def __call__(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        self.asked.append(block)
        time.sleep(self.wait)
        if len(self.asked) - 1 == self.fail_at:
            raise self.fail
        self.source(block, tensors)


def counted(path: Path, **options: Any) -> tuple[DiT, Counted]:
    dit = empty()
    source = Counted(load_streamed(dit, path, dtype=torch.bfloat16))
    dit.trunk = Streamed(dit.trunk, source, **options)
    return dit, source


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("resident", [0, 1, LAYERS])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_pass_has_the_bits_of_a_model_that_stays(tmp_path: Path, name: str, resident: int) -> None:
    path, config = written(tmp_path, CONFIGS[name]), CONFIGS[name]
    whole = loaded(path, config)
    dit = streamed(path, config, resident=resident)
    with dit.trunk:
        for seed in (0, 1, 0):  # two prompts, as guidance asks, and the next step
            assert torch.equal(run(dit, seed), run(whole, seed))
    assert not torch.equal(run(whole, 0), run(whole, 1))


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_any_number_of_slots_gives_the_same_bits(tmp_path: Path, slots: int) -> None:
    path = written(tmp_path)
    dit = streamed(path, slots=slots)
    with dit.trunk:
        assert all(torch.equal(run(dit, seed), run(loaded(path), seed)) for seed in (0, 1))


@pytest.mark.parametrize("slow", ["source", "block"])
def test_whoever_waits_for_whom_the_bits_are_the_same(tmp_path: Path, slow: str) -> None:
    path = written(tmp_path)
    dit, source = counted(path)
    if slow == "source":
        source.wait = 0.01
    else:
        for block in dit.blocks:
            block.register_forward_pre_hook(lambda module, args: time.sleep(0.01))
    with dit.trunk:
        assert all(torch.equal(run(dit, seed), run(loaded(path), seed)) for seed in (0, 1))


def test_two_experts_one_after_another(tmp_path: Path) -> None:
    for seed in (0, 1):
        path = written(tmp_path / str(seed), seed=seed)
        dit = streamed(path)
        with dit.trunk:
            assert torch.equal(run(dit), run(loaded(path)))


def test_the_next_expert_may_be_read_while_this_one_runs(tmp_path: Path) -> None:
    paths = [written(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    first, second = (streamed(path) for path in paths)
    with first.trunk, second.trunk:
        outs = [run(dit) for dit in (first, second, first)]
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], run(loaded(paths[1])))


def test_names_and_dtypes_of_the_model_stay(tmp_path: Path) -> None:
    path, config = written(tmp_path, CONFIGS["animate-14B"]), CONFIGS["animate-14B"]
    dit = streamed(path, config)
    with dit.trunk:
        run(dit)
        want = {name: (tensor.shape, tensor.dtype) for name, tensor in loaded(path, config).state_dict().items()}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in dit.state_dict().items()} == want


def test_inference_mode_is_no_obstacle(tmp_path: Path) -> None:
    path = written(tmp_path)
    with torch.inference_mode():
        dit = streamed(path, resident=1)
        with dit.trunk:
            assert all(torch.equal(run(dit, seed), run(loaded(path), seed)) for seed in (0, 1))


def test_gradients_are_refused(tmp_path: Path) -> None:
    dit = streamed(written(tmp_path))
    x = draw(1, 16, FRAMES, SIDE, SIDE).requires_grad_()
    with dit.trunk, pytest.raises(RuntimeError, match="no gradients"):
        dit(x, torch.tensor([[600.0]]), **inputs(T2V))


class LowRank(nn.Module):
    """A branch beside a linear layer."""

    def __init__(self, base: nn.Linear, seed: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(draw(2, base.in_features, seed=seed).bfloat16())
        self.up = nn.Parameter(draw(base.out_features, 2, seed=seed + 1).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.01 * (x @ self.down.T) @ self.up.T


def test_what_stands_around_a_layer_stays_while_the_layer_comes_and_goes(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole, dit = loaded(path), streamed(path)
    plain = run(whole)
    with dit.trunk:
        for model in (whole, dit):
            for i, block in enumerate(model.blocks):
                block.ffn[2] = LowRank(block.ffn[2], i)
        assert torch.equal(run(dit), run(whole)) and not torch.equal(run(dit), plain)


class Coarse(nn.Module):
    """Stands in for a linear layer: whole numbers and a scale, in buffers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        scale = base.weight.float().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (base.weight.float() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.codes * self.scale).to(x.dtype), self.bias)


def test_layers_that_keep_their_numbers_in_buffers_are_streamed_too(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole, dit = loaded(path), loaded(path)
    for model in (whole, dit):
        for block in model.blocks:
            block.ffn[0] = Coarse(block.ffn[0])
    dit.trunk = Streamed(dit.trunk, HostBlocks(dit.blocks))
    with dit.trunk:
        assert all(p.is_meta for p in tensors_of(dit.blocks[0]).values())
        assert torch.equal(run(dit), run(whole)) and not torch.equal(run(dit), run(loaded(path)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own imports
def test_blocks_that_are_compiled_are_compiled_once(tmp_path: Path) -> None:
    path = written(tmp_path)
    dit = streamed(path, resident=1)
    for block in dit.blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.compiler.reset()
    with dit.trunk, torch._dynamo.config.patch(error_on_recompile=True):
        outs = [run(dit, seed) for seed in (0, 1, 0)]
    torch.compiler.reset()
    assert torch.equal(outs[0], outs[2])
    torch.testing.assert_close(outs[0], run(loaded(path)), rtol=0, atol=1e-3)


# ---------------------------------------------------------------- files


def comfy(path: Path, folder: Path) -> Path:
    """One fp8 file with a scale for each matrix of a block (every second one: for each of its rows), under a prefix."""
    out = {}
    for name, value in load_file(path).items():
        key = f"model.diffusion_model.{name}"
        if name.startswith("blocks.") and value.dim() == 2:
            rows = "self_attn" in name
            scale = value.abs().amax(1) / 448 if rows else value.abs().max() / 448
            out[key] = (value / (scale[:, None] if rows else scale)).to(torch.float8_e4m3fn)
            out[key.removesuffix("weight") + "scale_weight"] = scale
        else:
            out[key] = value.half()
    save_file(out, folder / "comfy.safetensors")
    return folder / "comfy.safetensors"


def diffusers(path: Path, folder: Path) -> Path:
    """Two shards under diffusers' names; a block lies in both of them."""
    names = get_format("dit", "diffusers")
    values = {names.foreign(name)[0][0]: value.bfloat16() for name, value in load_file(path).items()}
    for part in (0, 1):
        some = {name: value for i, (name, value) in enumerate(sorted(values.items())) if i % 2 == part}
        save_file(some, folder / f"diffusion_pytorch_model-0000{part + 1}-of-00002.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("layout", [comfy, diffusers])
def test_published_layouts_give_the_bits_of_loading(
    tmp_path: Path, layout: Callable[[Path, Path], Path], dtype: torch.dtype | None
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    path = layout(written(tmp_path), folder)
    whole, dit = loaded(path, dtype=dtype), empty()
    source = load_streamed(dit, open_weights(path, kind="dit"), dtype=dtype)
    for number, (block, there) in enumerate(zip(dit.blocks, whole.blocks, strict=True)):
        room = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors_of(block).items()}
        source(number, room)
        want = tensors_of(there)
        assert all(torch.equal(value, want[name]) and value.dtype == want[name].dtype for name, value in room.items())


@pytest.mark.parametrize("rows", ["one", "each", "none"])
def test_large_tensors_are_converted_in_pieces_with_the_same_bits(tmp_path: Path, rows: str) -> None:
    shape = 3 * PIECE // 100, 250
    value = draw(*shape)
    scale = {"one": torch.tensor(0.3), "each": draw(shape[0], 1).abs(), "none": None}[rows]
    stored = value if scale is None else value.to(torch.float8_e4m3fn)
    save_file({"v": stored} | ({} if scale is None else {"s": scale}), tmp_path / "w.safetensors")
    start, header = 8 + int.from_bytes((tmp_path / "w.safetensors").read_bytes()[:8], "little"), {}
    for name, tensor, dtype in (("v", stored, "F32" if scale is None else "F8_E4M3"), ("s", scale, "F32")):
        if tensor is not None:
            header[name] = Entry(name, dtype, tuple(tensor.shape), tmp_path / "w.safetensors", 0, tensor.nbytes)
    order = sorted(header, key=lambda name: (-{"F32": 4, "F8_E4M3": 1}[header[name].dtype], name))
    for name in order:  # as safetensors lays them out: the widest first
        header[name] = replace(header[name], offset=start)
        start += header[name].size
    source = Source(shape, (header["v"],), (header.get("s"),))
    target = torch.empty(shape, dtype=torch.bfloat16)
    with (tmp_path / "w.safetensors").open("rb", buffering=0) as file:
        fill(target, source, {tmp_path / "w.safetensors": file})
        turned = torch.empty(shape[::-1], dtype=torch.bfloat16)
        if scale is None:
            fill(turned, replace(source, operation="transpose"), {})
            assert torch.equal(turned.T, target)
    assert torch.equal(target, read_source(source).bfloat16())
    assert target.float().std() > 0.1


def test_every_tensor_has_its_place_before_anything_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    dit = empty(replace(T2V, layers=LAYERS + 1))
    with pytest.raises(InputError, match="missing") as caught:
        load_streamed(dit, path)
    assert caught.value.code == "E4013" and all(p.is_meta for p in dit.parameters())
    with pytest.raises(InputError) as caught:
        load_streamed(empty(replace(T2V, layers=LAYERS - 1)), path)
    assert caught.value.code == "E4013"


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 4)  # the blocks come first


def touch(path: Path) -> None:
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("harm", "code"), [(cut, "E4006"), (touch, "E4011"), (Path.unlink, "E4001")], ids=["cut", "rewritten", "removed"]
)
def test_a_file_that_changes_under_way_is_said_and_nothing_hangs(
    tmp_path: Path, harm: Callable[[Path], None], code: str
) -> None:
    path = written(tmp_path)
    dit, source = counted(path)
    with dit.trunk:
        run(dit)
        assert soon(lambda: len(source.asked) == LAYERS + 2)
        time.sleep(0.02)  # what was read ahead is in memory; and the clock of the file system is past the first writing
        harm(path)
        for _ in range(2):  # it stays an error
            with pytest.raises(InputError) as caught:
                run(dit)
            assert caught.value.code == code
        assert soon(lambda: not readers())


def test_values_that_are_not_finite_are_named_when_their_block_is_first_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    values = load_file(path)
    values["blocks.2.ffn.0.bias"][3] = torch.nan
    save_file(values, path)
    dit = streamed(path)
    with dit.trunk, pytest.raises(InputError, match=r"blocks\.2\.ffn\.0\.bias: 1 of") as caught:
        run(dit)
    assert caught.value.code == "E4010"


def test_values_that_a_narrow_dtype_cannot_hold_are_named_too(tmp_path: Path) -> None:
    path = written(tmp_path)
    values = load_file(path)
    values["blocks.0.ffn.0.bias"][3] = 1e6
    save_file(values, path)
    with pytest.raises(InputError, match="float16") as caught:
        streamed(path, dtype=torch.float16, resident=LAYERS)
    assert caught.value.code == "E4010"


# ---------------------------------------------------------------- the thread


def test_an_error_in_the_thread_is_raised_as_it_is_each_time(tmp_path: Path) -> None:
    path = written(tmp_path)
    dit, source = counted(path)
    source.fail, source.fail_at = KeyError("of the source"), LAYERS + 2
    with dit.trunk:
        assert torch.equal(run(dit), run(loaded(path)))
        for _ in range(2):
            with pytest.raises(KeyError) as caught:
                run(dit)
            assert caught.value is source.fail


def test_a_pass_that_broke_off_leaves_the_next_one_right(tmp_path: Path) -> None:
    path = written(tmp_path)
    dit = streamed(path)

    def interrupt(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    with dit.trunk:
        for i in range(LAYERS):
            handle = dit.blocks[i].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(dit)
            handle.remove()
            assert torch.equal(run(dit), run(loaded(path)))


def test_the_first_blocks_of_the_next_pass_are_read_beforehand(tmp_path: Path) -> None:
    dit, source = counted(written(tmp_path))
    with dit.trunk:
        run(dit)
        assert soon(lambda: len(source.asked) == LAYERS + 2)
        time.sleep(0.05)
        assert source.asked == [0, 1, 2, 0, 1]  # and no more than there are slots


def test_closing_ends_the_thread_frees_everything_and_may_be_done_twice(tmp_path: Path) -> None:
    dit = streamed(written(tmp_path), resident=1)
    run(dit)
    assert len(readers()) == 1
    dit.trunk.close()
    assert readers() == [] and all(p.is_meta for p in dit.blocks.parameters())
    dit.trunk.close()
    with pytest.raises(RuntimeError, match="closed"):
        run(dit)


def test_closing_does_not_wait_for_a_reader_that_waits(tmp_path: Path) -> None:
    dit = streamed(written(tmp_path))
    start = time.monotonic()
    dit.trunk.close()
    assert time.monotonic() - start < 5


def test_a_model_that_nobody_closed_takes_its_thread_with_it(tmp_path: Path) -> None:
    dit = streamed(written(tmp_path))
    run(dit)
    assert len(readers()) == 1
    del dit
    gc.collect()
    assert soon(lambda: not readers())


# ---------------------------------------------------------------- memory


def present(dit: DiT) -> list[int]:
    """The blocks that have values."""
    return [i for i, block in enumerate(dit.blocks) if any(not t.is_meta for t in tensors_of(block).values())]


@pytest.mark.parametrize("resident", [0, 1, 2])
def test_no_more_than_the_resident_blocks_and_the_slots_are_ever_there(tmp_path: Path, resident: int) -> None:
    config = replace(T2V, layers=6)
    dit = streamed(written(tmp_path, config), config, resident=resident)
    kept = sorted(spread(6, resident))
    seen: list[list[int]] = []
    buffers: set[int] = set()

    def look(module: nn.Module, args: object) -> None:
        seen.append(present(dit))
        buffers.update(t.untyped_storage().data_ptr() for t in tensors_of(module).values())

    for block in dit.blocks:
        block.register_forward_pre_hook(look)
    with dit.trunk:
        for _ in range(3):
            run(dit)
            assert present(dit) == kept
    assert seen == 3 * [sorted({*kept, i}) for i in range(6)]
    assert len(buffers) == resident + 2
    size = max(sum(t.nbytes for t in tensors_of(block).values()) for block in dit.blocks)
    assert all(home.layout.size < 1.5 * size for home in dit.trunk._homes)  # gaps between tensors: these are tiny


def test_kept_blocks_have_equal_gaps_between() -> None:
    assert spread(40, 0) == set() and spread(40, 4) == {5, 15, 25, 35} and spread(3, 9) == {0, 1, 2}
    assert all(len(spread(n, k)) == k for n in range(1, 12) for k in range(n + 1))


@pytest.mark.parametrize("resident", [0, 1])
def test_blocks_kept_on_the_host_compute_where_they_lie(tmp_path: Path, resident: int) -> None:
    path = written(tmp_path, CONFIGS["animate-14B"])
    config = CONFIGS["animate-14B"]
    whole, dit = loaded(path, config), loaded(path, config)
    source = HostBlocks(dit.blocks)
    assert present(dit) == [] and len(source.flats) == LAYERS
    places: set[int] = set()
    for block in dit.blocks:
        block.register_forward_pre_hook(
            lambda module, args: places.update(t.untyped_storage().data_ptr() for t in tensors_of(module).values())
        )
    dit.trunk = Streamed(dit.trunk, source, resident=resident)
    with dit.trunk:
        assert all(torch.equal(run(dit, seed), run(whole, seed)) for seed in (0, 1))
    assert places == {flat.untyped_storage().data_ptr() for flat in source.flats}


# ---------------------------------------------------------------- a GPU


class Fake:
    """Stands in for CUDA's streams and events: writes down who records and who waits, copies at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[Any, ...]] = []
        log, lock = self.log, threading.Lock()

        def note(*what: Any) -> None:
            with lock:
                log.append(what)

        class Stream:
            def __init__(self, name: object = None) -> None:
                self.name = "copy" if name is None or isinstance(name, torch.device) else name

            def wait_event(self, event: Event) -> None:
                note(self.name, "waits", event)

            def __enter__(self) -> None:
                note(self.name, "begins")

            def __exit__(self, *rest: object) -> None:
                note(self.name, "ends")

        class Event:
            def __init__(self, blocking: bool = False) -> None:
                self.kind = "arrived" if blocking else "left"

            def record(self, stream: Stream) -> None:
                note(stream.name, "records", self)

            def synchronize(self) -> None:
                note("reader", "waits", self)

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("compute"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: note("all", "synchronize"))
        monkeypatch.setattr(streaming, "on_gpu", lambda device: True)
        monkeypatch.setattr(streaming, "host_buffer", lambda size, pinned: torch.empty(size, dtype=torch.uint8))
        self.note = note


def test_on_a_gpu_reading_uploading_and_computing_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one: the order in which streams and events are told what to do, slot by slot."""
    path, fake = written(tmp_path), Fake(monkeypatch)
    whole, dit = loaded(path), empty()
    source = load_streamed(dit, path, dtype=torch.bfloat16)

    def reading(block: int, tensors: Mapping[str, Tensor]) -> None:
        fake.note("reader", "reads", block)
        source(block, tensors)

    dit.trunk = Streamed(dit.trunk, reading)
    for block in dit.blocks:
        block.register_forward_pre_hook(lambda module, args: fake.note("compute", "block"))
    with dit.trunk:
        slots = dit.trunk._feed._slots
        arrived, left = list(slots._arrived), list(slots._left)
        assert all(torch.equal(run(dit, seed), run(whole, seed)) for seed in (0, 1))
    assert fake.log[-1] == ("all", "synchronize")

    reader = [entry for entry in fake.log if entry[0] in ("reader", "copy")]
    want: list[tuple[Any, ...]] = []
    for n in range(2 * LAYERS + 2):
        a, b = arrived[n % 2], left[n % 2]
        want += [("reader", "waits", a), ("reader", "reads", n % LAYERS), ("copy", "begins"), ("copy", "waits", b)]
        want += [("copy", "records", a), ("copy", "ends")]
    assert reader == want[: len(reader)] and len(reader) >= 2 * LAYERS * 6

    compute = [entry for entry in fake.log if entry[0] == "compute"]
    want = [("compute", "records", event) for event in left]  # the slots' memory may still be in use by others
    for n in range(2 * LAYERS):
        want += [("compute", "waits", arrived[n % 2]), ("compute", "block"), ("compute", "records", left[n % 2])]
    assert compute == want

    def nth(entry: tuple[Any, ...], n: int) -> int:
        return [i for i, found in enumerate(fake.log) if found == entry][n]

    for n in range(2 * LAYERS):  # told in this order: a wait for an event that is not yet recorded would be no wait
        told = nth(("copy", "records", arrived[n % 2]), n // 2)
        assert told < nth(("compute", "waits", arrived[n % 2]), n // 2)
        if n >= 2:
            assert nth(("compute", "records", left[n % 2]), n // 2) < nth(("copy", "waits", left[n % 2]), n // 2)


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [0, 1])
@pytest.mark.parametrize("where", ["file", "host"])
def test_on_a_gpu_every_pass_has_the_bits_of_a_model_that_stays(tmp_path: Path, where: str, resident: int) -> None:
    config = replace(T2V, dim=512, ffn_dim=2048, heads=4, layers=8)
    path = written(tmp_path, config)
    whole = loaded(path, config).cuda()
    if where == "host":
        dit = loaded(path, config)
        source: Any = HostBlocks(dit.blocks, pinned=True)
        for name, module in dit.named_children():
            if name != "blocks":
                module.cuda()
    else:
        dit = empty(config)
        source = load_streamed(dit, path, dtype=torch.bfloat16, device="cuda")
        assert isinstance(source, FileBlocks)
    x, t, context = draw(1, 16, 9, 32, 32).cuda(), torch.tensor([[600.0]]).cuda(), draw(1, 5, config.text_dim).cuda()
    dit.trunk = Streamed(dit.trunk, source, "cuda", resident=resident)
    with torch.no_grad(), dit.trunk:
        want = whole(x, t, context)
        outs = [dit(x, t, context) for _ in range(10)]  # told without waiting: the GPU is far behind
        assert all(torch.equal(out, want) for out in outs)
