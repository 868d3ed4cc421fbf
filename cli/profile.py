"""``ivl-export profile``: times of a bundle on this machine, its work, Table 19; reports; two runs compared.

``profile BUNDLE`` is short for ``profile measure BUNDLE``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import LatencyError, UsageError
from .output import check_writable, print_json, print_table
from .profile_layers import layers as profile_layers

if TYPE_CHECKING:
    from ..profiles.measure.cases import Progress
    from ..profiles.measure.receipt import Profile
    from ..profiles.report.diff import Diff

DEFAULT = "measure"


class _Profile(TyperGroup):
    """A group whose command may be left out: then it is :data:`DEFAULT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        return super().parse_args(ctx, self._named(args))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, self._named(args))

    def _named(self, args: list[str]) -> list[str]:
        return args if args and args[0] in self.commands else [DEFAULT, *args]


app = typer.Typer(cls=_Profile, add_completion=False)
app.command("layers")(profile_layers)

Html = Annotated[Path | None, typer.Option(help="Write one self-contained page with charts here.")]
Png = Annotated[Path | None, typer.Option(help="Write each chart as a PNG into this folder.")]
Csv = Annotated[Path | None, typer.Option(help="Write a line for each timed case here.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")]
Beside = Annotated[
    list[Path] | None, typer.Option(help="A receipt whose columns to set beside in Table 19 (repeatable).")
]


@app.command(
    DEFAULT,
    epilog="Also: 'ivl-export profile report RECEIPT' prints and draws a receipt again; "
    "'ivl-export profile diff OLD NEW' compares two; "
    "'ivl-export profile layers BUNDLE' shows where the time of a call goes.",
)
def measure(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    batch: Annotated[
        str | None,
        typer.Option(help="Batch sizes with commas between.", show_default="1,8; with --table19 1,128"),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Text lengths to time too: 8,16,32.", show_default="as tuned")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Whose engines: onnxruntime, tensorrt-rtx, ...")
    ] = "onnxruntime",
    target: Annotated[str | None, typer.Option(help="Which engines of the backend: sm89, ...")] = None,
    device: Annotated[
        str | None, typer.Option(help="Where the backend computes: cuda:0.", show_default="the backend's own")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.01, help="Time limit of one measurement; it ends sooner when stable.")
    ] = 3.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of an engine.")] = None,
    table19: Annotated[
        bool, typer.Option("--table19", help="The paper's cost tables, with the PyTorch bf16 baseline.")
    ] = False,
    baseline: Annotated[bool, typer.Option(help="With --table19: time the PyTorch modules too.")] = True,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The bundle's weights, for the baseline.", show_default="its source")
    ] = None,
    ceilings: Annotated[bool, typer.Option(help="Measure what the machine reaches at best.")] = True,
    layers: Annotated[
        bool, typer.Option("--layers", help="Time each layer too, by the backend's own profiler.")
    ] = False,
    beside: Beside = None,
    out: Annotated[Path | None, typer.Option(help="Write the receipt, with raw samples, here.")] = None,
    html: Html = None,
    png: Png = None,
    csv: Csv = None,
    as_json: AsJson = False,
) -> None:
    """Time a bundle's components and chained calls here; count FLOPs and bytes from its graphs."""
    batches = None if batch is None else parse_sizes("--batch", batch)
    texts = () if lengths is None else tuple(parse_sizes("--lengths", lengths))
    for name, path in (("--out", out), ("--html", html), ("--csv", csv)):
        check_writable(name, path)
    if checkpoint is not None and not (table19 and baseline):
        raise UsageError("--checkpoint is for the baseline.", "There is none here.", "Add --table19.")
    from ..profiles.measure import receipt, report
    from ..profiles.measure.layers import with_layers
    from ..profiles.measure.timing import StopRule

    others = [receipt.read(path) for path in beside or ()]
    options = report.Options(
        backend,
        target,
        threads,
        device,
        batches,
        texts,
        StopRule(seconds),
        table19,
        baseline,
        checkpoint,
        ceilings,
    )
    with _progress() as progress:
        result = report.profile(bundle, options, progress)
        if layers:
            result = with_layers(result, bundle, progress)
    if out is not None:
        receipt.write(result.to_json(), out)
    _export(result, others, html, png, csv, as_json)
    if out is not None and not as_json:
        typer.echo(f"Receipt with raw samples: {out}")


@app.command("report")
def report_again(
    receipt: Annotated[Path, typer.Argument(help="What --out wrote.", show_default=False)],
    beside: Beside = None,
    html: Html = None,
    png: Png = None,
    csv: Csv = None,
    as_json: AsJson = False,
) -> None:
    """Print and draw a receipt again, without measuring."""
    for name, path in (("--html", html), ("--csv", csv)):
        check_writable(name, path)
    from ..profiles.measure.receipt import read

    _export(read(receipt), [read(path) for path in beside or ()], html, png, csv, as_json)


@app.command("diff")
def compare(
    old: Annotated[Path, typer.Argument(help="The receipt before.", show_default=False)],
    new: Annotated[Path, typer.Argument(help="The receipt after.", show_default=False)],
    fail_above: Annotated[
        str | None,
        typer.Option(help="Exit with 9 if a median is surely slower by more: 5%.", metavar="PERCENT"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two receipts case by case: ratio of medians with its bootstrap interval, and a verdict."""
    limit = None if fail_above is None else parse_percent(fail_above)
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


def parse_sizes(option: str, text: str) -> list[int]:
    """Sizes of ``1,8,32``; UsageError otherwise."""
    sizes = [part.strip() for part in text.split(",")]
    if not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise UsageError(f"{option} {text!r} is no list of sizes.", "", f"Write {option} 1,8,32.")
    return [int(size) for size in sizes]


def parse_percent(text: str) -> float:
    """0.05 of ``5%`` or ``5``; UsageError otherwise."""
    try:
        value = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise UsageError(f"--fail-above {text!r} is no percentage.", "", "Write --fail-above 5%.")
    return value


def _export(
    result: Profile,
    others: list[Profile],
    html: Path | None,
    png: Path | None,
    csv: Path | None,
    as_json: bool,
) -> None:
    """Everything that is written or printed of a profile; ``others`` add columns to its Table 19."""
    from dataclasses import replace

    from ..files.write import write_text
    from ..profiles.cost.table19 import merged

    if tables := [p.table19 for p in (result, *others) if p.table19 is not None]:
        result = replace(result, table19=merged(tables))
    written = []
    if csv is not None:
        from ..profiles.report.sheet import sheet

        write_text(sheet(result), csv)
        written.append(csv)
    if html is not None:
        from ..profiles.report.page import page

        write_text(page(result), html)
        written.append(html)
    if png is not None:
        from ..profiles.report.charts import charts
        from ..profiles.report.png import write_drawings

        written += write_drawings(charts(result), png)
    if as_json:
        print_json(result.to_json())
        return
    from .profile_tables import print_profile

    print_profile(result)
    for path in written:
        typer.echo(f"Written: {path}")


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
    typer.echo("the interval covers the noise within both runs, not a drift of the machine between them")
    for line in result.differences:
        typer.echo(f"changed: {line}")
    for which, names in (("before", result.only_old), ("after", result.only_new)):
        for name in names:
            typer.echo(f"only {which}: {name}")


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar on stderr where that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("loading", total=None)

        def progress(case: str, done: int, total: int) -> None:
            bar.update(task, description=case, completed=done, total=total)

        yield progress
