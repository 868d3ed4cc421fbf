"""Write docs/cli.md from the commands: ``python -m ivl_export.cli.document``; ``--check`` only compares."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .app import GROUPS, JOINED, RENAMED, load

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
_HEAD = """# The command line

Written from the commands by `python -m ivl_export.cli.document`; a test fails when it is stale.

Every verb has `--help`, and `--json` where it prints results. `--debug`, anywhere on the line, shows
tracebacks. Errors say what happened, why, and what to do. Exit codes: 0 success, 1 a bug, 2 usage, 3 input,
4 checkpoint, 5 capability, 6 build, 7 accuracy, 8 integrity, 9 latency, 130 Ctrl-C.
"""


def document() -> str:
    """The whole page."""
    parts = [_HEAD]
    for group, verbs in GROUPS.items():
        parts.append(f"## {group}\n")
        for verb in verbs:
            for name, command in _commands(f"ivl-export {verb}", load(verb)):
                parts.append(_section(name, command))
    renamed = {old: f"ivl-export {' '.join(new)}; the old name still works" for old, new in RENAMED.items()}
    moved = [f"| `ivl-export {old}` | {_cell(new)} |" for old, new in sorted({**renamed, **JOINED}.items())]
    parts.append("\n".join(["## Earlier names\n", "| before | now |", "| --- | --- |", *moved, ""]))
    return "\n".join(parts)


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """``command``, or each command of a group, with what is typed to call it."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    default = getattr(command, "default", None)
    inner_commands = sorted(command.commands.items(), key=lambda item: item[0] != default)
    for inner, part in inner_commands:
        yield from _commands(name if inner == default else f"{name} {inner}", part)


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    hints = get_type_hints(inspect.unwrap(command.callback))
    usage = " ".join([name, "[OPTIONS]", *map(_metavar, arguments)])
    lines = [f"### {name}\n", f"```text\n{usage}\n```\n", _paragraphs(command.help), ""]
    if arguments or options:
        lines += ["| option | | default |", "| --- | --- | --- |"]
        lines += [_row(f"`{_metavar(p).strip('[]')}`", p) for p in arguments]
        lines += [_row(_names(p, hints.get(p.name)), p) for p in options]
        lines.append("")
    return "\n".join(lines)


def _metavar(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).strip("[]")
    name += "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]"


def _row(names: str, parameter: Any) -> str:
    return f"| {names} | {_cell(parameter.help or '')} | {_default(parameter)} |"


def _names(option: Any, hint: Any) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    if option.secondary_opts:
        names += " / " + ", ".join(f"`{name}`" for name in option.secondary_opts)
    return names if option.is_flag else f"{names} {_cell(option.metavar or _kind(hint))}"


def _kind(hint: Any) -> str:
    """What an option of this type takes: the names of an enumeration, else a word for the type."""
    kinds = [part for part in (*get_args(hint), hint) if isinstance(part, type)]
    kinds += [part for inner in get_args(hint) for part in get_args(inner) if isinstance(part, type)]
    for kind in kinds:
        if issubclass(kind, Enum):
            return "|".join(str(choice.value) for choice in kind)
        if issubclass(kind, Path):
            return "PATH"
        if issubclass(kind, int | float):
            return "NUMBER"
    return "TEXT"


def _default(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return _cell(parameter.show_default)
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or value is False or parameter.show_default is False or callable(value):
        return ""
    if value is True:
        return f"`{parameter.opts[0]}`"
    return f"`{_cell(str(getattr(value, 'value', value)))}`"


def _paragraphs(text: str) -> str:
    """Help text as Markdown: lines of a paragraph joined."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(argv: Sequence[str]) -> int:
    """Write the page; with ``--check`` say whether it is what the commands are now (exit code 1: stale)."""
    text = document()
    if "--check" not in argv:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/cli.md is stale: run python -m ivl_export.cli.document", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
