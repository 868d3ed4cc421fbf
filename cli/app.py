"""The command line's verbs. A verb's module is imported when the verb is used: ``--help`` starts fast.

To add a verb, write ``cli/<verb>.py`` with a module-level ``app`` (``typer.Typer(add_completion=False)``
with one command, or a group of them) and add its line to :data:`VERBS`. Errors are raised as
:class:`~ivl_export.errors.IvlError`; :func:`ivl_export.cli.main` prints them and picks the exit code.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__

#: verb -> (module in this package, line of help)
VERBS: dict[str, tuple[str, str]] = {
    "build": ("build", "Checkpoint in, verified bundle out: export, calibrate, quantise, engines, proof."),
    "calibrate": ("calibrate", "Measure a model's input ranges once, for builds that take --scales."),
    "export": ("export", "Plain ONNX graphs of a checkpoint, with a copy of its weights or without."),
    "recipes": ("recipes", "Show the precision recipes, or print one as a file to edit."),
    "sensitivity": ("sensitivity", "What each layer loses when it alone is quantised; odd channels."),
    "train": ("train", "Train a small InternVL on drawn scenes, or fine-tune a chat model on conversations."),
    "qat": ("qat", "Fine-tune a checkpoint for a precision; 'build' takes the result."),
    "scenes": ("scenes", "Draw scenes with captions, to try internvl-nano on or to calibrate with."),
    "run": ("run", "Embed, classify, retrieve, caption or chat about images, through a bundle's engines."),
    "eval": ("eval", "Measure a bundle on your own copy of a benchmark, beside the paper's number."),
    "inspect": ("inspect", "Show what a bundle holds, what it promises, and whether its files are intact."),
    "compare": ("compare", "Show two bundles side by side: sizes, accuracy with its intervals, kernels."),
    "profile": ("profile", "Time a bundle on this machine; count FLOPs and bytes from its graphs."),
    "estimate": ("estimate", "Predict latency, memory and cost on a GPU you do not have."),
    "cache": ("cache", "Show or delete what earlier builds left for later ones."),
    "doctor": ("doctor", "Say what can be built and run on this machine, and what to install."),
}


class _Verbs(TyperGroup):
    """Swaps a verb's placeholder for the real command when it is called or completed."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in VERBS:
            self.commands[args[0]] = _load(args[0])
        return super().resolve_command(ctx, args)


def _load(verb: str) -> Any:
    module, help_line = VERBS[verb]
    command = typer.main.get_command(import_module(f".{module}", __package__).app)
    command.name, command.help = verb, command.help or help_line
    return command


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ivl-export {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Verbs,
    name="ivl-export",
    help="InternVL checkpoints to verified FP8 / INT8 engines.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks. May stand anywhere on the line.")
    ] = False,
) -> None:
    pass  # both are dealt with before: --version above, --debug in main


def _placeholder() -> None:
    raise AssertionError("resolve_command replaces this")


for _verb, (_, _line) in VERBS.items():
    app.command(_verb, help=_line)(_placeholder)
