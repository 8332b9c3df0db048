"""The command line as a whole: what it refuses, how it speaks, what it does not import."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import warnings

import pytest

from command_line import ENVIRONMENT
from wanloom import cli
from wanloom.cli import console
from wanloom.cli.console import bytes_text, count_text, time_text, warning_line
from wanloom.errors import WanloomWarning

HEAVY = ("torch", "transformers", "numpy", "av", "PIL", "diffusers")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["doctr"], "'doctr' is not a command. Did you mean 'doctor'?"),
        (["doctor", "--jsn"], "--jsn is not an option of `wanloom doctor`. Did you mean '--json'?"),
        (["plan", "--frame", "81"], "--frame is not an option"),
        (["--verson"], "--verson is not an option of `wanloom`. Did you mean '--version'?"),
        (["doctor", "--json", "--json"], "--json: given 2 times"),
        (["plan", "--frames", "81", "--frame_num", "85"], "--frames: given 2 times"),
        (["plan", "--frames"], "--frames"),
        (["doctor", "x"], "unexpected extra argument (x)"),
    ],
)
def test_words_that_fit_nowhere_exit_2_with_one_line(run, words, said):
    ran = run(*words)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("error[E2022]: ")
    assert said in ran.err
    assert ran.err.count("\n") == 1


def test_without_words_the_overview_is_shown(run):
    ran = run()
    assert ran.code == 0
    assert all(name in ran.out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_of_its_own(run, name):
    ran = run(name, "--help")
    assert ran.code == 0
    assert f"Usage: wanloom {name}" in ran.out


def test_a_bug_is_one_line_and_exit_70(run, monkeypatch):
    def broken() -> dict[str, object]:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("wanloom.cli.doctor.examine", broken)
    ran = run("doctor")
    assert ran.code == 70
    assert ran.err == (
        "internal error: RuntimeError: first line. This is a bug; the same command with --debug shows where.\n"
    )


def test_debug_shows_where_an_error_came_from(run):
    ran = run("plan", "nothing", "--debug")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("error[E2002]")


def test_a_stop_is_exit_130(run, monkeypatch):
    def stopped() -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr("wanloom.cli.doctor.examine", stopped)
    assert run("doctor").code == 130


def test_control_characters_of_the_input_do_not_reach_the_terminal(run):
    ran = run("plan", "\x1b[31mred\nline")
    assert ran.err.count("\n") == 1
    assert "\x1b" not in ran.err


def test_a_warning_is_one_line_said_once(capsys):
    with console.one_line_warnings(debug=False):
        warnings.simplefilter("always")
        for _ in range(2):
            warnings.warn(WanloomWarning("W4018: experts of unknown origin"), stacklevel=1)
        warnings.warn("a library's own remark", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning[W4018]: experts of unknown origin\n"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("W4018: a", "warning[W4018]: a"),
        ("[W4018]: a", "warning[W4018]: a"),
        ("warning[W4018]: a", "warning[W4018]: a"),
        ("a", "warning: a"),
    ],
)
def test_warnings_have_one_form(given, line):
    assert warning_line(given) == line


def test_numbers_are_said_in_words_people_read():
    assert [bytes_text(n) for n in (0, 999, 1234, 57.2e9, 126e9)] == ["0 B", "999 B", "1.2 kB", "57.2 GB", "126 GB"]
    assert [time_text(s) for s in (0.26, 12.4, 75, 4000)] == ["0.3 s", "12 s", "1 m 15 s", "1 h 06 m"]
    assert count_text(3.21e15) == "3.21 P"


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["plan"], ["doctor"], ["models"]])
def test_quick_commands_are_quick_and_import_nothing_heavy(words, tmp_path):
    code = (
        "import sys; from wanloom.cli import main; code = main(sys.argv[1:]); "
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    seconds = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.stderr.splitlines()[-1] == "[]"
    # 0.5 s is promised where nothing else runs; the tests share their machine, so the processor's own time counts.
    assert statistics.median(seconds) < 0.5


def test_checks_do_not_vanish_under_dash_o(process, tmp_path):
    code = "from wanloom.cli import main; raise SystemExit(main(['plan', '--frames', '82']))"
    done = subprocess.run(
        [sys.executable, "-O", "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    plain = process("plan", "--frames", "82")
    assert (done.returncode, done.stderr) == (plain.code, plain.err)
    assert plain.code == 2


def test_version_is_that_of_the_package(process):
    import wanloom

    assert process("--version").out == f"wanloom {wanloom.__version__}\n"


def test_json_answers_are_json(run):
    for words in (["plan", "--json"], ["models", "--json"], ["models", "ti2v-5B", "--json"], ["doctor", "--json"]):
        assert json.loads(run(*words).out)
