"""Bad input, row by row: what a person gets wrong is one line on stderr with a stable code, before any work is done.

The rows are numbered as in the project's catalogue of bad inputs. Each is owned by exactly one entry of `REFUSED` or
one function whose name begins with its number; the last test says so. Everywhere: the exit code is the first digit of
the error's code, nothing is written, no tensor is read, no traceback is shown.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from command_line import Ran, run_here, run_process, start

OWNED = (*range(1, 28), 31, *range(33, 39), *range(40, 50), *range(66, 88), 94, 95, 96)

T2V, I2V, TI2V, SMALL, I2V_21 = "t2v-A14B", "i2v-A14B", "ti2v-5B", "t2v-1.3B", "i2v-14B"
SHORT = ("--size", "64x64", "--frames", "5", "--steps", "2", "--seed", "1")
SHARD = "diffusion_pytorch_model.safetensors"


# ------------------------------------------------------------------------------------------- what the rows share


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small checkpoints of five released models; not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    for name in (T2V, I2V, TI2V, SMALL, I2V_21):
        tiny.checkpoint(folder, name)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], here: Path) -> Callable[..., Ran]:
    """A command line in this process, in the folder `here`."""
    return partial(run_here, capsys)


@pytest.fixture
def refused(run: Callable[..., Ran], here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`refused("E2005", *words)`: refused with this code, nothing left behind; returns the message."""

    def read_entry(entry: object) -> None:
        pytest.fail(f"tensor data was read: {entry}")

    monkeypatch.setattr("wanloom.checkpoint.load.read_entry", read_entry)

    def call(code: str, *words: object) -> str:
        before = sorted(here.rglob("*"))
        ran = run("generate", *words)
        check_refusal(ran, code)
        assert sorted(here.rglob("*")) == before
        return ran.err

    return call


def check_refusal(ran: Ran, code: str) -> None:
    """The form that every refusal has."""
    *warnings, error = ran.err.splitlines() or [""]
    assert error.startswith(f"error[{code}]: "), ran.err
    assert ran.code == int(code[1])
    assert all(line.startswith("warning[W") for line in warnings)
    assert "Traceback" not in ran.err
    assert not re.search(r"0x[0-9a-f]{6,}", ran.err)


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`model("t2v-1.3B")`: a copy of that small checkpoint, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(models / name, tmp_path / "damaged" / name))

    return copy


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return tiny.picture(tmp_path / "picture.png")


# ------------------------------------------------------------------------------------------- 1. the command line

# Row -> (what is typed after `generate`, error code, words of the message); {t2v} and so on are small checkpoints.
GOOD = "--ckpt-dir {t2v} --prompt x"
REFUSED: dict[int, list[tuple[str, str, str]]] = {
    1: [("--task t2v-14B --prompt x", "E2001", "--ckpt-dir is required: t2v-14B has no demo model")],
    3: [("--task t2v-15B --ckpt-dir {t2v} --prompt x", "E2002", "Did you mean 't2v-14B'? There are: ")],
    4: [
        (f"{GOOD} --size 1280x721", "E2003", "got 1280x721, expected WIDTHxHEIGHT in multiples of 16. Use 1280x720"),
        (f"{GOOD} --size 720*", "E2003", "got '720*', expected WIDTHxHEIGHT"),
        (f"{GOOD} --size abc", "E2003", "got 'abc', expected WIDTHxHEIGHT"),
        ("--task ti2v-5B --ckpt-dir {ti2v} --prompt x --size 1280x720", "E2003", "in multiples of 32"),
    ],
    5: [
        (f"{GOOD} --size 16400x16", "E2004", "above the 1024 positions per axis of t2v-A14B"),
        ("--task i2v-A14B --ckpt-dir {i2v} --prompt x --image {narrow} --size 16x16", "E2004", "does not fit the area"),
    ],
    6: [
        (f"{GOOD} --size 0x0", "E2003", "got 0x0"),
        (f"{GOOD} --size -16x16", "E2003", "got '-16x16'"),
        (f"{GOOD} --size 1000000000x16", "E2003", "expected sides of 1 to"),
    ],
    7: [(f"{GOOD} --frames 82", "E2005", "got 82, this model makes 4n+1. Use 81 or 85.")],
    8: [(f"{GOOD} --frames 0", "E2005", "got 0"), (f"{GOOD} --frames -7", "E2005", "got -7")],
    9: [(f"{GOOD} --frames 100001", "E2006", "above the limit")],
    10: [(f"{GOOD} --steps {text}", "E2007", f"got {shown}") for text, shown in
         (("0", "0"), ("-1", "-1"), ("1.5", "'1.5'"), ("1e9", "'1e9'"), ("1001", "1001"))],
    11: [(f"{GOOD} --guidance {text}", "E2008", "guidance: got ") for text in ("nan", "inf", "abc", "1,2,3", "-1")],
    12: [(f"{GOOD} --shift {text}", "E2009", "shift: ") for text in ("0", "nan", "-3")],
    13: [(f"{GOOD} --seed {text}", "E2010", "0..2^63-1, or -1") for text in ("-5", str(2**64), "1.0")],
    14: [(f"{GOOD} --sampler eular", "E2011", "Did you mean 'euler'? There are: dpm++, euler, unipc.")],
    19: [("--task i2v-A14B --ckpt-dir {i2v} --prompt x", "E2015", "i2v-A14B needs a picture. Give --image FILE.")],
    20: [(f"{GOOD} --image {{picture}}", "E2016", "image: not used by t2v-A14B")],
    23: [(f"{GOOD} --out missing/a.mp4", "E5001", "the directory missing does not exist")],
    26: [
        (f"{GOOD} --out x.exe", "E2017", ".mp4, .mkv, .webm, .gif, .png"),
        (f"{GOOD} --out x", "E2017", ".mp4, .mkv, .webm, .gif, .png"),
    ],
    37: [
        (f"{GOOD} --frame 81", "E2022", "--frame is not an option of `wanloom generate`. Did you mean '--frames'?"),
        (f"{GOOD} --promp x", "E2022", "Did you mean '--prompt'?"),
        (f"{GOOD} --prompt y", "E2022", "--prompt: given 2 times"),
        (f"{GOOD} --steps 4 --sample_steps 4", "E2022", "--steps: given 2 times"),
        (f"{GOOD} --overwrite --overwrite", "E2022", "--overwrite: given 2 times"),
        (f"{GOOD} --steps", "E2022", "--steps"),
        (f"{GOOD} left over", "E2022", "unexpected extra arguments (left over)"),
    ],
    38: [
        (f"{GOOD} --device cpu --noise-device cuda", "E2023", "cuda conflicts with --device cpu"),
        (f"{GOOD} --sigmas 1,0.5 --steps 2", "E2023", "Leave --steps and --shift out"),
        (f"{GOOD} --like a.mp4 --resume a.job", "E2023", "conflicts with --like"),
    ],
}  # fmt: skip

