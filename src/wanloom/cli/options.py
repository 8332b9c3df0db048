"""Options of the command line: made from the fields of `Request`, exact, each given once.

A field's first flag is the documented one; underscores and the official spellings are aliases. What a person typed
stays text here, and the field's own reader turns it into a value, so that an error has the field's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import click

from wanloom.errors import InputError
from wanloom.request import OPTIONS, UNAVAILABLE, Option, Request, check_unavailable, request_from_text

DEFAULT_TASK = "t2v-A14B"  # the official command's default
SECTIONS = {"video": "The video", "model": "The checkpoint", "run": "The run"}

WORDS = "wanloom.words"  # in click's context: what was typed behind the command's name

Function = TypeVar("Function", bound=Callable[..., Any])


class Command(click.Command):
    """A click command that refuses a single option given twice, and lists its options by section in `--help`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = list(args)
        order: list[click.Parameter] = self.make_parser(ctx).parse_args(args=list(args))[2]
        for option in order:
            if isinstance(option, click.Option) and order.count(option) > 1:
                name = next((flag for flag in option.opts if flag.startswith("--")), option.opts[0])
                raise InputError("E2022", f"{name}: given {order.count(option)} times, expected once.")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=26)


class RequestOption(click.Option):
    """One field of Request as an option; `--help` shows its documented name and the official alias."""

    def __init__(self, option: Option) -> None:
        self.section = SECTIONS[option.group]
        self.documented = option.flags[0]
        plain = option.flags[0].replace("-", "_")
        self.official = [flag for flag in option.flags if "_" in flag[2:] and flag.replace("-", "_") != plain]
        declared = [*option.flags, option.name]
        if option.switch:
            super().__init__(declared, is_flag=True, default=False, help=option.help)
        else:
            super().__init__(declared, type=str, default=None, metavar=option.metavar, help=option.help)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        name = self.documented if self.is_flag else f"{self.documented} {self.metavar}"
        alias = f" (= {', '.join(self.official)})" if self.official else ""
        return name, (self.help or "") + alias


def request_options(names: Iterable[str] | None = None) -> Callable[[Function], Function]:
    """A decorator that adds the options of all fields of Request, or of those named, and the refused official ones."""
    wanted = None if names is None else set(names)
    chosen = [option for option in OPTIONS if wanted is None or option.name in wanted]

    def decorate(function: Function) -> Function:
        made: list[click.Option] = [RequestOption(option) for option in chosen]
        parameters: list[click.Parameter] = getattr(function, "__click_params__", [])
        taken = {parameter.name for parameter in parameters}
        for refused in UNAVAILABLE:
            if _field_of(refused.flags[0]) in taken:  # this command has it
                continue
            extra: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if refused.switch else {}
            made.append(click.Option([*refused.flags, _field_of(refused.flags[0])], type=str, hidden=True, **extra))
        function.__click_params__ = [*reversed(made), *parameters]  # type: ignore[attr-defined]  # click's own list
        return function

    return decorate


def typed_values(params: Mapping[str, Any]) -> dict[str, str | bool]:
    """What was typed for fields of Request: name -> text, or True for a switch. Refuses what is not in this version."""
    for refused in UNAVAILABLE:
        value = params.get(_field_of(refused.flags[0]))
        if value is not None:
            check_unavailable(refused, value)
    names = {option.name for option in OPTIONS}
    return {name: value for name, value in params.items() if name in names and value not in (None, False)}


def read_request(params: Mapping[str, Any]) -> Request:
    """The Request that was typed. Errors: those of the fields' readers."""
    return request_from_text(typed_values(params))


def _field_of(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")
