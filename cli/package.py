"""``ivl-export package``: a bundle as a folder to deploy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..packages.registry import MODULES, all_settings, find_format
from ..packages.write import Package
from .command import SettingsOpt, command
from .options import BundleArg, JsonOpt
from .output import human_bytes, print_json, print_table
from .progress import Bars

app = typer.Typer(add_completion=False)
_SHOWN = 30
"""Files of a table; more are counted by folder."""


@app.command(cls=command(all_settings()))
def package(
    bundle: BundleArg,
    format: Annotated[str, typer.Option(metavar="|".join(MODULES), help="What to make.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="The package's folder.", show_default="packages/NAME-FORMAT"),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the package, and of the model it serves.", show_default="the folder's"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a package that is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and their sizes, write nothing.")
    ] = False,
    settings: SettingsOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Turn a bundle into a folder to deploy: it appears whole or not at all.

    Every file of the bundle is hashed before. Settings of other formats are refused.
    """
    from ..api import package as make

    kind = find_format(format)
    with Bars() as bars:
        made = make(
            bundle,
            out,
            format=format,
            name=name,
            settings=settings or (),
            force=force,
            dry_run=dry_run,
            progress=bars,
        )
    if as_json:
        print_json(
            {
                "package": str(made.root),
                "format": made.format,
                "made": made.made,
                "bytes": made.size,
                "files": made.files,
                "pending": list(made.pending),
            }
        )
        return
    title = f"{made.root}: {kind.summary}"
    print_table(title, ("file", "size"), _rows(made))
    for text in made.pending:
        typer.echo(f"and {text}")
    count = f"{human_bytes(made.size)}, {len(made.files)} files"
    typer.echo(f"package: {made.root} ({count})" if made.made else f"dry run: nothing is written ({count})")


def _rows(made: Package) -> list[tuple[str, str]]:
    """A row for each file; of a long list, for each folder that has several."""
    if len(made.files) <= _SHOWN:
        return [(path, "-" if size is None else human_bytes(size)) for path, size in made.files.items()]
    groups: dict[str, list[int | None]] = {}
    for path, size in made.files.items():
        folder = path.split("/")[0] if "/" in path else path
        groups.setdefault(folder, []).append(size)
    return [
        (
            folder if len(sizes) == 1 else f"{folder}/ ({len(sizes)} files)",
            human_bytes(sum(size or 0 for size in sizes)) if sizes != [None] else "-",
        )
        for folder, sizes in groups.items()
    ]
