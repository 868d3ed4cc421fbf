"""The charts of a profile: Table 19, roofline, latency histograms, batch sweep, layer treemaps.

Each function lays out one :class:`.drawing.Drawing`, or None where the profile has nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..cost.flops import ComponentCost
from ..cost.table19 import Row
from ..measure.cases import GRAPHS, Case
from ..measure.ceilings import Ceilings
from ..measure.receipt import Profile
from .drawing import (
    SERIES,
    Dot,
    Drawing,
    Line,
    Mark,
    Rect,
    Scale,
    Text,
    decades,
    fitted,
    legend,
    number,
    text_width,
    ticks,
)
from .treemap import time_map, work_map

WIDTH = 960.0
MIN_SAMPLES = 10
"""Fewer calls make no histogram."""
_PARTS = (("ViT", "s0"), ("QLLaMA image", "s1"), ("QLLaMA text", "s2"))


def charts(profile: Profile) -> list[Drawing]:
    """All charts that the profile has data for, in the order of the page."""
    makers: tuple[Callable[[Profile], Drawing | None], ...] = (
        table19_chart,
        roofline_chart,
        histograms,
        batch_sweep,
        work_map,
        time_map,
    )
    return [drawing for make in makers if (drawing := make(profile)) is not None]


def table19_chart(profile: Profile) -> Drawing | None:
    """Milliseconds a pair, stacked by part: the paper's row, then this machine's, line by line."""
    table = profile.table19
    if table is None:
        return None
    bars: list[tuple[str, str, Row | None]] = []
    for line in table.lines:
        head = f"{line.model.replace('InternVL-', '')} {line.method.rpartition('-')[2]}, {line.image_size} px"
        if line.paper is not None:
            bars.append((head, "paper: A100, bf16", line.paper))
            head = ""
        if not any(line.measured):
            bars.append((head, "here", None))
            continue
        for column, row in zip(table.columns, line.measured, strict=True):
            bars.append((head, f"{column.backend} {column.precision}", row))
            head = ""
    left, right, top, step = 300.0, 190.0, 40.0, 24.0
    drawing = Drawing(
        "table19",
        "Table 19: time of one image-text pair",
        "Milliseconds a pair, amortised over the batch, stacked by part. The paper's A100 and this machine "
        "are shown together, not compared.",
        WIDTH,
        top + step * len(bars) + 44,
    )
    most = max(row.total_ms or 0.0 for _, _, row in bars if row is not None)
    scale = Scale(0.0, most, left, WIDTH - right)
    bottom = top + step * len(bars)
    _vertical_grid(drawing, scale, ticks(0.0, most), top, bottom)
    drawing.add(Text((left + WIDTH - right) / 2, bottom + 36, "ms a pair", "middle", "muted"))
    legend(drawing, [(part, colour) for part, colour in _PARTS], left, 22)
    for i, (head, who, row) in enumerate(bars):
        y = top + step * i
        if head and i:
            drawing.add(Line(((8, y), (WIDTH - 8, y)), "grid"))
        drawing.add(Text(8, y + 16, head, bold=True), Text(left - 8, y + 16, who, "end", "muted"))
        _stack(drawing, scale, y, row, who)
    return drawing


def _stack(drawing: Drawing, scale: Scale, y: float, row: Row | None, who: str) -> None:
    if row is None:
        drawing.add(Text(scale(0) + 6, y + 16, "not measured", fill="muted"))
        return
    at = 0.0
    parts = (row.vit_ms, row.qllama_image_ms, row.qllama_text_ms)
    for (part, colour), ms in zip(_PARTS, parts, strict=True):
        if ms is not None:
            x = scale(at)
            drawing.add(Rect(x, y + 4, scale(at + ms) - x, 16, colour, f"{who}, {part}: {number(ms)} ms"))
            at += ms
    label = f"{number(row.total_ms or at)} ms, {number(row.pairs_per_s or 0)} pairs/s"
    drawing.add(Text(scale(at) + 6, y + 16, label))


def histograms(profile: Profile) -> Drawing | None:
    """A small histogram of every component's and chained call's samples, with its median and p99."""
    cases = [c for c in profile.cases if c.kind in ("component", "chained")]
    enough = [c for c in cases if len(c.measurement.samples_ns) >= MIN_SAMPLES]
    if not enough:
        return None
    across, cell_width, cell_height = 3, WIDTH / 3, 132.0
    left_out = len(cases) - len(enough)
    drawing = Drawing(
        "histograms",
        "Latency of single calls",
        "Calls by their milliseconds, up to the 99th percentile; lines mark the median (solid) and p99 "
        "(dashed). Grey: calls before the steady part, which do not count."
        + (f" Without {left_out} cases of fewer than {MIN_SAMPLES} calls." if left_out else ""),
        WIDTH,
        cell_height * -(-len(enough) // across) + 8,
    )
    for i, case in enumerate(enough):
        _histogram(drawing, case, (i % across) * cell_width, (i // across) * cell_height, cell_width)
    return drawing


def _histogram(drawing: Drawing, case: Case, x: float, y: float, width: float) -> None:
    left, right, top, bottom = x + 14, x + width - 14, y + 40, y + 104
    ms = np.asarray(case.measurement.samples_ns, np.float64) / 1e6
    counted, s = ms[case.measurement.steady_from :], case.measurement.summary
    low, high = float(min(ms.min(), s.min_ms)), float(max(np.quantile(ms, 0.99), s.p99_ms))
    high = high if high > low else low * 1.01 + 1e-6
    edges = np.linspace(low, high, 31)
    every, steady = (np.histogram(np.minimum(v, high), edges)[0] for v in (ms, counted))
    title = fitted(case_title(case), width - 20)
    drawing.add(Text(x + 14, y + 18, title, bold=True))
    drawing.add(
        Text(x + 14, y + 33, f"{s.samples:,} calls, p50 {number(s.p50_ms)}, p99 {number(s.p99_ms)} ms",
             fill="muted", size=11)
    )  # fmt: skip
    scale, bar = Scale(low, high, left, right), (right - left) / 30
    for i in range(30):
        for count, colour in ((int(every[i]), "axis"), (int(steady[i]), "s0")):
            if count:
                tall = max(1.0, (bottom - top) * count / int(every.max()))
                tooltip = f"{number(float(edges[i]))} to {number(float(edges[i + 1]))} ms: {count} calls"
                drawing.add(Rect(left + i * bar, bottom - tall, bar - 1, tall, colour, tooltip))
    drawing.add(Line(((left, bottom), (right, bottom)), "axis"))
    for value, dashed in ((s.p50_ms, False), (min(s.p99_ms, high), True)):
        drawing.add(Line(((scale(value), top - 3), (scale(value), bottom)), "s1", 1.5, dashed))
    drawing.add(
        Text(left, bottom + 15, f"{number(low)} ms", "start", "muted", 11),
        Text(right, bottom + 15, f"{number(high)} ms", "end", "muted", 11),
    )


def case_title(case: Case) -> str:
    """A case in a few words: its name, batch and lengths."""
    name = case.call.replace("InternVL-", "")
    if "past" in case.sizes:
        return f"{name}, batch {case.batch}, past {case.sizes['past']}"
    tokens = f", {case.sizes['text']} tokens" if "text" in case.sizes else ""
    return f"{name}, batch {case.batch}{tokens}"


def batch_sweep(profile: Profile) -> Drawing | None:
    """Throughput and median time against the batch size, a line for each component at its tuned sizes."""
    series: dict[str, list[Case]] = {}
    for case in profile.of_kind("component"):
        if case.backend.endswith(GRAPHS):
            continue  # a line for each component
        line_cases = series.setdefault(f"{case.name} ({case.unit}/s)", [])
        if all(case.batch != other.batch for other in line_cases):  # the tuned sizes come first
            line_cases.append(case)
    if len({case.batch for cases in series.values() for case in cases}) < 2:
        return None
    drawing = Drawing(
        "batches",
        "Batch sweep",
        "Components alone at the lengths their engines are tuned for; both axes are logarithmic.",
        WIDTH,
        372.0,
    )
    legend(drawing, list(zip(series, SERIES, strict=False)), 60, 22)
    panels = (
        ("items per second", lambda case: case.per_second, 60.0),
        ("median ms of a call", lambda case: case.measurement.summary.p50_ms, 60.0 + WIDTH / 2),
    )
    for unit, value, left in panels:
        _sweep(drawing, series, unit, value, left)
    return drawing


def _sweep(
    drawing: Drawing, series: dict[str, list[Case]], unit: str, value: Callable[[Case], float], left: float
) -> None:
    right, top, bottom = left + WIDTH / 2 - 80, 66.0, 318.0
    cases = [case for line_cases in series.values() for case in line_cases]
    batches = sorted({case.batch for case in cases})
    values = [value(case) for case in cases]
    x = Scale(batches[0], batches[-1], left + 12, right - 12, log=True)
    y = Scale(min(values) / 1.3, max(values) * 1.3, bottom, top, log=True)
    for at in _spread(decades(y.low, y.high), y, 22):
        drawing.add(Line(((left, y(at)), (right, y(at))), "grid"))
        drawing.add(Text(left - 6, y(at) + 4, number(at), "end", "muted", 11))
    for batch in _spread([float(b) for b in batches], x, 26):
        drawing.add(Text(x(batch), bottom + 16, number(batch), "middle", "muted", 11))
    drawing.add(Line(((left, bottom), (right, bottom)), "axis"))
    drawing.add(Text((left + right) / 2, bottom + 38, "batch size", "middle", "muted"))
    drawing.add(Text(left, top - 12, unit, fill="muted"))
    for (name, line_cases), colour in zip(series.items(), SERIES, strict=False):
        points = sorted((x(case.batch), y(value(case)), case) for case in line_cases)
        drawing.add(Line(tuple((px, py) for px, py, _ in points), colour, 2))
        for px, py, case in points:
            title = f"{name.partition(' ')[0]}, batch {case.batch}: {number(value(case))} {unit}"
            drawing.add(Dot(px, py, 4, colour, title))


def _spread(values: Sequence[float], scale: Scale, apart: float) -> list[float]:
    """Those of ``values`` whose places are at least ``apart`` pixels from each other."""
    shown: list[float] = []
    for value in values:
        if not shown or abs(scale(value) - scale(shown[-1])) >= apart:
            shown.append(value)
    return shown


def _vertical_grid(
    drawing: Drawing, scale: Scale, values: Sequence[float], top: float, bottom: float
) -> None:
    for value in values:
        drawing.add(Line(((scale(value), top), (scale(value), bottom)), "grid"))
        drawing.add(Text(scale(value), bottom + 16, number(value), "middle", "muted", 11))


WIDTH, HEIGHT = 960.0, 470.0
LEFT, RIGHT, TOP, BOTTOM = 76.0, 780.0, 48.0, 410.0
Box = tuple[float, float, float, float]


def roofline_chart(profile: Profile) -> Drawing | None:
    """Every component case with products as a point, and the roofs over them; None without ceilings."""
    ceilings = profile.ceilings
    cases = profile.of_kind("component")
    points = [(case, cost) for case in cases if (cost := profile.cost(case)) and cost.macs]
    if ceilings is None or not points or not ceilings.products or not ceilings.copies:
        return None
    roofs: dict[str, float] = {}
    for product in ceilings.products:
        roofs[product.kind] = max(roofs.get(product.kind, 0.0), product.gflops)
    xs = [cost.intensity for _, cost in points]
    ys = [_gflops(case, cost) for case, cost in points]
    x = Scale(min(xs) / 3, max(*xs, max(roofs.values()) / ceilings.copies[-1].gbps) * 3, LEFT, RIGHT, True)
    y = Scale(min(*ys, min(roofs.values())) / 3, max(roofs.values()) * 2, BOTTOM, TOP, True)
    drawing = Drawing(
        "roofline",
        "Roofline",
        f"Components alone under the ceilings measured on the {ceilings.device}. Slanted: copying buffers of "
        "the size named; level: large matrix products. Bytes are weights, inputs and outputs of a call.",
        WIDTH,
        HEIGHT,
    )
    _axes(drawing, x, y)
    _roofs(drawing, x, y, ceilings, roofs)
    _points(drawing, x, y, points)
    return drawing


def _gflops(case: Case, cost: ComponentCost) -> float:
    return cost.flops / case.measurement.summary.p50_ms / 1e6


def _axes(drawing: Drawing, x: Scale, y: Scale) -> None:
    for value in decades(x.low, x.high):
        drawing.add(Line(((x(value), TOP), (x(value), BOTTOM)), "grid"))
        drawing.add(Text(x(value), BOTTOM + 17, number(value), "middle", "muted", 11))
    for value in decades(y.low, y.high):
        drawing.add(Line(((LEFT, y(value)), (RIGHT, y(value))), "grid"))
        drawing.add(Text(LEFT - 6, y(value) + 4, number(value), "end", "muted", 11))
    drawing.add(
        Text((LEFT + RIGHT) / 2, BOTTOM + 42, "operations for each byte (FLOP/byte)", "middle", "muted"),
        Text(8, TOP - 28, "GFLOP/s", fill="muted"),
    )


def _roofs(drawing: Drawing, x: Scale, y: Scale, ceilings: Ceilings, roofs: dict[str, float]) -> None:
    """The ceilings, with their names on the right."""
    labels: list[float] = []
    top = max(roofs.values())
    for copied in ceilings.copies:
        start = max(x.low, y.low / copied.gbps)
        end = min(x.high, top / copied.gbps)
        if start < end:  # else all of it is outside the plot
            ends = ((x(value), y(copied.gbps * value)) for value in (start, end))
            drawing.add(Line(tuple(ends), "axis", 1.2, True))
    for kind, gflops in sorted(roofs.items(), key=lambda item: -item[1]):
        start = min(max(x.low, gflops / max(c.gbps for c in ceilings.copies)), x.high)
        drawing.add(Line(((x(start), y(gflops)), (RIGHT, y(gflops))), "text", 1.2))
        at = y(gflops) + 4
        while any(abs(at - other) < 14 for other in labels):
            at += 14
        label = f"{kind}: {number(gflops)} GFLOP/s"
        drawing.add(Text(RIGHT + 8, at, label, size=11))
        labels.append(at)
    side = max(labels) + 28
    drawing.add(Text(RIGHT + 8, side, "copying (dashed)", fill="muted", size=11))
    for i, copied in enumerate(ceilings.copies):
        label = f"{copied.nbytes / 2**20:.0f} MiB: {number(copied.gbps)} GB/s"
        drawing.add(Text(RIGHT + 8, side + 16 * (i + 1), label, size=11, fill="muted"))


def _points(drawing: Drawing, x: Scale, y: Scale, points: list[tuple[Case, ComponentCost]]) -> None:
    names = list(dict.fromkeys(case.name for case, _ in points))
    at = LEFT
    for name, colour in zip(names, SERIES, strict=False):
        drawing.add(Rect(at, 12, 12, 12, colour), Text(at + 17, 22, name))
        at += 17 + text_width(name) + 18
    colours = dict(zip(names, SERIES, strict=False))
    labels: list[Mark] = []
    occupied: list[Box] = []
    for case, cost in points:
        px, py = x(cost.intensity), y(_gflops(case, cost))
        share = "" if case.of_floor is None else f", {case.of_floor:.0%} of the ceiling"
        title = f"{case.name}, batch {case.batch}: {number(_gflops(case, cost))} GFLOP/s{share}"
        drawing.add(Dot(px, py, 4.5, colours[case.name], title))
        occupied.append((px - 5, py - 5, 10, 10))
    for case, cost in points:
        px, py = x(cost.intensity), y(_gflops(case, cost))
        length = case.sizes.get("past", case.sizes.get("text"))
        text = f"{case.batch}" if length is None else f"{case.batch} x {length}"
        if (place := _free(px, py, text_width(text, 10), occupied)) is not None:
            labels.append(Text(place[0], place[1] + 9, text, size=10, fill="muted"))
            occupied.append(place)
    drawing.add(
        *labels, Text(WIDTH - 8, 22, "labels: batch size x tokens (of a step: its past)", "end", "muted", 11)
    )


def _free(x: float, y: float, width: float, occupied: list[Box]) -> Box | None:
    """A place for a label next to a point that touches no other; None if there is none."""
    for dx, dy in ((8, -6), (-8 - width, -6), (-width / 2, -20), (-width / 2, 8)):
        box = (x + dx, y + dy, width, 12.0)
        inside = box[0] >= LEFT and box[0] + width <= RIGHT and box[1] >= TOP and box[1] + 12 <= BOTTOM
        if inside and not any(_touch(box, other) for other in occupied):
            return box
    return None


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
