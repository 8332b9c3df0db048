"""The command `wanloom`: what a person types becomes a Request, an answer, or one line saying what to mend.

    wanloom demo                                     a video in seconds, nothing to download
    wanloom generate --task t2v-A14B --ckpt-dir DIR --prompt "..."
    wanloom plan | doctor | models | inspect | convert | calibrate | preprocess | train

Nothing heavy is imported here: a command's module is loaded when the command is typed, torch when there is work for it.
Exit codes: 0 ok, 2 usage, 3 input media, 4 model file, 5 resources, 6 numerical, 7 interrupted but resumable,
8 environment, 70 a bug of ours, 130 stopped at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from wanloom.cli.console import one_line_warnings, report_error
from wanloom.errors import InputError, WanloomError, did_you_mean

# Name -> (module of this package that holds `command`, what the overview says).
COMMANDS = {
    "demo": ("demo", "Make a video with the model that ships inside: no download, no GPU."),
    "generate": ("generate", "Make a video from a prompt, and an image where the task takes one."),
    "plan": ("plan", "What a run would need, what this machine has, and whether it fits."),
    "doctor": ("doctor", "What is installed and what this machine can do."),
    "models": ("models", "The models there are, where to get them, how large they are."),
    "inspect": ("inspect", "Say what a checkpoint file or directory is."),
    "convert": ("convert", "Write a checkpoint in another layout or number format."),
    "calibrate": ("calibrate", "Measure a model for the step caches that need it."),
    "preprocess": ("preprocess", "Make a model's inputs from raw videos and pictures."),
    "train": ("train", "Train a model from a recipe file."),
}

UNUSABLE = "E2022"  # unknown, shortened or repeated options; words that fit nowhere


class Overview(click.Group):
    """The group of all commands; a command's module is imported only when it is typed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"wanloom.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0].startswith("-"):
            raise click.NoSuchOption(args[0], ctx=ctx)
        if args[0] not in COMMANDS:
            raise InputError(UNUSABLE, f"'{args[0]}' is not a command. {did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    """`wanloom --version`."""
    if not wanted or ctx.resilient_parsing:
        return
    from wanloom import __version__

    print(f"wanloom {__version__}")
    ctx.exit(0)


@click.group(
    cls=Overview,
    invoke_without_command=True,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
    epilog="`wanloom COMMAND --help` says more. Every command takes --debug, which shows where an error came from.",
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=print_version, help="Say which.")
@click.pass_context
def wanloom(ctx: click.Context) -> None:
    """Videos from prompts and images with the Wan family of open models.

    Start with `wanloom demo`.
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit code. Whatever goes wrong becomes one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    try:
        with one_line_warnings(debug=debug):
            outcome = wanloom.main(args=arguments, prog_name="wanloom", standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except WanloomError as problem:
        return _fail(str(problem), problem.exit_code, debug)
    except click.UsageError as problem:
        return _fail(f"error[{UNUSABLE}]: {_usage(problem)}", 2, debug)
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _fail("stopped.", 130, debug)
    except BrokenPipeError:  # `wanloom models | head`: the reader has left, which is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as bug:  # the last line of defence: what nobody can mend but us is said in one line, too
        words = f"{type(bug).__name__}: {bug}".splitlines()[0]
        return _fail(f"internal error: {words}. This is a bug; the same command with --debug shows where.", 70, debug)


def _fail(line: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    report_error(line)
    return code


def _usage(problem: click.UsageError) -> str:
    """What is wrong with an option, in our words, with the nearest option that exists."""
    command = problem.ctx.command if problem.ctx else wanloom
    place = problem.ctx.command_path if problem.ctx else "wanloom"
    if isinstance(problem, click.NoSuchOption):
        names = [name for option in command.params for name in option.opts if name.startswith("--")]
        guess = did_you_mean(problem.option_name, names).partition("There are:")[0]
        return f"{problem.option_name} is not an option of `{place}`. {guess}`{place} --help` lists them."
    if isinstance(problem, click.BadOptionUsage):
        return f"{problem.option_name}: {problem.message}"
    return f"{problem.format_message().rstrip('.')}. See `{place} --help`."
