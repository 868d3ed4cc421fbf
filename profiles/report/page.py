"""A profile as a self-contained HTML page (no scripts, no network) or as CSV, and a page of its layers."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from html import escape

from ..cost.table19 import BATCH, SOURCE, SOURCE_11, Row, Table19
from ..measure.cases import Case
from ..measure.layer_profile import LayerProfile
from ..measure.receipt import Profile
from .charts import charts
from .drawing import number
from .html import Cell, document, figures, table
from .treemap import layer_time_map

_KINDS = {
    "component": "Components alone",
    "chained": "Chained calls",
    "host": "Outside the engines",
    "baseline": "PyTorch modules with the same weights",
}


def page(profile: Profile) -> str:
    """The whole HTML document."""
    notes = "".join(f"<p>{escape(note)}</p>" for note in profile.notes)
    return document(
        f"Profile of {profile.subject.name}",
        f"""<p>{escape(_subtitle(profile))}</p>
{_facts(profile)}
{figures(charts(profile))}
{"".join(_cases(profile, kind) for kind in _KINDS)}
{_ceilings(profile)}
{_table19(profile.table19) if profile.table19 else ""}
{notes}""",
    )


def _subtitle(profile: Profile) -> str:
    subject, settings = profile.subject, profile.settings
    pixels = f" at {subject.image_size} pixels" if subject.image_size else ""
    return (
        f"{subject.model}, {subject.parameters:,} parameters{pixels}, {subject.recipe} on "
        f"{settings.backend}{f' ({settings.target})' if settings.target else ''}; measured {profile.created}"
    )


def _facts(profile: Profile) -> str:
    machine, start, clocks = profile.machine, profile.startup, profile.clocks
    mhz = [f"{value:.0f} MHz" for value in (clocks.cpu_mhz_before, clocks.cpu_mhz_after) if value]
    rows: list[tuple[Cell, ...]] = [
        ("threads", profile.settings.threads or "as the backend chooses"),
        ("CPU", f"{machine.cpu}, {machine.cores} cores"),
        ("CPU clock before and after", " and ".join(mhz)),
        *(("GPU", f"{gpu.name}, {gpu.memory_mib:,} MiB, driver {gpu.driver}") for gpu in machine.gpus),
        *(("GPU while measured", gpu.text) for gpu in clocks.gpus),
        ("system", f"{machine.os}; load average {_load(machine.load_average)} before"),
        ("first request", f"{number(start.first_request_ms)} ms: {start.boundary}"),
        ("opening", ", ".join(f"{n} {number(s * 1e3)} ms" for n, s in start.load_seconds.items())),
        ("first call", ", ".join(f"{n} {number(ms)} ms" for n, ms in start.first_call_ms.items())),
        ("peak memory of the process", _gigabytes(profile.peak_memory_bytes)),
        *(
            [("peak memory of the GPU", _gigabytes(profile.peak_device_bytes))]
            if profile.peak_device_bytes is not None
            else []
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in profile.versions.items())),
        ("commit", profile.commit or "unknown"),
        ("bundle", f"sha256 of its manifest {profile.subject.manifest_sha256}"),
    ]
    return f'<div class="facts">{table("", ("", ""), rows)}</div>'


def _load(average: float | None) -> str:
    return "unknown" if average is None else f"{average:.2f}"


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.2f} GB"


def _cases(profile: Profile, kind: str) -> str:
    cases = profile.of_kind(kind)
    if not cases:
        return ""
    heads = (
        "case", "batch", "sizes", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "per second", "calls", "steady",
        "floor ms", "of it",
    )  # fmt: skip
    boundaries = dict.fromkeys(case.boundary for case in cases)
    notes = ""
    for boundary in boundaries:
        names = dict.fromkeys(case.call for case in cases if case.boundary == boundary)
        notes += f"<p>Timed ({escape(', '.join(names))}): {escape(boundary)}.</p>"
    return table(_KINDS[kind], heads, [_case(case) for case in cases]) + notes


def _case(case: Case) -> tuple[Cell, ...]:
    s = case.measurement.summary
    sizes = ", ".join(f"{axis} {size}" for axis, size in case.sizes.items() if axis not in ("batch", "total"))
    return (
        case.call, case.batch, sizes, s.p50_ms, s.p90_ms, s.p95_ms, s.p99_ms,
        f"{number(case.per_second)} {case.unit}", s.samples, "yes" if case.measurement.stable else "no",
        case.floor.ms if case.floor else None, None if case.of_floor is None else f"{case.of_floor:.0%}",
    )  # fmt: skip


def _ceilings(profile: Profile) -> str:
    ceilings = profile.ceilings
    if ceilings is None:
        return ""
    products = [(f"products, {p.kind}", f"{number(p.gflops)} GFLOP/s", p.by) for p in ceilings.products]
    copies = [
        (f"copying {c.nbytes / 2**20:.0f} MiB", f"{number(c.gbps)} GB/s", "read and written")
        for c in ceilings.copies
    ]
    note = (
        "<p>A floor is all products at their ceiling, or all bytes at that of copying, whichever takes "
        "longer; of it: the floor's share of the median.</p>"
    )
    return table(f"Ceilings of the {ceilings.device}", ("", "measured", "by"), [*products, *copies]) + note


def _table19(costs: Table19) -> str:
    rows: list[tuple[Cell, ...]] = []
    for line in costs.lines:
        head = (line.model, line.method, line.image_size)
        entries: list[tuple[str, int, Row | None, float | None]] = []
        if line.paper:
            entries.append(("paper: A100, bf16", BATCH, line.paper, None))
        entries += [
            (f"{c.backend} {c.precision}, {c.machine}", c.batch, row, ratio)
            for c, row, ratio in zip(costs.columns, line.measured, line.ratios, strict=True)
            if row is not None
        ]
        if not any(line.measured):
            entries.append(("here", 0, None, None))
        for who, batch, row, ratio in entries:
            cells = (
                (row.vit_ms, row.qllama_image_ms, row.qllama_text_ms, row.total_ms, row.pairs_per_s)
                if row
                else (None,) * 5
            )
            rows.append((*head, who, batch or None, *cells, f"{ratio:.2f}x" if ratio else None))
    heads = (
        "model", "method", "pixels", "by", "batch", "ViT ms", "QLLaMA image ms", "QLLaMA text ms", "total ms",
        "pairs/s", "over PyTorch bf16 here",
    )  # fmt: skip
    columns = [f"{c.backend} {c.precision}, {c.machine}, images/s" for c in costs.rate_columns]
    rates = [(r.model, r.image_size, r.batch, r.paper, *r.measured) for r in costs.rates]
    rate_heads = ("model", "pixels", "batch", "paper: A100, images/s", *columns)
    notes = "".join(f"<p>{escape(note)}</p>" for note in (SOURCE, *costs.notes))
    return (
        table("Table 19 in numbers", heads, rows)
        + notes
        + table("Table 11: images per second of the vision component", rate_heads, rates)
        + f"<p>{escape(SOURCE_11)}</p>"
    )


TOP = 20


def layer_page(title: str, profiles: Sequence[LayerProfile]) -> str:
    """The HTML document of ``profiles``, the slowest :data:`TOP` layers of each."""
    drawing = layer_time_map(profiles)
    charts = figures([drawing]) if drawing else ""
    return document(title, charts + "".join(_component(of) for of in profiles))


def _component(of: LayerProfile) -> str:
    sizes = ", ".join(f"{axis} {size}" for axis, size in of.sizes.items())
    call = f"{of.call_ms:.3g} ms a call, mean of the quicker half of {of.calls} calls"
    head = f"<h2>{escape(of.component)} on {escape(of.backend)}</h2><p>{escape(sizes)}: {call}</p>"

    def share(ms: float) -> str:
        return f"{ms / of.call_ms:.1%}" if of.call_ms else ""

    slowest = [(la.name, la.op, la.ms, share(la.ms)) for la in of.layers[:TOP]]
    tables = [table("", ("slowest layers", "operator", "ms", "share of the call"), slowest)]
    for name, sums in (
        ("operator", of.by(lambda layer: layer.op)),
        ("layer type", of.by(lambda layer: layer.type)),
        ("block", of.by(lambda layer: layer.block)),
    ):
        shown = [(key, ms, share(ms)) for key, ms in list(sums.items())[:TOP]]
        others = sum(list(sums.values())[TOP:])
        shown += [(f"{len(sums) - TOP} others", others, share(others))] if len(sums) > TOP else []
        shown.append(("in no layer", of.rest_ms, share(of.rest_ms)))
        tables.append(table("", (f"by {name}", "ms", "share of the call"), shown))
    return head + "".join(tables)


COLUMNS = (
    "bundle", "model", "kind", "name", "backend", "precision", "batch", "sizes", "unit", "p50_ms", "p90_ms",
    "p95_ms", "p99_ms", "mean_ms", "min_ms", "max_ms", "items_per_s", "samples", "stable", "floor_ms",
    "of_floor", "bound", "gmac", "weight_bytes", "clock", "boundary",
)  # fmt: skip


def as_csv(profile: Profile) -> str:
    """A profile's cases as CSV, units in the heads; inapplicable and missing values are empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for case in profile.cases:
        s, floor, cost = case.measurement.summary, case.floor, profile.cost(case)
        sizes = " ".join(f"{name}={size}" for name, size in case.sizes.items())
        writer.writerow(
            (
                profile.subject.name, profile.subject.model, case.kind, case.name, case.backend,
                case.precision, case.batch, sizes, case.unit, s.p50_ms, s.p90_ms, s.p95_ms, s.p99_ms,
                s.mean_ms, s.min_ms, s.max_ms, case.per_second, s.samples, case.measurement.stable,
                floor.ms if floor else None, case.of_floor, floor.bound if floor else None,
                cost.macs / 1e9 if cost else None, cost.weight_bytes if cost else None, case.clock,
                case.boundary,
            )
        )  # fmt: skip
    return file.getvalue()
