"""Classes of commands and groups: short help, and settings (``-O KEY=VALUE``) for what is seldom typed.

A command takes its class from :func:`command`, with the table of its settings, and has a parameter
``settings: SettingsOpt``. ``-O help`` explains the settings. ``--KEY VALUE`` is accepted for each of them as
well: many were options before.
"""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from ..settings import Table, described

SettingsOpt = Annotated[
    list[str] | None,
    typer.Option("-O", "--setting", metavar="KEY=VALUE", help="A setting (repeatable).", show_default=False),
]
_NAMES = 25
"""Columns of a help page that the names of options take."""


class Command(TyperCommand):
    """A command with settings; see :func:`command`."""

    settings: ClassVar[Table] = {}
    renamed: ClassVar[Mapping[str, str]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """As typer's, with earlier spellings replaced; ``-O help`` prints the settings and ends."""
        words = list(self._current(args))
        if self.settings and ("-O", "help") in pairwise(words):
            typer.echo(f"Settings of {ctx.command_path}:")
            for line in described(self.settings):
                typer.echo(textwrap.fill(line, _columns(), initial_indent="  ", subsequent_indent="      "))
            ctx.exit()
        return super().parse_args(ctx, words)

    def _current(self, args: Sequence[str]) -> Iterator[str]:
        """``args`` with ``--threads 2`` as ``-O threads=2``, and options by their names of today."""
        with_value = {name for p in options_of(self) if not p.is_flag for name in p.opts}
        words = iter(args)
        for word in words:
            option, equals, value = word.partition("=")
            option = self.renamed.get(option, option)
            key = option.removeprefix("--") if option.startswith("--") else ""
            if word == "--":
                yield from (word, *words)
            elif key in self.settings:
                if not equals and not self.settings[key].is_switch:
                    equals, value = "=", next(words, "")
                yield from ("-O", f"{key}{equals}{value}")
            elif (on := key.removeprefix("no-")) in self.settings and self.settings[on].is_switch:
                yield from ("-O", f"{on}=false")
            else:
                yield f"{option}{equals}{value}"
                if option in with_value and not equals:
                    yield from [value for value in (next(words, None),) if value is not None]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, purpose, arguments, options by group, and the names of the settings."""
        formatter.write("\n".join(_help(self, ctx.command_path, _columns())) + "\n")


class Group(TyperGroup):
    """A group of commands, with help that fits a screen."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, purpose, and a line for each command."""
        width = _columns()
        lines = [f"Usage: {ctx.command_path} COMMAND [OPTIONS] ...", *_purpose(self, width), ""]
        for name in self.list_commands(ctx):
            lines += _entry(name, paragraphs(self.commands[name].help or "")[0], width, names=12)
        formatter.write("\n".join(lines) + "\n")


class DefaultGroup(Group):
    """A group of commands; a line that names none of them calls :attr:`default`."""

    default: ClassVar[str]

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """As typer's, with the default command put in."""
        return super().parse_args(ctx, self._named(args))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer's, with the default command put in."""
        return super().resolve_command(ctx, self._named(args))

    def _named(self, args: list[str]) -> list[str]:
        return args if args and args[0] in self.commands else [self.default, *args]


def group_with_default(name: str) -> type[DefaultGroup]:
    """A :class:`DefaultGroup` whose default command is ``name``: ``train`` is short for ``train run``."""
    return type("Group", (DefaultGroup,), {"default": name})


def command(settings: Table, renamed: Mapping[str, str] | None = None) -> type[Command]:
    """The class of a command with these settings.

    Args:
        settings: table of the command's settings.
        renamed: earlier name of an option -> its name, or that of a setting: ``--no-learn-scales``.
    """
    return type("Command", (Command,), {"settings": settings, "renamed": renamed or {}})


def options_of(command: Any) -> list[Any]:
    """The options of ``command`` that its help shows."""
    return [p for p in command.params if p.param_type_name == "option" and not p.hidden]


def usage(command: Any, path: str) -> str:
    """``ivl-export run embed [OPTIONS] BUNDLE [IMAGES...]``."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    return " ".join([path, "[OPTIONS]", *map(metavar, arguments)])


def metavar(argument: Any) -> str:
    """The name of an argument as a usage line has it."""
    name = (argument.metavar or argument.name.upper()).strip("[]")
    name += "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]"


def kinds(command: Any) -> dict[str, str]:
    """Parameter -> the word for what it takes: the names of an enumeration, or PATH, NUMBER, TEXT."""
    hints = get_type_hints(inspect.unwrap(command.callback))
    return {p.name: p.metavar or _kind(hints.get(p.name)) for p in command.params}


def _kind(hint: Any) -> str:
    types = [part for part in (*get_args(hint), hint) if isinstance(part, type)]
    types += [part for inner in get_args(hint) for part in get_args(inner) if isinstance(part, type)]
    for kind in types:
        if issubclass(kind, Enum):
            return "|".join(str(choice.value) for choice in kind)
        if issubclass(kind, Path):
            return "PATH"
        if issubclass(kind, int | float):
            return "NUMBER"
    return "TEXT"


def default(parameter: Any) -> str:
    """The default of a parameter as help pages show it; empty: none, or off."""
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or value is False or parameter.show_default is False or callable(value):
        return ""
    return str(parameter.opts[0] if value is True else getattr(value, "value", value))


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a help text, a line each."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip())]


def _columns() -> int:
    return max(60, min(100, shutil.get_terminal_size((80, 24)).columns))


def _help(command: Any, path: str, width: int) -> Iterator[str]:
    yield from textwrap.wrap(f"Usage: {usage(command, path)}", width, subsequent_indent="  ")
    yield from (*_purpose(command, width), "")
    words = kinds(command)
    for argument in (p for p in command.params if p.param_type_name == "argument"):
        yield from _entry(metavar(argument).strip("[]"), argument.help or "", width)
    groups: dict[str, list[Any]] = {"Options": []}
    for option in options_of(command):
        groups.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    for title, options in groups.items():
        yield typer.style(title, bold=True)
        for option in options:
            names = ", ".join(option.opts[:1] if option.name == "settings" else option.opts)
            word, text, shown = words[option.name], option.help or "", default(option)
            if len(word) > _NAMES:
                word, text = "NAME", f"{text} One of: {word.replace('|', ', ')}."
            if option.name == "settings":
                text += f" -O help explains {', '.join(command.settings)}."
            names += "" if option.is_flag else f" {word}"
            yield from _entry(names, f"{text} [{shown}]" if shown else text, width)
    for text in paragraphs(command.epilog or ""):
        yield from textwrap.wrap(text, width)


def _purpose(command: Any, width: int) -> Iterator[str]:
    for text in paragraphs(command.help or ""):
        yield ""
        yield from textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ")


def _entry(name: str, text: str, width: int, names: int = _NAMES) -> Iterator[str]:
    indent = " " * (names + 2)
    first = f"  {name:{names - 1}} "
    if len(first) > len(indent):
        yield first.rstrip()
        first = indent
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    yield from lines or [first.rstrip()]
