"""Saved states of a training run: complete or absent, two kept, resumed exactly.

    runs/NAME/PHASE/step_00001500/rank0.safetensors ...   masters, averages, optimisers of each rank
                                 /state.json              step, recipe digest, SHA-256 of the files above
A state is written into a hidden folder, flushed, and renamed.  Data and noise are functions of (seed, step), so the
step is all there is to say about them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from wanloom.durable import sha256_file, write_atomic
from wanloom.errors import InputError
from wanloom.train.ranks import Ranks

KEPT = 2


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], digest: str, ranks: Ranks, seconds: float) -> None:
    """Write state `step`; when this returns on rank 0 the state is durable and older ones than two are gone."""
    part, final = folder / f".step_{step:08d}.part", folder / f"step_{step:08d}"
    if ranks.first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    ranks.barrier()
    file = part / f"rank{ranks.rank}.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    _sync(file)
    ranks.barrier()
    if not ranks.first:
        return
    hashes = {f"rank{r}.safetensors": sha256_file(part / f"rank{r}.safetensors") for r in range(ranks.size)}
    about = {"step": step, "recipe": digest, "processes": ranks.size, "seconds": round(seconds, 1), "sha256": hashes}
    write_atomic(part / "state.json", json.dumps(about, indent=1).encode())
    if final.exists():  # a state that failed its check and was written again
        shutil.rmtree(final)
    part.rename(final)
    _sync(folder)
    for old in sorted(folder.glob("step_*"))[:-KEPT]:
        shutil.rmtree(old)


def _about(state: Path) -> dict[str, object] | None:
    """What `state.json` says when every file of the state is as it was written, else None."""
    try:
        about: dict[str, object] = json.loads((state / "state.json").read_text())
        hashes = about["sha256"]
        assert isinstance(hashes, dict)
        intact = all(sha256_file(state / name) == sha for name, sha in hashes.items())
    except (OSError, ValueError, KeyError, AssertionError):
        return None
    return about if intact else None


def find_state(folder: Path, digest: str, ranks: Ranks) -> tuple[int, float, Path] | None:
    """The newest intact state: (step, seconds trained so far, folder). Damaged ones are named and passed over."""
    for state in sorted(folder.glob("step_*"), reverse=True):
        about = _about(state)
        if about is None:
            if ranks.first:
                print(f"{state.name} is damaged; going back to the one before", flush=True)
            continue
        if about["recipe"] != digest or about["processes"] != ranks.size:
            raise InputError(
                "E2020",
                f"{folder} holds the state of another recipe (digest {about['recipe']}, {about['processes']} "
                f"processes; this one: {digest}, {ranks.size}). Change the recipe's name, or move the folder away.",
            )
        return int(str(about["step"])), float(str(about["seconds"])), state
    return None


def load_tensors(state: Path, ranks: Ranks) -> dict[str, Tensor]:
    return load_file(state / f"rank{ranks.rank}.safetensors")
