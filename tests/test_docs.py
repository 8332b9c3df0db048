"""The documentation is run: every command, every Python block, every quoted piece of code, every table of numbers.

What the first words behind a fence mean:

    ```sh                     each line is run, in a folder of the document's own; exit 0 (of `plan` also 5: too large)
    ```sh exit=2              the last line ends with this exit code
    ```sh needs-checkpoint    as sh, with small random checkpoints in place of what `hf download` would fetch, and
                              `--dry-run` added to `generate`; of `preprocess` only the options are read
    ```python                 run; the blocks of a document share their names
    ```python src/...py       a quotation: each piece between lines of `...` stands in that file
    ```toml NAME              written to the file NAME and read as a recipe
    ```tree                   the files of the package, see `test_the_tree_in_the_readme_is_the_package`
    ```text                   only to be read

Commands that install or fetch (make, pip, git, hf, source) are not run; their targets and names are checked.
Where the demo models are absent, small random ones of the same form stand in, and their clips are short.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import textwrap
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from command_line import run_here
from wanloom import budget, demo
from wanloom.checkpoint.lora import RELIGHTING
from wanloom.media import save_video
from wanloom.plan import make_plan
from wanloom.request import Request
from wanloom.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "wanloom"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
STAND_IN = {"demo-t2v": "t2v-A14B", "demo-i2v": "i2v-A14B", "demo-ti2v": "ti2v-5B"}
STEPS, FRAMES = 3, 9  # of a clip whose command says neither: the documents show commands, not long videos

FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block: the words behind the fence, the text, its line in the document."""

    info: tuple[str, ...]
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [
        Block(tuple(found[1].split()) or ("",), found[2], text.count("\n", 0, found.start()) + 2)
        for found in FENCE.finditer(text)
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command: lines ending in a backslash go on, comments do not count."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


# ---------------------------------------------------------------- a place to run in


@pytest.fixture(scope="module")
def demo_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo models: the package's own where they are there, stand-ins for the others."""
    folder = tmp_path_factory.mktemp("models")
    for name, published in STAND_IN.items():
        if name in demo.available():
            (folder / name).symlink_to(demo.path_of(name))
        else:
            tiny.checkpoint(folder, published, pickles=False).rename(folder / name)
    return folder


@pytest.fixture
def place(demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the recipes in it, the demo models in their place, short clips by default."""
    monkeypatch.setattr(demo, "MODELS", demo_models)
    for name in STAND_IN:
        row = VARIANTS[name]
        monkeypatch.setitem(VARIANTS, name, replace(row, defaults=replace(row.defaults, steps=STEPS, frames=FRAMES)))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("wanloom.runtime.machine.gpus", tuple)  # the text of a page, not this machine's
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def _sound(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(32_000))


def _video(path: Path) -> None:
    save_video(path, np.full((5, 64, 64, 3), 200, np.uint8), fps=16)


def _folder(path: Path) -> None:
    """As `wanloom preprocess animate --replace` leaves it."""
    path.mkdir()
    tiny.picture(path / "src_ref.png")
    for name in ("pose", "face", "bg", "mask"):
        _video(path / f"src_{name}.mp4")


# What a document names and does not make: option -> how it comes to be.
GIVEN: dict[str, Callable[[Path], Any]] = {
    "--image": tiny.picture, "--last-image": tiny.picture, "--audio": _sound, "--src-root-path": _folder,
    "--pose-video": _video, "--face-video": _video,
}  # fmt: skip


class Shell:
    """Runs the lines of the documents; see the module for what is run and what is only checked."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *, stand_in: bool) -> None:
        self._capsys, self._stand_in = capsys, stand_in

    def run(self, words: list[str]) -> int:
        program, *rest = words
        run = {
            "wanloom": self._wanloom,
            "make": _check_make,
            "hf": self._fetch,
            "python": _check_script,
            "pip": _check_nothing,
            "git": _check_nothing,
            "source": _check_nothing,
        }[program]
        return run(rest)

    def _wanloom(self, words: list[str]) -> int:
        if words[:1] == ["generate"] and self._stand_in:
            words = [*words, "--dry-run"]
            for option, make in GIVEN.items():
                if option in words and not (place := Path(words[words.index(option) + 1])).exists():
                    make(place)
        if words[:2] == ["preprocess", "animate"] and self._stand_in:
            from wanloom.cli.preprocess import animate

            animate.make_context("animate", words[2:])  # the options are read; networks and videos are not here
            return 0
        if words[:1] == ["train"] and not Path(words[1]).resolve().is_relative_to(Path.cwd().resolve()):
            return self._check_recipe(Path(words[1]))
        ran = run_here(self._capsys, *words)
        if ran.code:
            print(ran.err)
        return 0 if words[0] == "plan" and ran.code == 5 else ran.code

    def _check_recipe(self, path: Path) -> int:
        """The recipes of the repository take hours: they are read, not run."""
        from wanloom.train.recipe import read_recipe

        return 0 if read_recipe(path).name == path.stem else 1

    def _fetch(self, words: list[str]) -> int:
        """`hf download REPOSITORY --local-dir FOLDER`: a small checkpoint of that model."""
        assert words[0] == "download" and words[2] == "--local-dir", f"not known here: hf {' '.join(words)}"
        name = next(row.name for row in VARIANTS.values() if words[1] in row.repos)
        folder = Path(words[3])
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            tiny.checkpoint(folder.parent, name).rename(folder)
            if name == "animate-14B":
                layer = "blocks.0.self_attn.q"
                halves = {f"{layer}.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}
                torch.save({"state_dict": halves}, folder / RELIGHTING)
        return 0


def _check_make(words: list[str]) -> int:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) [?:]?=", makefile, re.MULTILINE))
    for word in words:
        name, is_value, _ = word.partition("=")
        assert name in (variables if is_value else targets), f"make has no {word}"
    return 0


def _check_script(words: list[str]) -> int:
    assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
    return 0


def _check_nothing(words: list[str]) -> int:
    return 0


# ---------------------------------------------------------------- commands and code


@pytest.mark.filterwarnings("ignore::wanloom.errors.WanloomWarning")
@pytest.mark.parametrize("document", DOCUMENTS, ids=label)
def test_every_command_and_every_python_block_runs(
    document: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": "docs"}
    for block in blocks(document):
        kind, *rest = block.info
        where = f"{label(document)}:{block.line}"
        if kind == "sh":
            expected = next((int(word[5:]) for word in rest if word.startswith("exit=")), 0)
            shell = Shell(capsys, stand_in="needs-checkpoint" in rest)
            codes = {" ".join(words): shell.run(words) for words in commands(block.text)}
            *others, (last, code) = codes.items()
            assert not [line for line, other in others if other], where
            assert code == expected, f"{where}: {last}"
        elif kind == "python" and not rest:
            exec(compile("\n" * (block.line - 1) + block.text, label(document), "exec"), names)
        elif kind == "toml":
            from wanloom.train.recipe import read_recipe

            Path(rest[0]).write_text(block.text, encoding="utf-8")
            read_recipe(rest[0])
        else:
            assert kind in ("python", "tree", "text"), f"{where}: a block that is neither run nor marked as text"


QUOTATIONS = [
    pytest.param(block.text, ROOT / block.info[1], id=f"{label(document)}:{block.line}")
    for document in DOCUMENTS
    for block in blocks(document)
    if block.info[0] == "python" and len(block.info) == 2
]


@pytest.mark.parametrize(("quoted", "file"), QUOTATIONS)
def test_quoted_code_is_the_code(quoted: str, file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    for piece in re.split(r"^ *\.\.\.\n", quoted, flags=re.MULTILINE):
        wanted = textwrap.dedent(piece).strip("\n").splitlines()
        places = (lines[at : at + len(wanted)] for at in range(len(lines)))
        assert any(textwrap.dedent("\n".join(place)).splitlines() == wanted for place in places), piece


@pytest.mark.filterwarnings("ignore::wanloom.errors.WanloomWarning")
def test_the_picture_of_the_readme_can_be_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    spec = importlib.util.spec_from_file_location("readme_picture", ROOT / "tools" / "readme_picture.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "ROWS", 1)
    monkeypatch.setattr(tool, "COLUMNS", 2)
    monkeypatch.setattr("sys.argv", ["readme_picture.py", "picture.gif"])
    assert tool.main() == 0
    with Image.open("picture.gif") as picture:
        assert picture.n_frames >= FRAMES


# ---------------------------------------------------------------- tables and lists


def test_the_tree_in_the_readme_is_the_package() -> None:
    (tree,) = [block.text for block in blocks(ROOT / "README.md") if block.info[0] == "tree"]
    first, *lines = tree.splitlines()
    assert first == "src/wanloom/"
    listed, folders = [], [""]
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, about = line.strip().partition(" ")
        assert about.strip(), f"{name} has no line of its own"
        folders = folders[:depth]
        listed.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    # The line of a folder stands for its __init__.py, too.
    files = [path.relative_to(SOURCE) for path in SOURCE.rglob("*.py")]
    inside = [path for path in files if path.name != "__init__.py" or path.parent == Path()]
    rooms = {f"{folder.as_posix()}/" for path in inside for folder in path.parents if folder != Path()}
    assert len(listed) == len(set(listed))
    assert set(listed) ^ {*(path.as_posix() for path in inside), *rooms} == set()


def test_the_readmes_table_of_machines_is_what_plan_computes() -> None:
    rows = re.findall(r"^\| `([\w.-]+)` \|(.*)\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name, _ in rows} == {row.name for row in VARIANTS.values() if not row.demo}
    for name, rest in rows:
        row = VARIANTS[name]
        cells = [cell.strip() for cell in rest.split("|")]
        smaller = (832, 480) if (832, 480) in row.sizes else None
        width, height = row.defaults.size
        small = need(name, smaller, gpu=True).gpu if smaller else None
        assert cells[2:] == [
            gigabytes(sum(file.bytes for file in row.files)),
            f"{gigabytes(need(name, None, gpu=True).gpu)} ({width}x{height})",
            "-" if small is None else gigabytes(small),
            gigabytes(need(name, smaller, gpu=False).host),
        ]


def need(name: str, size: tuple[int, int] | None, *, gpu: bool) -> budget.Need:
    plan = make_plan(Request(task=name, size=size), VARIANTS[name], draft=True)
    return budget.need(plan, VARIANTS[name], "bfloat16", on_gpu=gpu)


def gigabytes(count: int) -> str:
    from wanloom.cli.console import bytes_text

    return bytes_text(count)


@cache
def codes_of_the_source() -> set[str]:
    """Every error and warning code that the package's code (not its prose) names."""
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                match = re.match(r"([EW]\d{4})(:|$)", node.value)
                if match:
                    found.add(match[1])
    return found


def test_every_code_is_explained_and_no_other() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| ([EW]\d{4}) \| .+ \| .+ \|$", text, re.MULTILINE)
    assert len(explained) == len(set(explained))
    assert set(explained) ^ codes_of_the_source() == set()


def test_codes_stand_under_their_exit_code() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    for section in sections:
        exit_code = re.match(r"Exit (\d)", section)
        for code in re.findall(r"^\| E(\d)\d{3} ", section, re.MULTILINE):
            assert exit_code and code == exit_code[1], section.splitlines()[0]


def test_every_exit_code_is_explained() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    named = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert named == {0, 70, 130} | {int(code[1]) for code in codes_of_the_source() if code[0] == "E"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=label)
def test_links_lead_somewhere(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" in target:
            continue
        assert (document.parent / target).exists(), target


def test_the_rooms_of_the_architecture_are_the_floors() -> None:
    from test_floors import FLOORS

    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = {
        int(level): set(re.findall(r"`(\w+)`", rooms))
        for level, rooms in re.findall(r"^\| (\d) \| (.*?) \|", text, re.MULTILINE)
    }
    there = {path.name.removesuffix(".py") for path in SOURCE.iterdir() if not path.name.startswith("__pycache__")}
    assert table == {level: set(rooms) & there for level, rooms in enumerate(FLOORS)}


def test_the_vocabulary_in_the_training_page_is_the_worlds() -> None:
    from wanloom.demo import world

    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name, words in (
        ("shapes", world.SHAPES), ("colours", world.COLOURS), ("backgrounds", world.BACKGROUNDS),
        ("motions", world.MOTIONS),
    ):  # fmt: skip
        line = re.search(rf"^\| {name} \| (.*?) \|", text, re.MULTILINE)
        assert line and re.findall(r"`(\w+)`", line[1]) == list(words), name
    every = re.search(r"^All words: (.*?)\.$", text, re.MULTILINE | re.DOTALL)
    assert every and every[1].split() == [word for word in world.VOCABULARY if word.isalpha()]


def test_the_demo_models_and_recipes_in_the_training_page_are_those_there_are() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(demo-\w+)` \| .* \| (\d+)x(\d+), (\d+) frames \|$", text, re.MULTILINE)
    demos = [row for row in VARIANTS.values() if row.demo]
    assert rows == [(row.name, *map(str, row.defaults.size), str(row.defaults.frames)) for row in demos]
    named = set(re.findall(r"^wanloom train recipes/(.*)\.toml$", text, re.MULTILINE))
    assert named == {path.stem for path in (ROOT / "recipes").glob("*.toml")}


def test_the_floors_in_the_training_page_are_those_of_the_card() -> None:
    from wanloom.train.card import FLOORS_ALL, FLOORS_IMAGE, FLOORS_TEXT

    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    assert {name: (float(least), float(aim)) for name, least, aim in rows} == {
        **FLOORS_ALL, **FLOORS_TEXT, **FLOORS_IMAGE
    }  # fmt: skip