CASES = [pytest.param(*case, id=f"B{row:03d}-{i}") for row, cases in REFUSED.items() for i, case in enumerate(cases)]


@pytest.mark.parametrize(("typed", "code", "said"), CASES)
def test_what_is_typed_wrongly_is_refused(typed, code, said, refused, models, picture, tmp_path):
    tiny.picture(tmp_path / "narrow.png", (160, 16))
    places = {"t2v": models / T2V, "i2v": models / I2V, "ti2v": models / TI2V}
    words = [word.format(**places, picture=picture, narrow=tmp_path / "narrow.png") for word in typed.split(" ")]
    assert said in refused(code, *words)


@pytest.mark.parametrize("kind", ["absent", "a file"])
def test_b002_a_checkpoint_that_is_no_directory(kind, refused, tmp_path):
    place = tmp_path / "model"
    if kind == "a file":
        place.write_bytes(b"x")
    said = refused("E4001", "--ckpt-dir", place, "--prompt", "x")
    assert str(place) in said


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_b015_an_empty_prompt(prompt, refused, models):
    assert "prompt: is empty" in refused("E2012", "--ckpt-dir", models / T2V, "--prompt", prompt)


def test_b016_a_prompt_of_a_megabyte(refused, models):
    assert "the limit is 8192" in refused("E2013", "--ckpt-dir", models / T2V, "--prompt", "x" * 10**6)


@pytest.mark.parametrize("prompt", ["a\0b", "a\ud800b", os.fsdecode(b"caf\xe9")], ids=["NUL", "surrogate", "latin-1"])
def test_b017_a_prompt_that_is_not_text(prompt, refused, models):
    assert "not text" in refused("E2014", "--ckpt-dir", models / T2V, "--prompt", prompt)


@pytest.mark.parametrize("prompt", ["one\ntwo", "../../etc", "'\"`$(x)", "🐈 \U0001f3fd", "\u202eabc \u05e9\u05dc"])
def test_b018_an_odd_prompt_is_accepted_and_names_no_file(prompt, run, models):
    from wanloom.cli.prepare import prepare

    ran = run("generate", "--ckpt-dir", models / T2V, *SHORT, "--prompt", prompt, "--dry-run")
    assert ran.code == 0
    assert json.loads(ran.out)["prompt"] == prompt
    typed = {"ckpt_dir": str(models / T2V), "prompt": prompt, "size": "64x64", "seed": "7"}
    with pytest.warns(UserWarning):
        (out,) = prepare(typed, like=None, resume=None, dry_run=True).outputs
    assert re.fullmatch(r"t2v-A14B_64x64_7_\d{8}_\d{6}\.mp4", out.name)


