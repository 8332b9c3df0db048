"""Whole runs, small: a run that is killed and started again gives the bits of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wanloom.errors import InputError
from wanloom.models.vae import CausalVae, init_for_training
from wanloom.train.ranks import Ranks
from wanloom.train.state import find_state, load_tensors, save_state
from wanloom.train.vae import write_vae
from wanloom.variants import VARIANTS

RECIPE = """
name = "{name}"
variant = "demo-t2v"
kind = "vae"
seed = 3
processes = {processes}
dtype = "bfloat16"
data = {{ clips = 2 }}
watch = {{ log = 1, loss = 100, sheet = 100, save = 2, prompts = 1 }}
[[phases]]
name = "only"
trains = ["vae"]
optim = {{ warmup = 2 }}
stages = [{{ steps = 6, batch = 1, frames = 1, crop = 16 }}, {{ steps = 4, batch = 1, frames = 5, crop = 16 }}]
"""
START = "import sys; from wanloom.train import run; run(sys.argv[1], sys.argv[2])"


def launch(recipe: Path, root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__':\n    {START}", str(recipe), str(root)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def kill_at(state: Path, recipe: Path, root: Path) -> None:
    """Start the recipe and kill its processes once `state` is written."""
    broken = launch(recipe, root)
    deadline = time.monotonic() + 120
    while not state.exists() and broken.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.communicate()
    assert not (state.parent / "average.safetensors").exists(), "the phase was over before the kill: it shows nothing"


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again_it_ends_with_the_same_bits(tmp_path: Path, processes: int) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text(RECIPE.format(name="run", processes=processes))
    finish(launch(recipe, tmp_path / "whole"))
    only = tmp_path / "broken" / "run" / "only"
    kill_at(only / "step_00000004", recipe, tmp_path / "broken")
    out = finish(launch(recipe, tmp_path / "broken"))
    assert "event resume" in out
    whole = load_file(tmp_path / "whole" / "run" / "only" / "average.safetensors")
    again = load_file(only / "average.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    names = sorted(p.name for p in (tmp_path / "broken" / "run" / "checkpoint").iterdir())
    assert names == ["Wan2.1_VAE.safetensors"]


FLOW = """
name = "flow"
variant = "demo-t2v"
kind = "flow"
seed = 4
processes = 2
vae = "{vae}"
data = {{ clips = 4, held_out = 2 }}
watch = {{ log = 1, loss = 100, sheet = 100, save = 2, prompts = 1, sampler_steps = 1 }}
[[phases]]
name = "shared"
optim = {{ muon_lr = 0.02, warmup = 1 }}
stages = [{{ steps = 2, batch = 2, frames = 1 }}, {{ steps = 2, batch = 2 }}]
[[phases]]
name = "high_noise_model"
init = "shared"
trains = ["dit"]
flow = {{ low = 0.875 }}
optim = {{ muon_lr = 0.006, warmup = 1 }}
stages = [{{ steps = 40, batch = 1 }}]
"""


def test_a_flow_run_killed_in_its_second_phase_ends_with_the_same_checkpoint(tmp_path: Path) -> None:
    vae = CausalVae(VARIANTS["demo-t2v"].vae)
    init_for_training(vae, torch.Generator().manual_seed(0))
    write_vae(vae, tmp_path / "vae")
    recipe = tmp_path / "flow.toml"
    recipe.write_text(FLOW.format(vae=tmp_path / "vae"))
    finish(launch(recipe, tmp_path / "whole"))
    kill_at(tmp_path / "broken" / "flow" / "high_noise_model" / "step_00000004", recipe, tmp_path / "broken")
    assert "event resume" in finish(launch(recipe, tmp_path / "broken"))
    whole, again = (tmp_path / root / "flow" / "checkpoint" for root in ("whole", "broken"))
    files = sorted(p.relative_to(whole) for p in whole.rglob("*.safetensors"))
    assert len(files) == 4  # two experts, text encoder, VAE
    assert all((whole / file).read_bytes() == (again / file).read_bytes() for file in files)


def test_a_damaged_newest_state_falls_back_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4, 6):
        save_state(tmp_path, step, {"a": torch.full((3,), float(step))}, "digest", Ranks(), 1.5 * step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004", "step_00000006"]
    file = tmp_path / "step_00000006" / "rank0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    found = find_state(tmp_path, "digest", Ranks())
    assert found is not None
    assert found[:2] == (4, 6.0)
    assert load_tensors(found[2], Ranks())["a"].tolist() == [4, 4, 4]
    assert "step_00000006 is damaged" in capsys.readouterr().out


def test_the_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, 2, {"a": torch.zeros(1)}, "one", Ranks(), 0.0)
    with pytest.raises(InputError, match="another recipe") as caught:
        find_state(tmp_path, "two", Ranks())
    assert caught.value.code == "E2020"
