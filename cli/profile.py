"""``ivl-export profile``: times of a bundle on this machine, FLOPs and bytes of its graphs, Table 19."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .output import human_bytes, print_json, print_table

if TYPE_CHECKING:
    from ..profiles.flops import ComponentCost
    from ..profiles.latency import Case, Progress
    from ..profiles.report import Profile
    from ..profiles.table19 import Row, Table19

app = typer.Typer(add_completion=False)


@app.command()
def profile(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes with commas between.", show_default="1,8")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Whose engines: onnxruntime, tensorrt-rtx, ...")
    ] = "onnxruntime",
    target: Annotated[str | None, typer.Option(help="Which engines of the backend: sm89, ...")] = None,
    seconds: Annotated[
        float, typer.Option(min=0.01, help="Time limit of one measurement; it ends sooner when stable.")
    ] = 3.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of an engine.")] = None,
    table19: Annotated[
        bool, typer.Option("--table19", help="Print the paper's cost table for any model.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the receipt, with raw samples, here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")] = False,
) -> None:
    """Time a bundle's components and chained calls here; count FLOPs and bytes from its graphs."""
    batches = None if batch is None else parse_batches(batch)
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UsageError(
            f"--out {out} is no file that can be written.",
            "It is a folder, or its folder does not exist.",
            "Name a file in a folder that is there.",
        )
    from ..profiles import report
    from ..profiles.measure import StopRule

    with _progress() as progress:
        result = report.profile(
            bundle, backend, target, threads, batches, StopRule(seconds), table19, progress
        )
    receipt = result.to_json() if as_json or out is not None else None
    if out is not None:
        report.write(receipt, out)
    if as_json:
        print_json(receipt)
        return
    _about(result)
    _components(result)
    _chained(result)
    _costs(result)
    if result.table19 is not None:
        _table19(result.table19)
    for note in result.notes:
        typer.echo(note)
    if out is not None:
        typer.echo(f"Receipt with raw samples: {out}")


def parse_batches(text: str) -> list[int]:
    """Batch sizes of ``1,8,32``; UsageError otherwise."""
    sizes = [part.strip() for part in text.split(",")]
    if not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise UsageError(f"--batch {text!r} is no list of batch sizes.", "", "Write --batch 1,8,32.")
    return [int(size) for size in sizes]


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar on stderr where that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("loading", total=None)

        def progress(case: str, done: int, total: int) -> None:
            bar.update(task, description=case, completed=done, total=total)

        yield progress


def _about(result: Profile) -> None:
    machine, settings = result.machine, result.settings
    memory = None if machine.memory_bytes is None else human_bytes(machine.memory_bytes)
    peak = None if result.peak_memory_bytes is None else human_bytes(result.peak_memory_bytes)
    engines = f"{settings.backend}{f'-{settings.target}' if settings.target else ''}"
    threads = f", {settings.threads} threads" if settings.threads else ""
    print_table(
        f"Profile of {result.subject.name}",
        ("", ""),
        [
            ("model", f"{result.subject.model}, {result.subject.parameters:,} parameters"),
            ("engines", f"{result.subject.precision} on {engines}{threads}"),
            ("CPU", f"{machine.cpu}, {machine.cores} cores, {memory or 'unknown'} of memory"),
            *[("GPU", f"{gpu.name}, {gpu.memory_mib} MiB, driver {gpu.driver}") for gpu in machine.gpus],
            ("load average before", machine.load_average),
            ("loading", [f"{name} {seconds:.2f} s" for name, seconds in result.load_seconds.items()]),
            ("peak memory of the process", peak),
        ],
    )


_TIMES = ("batch", "tokens", "p50", "p90", "p99", "per second", "calls", "steady")


def _times(case: Case) -> tuple[object, ...]:
    s = case.measurement.summary
    rate = f"{case.per_second:.4g} {case.unit}"
    where = (case.batch, _tokens(case.sizes))
    return (*where, s.p50_ms, s.p90_ms, s.p99_ms, rate, s.samples, case.measurement.stable)


def _tokens(sizes: dict[str, int]) -> str | None:
    """The lengths in play: of a text, of a step's past and itself, of a prompt and its caption."""
    for new, before in (("text", "past"), ("new_tokens", "prompt"), ("tokens", "")):
        if new in sizes:
            return f"{sizes[before]}+{sizes[new]}" if before in sizes else str(sizes[new])
    return None


def _components(result: Profile) -> None:
    cases = [case for case in result.cases if case.kind == "component"]
    rows = [(case.name, *_times(case)) for case in cases]
    print_table("Components alone, times in ms", ("component", *_TIMES), rows)
    if any("past" in case.sizes for case in cases):
        typer.echo("tokens of a step: those in its past + new ones")
    _footnotes(result, cases)


