"""The command line's verbs. A verb's module is imported when the verb is used, so that ``--help`` is fast.

To add a verb, write ``cli/<verb>.py`` with a module-level ``app`` (``typer.Typer(add_completion=False)``
with one command, or a group of them) and add its line to :data:`GROUPS`. Errors are raised as
:class:`~ivl_export.errors.IvlError`; :func:`ivl_export.cli.main` prints them and picks the exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import UsageError

#: purpose -> verb -> one line of help; a verb's module has the verb's name
GROUPS: dict[str, dict[str, str]] = {
    "Make": {
        "build": "Convert a checkpoint to a bundle: graphs, weights and engines.",
        "calibrate": "Measure the layers' input ranges once, for many builds.",
        "export": "Write plain ONNX graphs, with a copy of the weights or without.",
        "train": "Train or fine-tune a model; also: train qat, train scenes.",
    },
    "Measure": {
        "eval": "Score a bundle on your copy of a benchmark, next to the paper.",
        "sensitivity": "Rank layers by what is lost when one alone is quantised.",
        "profile": "Time a bundle on this machine: calls, or each layer.",
        "compare": "Compare two bundles, or two receipts of 'profile --out'.",
        "estimate": "Predict latency, memory and cost on a GPU you do not have.",
    },
    "Use": {
        "run": "Embed, classify, retrieve, caption or chat with a bundle.",
        "embed": "Embed folders, lists and archives of any size into shards.",
        "serve": "Serve bundles over HTTP: OpenAI's routes, captions, ranking.",
        "package": "Make a folder to deploy: Triton, Docker, wheels, a project.",
    },
    "Look after": {
        "verify": "Check a bundle's files, and show which kernels really run.",
        "doctor": "Check this machine and what is installed; also: doctor cache.",
    },
}
VERBS: dict[str, str] = {verb: line for verbs in GROUPS.values() for verb, line in verbs.items()}

#: earlier name of a verb -> its words now; the earlier name still works, with a note
RENAMED: dict[str, tuple[str, ...]] = {
    "cache": ("doctor", "cache"),
    "qat": ("train", "qat"),
    "scenes": ("train", "scenes"),
}

#: earlier command, since joined with another -> its replacement
JOINED: dict[str, str] = {
    "inspect": "ivl-export verify BUNDLE, with --contents or --layers",
    "profile diff": "ivl-export compare OLD NEW",
    "profile layers": "ivl-export profile BUNDLE --layers -O latency=false",
    "profile measure": "ivl-export profile BUNDLE",
    "profile report": "ivl-export profile RECEIPT",
    "recipes": "ivl-export build --list-recipes, or build --show-recipe NAME",
}


def current_words(args: Sequence[str]) -> list[str]:
    """``args`` with a renamed verb's present words; a note about that is printed to stderr.

    Raises:
        UsageError: they begin with one of :data:`JOINED`; it names the replacement.
    """
    for old in (" ".join(args[:1]), " ".join(args[:2])):
        if old in JOINED and not (len(old.split()) == 2 and Path(args[1]).exists()):
            raise UsageError(
                f"'ivl-export {old}' has another name now.",
                "Commands that overlapped were joined.",
                f"Type {JOINED[old]}.",
            )
    if args and args[0] in RENAMED:
        words = RENAMED[args[0]]
        typer.echo(f"note: '{args[0]}' is '{' '.join(words)}' now.", err=True)
        return [*words, *args[1:]]
    return list(args)


class _Verbs(TyperGroup):
    """Swaps a verb's placeholder for the real command when it is called or completed."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in VERBS:
            self.commands[args[0]] = load(args[0])
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """One screen: the verbs by purpose. Frames around each group would take a second one."""
        lines = ["Usage: ivl-export VERB [OPTIONS] ...", "", f"  {self.help}", ""]
        for group, verbs in GROUPS.items():
            lines.append(typer.style(group, bold=True))
            lines += [f"  {typer.style(verb, fg='cyan')}{'':{13 - len(verb)}}{verbs[verb]}" for verb in verbs]
        lines += [
            typer.style("Options", bold=True),
            "  VERB --help, -h          Show a verb's options.  VERB --json: print JSON.",
            "  --debug                  Show tracebacks, anywhere on the line.",
            "  --version                Print the version and exit.",
            "  --install-completion     Complete verbs and options in this shell.",
            "  --show-completion        Print that script, to copy or adapt.",
        ]
        formatter.write("\n".join(lines) + "\n")


def load(verb: str) -> Any:
    """The command of ``verb``, its module imported."""
    command = typer.main.get_command(import_module(f".{verb}", __package__).app)
    command.name, command.help = verb, command.help or VERBS[verb]
    return command


def _version(show: bool) -> None:
    if show:
        typer.echo(f"ivl-export {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Verbs,
    name="ivl-export",
    help="Convert InternVL checkpoints to FP8 and INT8 engines, and verify what runs.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks. Works anywhere on the line.")
    ] = False,
) -> None:
    pass  # --version has its callback, main removes --debug


def _placeholder() -> None:
    raise AssertionError("resolve_command replaces this")


for _verb, _line in VERBS.items():
    app.command(_verb, help=_line)(_placeholder)
