"""``ivl-export compare``: two bundles or two receipts of ``profile``. Runs no engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bundle import Bundle
from ..errors import LatencyError, UsageError
from .command import command
from .output import human_bytes, print_json, print_table, show

if TYPE_CHECKING:
    from ..profiles.report.diff import Diff

app = typer.Typer(add_completion=False)


@app.command(cls=command({}))
def compare(
    a: Annotated[Path, typer.Argument(help="A bundle's folder, or a receipt.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="The other bundle, or the later receipt.", show_default=False)],
    fail_above: Annotated[
        str | None,
        typer.Option(
            help="For receipts: exit with 9 if a median is slower by more than this, beyond noise: 5%.",
            metavar="PERCENT",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two bundles (sizes, accuracy, kernels, engines) or two receipts of 'profile --out' (times).

    Of bundles: engines that differ in bytes may compute the same, so programs and weights are compared.
    For receipts: the ratio of medians of each case with its bootstrap interval, and a verdict.
    """
    limit = None if fail_above is None else parse_percent(fail_above)
    folders = [path for path in (a, b) if path.is_dir()]
    if len(folders) == 1 and (a.is_file() or b.is_file()):
        raise UsageError(
            "A bundle and a receipt cannot be compared.",
            f"{folders[0]} is a folder, the other a file.",
            "Give two bundles, or two receipts of 'ivl-export profile --out'.",
        )
    if not folders:
        _compare_receipts(a, b, fail_above, limit, as_json)
        return
    if fail_above is not None:
        raise UsageError(
            "--fail-above limits times.",
            "Bundles contain no times.",
            "Compare two receipts: ivl-export profile BUNDLE --out RECEIPT.",
        )
    _compare_bundles(a, b, as_json)


def _compare_bundles(path_a: Path, path_b: Path, as_json: bool) -> None:
    from ..evaluation.compare import compare as side_by_side

    result = side_by_side(Bundle.open(path_a), Bundle.open(path_b))
    if as_json:
        print_json(result)
        return
    a, b = result["bundles"]
    print_table("Bundles", ("", "A", "B"), [(key, _value(key, a), _value(key, b)) for key in a])
    if result["components"]:
        rows = [
            (row["name"], name, *(row[side] and row[side].get(key) for side in "ab"))
            for row in result["components"]
            for key, name in (
                ("own_cosine", "cosine, fp32 inputs"),
                ("own_sqnr_db", "SQNR dB, fp32 inputs"),
                ("chained_cosine", "cosine, chained"),
                ("chained_sqnr_db", "SQNR dB, chained"),
                ("samples", "samples"),
            )
        ]
        print_table("Components against fp32, worst output", ("component", "", "A", "B"), rows)
    if result["tasks"]:
        rows = [(r["name"], _score(r["a"]), _score(r["b"]), _gap(r)) for r in result["tasks"]]
        print_table("Tasks, % with 95% interval", ("task", "A", "B", "B - A"), rows)
    if result["verification"]:
        rows = [(row["name"], _counts(row["a"]), _counts(row["b"])) for row in result["verification"]]
        print_table("Matrix products by precision", ("", "A", "B"), rows)
    if result["engines"]:
        rows = [(r["name"], _same(r["same_bytes"]), _same(r["same_program"])) for r in result["engines"]]
        print_table("Engines of both", ("", "bytes", "programs and weights"), rows)
    for note in result["notes"]:
        typer.echo(f"note: {show(note)}")


def _compare_receipts(
    old: Path, new: Path, fail_above: str | None, limit: float | None, as_json: bool
) -> None:
    """Compare receipts case by case; LatencyError if one is slower than the limit allows."""
    from ..profiles.measure.receipt import read
    from ..profiles.report.diff import diff

    result = diff(read(old), read(new), limit)
    if as_json:
        print_json(result.to_json())
    else:
        _print_diff(result)
    if result.failed:
        worst = max(result.failed, key=lambda change: change.low)
        raise LatencyError(
            f"{len(result.failed)} of {len(result.changes)} cases are slower by more than {fail_above}.",
            f"{worst.kind} {worst.name} at batch {worst.batch}: {worst.old_ms:.4g} -> {worst.new_ms:.4g} ms, "
            f"{worst.low - 1:+.1%} to {worst.high - 1:+.1%}.",
            "Find the change that did it, or raise --fail-above.",
        )


def parse_percent(text: str) -> float:
    """0.05 of ``5%`` or ``5``; UsageError otherwise."""
    try:
        value = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise UsageError(f"--fail-above {text!r} is not a percentage.", "", "Write --fail-above 5%.")
    return value


def _print_diff(result: Diff) -> None:
    print_table(
        f"{result.old} -> {result.new}",
        ("case", "batch", "sizes", "old ms", "new ms", "new / old", "95% interval", "verdict", "steady"),
        [
            (
                c.name if c.kind == "component" else f"{c.kind} {c.name}",
                c.batch,
                " ".join(f"{k}={v}" for k, v in c.sizes.items() if k != "batch"),
                c.old_ms,
                c.new_ms,
                f"{c.ratio:.3f}",
                f"{c.low:.3f} to {c.high:.3f}",
                c.verdict,
                c.steady,
            )
            for c in result.changes
        ],
    )
    typer.echo("the interval covers noise within both runs, not changes of the machine between them")
    for line in result.differences:
        typer.echo(f"changed: {line}")
    for which, names in (("before", result.only_old), ("after", result.only_new)):
        for name in names:
            typer.echo(f"only {which}: {name}")


def _value(key: str, bundle: dict[str, Any]) -> object:
    return human_bytes(bundle[key]) if key.endswith("bytes") else bundle[key]


def _same(equal: bool | None) -> str:
    return "not known" if equal is None else "equal" if equal else "different"


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
