"""The tables that ``ivl-export profile`` prints of a profile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from .output import human_bytes, print_table

if TYPE_CHECKING:
    from ..profiles.cost.flops import ComponentCost
    from ..profiles.cost.table19 import Row, Table19
    from ..profiles.measure.cases import Case
    from ..profiles.measure.receipt import Profile

_TIMES = ("batch", "tokens", "p50", "p90", "p95", "p99", "items/s", "calls", "steady", "floor", "of it")
_TITLES = {
    "component": "Components alone, times in ms",
    "chained": "Chained, times in ms",
    "host": "Work outside the engines, times in ms",
    "baseline": "PyTorch modules with the same weights, times in ms",
}


def print_profile(result: Profile) -> None:
    """All tables of a profile."""
    _about(result)
    for kind in _TITLES:
        _cases(result, kind)
    _ceilings(result)
    _costs(result)
    if result.table19 is not None:
        _table19(result.table19)
    for note in result.notes:
        typer.echo(note)


def _about(result: Profile) -> None:
    machine, settings, clocks = result.machine, result.settings, result.clocks
    engines = f"{settings.backend}{f'-{settings.target}' if settings.target else ''}"
    threads = f", {settings.threads} threads" if settings.threads else ""
    mhz = [value for value in (clocks.cpu_mhz_before, clocks.cpu_mhz_after) if value is not None]
    start = result.startup
    print_table(
        f"Profile of {result.subject.name}",
        ("", ""),
        [
            ("model", f"{result.subject.model}, {result.subject.parameters:,} parameters"),
            ("engines", f"{result.subject.recipe} on {engines}{threads}"),
            ("CPU", f"{machine.cpu}, {machine.cores} cores, {_bytes(machine.memory_bytes)} of memory"),
            ("CPU clock before and after", " and ".join(f"{value:.0f} MHz" for value in mhz) or None),
            *[("GPU", f"{gpu.name}, {gpu.memory_mib} MiB, driver {gpu.driver}") for gpu in machine.gpus],
            *[("while measured", gpu.text) for gpu in clocks.gpus],
            ("load average before", machine.load_average),
            ("first request", f"{start.first_request_ms:.0f} ms: {start.boundary}"),
            ("opening", [f"{name} {seconds:.2f} s" for name, seconds in start.load_seconds.items()]),
            ("first call", [f"{name} {ms:.1f} ms" for name, ms in start.first_call_ms.items()]),
            ("peak memory of the process", _bytes(result.peak_memory_bytes)),
            *(
                [("peak memory of the GPU", _bytes(result.peak_device_bytes))]
                if result.peak_device_bytes is not None
                else []
            ),
        ],
    )


def _bytes(size: int | None) -> str:
    return "unknown" if size is None else human_bytes(size)


def _cases(result: Profile, kind: str) -> None:
    cases = result.of_kind(kind)
    if not cases:
        return
    from ..profiles.measure.chat_latency import token_ms

    chained = kind == "chained"
    rows = [
        (
            _call(case),
            *_times(case),
            *((case.components_ms, case.rest_ms) if chained else ()),
        )
        for case in cases
    ]
    first = "component" if kind in ("component", "baseline") else "call"
    print_table(_TITLES[kind], (first, *_TIMES, *(("parts", "rest") if chained else ())), rows)
    if chained:
        typer.echo("parts: time in the components, mean of all calls; rest: the other time of a call")
    typer.echo(f"items: {', '.join(dict.fromkeys(case.unit for case in cases))}")
    if any("prompt" in case.sizes for case in cases):
        typer.echo("tokens of a caption or an answer: its prompt + new ones")
    if any("past" in case.sizes for case in cases):
        typer.echo("tokens of a step: those in its past + new ones")
    if chained and (ms := token_ms(cases)) is not None:
        typer.echo(f"each further token of an answer: {ms:.3g} ms (answer less next question)")
    _footnotes(result, cases)


def _times(case: Case) -> tuple[object, ...]:
    s = case.measurement.summary
    floor = case.floor.ms if case.floor else None
    share = None if case.of_floor is None else f"{case.of_floor:.0%}"
    times = (s.p50_ms, s.p90_ms, s.p95_ms, s.p99_ms)
    return (
        case.batch, tokens(case.sizes), *times, case.per_second,
        s.samples, case.measurement.stable, floor, share,
    )  # fmt: skip


def tokens(sizes: dict[str, int]) -> str | None:
    """The lengths of a case: ``8`` of a text, ``15+1`` of a step (past + new) or a caption (prompt + new)."""
    for new, before in (("text", "past"), ("new_tokens", "prompt"), ("tokens", "")):
        if new in sizes:
            return f"{sizes[before]}+{sizes[new]}" if before in sizes else str(sizes[new])
    return None


def _call(case: Case) -> str:
    return case.call.replace("InternVL-", "")


def _footnotes(result: Profile, cases: tuple[Case, ...]) -> None:
    """The boundaries of the times, and the meaning of an unsteady row."""
    boundaries: dict[str, list[str]] = {}
    for case in cases:
        clock = "" if case.clock == "host clock" else f" ({case.clock})"
        names = boundaries.setdefault(case.boundary + clock, [])
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


def _ceilings(result: Profile) -> None:
    ceilings = result.ceilings
    if ceilings is None:
        return
    from ..profiles.cost.gpus import of_driver

    published = of_driver(ceilings.device)
    rows: list[tuple[object, ...]] = []
    for product in ceilings.products:
        peak = published.tflops(product.kind) if published else None
        rows.append(
            (f"products, {product.kind}", f"{product.gflops:.4g} GFLOP/s", peak and f"{peak:.4g} TFLOP/s",
             f"{product.by}, {product.side} x {product.side}")
        )  # fmt: skip
    for copied in ceilings.copies:
        memory = published.memory_gbps if published else None
        rows.append(
            (f"copying {human_bytes(copied.nbytes)}", f"{copied.gbps:.4g} GB/s", memory and f"{memory} GB/s",
             "read and written")
        )  # fmt: skip
    print_table(f"Ceilings of the {ceilings.device}", ("", "measured", "published", "by"), rows)
    typer.echo(
        "floor: all products at their ceiling, or all bytes at that of copying, whichever takes longer; "
        "of it: the floor's share of the median"
    )
    typer.echo("")


def _costs(result: Profile) -> None:
    if not result.costs:
        return
    rows = []
    for case in result.of_kind("component"):
        cost = result.cost(case)
        if cost is not None:
            rate = cost.flops / case.measurement.summary.p50_ms / 1e6
            moved = human_bytes(cost.weight_bytes), human_bytes(cost.input_bytes + cost.output_bytes)
            work = (cost.macs / 1e9, cost.flops / 1e9, *moved, rate)
            rows.append((case.name, case.batch, tokens(case.sizes), *work))
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
    from ..profiles.cost.table19 import SOURCE, SOURCE_11

    def cells(row: Row | None) -> tuple[object, ...]:
        if row is None:
            return (None,) * 5
        return row.vit_ms, row.qllama_image_ms, row.qllama_text_ms, row.total_ms, row.pairs_per_s

    machines = {column.machine for column in table.columns}
    several = len(machines) > 1
    rows: list[tuple[object, ...]] = []
    for line in table.lines:
        head: tuple[object, ...] = (line.model, line.method.removeprefix("InternVL-"), line.image_size)
        if line.paper is not None:
            rows.append((*head, "paper: A100 bf16", 128, *cells(line.paper), None))
            head = ("", "", "")
        if not any(line.measured):
            rows.append((*head, "here", None, *cells(None), None))
            continue
        for column, row, ratio in zip(table.columns, line.measured, line.ratios, strict=True):
            if row is not None or line.paper is not None:
                who = f"{column.backend} {column.precision}{f', {column.machine}' if several else ''}"
                rows.append((*head, who, column.batch, *cells(row), ratio and f"{ratio:.2f}x"))
                head = ("", "", "")
    print_table(
        "Table 19: time of one image-text pair, InternVL-C and InternVL-G",
        (
            "model", "", "pixels", "by", "batch", "ViT ms", "image ms", "text ms",
            "total ms", "pairs/s", "x PyTorch",
        ),
        rows,
    )  # fmt: skip
    typer.echo(f"paper: {SOURCE}")
    typer.echo("image, text: QLLaMA's; total: their sum with the ViT")
    typer.echo("x PyTorch: times as fast as the PyTorch bf16 baseline of the same run, machine and batch")
    if machines and not several:
        typer.echo(f"here: {next(iter(machines))}")
    columns = [f"{c.backend} {c.precision}{f', {c.machine}' if several else ''}" for c in table.rate_columns]
    print_table(
        "Table 11: images per second of the vision component",
        ("model", "pixels", "batch", "paper: A100 bf16", *columns),
        [(rate.model, rate.image_size, rate.batch, rate.paper, *rate.measured) for rate in table.rates],
    )
    typer.echo(f"paper: {SOURCE_11}")
    for note in table.notes:
        typer.echo(note)
