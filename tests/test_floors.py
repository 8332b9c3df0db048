"""The floors and the five nevers of docs/architecture.md, read from the source by `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "wanloom"

FLOORS = (
    ("errors", "durable", "store", "pulse"),
    ("models", "sampling", "request"),
    (
        "variants",
        "budget",
        "vae_cost",
        "shares",
        "rates",
        "estimate",
        "placement",
        "records",
        "encoders",
        "runtime",
        "checkpoint",
        "media",
        "demo",
    ),
    ("clips", "sizes", "plan", "inputs", "speaking", "parts", "together", "jobs", "prompts", "preview", "preprocess"),
    ("conditioning", "results", "outputs", "work", "shortcuts", "ladder"),
    ("pipeline",),
    ("calibrate", "train", "server"),
    ("cli", "__init__", "__main__"),
)
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

HEAVY = ("torch", "transformers", "av", "PIL", "numpy")
STDLIB = set(sys.stdlib_module_names)

# Identifiers that belong to machines and files. Words in strings and comments do not count.
MACHINES = {"device", "cuda", "cpu", "rank", "ranks", "world_size", "distributed", "pin_memory", "empty_cache"}
FILES = {"open", "Path", "environ", "argv", "getenv", "load_file", "save_file"}
CACHES = {"lru_cache", "cache", "cached_property"}

FILES_OF_PACKAGE = sorted(path for path in ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    """`models` for models/dit.py, `plan` for plan.py."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Dotted names of the modules a file imports, `from a import b` as a and a.b; lazily or at the top."""
    tree = tree_of(path)
    here = ("wanloom", *path.relative_to(ROOT).parts[:-1])
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join((*package, *([node.module] if node.module else [])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("wanloom.")}
    return rooms & set(FLOOR)


def names_in(path: Path) -> set[str]:
    """Every identifier of a file: variables, attributes, arguments, keywords, imported names."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                names |= {value, *value.split(".")}
    return names


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def in_room(*rooms: str) -> list[Path]:
    return [path for path in FILES_OF_PACKAGE if room_of(path) in rooms]


@pytest.mark.parametrize("path", FILES_OF_PACKAGE, ids=label)
def test_imports_only_go_down(path: Path) -> None:
    assert room_of(path) in FLOOR, f"{label(path)} has no floor: name it in FLOORS and in docs/architecture.md"
    upwards = {room for room in rooms_imported(path) if FLOOR[room] > FLOOR[room_of(path)]}
    assert not upwards


def test_rooms_of_one_floor_do_not_import_each_other_in_a_circle() -> None:
    edges = {room: set[str]() for room in FLOOR}
    for path in FILES_OF_PACKAGE:
        edges[room_of(path)] |= rooms_imported(path) - {room_of(path)}
    done: set[str] = set()
    while ready := {room for room in edges if room not in done and edges[room] <= done}:
        done |= ready
    assert not set(edges) - done, "these rooms import each other in a circle"


@pytest.mark.parametrize("path", in_room("models"), ids=label)
def test_models_never_name_a_device_rank_file_flag_or_cache(path: Path) -> None:
    found = names_in(path) & (MACHINES | FILES | CACHES)
    assert not found


@pytest.mark.parametrize("path", in_room("sampling"), ids=label)
def test_sampling_never_imports_models(path: Path) -> None:
    assert "models" not in rooms_imported(path)


@pytest.mark.parametrize("path", in_room("runtime"), ids=label)
def test_runtime_never_names_a_variant(path: Path) -> None:
    from wanloom.variants import VARIANTS

    assert not rooms_imported(path) & {"variants", "plan"}
    words = {node.value for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant)}
    assert not words & set(VARIANTS)


@pytest.mark.parametrize("path", in_room("conditioning"), ids=label)
def test_conditioning_never_names_a_device(path: Path) -> None:
    found = names_in(path) & MACHINES
    assert not found


@pytest.mark.parametrize("path", in_room("cli", "server"), ids=label)
def test_cli_and_server_never_touch_a_tensor(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "numpy"}


@pytest.mark.parametrize("path", in_room("models", "sampling"), ids=label)
def test_models_and_sampling_import_only_torch(path: Path) -> None:
    outside = {name.split(".")[0] for name in imported(path)} - STDLIB
    assert outside <= {"torch", "wanloom"}


@pytest.mark.parametrize("path", in_room("runtime"), ids=label)
def test_runtime_needs_no_more_than_torch_at_the_top(path: Path) -> None:
    at_top = {name.split(".")[0] for name in imported(path, top_only=True)} - STDLIB
    anywhere = {name.split(".")[0] for name in imported(path)} - STDLIB
    for_triton = path.name.startswith("triton_")  # kernels cannot be written without it; see below
    assert at_top <= {"torch", "wanloom"} | ({"triton"} if for_triton else set())
    assert for_triton or not any(".triton_" in name for name in imported(path, top_only=True))
    assert anywhere <= {"torch", "wanloom", "numpy", "safetensors", "triton", "flash_attn", "sageattention"}


@pytest.mark.parametrize(
    "statement",
    [
        "import wanloom",
        "import wanloom.plan, wanloom.clips, wanloom.variants, wanloom.budget, wanloom.request, wanloom.cli",
        "import wanloom.models.config, wanloom.sampling.schedule, wanloom.errors, wanloom.durable",
    ],
)
def test_planning_and_help_load_nothing_heavy(statement: str) -> None:
    program = f"import sys; {statement}; print(*({set(HEAVY)!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("path", FILES_OF_PACKAGE, ids=label)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text, tree = path.read_text(encoding="utf-8"), tree_of(path)
    assert len(text.splitlines()) <= 700
    if text.strip() and path.name != "__init__.py":
        assert ast.get_docstring(tree), "a module opens with what a newcomer would want to know"
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 80]
    assert not long


@pytest.mark.parametrize("path", FILES_OF_PACKAGE, ids=label)
def test_nothing_unpickles_shells_out_or_swallows_errors(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
        if isinstance(node, ast.Call):
            keywords = {word.arg: word.value for word in node.keywords}
            shell = keywords.get("shell")
            assert not (isinstance(shell, ast.Constant) and shell.value is True), f"line {node.lineno}: shell=True"
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "torch.load":
                safe = keywords.get("weights_only")
                assert isinstance(safe, ast.Constant) and safe.value is True, f"line {node.lineno}: torch.load"
    assert not {"pickle", "marshal", "shelve", "dill"} & {name.split(".")[0] for name in imported(path)}


def test_the_floors_are_in_order() -> None:
    rooms = [room for rooms in FLOORS for room in rooms]
    assert len(rooms) == len(set(rooms))
    assert all(lower and upper for lower, upper in pairwise(FLOORS))
