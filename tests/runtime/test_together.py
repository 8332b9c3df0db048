"""One video by several processes: the pipeline on the first, its transformer on all, and the numbers of a run alone.

All processes are started once for the fast tests; `matrix` has more processes, models and ways.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor

import tiny
from clip_files import three_clips
from wanloom.checkpoint.find import resolve
from wanloom.checkpoint.load import survey
from wanloom.pipeline import Pipeline
from wanloom.request import Request
from wanloom.runtime.crew import Crew, Lost, is_loss
from wanloom.runtime.layouts import Layout, Place
from wanloom.runtime.watchdog import FileBoard, Watch
from wanloom.together import Together, serve
from wanloom.variants import VARIANTS

NEAR = 2e-5  # float32, two or three steps of a random model; relative to the largest value
PLAIN = {"size": (32, 32), "frames": 5, "steps": 2, "seed": 3, "prompt": "a cat runs"}

# name -> model, world, (cfg, ring, ulysses), options of Together, further fields of the request
Case = tuple[str, int, tuple[int, int, int], dict[str, Any], dict[str, Any]]
FAST: dict[str, Case] = {
    "halves of guidance, two experts": ("t2v-A14B", 2, (2, 1, 1), {}, {"steps": 3}),
    "heads, all weights cut": ("t2v-A14B", 2, (1, 1, 2), {"cut": ("dit", "text")}, {"steps": 3}),
    "a ring, clean frames, late guidance": ("ti2v-5B", 2, (1, 2, 1), {}, {"image": True, "guidance_mode": "late"}),
    "halves, cut, no guidance late": ("t2v-1.3B", 2, (2, 1, 1), {"cut": ("dit",)}, {"guidance_mode": "late-off"}),
    "blocks that come and go": ("t2v-1.3B", 2, (1, 1, 2), {"resident_blocks": 1}, {}),
}  # fmt: skip
MORE: dict[str, Case] = {
    "three": ("i2v-14B", 3, (1, 3, 1), {}, {"image": True}),
    "halves and heads": ("t2v-A14B", 4, (2, 1, 2), {}, {"steps": 3}),
    "halves and a ring, cut": ("i2v-A14B", 4, (2, 2, 1), {"cut": ("dit", "text")}, {"image": True}),
    "heads and a ring": ("ti2v-5B", 4, (1, 2, 2), {}, {"image": True}),
    "eight bits": ("t2v-1.3B", 2, (1, 1, 2), {"quantise": "int8"}, {}),
    "one branch only": ("t2v-1.3B", 2, (1, 1, 2), {}, {"guidance": 1.0}),
    "three, cut": ("t2v-A14B", 3, (1, 3, 1), {"cut": ("dit", "text")}, {"steps": 3}),
    "clip by clip": ("animate-14B", 2, (1, 1, 2), {}, {"clips": "animate"}),
    "clip by clip, guided": ("s2v-14B", 2, (2, 1, 1), {}, {"clips": "s2v"}),
}  # fmt: skip


def make(folder: Path, case: Case, crew: Crew | None) -> Tensor:
    """The latents of a case, made by the first process with its crew, or alone."""
    model, _, sizes, options, fields = case
    files = resolve(VARIANTS[model], ckpt_dir=folder / model)
    cut = options.get("cut", ())
    options = {name: value for name, value in options.items() if name != "cut"}
    if crew is not None:
        options["make_parts"] = partial(Together, crew=crew, layout=Layout(*sizes), cut=cut)
    elif "resident_blocks" in options:
        options = {}  # which changes nothing
    picture = {"image": folder / "cat.png"} if fields.get("image") else {}
    if "clips" in fields:
        fields = {"size": None, "frames": None, **three_clips(Path(mkdtemp(dir=folder)))[fields["clips"]]}
    pipe = Pipeline(survey(VARIANTS[model], files), files, device="cpu", dtype="float32", **options)
    return pipe.run(Request(**{**PLAIN, **fields, **picture})).videos[0].latents


def work(folder: Path, cases: dict[str, Case]) -> dict[str, Tensor]:
    """What the first process of this world makes; nothing on the others."""
    group = torch.distributed
    crew, made = Crew(Place(group.get_rank(), group.get_world_size())), {}
    crew.compute_on("cpu")
    for name, case in cases.items():
        if case[1] != group.get_world_size():
            continue
        if crew.first:
            made[name] = make(folder, case, crew)
            crew.tell("end")
        else:
            serve(crew)
    return made


def everything(folder: Path, cases: dict[str, Case]) -> dict[str, Any]:
    """All that the processes of the fast tests do."""
    return {"made": work(folder, cases), "said": wait_in_vain(folder)}


def wait_in_vain(folder: Path) -> str:
    """What the watchdog says while the main thread is deep in an exchange to which the last process does not come."""
    rank, last = torch.distributed.get_rank(), torch.distributed.get_world_size() - 1
    file, patience = folder / f"said-{last}", os.environ.get("WANLOOM_PATIENCE")
    os.environ["WANLOOM_PATIENCE"] = "1"
    watch = Watch(FileBoard(folder / f"board-{last}", rank), file.write_text if rank == 0 else str)
    watch.start()
    if rank == last:
        until = time.monotonic() + 60
        while not file.is_file() and time.monotonic() < until:
            time.sleep(0.05)
    torch.distributed.barrier()
    watch.close()
    del os.environ["WANLOOM_PATIENCE"]
    if patience is not None:
        os.environ["WANLOOM_PATIENCE"] = patience
    return file.read_text()


def check(folder: Path, cases: dict[str, Case]) -> None:
    worlds = sorted({case[1] for case in cases.values()}, reverse=True)
    found = ranks.run(everything, worlds, folder, cases, seconds=1500)
    for world in worlds:
        assert "did anything for" in found[world][0]["said"]
    made = {name: value for world in worlds for name, value in found[world][0]["made"].items()}
    assert made.keys() == cases.keys()
    for name, case in cases.items():
        alone = make(folder, case, None)
        far = float((made[name] - alone).abs().max() / alone.abs().max())
        print(f"{name}: {far:.1e}")
        same = case[2] == (2, 1, 1) and "clips" not in case[4]  # halves alone, and nothing encoded: the same bits
        assert far <= (0 if same else NEAR), f"{name}: {far}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in sorted({case[0] for case in (*FAST.values(), *MORE.values())}):
        tiny.checkpoint(folder, name)
    tiny.picture(folder / "cat.png")
    return folder


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore::wanloom.errors.WanloomWarning")
def test_two_processes_make_the_video_of_one_and_notice_who_does_not_come(folder: Path) -> None:
    check(folder, FAST)


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore::wanloom.errors.WanloomWarning")
def test_three_and_four_processes_and_other_ways_make_it_too(folder: Path) -> None:
    check(folder, MORE)


def test_only_an_exchange_that_lost_somebody_is_a_loss() -> None:
    assert is_loss(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert not is_loss(RuntimeError("shape '[2]' is invalid for input of size 3"))
    crew = Crew(Place(0, 2))
    with pytest.raises(Lost), crew.exchange():
        raise RuntimeError("gloo says that somebody is gone")
    assert crew.torn
    crew.tell("end")  # is told to nobody: they would not know what they hear
