"""``ivl-export doctor cache``: list and delete cached engines, weights, scores and images."""

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
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def cache() -> None:
    """Engines, kernel times, packed weights, task scores and images that later runs reuse.

    The cache is $IVL_EXPORT_CACHE, or ivl-export in your cache folder. Engines take at most
    $IVL_EXPORT_CACHE_SIZE (20G), and so do weights; deleting any of it costs time only.
    """


@app.command("ls", cls=command({}))
def list_entries(kind: Kind = None, as_json: Json = False) -> None:
    """List cached entries, the most recently used first."""
    from ..files.cache_dir import cache_folder, entries

    _print("Entries in", "entries", entries(_kinds(kind)), str(cache_folder()), as_json)


@app.command("prune", cls=command({}))
def prune_entries(
    kind: Kind = None,
    size: Annotated[
        str | None, typer.Option(help="Keep the most recently used entries up to this total: 5G.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(help="Delete entries unused for this long: 12h, 30d, 8w.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete all entries.")] = False,
    as_json: Json = False,
) -> None:
    """Delete old entries, entries beyond a total size, or all."""
    from ..files.cache_dir import cache_folder, parse_size, prune

    if everything == (size is not None or older_than is not None):
        raise UsageError(
            "Nothing was selected for deletion." if not everything else "--all deletes everything already.",
            "--all is used alone; --size and --older-than can be combined.",
            "Give --older-than 30d, --size 5G or --all.",
        )
    deleted = prune(
        limit=None if size is None else parse_size(size, "--size"),
        older_than=None if older_than is None else _duration(older_than),
        kinds=_kinds(kind),
    )
    _print("Deleted from", "deleted", deleted, str(cache_folder()), as_json)


def _kinds(kind: str | None) -> tuple[str, ...]:
    from ..files.cache_dir import KINDS

    if kind is not None and kind not in KINDS:
        raise UsageError(
            f"The cache has no kind {kind!r}.", f"Known: {', '.join(KINDS)}.", "Give --kind one of these."
        )
    return KINDS if kind is None else (kind,)


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", text.strip())
    if not match:
        raise UsageError(
            f"--older-than cannot read {text!r}.", "", "Give hours, days or weeks: 12h, 30d, 8w."
        )
    return float(match[1]) * _SECONDS[match[2]]


def _print(title: str, key: str, entries: list[Entry], folder: str, as_json: bool) -> None:
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
    print_table(f"{title} {folder}", ("kind", "name", "size", "days since used"), rows)
    typer.echo(f"{len(entries)} entries, {human_bytes(total)}")