@pytest.mark.parametrize("kind", ["absent", "directory", "pipe", "device", "socket"])
def test_b021_a_picture_that_is_no_regular_file_is_not_waited_for(kind, refused, models, tmp_path):
    place = tmp_path / "p.png"
    listener = socket.socket(socket.AF_UNIX) if kind == "socket" else None
    if kind == "directory":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif listener:
        listener.bind(str(place))
    said = refused("E3001", "--task", I2V, "--ckpt-dir", models / I2V, "--prompt", "x", "--image", place)
    if listener:
        listener.close()
    assert "image: " in said


def test_b022_a_picture_without_permission(refused, models, picture, monkeypatch):
    real = os.open

    def guarded(path: Any, *rest: Any, **options: Any) -> int:
        if Path(path) == picture:  # as the system answers for mode 0000; tests may run as root, who may read all
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", guarded)
    said = refused("E3002", "--task", I2V, "--ckpt-dir", models / I2V, "--prompt", "x", "--image", picture)
    assert "permission denied" in said


def test_b024_an_output_that_exists_is_not_replaced(refused, models, here):
    (here / "a.mp4").write_bytes(b"mine")
    assert "--overwrite" in refused("E5002", "--ckpt-dir", models / T2V, *SHORT, "--prompt", "x", "--out", "a.mp4")
    assert (here / "a.mp4").read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["directory", "directory.mp4", "/dev/full", "long name", "read-only"])
def test_b025_an_output_that_cannot_be_written(kind, refused, models, here, monkeypatch):
    place = kind
    if kind.startswith("directory"):
        (here / kind).mkdir()
    elif kind == "long name":
        place = "x" * 300 + ".mp4"
    elif kind == "read-only":
        import tempfile

        def refuse(*rest: Any, **options: Any) -> None:
            raise PermissionError(13, "Permission denied")

        place = "a.mp4"
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write everywhere
    refused("E5001", "--ckpt-dir", models / T2V, *SHORT, "--prompt", "x", "--out", place)


def test_b027_a_disk_that_is_too_full(refused, models, monkeypatch):
    monkeypatch.setattr(os, "fstatvfs", lambda handle: SimpleNamespace(f_bavail=10, f_frsize=4096))
    said = refused("E5003", "--ckpt-dir", models / T2V, *SHORT, "--prompt", "x")
    assert re.search(r"need \d+ MB, have \d+ MB", said)


def test_b031_a_gpu_that_is_not_there(refused, models, monkeypatch):
    monkeypatch.setattr("wanloom.runtime.machine.gpus", lambda: ())
    said = refused("E8002", "--ckpt-dir", models / T2V, *SHORT, "--prompt", "x", "--device", "cuda")
    assert "--device cpu" in said


def test_b033_gpu_memory_below_the_estimate(refused, models, monkeypatch):
    from wanloom.runtime.machine import Gpu

    monkeypatch.setattr("wanloom.runtime.machine.gpus", lambda: (Gpu(0, "Small GPU", 2**30, 10**8, (8, 9)),))
    monkeypatch.setattr("wanloom.cli.room.torch_has_gpu_build", lambda: True)
    said = refused("E5004", "--ckpt-dir", models / T2V, *SHORT, "--prompt", "x", "--device", "cuda")
    assert re.search(r"GPU memory: needs about [\d.]+ [GM]B, 100 MB are free. Try ", said)


@pytest.mark.parametrize("kind", ["PyAV absent", "codec absent"])
def test_b034_an_encoder_that_is_missing(kind, refused, models, monkeypatch):
    from dataclasses import replace

    from wanloom import media

    if kind == "PyAV absent":
        monkeypatch.setitem(sys.modules, "av", None)
    else:
        monkeypatch.setitem(media.CODECS, ".mp4", replace(media.CODECS[".mp4"], codec="no_such_codec"))
    said = refused("E8004", "--ckpt-dir", models / T2V, *SHORT, "--prompt", "x")
    assert "encoder: " in said


# --------------------------------------------------------------------------------------------------- 2. pictures


