"""Write docs/cli.md from the commands: ``python -m ivl_export.cli.document``; ``--check`` only compares."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .app import GROUPS, JOINED, RENAMED, load
from .command import default, kinds, metavar, options_of, paragraphs, usage

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
_HEAD = """# The command line

Written from the commands by `python -m ivl_export.cli.document`; a test fails when it is stale.

Every verb has `--help`, and `--json` where it prints results. `--debug`, anywhere on the line, shows
tracebacks. Errors say what happened, why, and what to do. Exit codes: 0 success, 1 a bug, 2 usage, 3 input,
4 checkpoint, 5 capability, 6 build, 7 accuracy, 8 integrity, 9 latency, 130 Ctrl-C.

Seldom-typed options are settings, `-O KEY=VALUE` (repeatable). `-O help` explains those of a command.
"""

_TAIL = """Settings were options before: `--threads 2` still means `-O threads=2`, and `--no-baseline`
`-O baseline=false`.
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
    parts.append(_TAIL)
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
    options, words = options_of(command), kinds(command)
    lines = [f"### {name}\n", f"```text\n{usage(command, name)}\n```\n"]
    lines += ["\n\n".join(paragraphs(command.help)), ""]
    if arguments or options:
        lines += ["| option | | default |", "| --- | --- | --- |"]
        lines += [_row(f"`{metavar(p).strip('[]')}`", p) for p in arguments]
        lines += [_row(_names(p, words[p.name]), p) for p in options]
        lines.append("")
    if command.settings:
        lines += ["Settings, each as `-O KEY=VALUE`:\n"]
        lines += [f"- `{key}` ({s.values}): {s.meaning}" for key, s in command.settings.items()]
        lines.append("")
    return "\n".join(lines)


def _row(names: str, parameter: Any) -> str:
    shown = _cell(default(parameter))
    shown = f"`{shown}`" if shown not in ("", "required") and parameter.show_default is True else shown
    return f"| {names} | {_cell(parameter.help or '')} | {shown} |"


def _names(option: Any, word: str) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return names if option.is_flag else f"{names} {_cell(word)}"


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
