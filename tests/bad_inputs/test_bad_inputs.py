"""Bad input, row by row: what a person gets wrong is one line on stderr with a stable code, before any work is done.

The rows are numbered as in the project's catalogue of bad inputs. Each is owned by an entry of `REFUSED` or by
functions of one file whose names begin with its number; the last test says so. Everywhere: the exit code is the first
digit of the error's code, nothing is written, no tensor is read, no traceback is shown.
"""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rows import I2V, OWNED, S2V, SHARD, SHORT, SMALL, T2V, TI2V, check_refusal, entry, safetensors, wav

import tiny
from command_line import Ran, run_process

# Row -> (what is typed after `generate`, error code, words of the message); {t2v} and so on are small checkpoints.
GOOD = "--ckpt-dir {t2v} --prompt x"
SPOKEN = "--task s2v-14B --ckpt-dir {s2v} --prompt x --image {picture} --audio {sound}"
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
        (f"{GOOD} --sigmas 1,0.5 --steps 3", "E2023", "2 noise levels are 2 steps, not 3"),
        (f"{GOOD} --like a.mp4 --resume a.job", "E2023", "conflicts with --like"),
    ],
    39: [
        ("--task s2v-14B --ckpt-dir {s2v} --prompt x --image {picture}", "E2024", "Give --audio FILE, or --tts-text"),
        (f"{SPOKEN} --num-clip 0", "E2024", "num-clips: got 0, expected 1..10000"),
        (f"{SPOKEN} --num-clip -1", "E2024", "num-clips: got -1, expected 1..10000"),
        (f"{SPOKEN} --num-clip 1.5", "E2024", "num-clips: got '1.5'"),
    ],
}  # fmt: skip

CASES = [pytest.param(*case, id=f"B{row:03d}-{i}") for row, cases in REFUSED.items() for i, case in enumerate(cases)]


@pytest.mark.parametrize(("typed", "code", "said"), CASES)
def test_what_is_typed_wrongly_is_refused(typed, code, said, refused, models, picture, tmp_path):
    tiny.picture(tmp_path / "narrow.png", (160, 16))
    places = {"t2v": models / T2V, "i2v": models / I2V, "ti2v": models / TI2V, "s2v": models / S2V}
    files = {"picture": picture, "narrow": tmp_path / "narrow.png", "sound": wav(tmp_path / "sound.wav")}
    words = [word.format(**places, **files) for word in typed.split(" ")]
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


def test_b028_sizes_that_do_not_go_with_the_heads_or_the_processes(refused, models):
    words = ("--ckpt-dir", models / T2V, *SHORT, "--prompt", "x", "--device", "cpu", "--dry-run")
    said = refused("E2018", *words, "--gpus", "3", "--ulysses_size", "3")
    assert "3 does not divide the 2 heads of this model. Use one of 1." in said
    assert "does not make 4 processes" in refused("E2018", *words, "--gpus", "4", "--ulysses_size", "3")
    assert "Start more with --gpus" in refused("E2018", *words, "--ulysses_size", "8")


@pytest.mark.parametrize("option", ["--dit_fsdp", "--t5_fsdp"])
def test_b029_weights_cut_among_one_process(option, refused, models):
    said = refused("E2019", "--ckpt-dir", models / T2V, *SHORT, "--prompt", "x", option)
    assert "this is one process. Start more with --gpus" in said


@pytest.mark.parametrize(("rank", "world"), [("foo", "2"), ("0", "0"), ("2", "2"), ("-1", "2"), ("0", "1e3")])
def test_b030_a_launcher_that_says_odd_things(rank, world, refused, models, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    said = refused("E8001", "--ckpt-dir", models / T2V, *SHORT, "--prompt", "x")
    assert "Start with torchrun, or unset RANK and WORLD_SIZE." in said


def test_b032_more_processes_than_gpus(refused, models, monkeypatch):
    from wanloom.runtime.machine import Gpu

    monkeypatch.setattr("wanloom.runtime.machine.gpus", lambda: (Gpu(0, "GPU", 2**36, 2**36, (8, 9)),))
    monkeypatch.setattr("wanloom.cli.supervise.torch_has_gpu_build", lambda: True)
    said = refused("E8003", "--ckpt-dir", models / T2V, *SHORT, "--prompt", "x", "--gpus", "4")
    assert "4 processes need 4 GPUs, 1 are here. Start 1, or use --device cpu." in said


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
    owners: dict[int, set[str]] = {row: {"REFUSED"} for row in REFUSED}
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        for number in re.findall(r"^def test_b(\d{3})_", file.read_text(encoding="utf-8"), re.MULTILINE):
            owners.setdefault(int(number), set()).add(file.name)
    assert set(owners) == set(OWNED)
    assert {row: names for row, names in owners.items() if len(names) > 1} == {}