def png(width: int, height: int, *extra: tuple[bytes, bytes], pixels: bytes | None = None) -> bytes:
    """A grey PNG with chunks of one's own between header and pixels; without `pixels` it has one byte of them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(pixels or b"\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@pytest.fixture
def shown(refused, models, tmp_path) -> Callable[..., str]:
    """`shown("E3004", data, "p.png")`: a picture file of these bytes is refused with this code."""

    def call(code: str, data: bytes, name: str = "p.png") -> str:
        file = tmp_path / name
        file.write_bytes(data)
        said = refused(code, "--task", I2V, "--ckpt-dir", models / I2V, *SHORT, "--prompt", "x", "--image", file)
        assert name in said
        return said

    return call


def test_b041_an_empty_picture(shown):
    shown("E3003", b"")


@pytest.mark.parametrize("data", [b"just text\n", b"<!DOCTYPE html><html></html>", b"%PDF-1.7\n", b"\0" * 64])
def test_b042_other_things_named_png(data, shown):
    shown("E3004", data)


def test_b043_a_picture_cut_at_every_hundredth(shown, picture):
    whole = picture.read_bytes()
    for percent in range(1, 100):
        shown("E3005", whole[: max(1, len(whole) * percent // 100)])


@pytest.mark.parametrize("side", [14_000, 50_000])
def test_b044_a_bomb_is_refused_by_its_header(side, shown):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "at most 40 Mpx" in shown("E3006", png(side, side))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # kB


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (400, 16)])
def test_b045_a_picture_too_small_or_too_narrow(size, shown):
    shown("E3007", png(*size, pixels=bytes((size[0] + 1) * size[1])))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_b046_an_animation(kind, shown, tmp_path):
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    file = tmp_path / "moving"
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    assert "one frame expected" in shown("E3008", file.read_bytes(), f"p.{kind.lower()}")


def odd_pictures(folder: Path) -> Iterator[tuple[str, Path, tuple[int, int]]]:
    """Good pictures in unusual forms: (name, file, size in pixels after the camera's rotation)."""
    ramp = np.linspace(0, 255, 96 * 64, dtype=np.uint8).reshape(64, 96)
    colored = Image.fromarray(np.stack([ramp, ramp.T.reshape(64, 96), 255 - ramp], -1))
    colored.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(ramp.astype(np.uint16) << 8).save(folder / "sixteen.png")
    palette = colored.convert("P")
    palette.save(folder / "palette.png", transparency=0)
    Image.fromarray(ramp).save(folder / "grey.jpg")
    colored.save(folder / "profile.png", icc_profile=b"not a real profile")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    colored.save(folder / "turned.jpg", exif=exif)
    for name in ("cmyk.jpg", "sixteen.png", "palette.png", "grey.jpg", "profile.png"):
        yield name, folder / name, (96, 64)
    yield "turned.jpg", folder / "turned.jpg", (64, 96)


def test_b047_unusual_pictures_are_converted_always_alike(run, models, tmp_path):
    from wanloom.media import read_picture

    for name, file, size in odd_pictures(tmp_path):
        words = ("--task", I2V, "--ckpt-dir", models / I2V, *SHORT, "--prompt", "x", "--image", file, "--dry-run")
        ran = run("generate", *words)
        assert ran.code == 0, f"{name}: {ran.err}"
        assert tuple(json.loads(ran.out)["inputs"][0]["size"]) == size, name
        pixels = read_picture(file).pixels
        assert pixels.shape == (size[1], size[0], 3)
        assert (pixels == read_picture(file).pixels).all()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.tiff", b"II*\0" + bytes(64)),
        ("p.psd", b"8BPS\0\1" + bytes(64)),
        ("p.fits", b"SIMPLE  =                    T" + bytes(64)),
        ("p.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
        ("p.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("p.ico", b"\0\0\1\0\1\0" + bytes(64)),
        ("p.jp2", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64)),
    ],
)
def test_b048_other_picture_formats_are_not_even_opened(name, data, shown, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *rest, **options: pytest.fail("a parser was opened"))
    shown("E3004", data, name)


@pytest.mark.parametrize("kind", ["text", "compressed text", "profile"])
def test_b049_a_picture_with_far_more_metadata_than_pixels(kind, shown):
    much = bytes(100 * 10**6)
    chunks = {
        "text": (b"tEXt", b"Comment\0" + b"x" * len(much)),
        "compressed text": (b"zTXt", b"Comment\0\0" + zlib.compress(much)),
        "profile": (b"iCCP", b"profile\0\0" + zlib.compress(much)),
    }
    shown("E3006", png(64, 64, chunks[kind], pixels=bytes(65 * 64)))


# ------------------------------------------------------------------------------------------------ 3. checkpoints


def safetensors(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with any header: a dict, or the text of one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], Any], **metadata: str) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt", **metadata})


def split(folder: Path, *revisions: str) -> dict[str, str]:
    """The one transformer file of a folder as two shards with an index; the index's map."""
    tensors = load_file(folder / SHARD)
    (folder / SHARD).unlink()
    names = sorted(tensors)
    where = {}
    for number, half in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        mark = {"wanloom.revision": revisions[number - 1]} if revisions else None
        save_file({name: tensors[name] for name in half}, folder / file, metadata=mark)
        where |= dict.fromkeys(half, file)
    write_index(folder, where)
    return where


def write_index(folder: Path, where: Any) -> None:
    document = where if isinstance(where, str) else json.dumps({"metadata": {}, "weight_map": where})
    (folder / f"{SHARD}.index.json").write_text(document)


