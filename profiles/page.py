"""A profile as one page that needs nothing else: no scripts, no network, light or dark as preferred."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .cases import Case
from .charts import charts
from .drawing import number
from .html import document
from .receipt import Profile
from .svg import style, svg
from .table19 import BATCH, SOURCE, SOURCE_11, Row, Table19

_CSS = """
:root{color-scheme:light dark}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,sans-serif}
main{max-width:1000px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:36px 0 6px}
p,figcaption,.muted{color:var(--muted)}p{margin:4px 0}
figure{margin:0}svg{width:100%;height:auto;display:block}svg text{font-family:system-ui,sans-serif}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;margin:6px 0}
th,td{padding:3px 10px 3px 0;text-align:left;border-bottom:1px solid var(--grid);white-space:nowrap}
.facts td{white-space:normal;vertical-align:top}.facts td:first-child{white-space:nowrap}
th{color:var(--muted);font-weight:600}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
@media print{body{background:#fff}}
"""
_KINDS = {
    "component": "Components alone",
    "chained": "Chained calls",
    "host": "Beside the engines",
    "baseline": "PyTorch modules with the same weights",
}
Cell = str | float | int | None


def page(profile: Profile) -> str:
    """The whole HTML document."""
    name = escape(profile.subject.name)
    figures = "\n".join(
        f"<h2>{escape(d.title)}</h2><figure>{svg(d)}<figcaption>{escape(d.caption)}</figcaption></figure>"
        for d in charts(profile)
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in profile.notes)
    main = f"""<h1>Profile of {name}</h1>
<p>{escape(_subtitle(profile))}</p>
{_facts(profile)}
{figures}
{"".join(_cases(profile, kind) for kind in _KINDS)}
{_ceilings(profile)}
{_table19(profile.table19) if profile.table19 else ""}
{notes}"""
    return document(f"Profile of {profile.subject.name}", _CSS + style(), main)


def _subtitle(profile: Profile) -> str:
    subject, settings = profile.subject, profile.settings
    pixels = f" at {subject.image_size} pixels" if subject.image_size else ""
    return (
        f"{subject.model}, {subject.parameters:,} parameters{pixels}, {subject.precision} on "
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
    return f'<div class="facts">{_table("", ("", ""), rows)}</div>'


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
    told = ""
    for boundary in boundaries:
        names = dict.fromkeys(case.name for case in cases if case.boundary == boundary)
        told += f"<p>Timed ({escape(', '.join(names))}): {escape(boundary)}.</p>"
    return _table(_KINDS[kind], heads, [_case(case) for case in cases]) + told


def _case(case: Case) -> tuple[Cell, ...]:
    s = case.measurement.summary
    sizes = ", ".join(f"{axis} {size}" for axis, size in case.sizes.items() if axis not in ("batch", "total"))
    return (
        case.name, case.batch, sizes, s.p50_ms, s.p90_ms, s.p95_ms, s.p99_ms,
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
    told = (
        "<p>A floor is all products at their ceiling, or all bytes at that of copying, whichever takes "
        "longer; of it: the floor's share of the median.</p>"
    )
    return _table(f"Ceilings of the {ceilings.device}", ("", "measured", "by"), [*products, *copies]) + told


def _table19(table: Table19) -> str:
    rows: list[tuple[Cell, ...]] = []
    for line in table.lines:
        head = (line.model, line.method, line.image_size)
        entries: list[tuple[str, int, Row | None, float | None]] = []
        if line.paper:
            entries.append(("paper: A100, bf16", BATCH, line.paper, None))
        entries += [
            (f"{c.backend} {c.precision}, {c.machine}", c.batch, row, ratio)
            for c, row, ratio in zip(table.columns, line.measured, line.ratios, strict=True)
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
    columns = [f"{c.backend} {c.precision}, {c.machine}, images/s" for c in table.rate_columns]
    rates = [(r.model, r.image_size, r.batch, r.paper, *r.measured) for r in table.rates]
    rate_heads = ("model", "pixels", "batch", "paper: A100, images/s", *columns)
    notes = "".join(f"<p>{escape(note)}</p>" for note in (SOURCE, *table.notes))
    return (
        _table("Table 19 in numbers", heads, rows)
        + notes
        + _table("Table 11: images per second of the vision component", rate_heads, rates)
        + f"<p>{escape(SOURCE_11)}</p>"
    )


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    cells = [list(row) for row in rows]
    numeric = [bool(cells) and all(not isinstance(row[i], str) for row in cells) for i in range(len(heads))]
    mark = [' class="n"' if n else "" for n in numeric]
    top = "".join(f"<th{m}>{escape(h)}</th>" for h, m in zip(heads, mark, strict=True)) if any(heads) else ""
    body = "".join(
        "<tr>" + "".join(f"<td{m}>{_show(c)}</td>" for c, m in zip(row, mark, strict=True)) + "</tr>"
        for row in cells
    )
    head = f"<thead><tr>{top}</tr></thead>" if top else ""
    title = f"<h2>{escape(title)}</h2>" if title else ""
    return f'{title}<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _show(cell: Cell) -> str:
    if cell is None or cell == "":
        return "-"
    return escape(cell if isinstance(cell, str) else number(float(cell)))
