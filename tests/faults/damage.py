"""Damaged checkpoints by the hundred: what is refused, what is accepted, and whether that was right.

    damage_run(500, "truncate")     a file cut anywhere: never accepted
    damage_run(500, "mutate")       bytes or values of a header changed: refused, or the same tensors come out
    damage_run(500, "mutate", manifest=True)    with recorded hashes nothing changed is accepted

It runs in a process of its own with a memory limit, so that a signal, a traceback or a large allocation is seen.
"""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
MEMORY = 512 * 2**20  # bytes that the child may take beyond what it has when it begins
GROWTH = 48 * 2**20  # bytes of memory in use that a run on files of at most 1 MB may add


def damage_run(count: int, how: str, *, manifest: bool = False, seed: int = 0) -> dict[str, int]:
    """Outcome -> how often: "accepted", "same" or an error code.  AssertionError for anything that must not happen."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(HERE), folder, str(count), how, str(int(manifest)), str(seed)]
        path = f"{ROOT / 'src'}:{ROOT / 'tests'}"
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-4000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.pop("grown") <= GROWTH
    outcome: dict[str, int] = result
    assert sum(outcome.values()) == count
    return outcome


def cut(raw: bytes, chance: random.Random) -> bytes:
    """The file up to anywhere: often in its header, at the borders, or a byte before its end."""
    header = 8 + int.from_bytes(raw[:8], "little") if raw[:2] != b"PK" else len(raw) // 2
    end = chance.choice(
        [chance.randrange(len(raw)), chance.randrange(min(header, len(raw))), header, header - 1, 8, 7, 0, len(raw) - 1]
    )
    return raw[: min(end, len(raw) - 1)]


def mutate(raw: bytes, chance: random.Random) -> bytes:
    """The file with its header changed in one of many ways."""
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    way = chance.choice(WAYS)
    if way == "length":
        return (length ^ (1 << chance.randrange(64))).to_bytes(8, "little") + header + data
    if way in ("bytes", "digits"):
        places = [i for i, byte in enumerate(header) if way == "bytes" or chr(byte).isdigit()]
        changed = bytearray(header)
        for _ in range(chance.choice((1, 1, 2, 5))):
            place = chance.choice(places)
            changed[place] = chance.choice(b"0123456789") if way == "digits" else chance.randrange(256)
        return raw[:8] + bytes(changed) + data
    if way == "cut text":
        at, much = chance.randrange(length), chance.randrange(1, 40)
        changed = bytearray(header[:at] + header[at + much :] + b" " * much)[:length]
        return raw[:8] + bytes(changed).ljust(length) + data
    table = json.loads(header)
    edit(table, way, chance)
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


WAYS = (
    "length", "bytes", "bytes", "digits", "digits", "cut text", "drop", "rename", "dtype", "shape", "offsets", "field",
    "type", "note", "copy",
)  # fmt: skip


def edit(table: dict[str, object], way: str, chance: random.Random) -> None:
    """One change of the header's values."""
    names = [name for name in table if name != "__metadata__"]
    name = chance.choice(names)
    entry = table[name]
    assert isinstance(entry, dict)
    if way == "drop":
        del table[name]
    elif way == "rename":
        table[chance.choice([name + "x", "", name.upper(), "a" * 300, name.replace("0", "7") + "_", "\0"])] = table.pop(
            name
        )
    elif way == "dtype":
        # A format of the same width with other values is not told by any header: F16 and BF16 are not exchanged here.
        entry["dtype"] = chance.choice(["I32", "U32", "F64", "F33", "", None, 7, ["F32"], "I8", "BOOL"])
    elif way == "shape":
        shape = list(entry["shape"])
        entry["shape"] = chance.choice(
            [
                [*shape, 1],
                shape[1:],
                [*shape, 2**40],
                [-1, *shape],
                "x",
                None,
                [2**62] * 3,
                [float(n) for n in shape],
                [1, *shape],
            ]
        )
    elif way == "offsets":
        start, end = entry["data_offsets"]
        by = chance.choice([1, 4, 16, 2**20, 2**63])
        entry["data_offsets"] = chance.choice(
            [[start + by, end + by], [start, end + by], [end, start], [start], None, [0, 0]]
        )
    elif way == "field":
        entry.pop(chance.choice(list(entry)))
    elif way == "type":
        table[name] = chance.choice([None, 1, "x", [], {}])
    elif way == "note":
        table["__metadata__"] = chance.choice(
            [{"a": 1}, [], "x", None, {"a": "b"}, {"wanloom.config": "{"}, {"wanloom.config": "[]"}]
        )
    elif way == "copy":
        table[name + ".copy"] = dict(entry)


def main(folder: Path, count: int, how: str, recorded: bool, seed: int) -> dict[str, int]:
    """Damage, survey, load, compare; in the child."""
    import torch

    import tiny
    from wanloom.checkpoint import manifest
    from wanloom.checkpoint.find import resolve
    from wanloom.checkpoint.load import load_into, survey
    from wanloom.errors import InputError
    from wanloom.models.dit import DiT
    from wanloom.models.vae import CausalVae
    from wanloom.variants import VARIANTS

    def load(root: Path) -> dict[str, torch.Tensor]:
        """All tensors of transformer and VAE, as a run would get them."""
        files = resolve(variant, ckpt_dir=root)
        found = survey(variant, files)
        with torch.device("meta"):
            modules = {"dit": DiT(found.dit), "vae": CausalVae(found.vae)}
        load_into(modules["dit"], files.experts["model"])
        load_into(modules["vae"], files.vae)
        return {f"{part}.{n}": v for part, module in modules.items() for n, v in module.state_dict().items()}

    warnings.simplefilter("ignore")
    variant = VARIANTS["t2v-1.3B"]
    whole = tiny.checkpoint(folder / "whole", variant.name, pickles=False)
    (whole / "Wan2.1_VAE.safetensors").rename(folder / "vae.safetensors")
    torch.save(torch_file(folder / "vae.safetensors"), whole / "Wan2.1_VAE.pth")
    expected = load(whole)
    targets = [whole / "diffusion_pytorch_model.safetensors", whole / "models_t5_umt5-xxl-enc-bf16.safetensors"]
    if how == "truncate":
        targets += [whole / "Wan2.1_VAE.pth", whole / "config.json"]
    if recorded:
        manifest.write(whole, targets)
    limit_memory()
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        target = chance.choice(targets)
        good = target.read_bytes()
        bad = cut(good, chance) if how == "truncate" else mutate(good, chance)
        target.write_bytes(bad)
        try:
            found = load(whole)
        except InputError as error:
            assert error.exit_code == 4, error
            assert target.name in error.message or target.stem in error.message, f"{target.name} is not named: {error}"
            assert not re.search(r"\n|Traceback|0x[0-9a-f]{6,}", error.message), error
            outcomes[error.code] += 1
        else:
            same = found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
            outcomes["unchanged" if bad == good else "same" if same else "accepted"] += 1
        target.write_bytes(good)
    shutil.rmtree(folder / "whole")
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {**outcomes, "grown": grown}


def torch_file(path: Path) -> dict[str, object]:
    from safetensors.torch import load_file

    return dict(load_file(path))


def limit_memory() -> None:
    """No more address space than now and a bit: a large allocation then fails with a traceback."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    place, number, kind, hashed, start = sys.argv[1:]
    print(json.dumps(main(Path(place), int(number), kind, bool(int(hashed)), int(start))))
