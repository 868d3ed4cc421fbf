"""``ivl-export compare``: two bundles side by side, from their receipts. Runs no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle import Bundle
from .output import human_bytes, print_json, print_table, show

app = typer.Typer(add_completion=False)


@app.command()
def compare(
    bundle_a: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    bundle_b: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show two bundles side by side: sizes, accuracy with its intervals, kernels."""
    from ..evaluation.compare import compare as side_by_side

    found = side_by_side(Bundle.open(bundle_a), Bundle.open(bundle_b))
    if as_json:
        print_json(found)
        return
    a, b = found["bundles"]
    print_table("Bundles", ("", "A", "B"), [(key, _value(key, a), _value(key, b)) for key in a])
    if found["components"]:
        rows = [
            (row["name"], name, *(row[side] and row[side].get(key) for side in "ab"))
            for row in found["components"]
            for key, name in (
                ("own_cosine", "cosine, fp32 inputs"),
                ("own_sqnr_db", "SQNR dB, fp32 inputs"),
                ("chained_cosine", "cosine, chained"),
                ("chained_sqnr_db", "SQNR dB, chained"),
                ("samples", "samples"),
            )
        ]
        print_table("Components against fp32, worst output", ("component", "", "A", "B"), rows)
    if found["tasks"]:
        rows = [(r["name"], _score(r["a"]), _score(r["b"]), _gap(r)) for r in found["tasks"]]
        print_table("Tasks, % with 95% interval", ("task", "A", "B", "B - A"), rows)
    if found["kernels"]:
        rows = [(row["name"], _counts(row["a"]), _counts(row["b"])) for row in found["kernels"]]
        print_table("GEMMs by precision", ("", "A", "B"), rows)
    for note in found["notes"]:
        typer.echo(f"note: {show(note)}")


def _value(key: str, bundle: dict[str, Any]) -> object:
    return human_bytes(bundle[key]) if key.endswith("bytes") else bundle[key]


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    percent = [100 * score[key] for key in ("accuracy", "low", "high")]
    return "{:.1f} ({:.1f} to {:.1f}, {})".format(*percent, score["total"])


def _gap(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return "not comparable"
    return (
        f"{100 * row['difference']:+.1f} {'within the interval' if row['within'] else 'outside the interval'}"
    )


def _counts(counts: dict[str, int] | None) -> object:
    return None if counts is None else [f"{count} {name}" for name, count in sorted(counts.items())]