@pytest.fixture
def rejected(refused) -> Callable[..., str]:
    """`rejected("E4006", folder, "t2v-1.3B", names=file)`: that model is refused; the message names the file."""

    def call(code: str, folder: Path, task: str = SMALL, *words: object, names: str = "") -> str:
        said = refused(code, "--task", task, "--ckpt-dir", folder, *SHORT, "--prompt", "x", *words)
        assert names in said
        return said

    return call


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin"])
def test_b066_a_pickled_transformer_where_safetensors_are_published(suffix, model, rejected):
    folder = model(SMALL)
    torch.save(load_file(folder / SHARD), folder / f"diffusion_pytorch_model{suffix}")
    (folder / SHARD).unlink()
    said = rejected("E4002", folder, names=f"diffusion_pytorch_model{suffix}")
    assert "wanloom convert" in said


class Payload:
    """What runs when somebody unpickles it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def test_b067_a_pickle_with_code_is_not_executed(model, rejected, run, here, tmp_path):
    folder, canary = model(SMALL), tmp_path / "canary"
    for file in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        good = (folder / file).read_bytes()
        torch.save({"weight": Payload(canary)}, folder / file)
        assert "mkdir" in rejected("E4003", folder, names=file)
        ran = run("convert", folder / file, here / "out", "--to", "official")
        check_refusal(ran, "E4003")
        (folder / file).write_bytes(good)
    assert not canary.exists()


@pytest.mark.parametrize("data", [b"", b"1234567"])
def test_b068_a_file_of_no_or_seven_bytes(data, model, rejected):
    folder = model(SMALL)
    (folder / SHARD).write_bytes(data)
    assert "truncated header" in rejected("E4004", folder, names=SHARD)


@pytest.mark.parametrize("length", [2**63, 9 * 2**20])
def test_b069_a_header_too_long(length, model, rejected):
    folder = model(SMALL)
    (folder / SHARD).write_bytes(struct.pack("<Q", length) + b" " * min(length, 10 * 2**20))
    rejected("E4005", folder, names=SHARD)


@pytest.mark.parametrize("change", [-1, 1], ids=["truncated", "trailing bytes"])
def test_b070_data_that_is_too_short_or_too_long(change, model, rejected):
    folder = model(SMALL)
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-1] if change < 0 else data + b"\0")
    assert f"expected {len(data)} bytes, found {len(data) + change}" in rejected("E4006", folder, names=SHARD)


@pytest.mark.parametrize(
    ("table", "tensor"),
    [
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, "b"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 6, 10)}, "b"),
        ({"a": entry("F32", [1], -4, 0)}, "a"),
        ({"a": entry("F32", [2**62, 2**62], 0, 8)}, "a"),
        ({"a": entry("F32", [-1], 0, 4)}, "a"),
        ({"a": entry("F32", [3], 0, 8)}, "a"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "a"),
    ],
    ids=["overlap", "gap", "negative offset", "overflow", "negative shape", "wrong size", "no offsets"],
)
def test_b071_tensors_that_do_not_lie_end_to_end(table, tensor, model, rejected):
    folder = model(SMALL)
    (folder / SHARD).write_bytes(safetensors(table, bytes(16)))
    assert f"tensor {tensor}" in rejected("E4007", folder, names=SHARD)


def test_b072_a_tensor_listed_twice(model, rejected):
    folder = model(SMALL)
    one = json.dumps(entry("F32", [1], 0, 4))
    (folder / SHARD).write_bytes(safetensors(f'{{"a": {one}, "a": {one}}}'.encode(), bytes(4)))
    assert "twice" in rejected("E4008", folder, names=SHARD)


def test_b073_numbers_that_cannot_be_read(model, rejected):
    folder = model(SMALL)
    (folder / SHARD).write_bytes(safetensors({"a": entry("F6_E3M2", [4], 0, 3)}, bytes(3)))
    assert "unknown dtype" in rejected("E4009", folder, names=SHARD)
    folder = shutil.copytree(folder.parent / SMALL, folder.parent / "int8")
    shutil.copy(model(T2V) / "low_noise_model" / SHARD, folder / SHARD)

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.0.self_attn.q.weight"] = tensors["blocks.0.self_attn.q.weight"].to(torch.int8)

    edit(folder / SHARD, quantise)
    assert "int8 without a scale" in rejected("E4009", folder, names=SHARD)


def test_b076_files_that_are_no_weights(model, rejected):
    looks = {
        "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    }
    folder = model(SMALL)
    for data in looks.values():
        (folder / SHARD).write_bytes(data)
        assert "not a weight file (looks like " in rejected("E4012", folder, names=SHARD)
    part = folder / "half.part"
    part.write_bytes(b"x" * 100)
    said = rejected("E4012", folder, SMALL, "--dit", part)
    assert "unfinished download" in said


def test_b077_shards_missing_listed_twice_or_too_many(model, rejected):
    folder = model(SMALL)
    where = split(folder)
    second = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    kept = second.read_bytes()
    second.unlink()
    rejected("E4013", folder, names=second.name)
    second.write_bytes(kept)
    extra = folder / "diffusion_pytorch_model-00003-of-00003.safetensors"
    extra.write_bytes(kept)
    rejected("E4013", folder, names=extra.name)
    extra.unlink()
    write_index(folder, dict.fromkeys(where, "diffusion_pytorch_model-00001-of-00002.safetensors"))
    rejected("E4013", folder)
    first = folder / "diffusion_pytorch_model-00001-of-00002.safetensors"
    write_index(folder, where)
    edit(first, lambda tensors: tensors.update(load_file(second)))
    rejected("E4013", folder, names=first.name)


@pytest.mark.parametrize("kind", ["no JSON", "no map", "parent", "absolute", "link out"])
def test_b078_an_index_that_is_invalid_or_leads_out_of_the_folder(kind, model, rejected, tmp_path):
    folder = model(SMALL)
    where = split(folder)
    shard = "diffusion_pytorch_model-00002-of-00002.safetensors"
    bad = {"parent": "../../x.safetensors", "absolute": str(folder / shard)}
    if kind == "no JSON":
        write_index(folder, "{not json")
    elif kind == "no map":
        write_index(folder, "[]")
    elif kind == "link out":
        shutil.move(folder / shard, tmp_path / "outside.safetensors")
        (folder / shard).symlink_to(tmp_path / "outside.safetensors")
    else:
        write_index(folder, {name: bad[kind] if file == shard else file for name, file in where.items()})
    rejected("E4014", folder)


def test_b079_shards_of_two_revisions(model, rejected):
    folder = model(SMALL)
    split(folder, "first", "second")
    assert "two revisions" in rejected("E4015", folder)


@pytest.mark.parametrize(
    ("has", "asked", "said"),
    [
        (T2V, I2V, "this is t2v-A14B (16 input channels), expected i2v-A14B (36)"),
        (I2V, T2V, "this is i2v-A14B (36 input channels), expected t2v-A14B (16)"),
        (TI2V, SMALL, "this is ti2v-5B"),
        (SMALL, TI2V, "expected ti2v-5B"),
        (I2V_21, SMALL, "this is i2v-14B"),
        (SMALL, T2V, "expected t2v-A14B"),
    ],
)
def test_b080_the_model_of_another_task(has, asked, said, models, picture, rejected):
    image = ("--image", picture) if asked == I2V else ()
    assert said in rejected("E4016", models / has, asked, *image, names=asked)


def test_b081_the_vae_of_the_other_generation(models, rejected):
    assert "48 latent channels" in rejected("E4017", models / SMALL, SMALL, "--vae", models / TI2V / "Wan2.2_VAE.pth")
    assert "16 latent channels" in rejected("E4017", models / TI2V, TI2V, "--vae", models / SMALL / "Wan2.1_VAE.pth")


def test_b082_swapped_experts_are_refused_where_recorded_else_remarked(model, run, rejected):
    folder = model(T2V)
    swapped = ("--dit-high", folder / "low_noise_model", "--dit-low", folder / "high_noise_model")
    ran = run("generate", "--ckpt-dir", folder, *SHORT, "--prompt", "x", *swapped, "--dry-run")
    assert ran.code == 0
    assert "warning[W4018]: " in ran.err
    for name in ("high_noise_model", "low_noise_model"):
        edit(folder / name / SHARD, lambda tensors: None, **{"wanloom.expert": name})
    assert "Swap --dit-high and --dit-low" in rejected("E4018", folder, T2V, *swapped)


def test_b083_only_one_of_two_experts(model, rejected):
    folder = model(T2V)
    shutil.rmtree(folder / "low_noise_model")
    assert "the expert low_noise_model is missing" in rejected("E4019", folder, T2V)


def test_b084_another_text_encoder(model, rejected):
    folder = model(SMALL)
    file = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    weights = torch.load(file, weights_only=True)
    kept = dict(weights)
    positions = [name for name in weights if "pos_embedding" in name and not name.startswith("blocks.0.")]
    torch.save({name: value for name, value in weights.items() if name not in positions}, file)
    assert "this is a T5 encoder" in rejected("E4020", folder)
    kept["token_embedding.weight"] = torch.zeros(2000, kept["token_embedding.weight"].shape[1])
    torch.save(kept, file)
    assert "do not belong together" in rejected("E4020", folder)


def write_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    "text",
    ['{"dim": "64"}', '{"eps": 1e999}', '{"dim": 64, "dim": 64}', '{"a":' * 40 + "1" + "}" * 40, '{"eps": NaN}', "[]"],
    ids=["wrong type", "infinite", "twice", "deep", "not a number", "no object"],
)
def test_b085_a_config_that_is_wrong(text, model, rejected):
    folder = model(SMALL)
    write_config(folder, text)
    rejected("E4021", folder, names="config.json")


def test_b085_an_unknown_key_is_a_warning(model, run):
    folder = model(SMALL)
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, json.dumps({**config, "colour_of_the_sky": "blue"}))
    ran = run("generate", "--task", SMALL, "--ckpt-dir", folder, *SHORT, "--prompt", "x", "--dry-run")
    assert ran.code == 0
    assert ran.err.count("colour_of_the_sky") == 1
    assert "warning[W4021]" in ran.err


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code", "_attn_implementation_internal"])
def test_b086_a_config_that_names_code(key, model, rejected):
    folder = model(SMALL)
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, json.dumps({**config, key: {"AutoModel": "evil.Model"}}))
    assert key in rejected("E4022", folder, names="config.json")


@pytest.mark.parametrize("change", [{"num_layers": 10**9}, {"dim": 0}, {"num_heads": 7}])
def test_b087_sizes_that_no_model_has(change, model, rejected):
    folder = model(SMALL)
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, json.dumps(config | change))
    rejected("E4023", folder, names="config.json")


def test_b094_python_files_in_a_model_folder_are_never_run(model, here):
    folder = model(SMALL)
    for name in ("setup.py", "modeling_wan.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(f"import os; os.mkdir({str(here / 'canary')!r})\n")
    hook = (
        "import sys; seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event in ('import', 'exec') else None)\n"
        "from wanloom.cli import main\n"
        f"code = main({['generate', '--task', SMALL, '--ckpt-dir', str(folder), *SHORT, '--prompt=x', '--dry-run']})\n"
        f"print([name for name in seen if {str(folder)!r} in name or 'modeling_wan' in name], file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    ran = run_process(here, "-c", hook, program=())
    assert ran.code == 0
    assert ran.err.splitlines()[-1] == "[]"
    assert not (here / "canary").exists()


@pytest.mark.parametrize("kind", ["damaged", "no vocabulary", "too large"])
def test_b095_a_tokenizer_that_is_damaged_or_huge(kind, model, rejected):
    folder = model(SMALL)
    file = folder / "google" / "umt5-xxl" / "tokenizer.json"
    if kind == "too large":
        with file.open("r+b") as handle:
            handle.truncate(10**9)
    else:
        file.write_text("{" if kind == "damaged" else '{"model": {}}')
    rejected("E4030", folder, names="tokenizer.json")


# ---------------------------------------------------------------------------------------- 4. found while running


def long_run(models: Path, *words: object) -> tuple[object, ...]:
    """A command line whose file is a.mp4."""
    return "generate", "--ckpt-dir", models / T2V, *SHORT, "--prompt", "a cat runs", "--out", "a.mp4", *words


def test_b074_weights_that_are_not_finite_are_found_while_loading(model, run, here):
    folder = model(SMALL)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.1.ffn.0.weight"][0, 0] = float("nan")

    edit(folder / SHARD, spoil)
    ran = run("generate", "--task", SMALL, "--ckpt-dir", folder, *SHORT, "--prompt", "x", "--out", "a.mp4")
    check_refusal(ran, "E4010")
    assert "tensor blocks.1.ffn.0.weight: 1 of" in ran.err
    assert not (here / "a.mp4").exists()


def test_b075_one_flipped_bit_in_a_file_whose_hash_is_recorded(model, run, here):
    from wanloom.checkpoint import manifest

    folder = model(SMALL)
    manifest.write(folder, [folder / SHARD])
    data = bytearray((folder / SHARD).read_bytes())
    data[-2] ^= 1
    (folder / SHARD).write_bytes(data)
    ran = run("generate", "--task", SMALL, "--ckpt-dir", folder, *SHORT, "--prompt", "x", "--out", "a.mp4")
    check_refusal(ran, "E4011")
    assert SHARD in ran.err
    assert not (here / "a.mp4").exists()


@pytest.mark.parametrize("kind", ["removed", "swapped"])
def test_b096_a_file_that_changes_while_it_is_loaded(kind, model, run, monkeypatch):
    from wanloom.checkpoint import load

    folder = model(SMALL)
    read = load.read_entry

    def read_and_change(one: Any) -> torch.Tensor:
        value = read(one)
        file = folder / SHARD
        if one.file == file and file.exists():
            if kind == "removed":
                file.unlink()
            else:
                data = file.read_bytes()
                file.with_suffix(".new").write_bytes(data + b"\0")
                file.with_suffix(".new").replace(file)
        return value

    monkeypatch.setattr(load, "read_entry", read_and_change)
    ran = run("generate", "--task", SMALL, "--ckpt-dir", folder, *SHORT, "--prompt", "x", "--out", "a.mp4")
    check_refusal(ran, "E4001" if kind == "removed" else "E4011")


@pytest.fixture(scope="session")
def killed(models, tmp_path_factory) -> Path:
    """The folder of a run that was killed after its first step; not to be changed."""
    folder = tmp_path_factory.mktemp("killed")
    ran = run_process(folder, *long_run(models, "--save-every", 1), WANLOOM_FAILPOINT="state")
    assert ran.code == -signal.SIGKILL, ran.err
    return folder / "a.job"


@pytest.fixture
def unfinished(killed, here) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed, here / "a.job"))


def test_b035_resuming_something_else_changes_nothing(unfinished, models, run, here):
    before = {file.name: file.read_bytes() for file in unfinished.iterdir()}
    for words, field in ((("--prompt", "a dog"), "prompt"), (("--steps", "3"), "steps"), (("--seed", "5"), "seed")):
        ran = run("generate", "--resume", unfinished, *words)
        check_refusal(ran, "E2020")
        assert field in ran.err
    swapped = run("generate", "--resume", unfinished, "--task", SMALL, "--ckpt-dir", models / SMALL)
    check_refusal(swapped, "E2020")
    after = {file.name: file.read_bytes() for file in unfinished.iterdir()}
    assert {name: data for name, data in after.items() if name != "lock"} == {
        name: data for name, data in before.items() if name != "lock"
    }
    assert not (here / "a.mp4").exists()
    ran = run("generate", "--resume", here / "nothing.job")
    check_refusal(ran, "E2020")


def test_b036_resuming_what_another_process_works_on(unfinished, run):
    import fcntl

    with (unfinished / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("4242\n")
        lock.flush()
        ran = run("generate", "--resume", unfinished)
    check_refusal(ran, "E2021")
    assert "in use by process 4242" in ran.err


@pytest.mark.parametrize("times", [1, 2])
def test_b040_ctrl_c_once_keeps_the_work_twice_stops_at_once(times, models, run, here, monkeypatch):
    passed = []

    def strike(point: str) -> None:
        passed.append(point)
        if (passed.count("step") == 2 and point == "step") or (point == "state" and times == 2):
            signal.raise_signal(signal.SIGINT)  # in the second step, and again while that is being saved

    monkeypatch.setattr("wanloom.pipeline.failpoint", strike)
    monkeypatch.setattr("wanloom.jobs.failpoint", strike)
    ran = run(*long_run(models))
    if times == 2:
        assert (ran.code, ran.err.splitlines()[-1]) == (130, "stopped.")
        return
    check_refusal(ran, "E7001")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    command = re.search(r"Continue: wanloom (generate --resume \S+)", ran.err)
    assert command
    again = run(*command[1].split())
    assert again.code == 0, again.err
    assert "resuming at step 2 of 2" in again.out
    assert (here / "a.mp4").is_file()


def test_b040_by_a_real_signal(models, here):
    words = [1000 if word == "2" else word for word in long_run(models)]
    with start(here, *words) as process:
        for line in process.stdout:
            if line.startswith("denoise "):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 7, err
    assert "Continue: wanloom generate --resume" in err
    assert (here / "a.job" / "plan.json").is_file()


# ------------------------------------------------------------------------------------------- 5. in time, and all


def timed(folder: Path, *words: object) -> tuple[float, Ran]:
    """A command line as a process: the median wall time of three, and what the last one said."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        ran = run_process(folder, *words)
        times.append(time.perf_counter() - started)
    return statistics.median(times), ran


