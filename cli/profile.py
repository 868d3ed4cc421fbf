"""``ivl-export profile``: latency of a bundle on this machine, its FLOPs and bytes, its layers, Table 19."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bundle import Bundle
from ..errors import UsageError
from ..settings import SWITCH, Setting, Table, path, read_settings, switch, text, whole
from .command import SettingsOpt, command
from .options import THREADS, BackendOpt, a_bundle
from .output import check_writable, print_json
from .profile_layers import LayerOptions, Where, print_layer_profiles, time_layers, write_layer_profiles
from .progress import Bars

if TYPE_CHECKING:
    from ..profiles.measure.layer_profile import LayerProfile
    from ..profiles.measure.receipt import Profile

app = typer.Typer(add_completion=False)

ON_RECEIPTS = frozenset({"subject", "join", "html", "png", "csv", "as_json"})
"""Options and settings that a receipt takes; the others are for measuring."""
PROFILE_OPTIONS = ("target", "threads", "device", "lengths", "baseline", "checkpoint", "ceilings")
"""Settings that are fields of :class:`..profiles.measure.bundle_profile.Options`."""


def _lengths(value: object) -> tuple[int, ...]:
    return tuple(parse_sizes("-O lengths", text(value)))


SETTINGS: Table = {
    "target": Setting("sm89, sm120 or another", "which engines of the backend to use", text),
    "device": Setting("cuda:0 or another", "where the backend computes; else its default", text),
    **THREADS,
    "lengths": Setting("8,16,32", "more text lengths to time", _lengths),
    "csv": Setting("a file: cases.csv", "write a line for each timed case there", path),
    "png": Setting("a folder: charts", "write each chart there as a PNG file", path),
    "baseline": Setting(
        SWITCH, "with --table19, time the PyTorch modules too; else true", switch, default=True
    ),
    "checkpoint": Setting(
        "a path: InternVL-14B", "weights for that baseline; else the bundle's source", path
    ),
    "ceilings": Setting(SWITCH, "measure the machine's best rates; else true", switch, default=True),
    "latency": Setting(
        SWITCH, "time whole calls; false with --layers times layers alone", switch, default=True
    ),
    "component": Setting("vision or another", "with --layers, time this component only", text),
    "calls": Setting(
        "10, 1 or more", "with --layers, calls timed layer by layer; else 10", whole(1), default=10
    ),
    "top": Setting(
        "12, 1 or more", "with --layers, number of slowest layers printed; else 12", whole(1), default=12
    ),
    "trace": Setting(
        "a file: trace.json", "with --layers, write a timeline for chrome://tracing or Perfetto there", path
    ),
}


@app.command(cls=command(SETTINGS, {"--beside": "--join"}))
def profile(
    context: typer.Context,
    subject: Annotated[
        Path,
        typer.Argument(
            help="A bundle's folder; or a receipt of --out, which is printed and drawn.",
            metavar="BUNDLE",
            show_default=False,
            callback=a_bundle,
        ),
    ],
    batch: Annotated[
        str | None,
        typer.Option(help="Batch sizes, joined by commas.", show_default="1,8; with --table19 1,128"),
    ] = None,
    backend: BackendOpt = "onnxruntime",
    seconds: Annotated[
        float, typer.Option(min=0.01, help="Time limit of one measurement; it ends sooner when stable.")
    ] = 3.0,
    table19: Annotated[
        bool, typer.Option("--table19", help="The paper's cost tables, with the PyTorch bf16 baseline.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Time each layer too, by the backend's own profiler.")
    ] = False,
    join: Annotated[
        list[Path] | None,
        typer.Option(help="Add the columns of another receipt's Table 19 (repeatable)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the receipt, with raw samples, to this file.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts to this file.")] = None,
    settings: SettingsOpt = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")] = False,
) -> None:
    """Time a bundle's components and chained calls on this machine; count FLOPs and bytes from its graphs.

    --layers adds where the time of a call is spent: slowest layers, operators, layer types, blocks.
    """
    values = read_settings(SETTINGS, settings or ())
    csv, png, trace = values.get("csv"), values.get("png"), values.get("trace")
    component = values.get("component")
    for name, file in (("--out", out), ("--html", html), ("-O csv", csv), ("-O trace", trace)):
        check_writable(name, file)
    if subject.is_file():
        _check_receipt_only(context, settings or ())
        from ..profiles.measure.receipt import read

        _export(read(subject), [read(other) for other in join or ()], html, png, csv, as_json)
        return
    batches = None if batch is None else parse_sizes("--batch", batch)
    if "checkpoint" in values and not (table19 and values["baseline"]):
        raise UsageError(
            "-O checkpoint is for the baseline.", "No baseline is timed without --table19.", "Add --table19."
        )
    if not layers and (component is not None or trace is not None or not values["latency"]):
        raise UsageError("-O component, -O trace and -O latency=false need --layers.", "", "Add --layers.")
    layer_options = LayerOptions(component, values["calls"], values["top"], trace)
    engine = (values.get("threads"), values.get("target"), values.get("device"))
    where: Where = (backend, batches[0] if batches else 1, *engine)
    if not values["latency"]:
        if table19 or out is not None or csv is not None:
            raise UsageError(
                "--table19, --out and -O csv need the times of whole calls.",
                "",
                "Leave -O latency=false out.",
            )
        _layers_alone(subject, where, layer_options, html, png, as_json)
        return
    from ..profiles.measure import bundle_profile, receipt
    from ..profiles.measure.timing import StopRule

    others = [receipt.read(other) for other in join or ()]
    options = bundle_profile.Options(
        backend,
        batches=batches,
        rule=StopRule(seconds),
        table19=table19,
        **{name: values[name] for name in PROFILE_OPTIONS if name in values},
    )
    profiles: list[LayerProfile] = []
    with Bars() as bars:
        result = bundle_profile.profile(subject, options, bars)
        if layers:
            where = (backend, result.settings.batches[0], *engine)
            profiles = time_layers(Bundle.open(subject), where, layer_options, bars)
            result = replace(result, layers=tuple(replace(p, trace=()) for p in profiles))
    if out is not None:
        receipt.write(result.to_json(), out)
    _export(result, others, html, png, csv, as_json)
    if not as_json:
        if layers:
            print_layer_profiles(profiles, layer_options.top)
        for label, file in (("Receipt with raw samples", out), ("Written", trace)):
            if file is not None:
                typer.echo(f"{label}: {file}")


def _check_receipt_only(context: typer.Context, settings: Iterable[str]) -> None:
    """UsageError if an option or setting was given that needs a bundle to measure."""
    names = {f"-O {key}": key for key in (setting.partition("=")[0] for setting in settings)}
    for name in context.params:
        source = context.get_parameter_source(name)
        if name != "settings" and source is not None and source.name == "COMMANDLINE":
            names[f"--{name}"] = name
    for option, name in names.items():
        if name not in ON_RECEIPTS:
            raise UsageError(
                f"{option} is for measuring.",
                "A receipt is printed and drawn, not measured.",
                "Give the bundle's folder, or leave the option out.",
            )


def _layers_alone(
    bundle: Path, where: Where, options: LayerOptions, html: Path | None, png: Path | None, as_json: bool
) -> None:
    """Time and show layers without whole calls."""
    from ..profiles.measure.layer_timing import SCHEMA

    with Bars() as bars:
        profiles = time_layers(Bundle.open(bundle), where, options, bars)
    files = write_layer_profiles(f"Layers of {bundle.resolve().name}", profiles, html, png)
    if as_json:
        print_json({"schema": SCHEMA, "components": [profile.to_json() for profile in profiles]})
        return
    print_layer_profiles(profiles, options.top)
    for file in (*files, *filter(None, [options.trace])):
        typer.echo(f"Written: {file}")


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
    """Write and print a profile; ``others`` add columns to its Table 19."""
    from ..files.write import write_text
    from ..profiles.cost.table19 import merged

    if tables := [p.table19 for p in (result, *others) if p.table19 is not None]:
        result = replace(result, table19=merged(tables))
    files = []
    if csv is not None:
        from ..profiles.report.page import as_csv

        write_text(as_csv(result), csv)
        files.append(csv)
    if html is not None:
        from ..profiles.report.page import page

        write_text(page(result), html)
        files.append(html)
    if png is not None:
        from ..profiles.report.charts import charts
        from ..profiles.report.png import write_drawings

        files += write_drawings(charts(result), png)
    if as_json:
        print_json(result.to_json())
        return
    from .profile_tables import print_profile

    print_profile(result)
    for file in files:
        typer.echo(f"Written: {file}")
