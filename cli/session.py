"""Shared by the verbs of ``ivl-export run``: options, an open bundle and its report, files written whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from ..errors import BuildError
from ..files.write import atomic
from .output import print_json, print_table, show

if TYPE_CHECKING:
    from ..runtime import InternVL, Mode


class Head(str, Enum):
    """Which image embedding: ``C`` the vision model's, ``G`` with QLLaMA's queries."""

    C = "C"
    G = "G"

    @property
    def mode(self) -> Mode:
        """The library's name for it."""
        return "InternVL-C" if self is Head.C else "InternVL-G"


ImagesArg = Annotated[list[Path], typer.Argument(help="Image files and folders.", show_default=False)]
HeadOpt = Annotated[Head, typer.Option("--mode", help="InternVL-C or InternVL-G embeddings.")]
TemperatureOpt = Annotated[
    float, typer.Option(min=0, help="Randomness of the draws; 0 always takes the likeliest token.")
]


@contextmanager
def session(
    bundle: Path, backend: str, engine: dict[str, Any], as_json: bool
) -> Iterator[tuple[InternVL, dict[str, Any]]]:
    """An open bundle and a report that the verb fills, printed when the block ends.

    ``engine`` has the settings of :data:`.options.ENGINE`; ``report["table"]`` (title, columns, rows) is
    printed unless ``as_json``.
    """
    from ..runtime import InternVL

    start = time.perf_counter()
    report: dict[str, Any] = {"bundle": str(bundle), "backend": backend}
    with InternVL.load(bundle, backend, **engine) as model:
        report["recipe"] = model.bundle.manifest.recipe
        yield model, report
        report["seconds"] = time.perf_counter() - start
        report["timings"] = {k: {"calls": t.calls, "seconds": t.seconds} for k, t in model.timings.items()}
    table = report.pop("table")
    if as_json:
        print_json(report)
        return
    print_table(*table)
    stages = ", ".join(f"{name} {t['seconds']:.3f}" for name, t in report["timings"].items())
    typer.echo(f"{report['recipe']} on {backend}: {report['seconds']:.2f} s ({stages})")
    for skip in report.get("skipped", ()):
        typer.echo(f"skipped: {show(skip['why'])}", err=True)


def save(out: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write ``out`` whole or not at all; BuildError if it cannot be."""
    try:
        with atomic(out) as partial, partial.open("wb") as file:
            write(file)
    except OSError as error:
        why = error.strerror or str(error)
        raise BuildError(f"Cannot write {out}.", f"{why}.", "Choose another place for --out.") from error
    return out