def test_refusals_take_at_most_two_seconds_more_than_saying_the_version(models, model, here, picture):
    huge = model(SMALL)
    rows, columns = 2**17, 2**15
    head = safetensors({"patch_embedding.weight": entry("F32", [rows, columns], 0, 4 * rows * columns)})
    with (huge / SHARD).open("wb") as file:  # 16 GB of nothing: reading it would take far longer
        file.write(head)
        file.truncate(len(head) + 4 * rows * columns)
    (here / "cut.png").write_bytes(picture.read_bytes()[:500])
    refusals = {
        "E2005": ("generate", "--ckpt-dir", models / T2V, "--prompt", "x", "--frames", "82"),
        "E3005": ("generate", "--task", I2V, "--ckpt-dir", models / I2V, "--prompt", "x", "--image", "cut.png"),
        "E4016": ("generate", "--task", SMALL, "--ckpt-dir", huge, "--prompt", "x"),
        "E5001": ("generate", "--ckpt-dir", models / T2V, *SHORT, "--prompt", "x", "--out", "missing/a.mp4"),
    }
    version, _ = timed(here, "--version")
    for code, words in refusals.items():
        seconds, ran = timed(here, *words)
        check_refusal(ran, code)
        assert seconds <= version + 2, code


def test_every_row_has_exactly_one_owner():
    functions = {int(match[1]) for name in globals() if (match := re.match(r"test_b(\d{3})_", name))}
    assert not functions & set(REFUSED)
    assert functions | set(REFUSED) == set(OWNED)