def _chained(result: Profile) -> None:
    cases = [case for case in result.cases if case.kind == "chained"]
    if cases:
        rows = [
            (_call(case), *_times(case), case.components_ms, case.mean_ms - case.components_ms)
            for case in cases
        ]
        print_table("Chained, times in ms", ("call", *_TIMES, "parts", "rest"), rows)
        typer.echo("parts: in the components, mean of all calls; rest: the chain's own time beside them")
        if any("prompt" in case.sizes for case in cases):
            typer.echo("tokens of a caption: its prompt + new ones")
        _footnotes(result, cases)


def _call(case: Case) -> str:
    return case.name.replace("InternVL-", "")


def _footnotes(result: Profile, cases: list[Case]) -> None:
    """What was timed, and what an unsteady row means."""
    boundaries: dict[str, list[str]] = {}
    for case in cases:
        names = boundaries.setdefault(case.boundary, [])
        names += [] if _call(case) in names else [_call(case)]
    for boundary, names in boundaries.items():
        which = f" {', '.join(names)}" if len(boundaries) > 1 else ""
        typer.echo(f"timed{which}: {boundary}")
    if not all(case.measurement.stable for case in cases):
        tolerance = result.settings.stop.tolerance
        typer.echo(
            f"not steady: when the limit came, the medians of the last windows still differed by more than "
            f"{tolerance:.0%}; the figures are those of all calls"
        )
    typer.echo("")


def _costs(result: Profile) -> None:
    if not result.costs:
        return
    rows = []
    for case in result.cases:
        cost = result.cost(case) if case.kind == "component" else None
        if cost is not None:
            rate = cost.flops / case.measurement.summary.p50_ms / 1e6
            moved = human_bytes(cost.weight_bytes), human_bytes(cost.input_bytes + cost.output_bytes)
            work = (cost.macs / 1e9, cost.flops / 1e9, *moved, rate)
            rows.append((case.name, case.batch, _tokens(case.sizes), *work))
    columns = ("component", "batch", "tokens", "GMAC", "GFLOP", "weights read", "in and out", "GFLOP/s")
    print_table("Work of one call, counted from the graphs", columns, rows)
    first = {cost.component: cost for cost in reversed(result.costs)}
    heads = ("component", "layers", "count", "MMAC", "share", "weights")
    layers = [
        row for name in dict.fromkeys(c.component for c in result.costs) for row in _layers(first[name])
    ]
    print_table("By layer type, batch and tokens as in the component's first line above", heads, layers)


def _layers(cost: ComponentCost) -> list[tuple[object, ...]]:
    """A component's layer types, the largest first; those below 2% of the work together."""
    layers = sorted(cost.layers, key=lambda layer: -layer.macs)
    large = [layer for layer in layers if layer.macs >= 0.02 * cost.macs]
    rest = layers[len(large) :]
    names = [(layer.layer.rpartition("layers.*.")[2], layer) for layer in large]
    rows = [(name, la.count, la.macs, la.weight_bytes) for name, la in names]
    if rest:
        sums = [
            sum(values) for values in zip(*((r.count, r.macs, r.weight_bytes) for r in rest), strict=True)
        ]
        rows.append((f"{len(rest)} smaller types", *sums))
    return [
        (
            cost.component if i == 0 else "",
            name,
            count,
            macs / 1e6,
            f"{macs / cost.macs:.1%}",
            human_bytes(size),
        )
        for i, (name, count, macs, size) in enumerate(rows)
    ]


def _table19(table: Table19) -> None:
    from ..profiles.table19 import SOURCE

    def cells(row: Row | None) -> tuple[object, ...]:
        if row is None:
            return (None,) * 5
        return row.vit_ms, row.qllama_image_ms, row.qllama_text_ms, row.total_ms, row.pairs_per_s

    here = "here" if table.batch is None else f"here, batch {table.batch}"
    rows: list[tuple[object, ...]] = []
    for paper, mine in zip(table.paper, table.measured, strict=True):
        rows.append((paper.method, paper.image_size, "paper", *cells(paper)))
        rows.append(("", "", here, *cells(mine)))
    columns = ("method", "pixels", "", "ViT ms", "QLLaMA image ms", "QLLaMA text ms", "total ms", "pairs/s")
    print_table("Table 19: time of one image-text pair", columns, rows)
    typer.echo(f"paper: {SOURCE}")
    for note in table.notes:
        typer.echo(note)
