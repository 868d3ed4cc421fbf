"""``ivl-export profile``: times of a bundle on this machine, its work, its layers, Table 19."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bundle import Bundle
from ..errors import UsageError
from .output import check_writable, print_json
from .profile_layers import LayerOptions, Where, print_layer_profiles, time_layers, write_layer_profiles
from .progress import Bars

if TYPE_CHECKING:
    from ..profiles.measure.layer_profile import LayerProfile
    from ..profiles.measure.receipt import Profile

app = typer.Typer(add_completion=False)

ON_RECEIPTS = frozenset({"subject", "beside", "html", "png", "csv", "as_json"})
"""Parameters that mean something where nothing is measured."""
LAYERS: dict[str, Any] = {"rich_help_panel": "With --layers"}


@app.command()
def profile(
    context: typer.Context,
    subject: Annotated[
        Path,
        typer.Argument(
            help="A bundle's folder; or a receipt that --out wrote, to print and draw it again.",
            metavar="BUNDLE",
            show_default=False,
        ),
    ],
    batch: Annotated[
        str | None,
        typer.Option(help="Batch sizes, joined by commas.", show_default="1,8; with --table19 1,128"),
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
    latency: Annotated[
        bool, typer.Option(help="Time whole calls; --layers --no-latency times layers alone.")
    ] = True,
    layers: Annotated[
        bool, typer.Option("--layers", help="Time each layer too, by the backend's own profiler.")
    ] = False,
    component: Annotated[
        str | None, typer.Option(help="Layers of this component only.", show_default="all", **LAYERS)
    ] = None,
    calls: Annotated[int, typer.Option(min=1, help="Calls that are timed layer by layer.", **LAYERS)] = 10,
    top: Annotated[int, typer.Option(min=1, help="How many of the slowest are printed.", **LAYERS)] = 12,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a call's timeline for chrome://tracing or Perfetto here.", **LAYERS),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Another receipt, whose columns join those of Table 19 (repeatable)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the receipt, with raw samples, here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page with charts here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write each chart as a PNG into this folder.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a line for each timed case here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")] = False,
) -> None:
    """Time a bundle's components and chained calls here; count FLOPs and bytes from its graphs.

    With --layers also where the time of a call goes: slowest layers, operators, layer types, blocks.
    """
    for name, path in (("--out", out), ("--html", html), ("--csv", csv), ("--trace", trace)):
        check_writable(name, path)
    if subject.is_file():
        _check_receipt_only(context)
        from ..profiles.measure.receipt import read

        _export(read(subject), [read(path) for path in beside or ()], html, png, csv, as_json)
        return
    batches = None if batch is None else parse_sizes("--batch", batch)
    texts = () if lengths is None else tuple(parse_sizes("--lengths", lengths))
    if checkpoint is not None and not (table19 and baseline):
        raise UsageError("--checkpoint is for the baseline.", "There is none here.", "Add --table19.")
    if not layers and (component is not None or trace is not None or not latency):
        raise UsageError("--component, --trace and --no-latency are about layers.", "", "Add --layers.")
    layer_options = LayerOptions(component, calls, top, trace)
    where = (backend, batches[0] if batches else 1, threads, target, device)
    if not latency:
        if table19 or out is not None or csv is not None:
            raise UsageError(
                "--table19, --out and --csv are about whole calls.", "", "Leave --no-latency out."
            )
        _layers_alone(subject, where, layer_options, html, png, as_json)
        return
    from ..profiles.measure import bundle_profile, receipt
    from ..profiles.measure.timing import StopRule

    others = [receipt.read(path) for path in beside or ()]
    options = bundle_profile.Options(
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
    profiles: list[LayerProfile] = []
    with Bars() as bars:
        result = bundle_profile.profile(subject, options, bars)
        if layers:
            where = (backend, result.settings.batches[0], threads, target, device)
            profiles = time_layers(Bundle.open(subject), where, layer_options, bars)
            result = replace(result, layers=tuple(replace(p, trace=()) for p in profiles))
    if out is not None:
        receipt.write(result.to_json(), out)
    _export(result, others, html, png, csv, as_json)
    if not as_json:
        if layers:
            print_layer_profiles(profiles, top)
        for label, path in (("Receipt with raw samples", out), ("Written", trace)):
            if path is not None:
                typer.echo(f"{label}: {path}")


def _check_receipt_only(context: typer.Context) -> None:
    """UsageError if an option was given that needs a bundle to measure."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in ON_RECEIPTS and source is not None and source.name == "COMMANDLINE":
            raise UsageError(
                f"--{name.replace('_', '-')} is about measuring.",
                "A receipt is printed and drawn again, not measured.",
                "Give the bundle's folder, or leave the option out.",
            )


def _layers_alone(
    bundle: Path, where: Where, options: LayerOptions, html: Path | None, png: Path | None, as_json: bool
) -> None:
    """Time and show layers without whole calls."""
    from ..profiles.measure.layer_timing import SCHEMA

    with Bars() as bars:
        profiles = time_layers(Bundle.open(bundle), where, options, bars)
    written = write_layer_profiles(f"Layers of {bundle.resolve().name}", profiles, html, png)
    if as_json:
        print_json({"schema": SCHEMA, "components": [profile.to_json() for profile in profiles]})
        return
    print_layer_profiles(profiles, options.top)
    for path in (*written, *filter(None, [options.trace])):
        typer.echo(f"Written: {path}")


def parse_sizes(option: str, text: str) -> list[int]:
    """Sizes of ``1,8,32``; UsageError otherwise."""
    sizes = [part.strip() for part in text.split(",")]
    if not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise UsageError(f"{option} {text!r} is not a list of sizes.", "", f"Write {option} 1,8,32.")
    return [int(size) for size in sizes]


def _export(
    result: Profile,
    others: list[Profile],
    html: Path | None,
    png: Path | None,
    csv: Path | None,
    as_json: bool,
) -> None:
    """Everything that is written or printed of a profile; ``others`` add columns to its Table 19."""
    from ..files.write import write_text
    from ..profiles.cost.table19 import merged

    if tables := [p.table19 for p in (result, *others) if p.table19 is not None]:
        result = replace(result, table19=merged(tables))
    written = []
    if csv is not None:
        from ..profiles.report.page import as_csv

        write_text(as_csv(result), csv)
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
