"""``ivl-export doctor cache``: show and delete what earlier builds left for later ones."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .command import Group, command
from .output import human_bytes, print_json, print_table

if TYPE_CHECKING:
    from ..files.cache_dir import Entry

app = typer.Typer(cls=Group, add_completion=False, no_args_is_help=True)

_SECONDS = {"h": 3600, "d": 86_400, "w": 7 * 86_400}
Kind = Annotated[str | None, typer.Option(help="Only engines, timing, weights, evaluations or images.")]
Json = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


@app.callback()
def cache() -> None:
    """Built engines, kernel times, packed weights, task scores and images that are taken over later.

    They lie in $IVL_EXPORT_CACHE, or in ivl-export in your cache folder. Engines take at most
    $IVL_EXPORT_CACHE_SIZE (20G), and so do weights; deleting any of it costs time only.
    """


@app.command("ls", cls=command({}))
def list_entries(kind: Kind = None, as_json: Json = False) -> None:
    """What is kept, used last first."""
    from ..files.cache_dir import cache_folder, entries

    _print("Kept in", "entries", entries(_kinds(kind)), str(cache_folder()), as_json)


@app.command("prune", cls=command({}))
def prune_entries(
    kind: Kind = None,
    size: Annotated[str | None, typer.Option(help="Keep what was used last, up to this: 5G.")] = None,
    older_than: Annotated[
        str | None, typer.Option(help="Delete what was not used for this long: 12h, 30d, 8w.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete all of it.")] = False,
    as_json: Json = False,
) -> None:
    """Delete what was not used for a while, what is over a size, or everything."""
    from ..files.cache_dir import cache_folder, parse_size, prune

    if everything == (size is not None or older_than is not None):
        raise UsageError(
            "It must be said what to delete.",
            "--all stands alone; --size and --older-than may stand together.",
            "Give --older-than 30d, --size 5G or --all.",
        )
    gone = prune(
        limit=None if size is None else parse_size(size, "--size"),
        older_than=None if older_than is None else _duration(older_than),
        kinds=_kinds(kind),
    )
    _print("Deleted from", "deleted", gone, str(cache_folder()), as_json)


def _kinds(kind: str | None) -> tuple[str, ...]:
    from ..files.cache_dir import KINDS

    if kind is not None and kind not in KINDS:
        raise UsageError(
            f"Nothing of kind {kind!r} is kept.", f"Known: {', '.join(KINDS)}.", "Give --kind one of these."
        )
    return KINDS if kind is None else (kind,)


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", text.strip())
    if not match:
        raise UsageError(
            f"--older-than cannot read {text!r}.", "", "Give hours, days or weeks: 12h, 30d, 8w."
        )
    return float(match[1]) * _SECONDS[match[2]]


def _print(what: str, key: str, entries: list[Entry], folder: str, as_json: bool) -> None:
    total = sum(entry.size for entry in entries)
    if as_json:
        listed = [
            {"kind": e.kind, "name": e.name, "path": str(e.path), "bytes": e.size, "used": e.used}
            for e in entries
        ]
        print_json({"folder": folder, key: listed, "bytes": total})
        return
    now = time.time()
    rows = [(e.kind, e.name[:48], human_bytes(e.size), f"{(now - e.used) / 86_400:.1f}") for e in entries]
    print_table(f"{what} {folder}", ("kind", "name", "size", "days since used"), rows)
    typer.echo(f"{len(entries)} entries, {human_bytes(total)}")
