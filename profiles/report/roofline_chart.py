"""The roofline plot: operations per second against operations per byte, under the measured ceilings.

Williams, Waterman, Patterson: Roofline, an insightful visual performance model (2009).
"""

from __future__ import annotations

from ..cost.flops import ComponentCost
from ..measure.cases import Case
from ..measure.ceilings import Ceilings
from ..measure.receipt import Profile
from .drawing import SERIES, Dot, Drawing, Line, Mark, Rect, Scale, Text, decades, number, text_width

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
    """The ceilings, and what they are on the right."""
    labels: list[float] = []
    top = max(roofs.values())
    for copied in ceilings.copies:
        start = max(x.low, y.low / copied.gbps)
        end = min(x.high, top / copied.gbps)
        if start < end:  # else all of it lies beside what is shown
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
    taken: list[Box] = []
    for case, cost in points:
        px, py = x(cost.intensity), y(_gflops(case, cost))
        share = "" if case.of_floor is None else f", {case.of_floor:.0%} of the ceiling"
        told = f"{case.name}, batch {case.batch}: {number(_gflops(case, cost))} GFLOP/s{share}"
        drawing.add(Dot(px, py, 4.5, colours[case.name], told))
        taken.append((px - 5, py - 5, 10, 10))
    for case, cost in points:
        px, py = x(cost.intensity), y(_gflops(case, cost))
        length = case.sizes.get("past", case.sizes.get("text"))
        text = f"{case.batch}" if length is None else f"{case.batch} x {length}"
        if (place := _free(px, py, text_width(text, 10), taken)) is not None:
            labels.append(Text(place[0], place[1] + 9, text, size=10, fill="muted"))
            taken.append(place)
    drawing.add(
        *labels, Text(WIDTH - 8, 22, "labels: batch size x tokens (of a step: its past)", "end", "muted", 11)
    )


def _free(x: float, y: float, width: float, taken: list[Box]) -> Box | None:
    """A place for a label beside a point that touches no other; None if there is none."""
    for dx, dy in ((8, -6), (-8 - width, -6), (-width / 2, -20), (-width / 2, 8)):
        box = (x + dx, y + dy, width, 12.0)
        inside = box[0] >= LEFT and box[0] + width <= RIGHT and box[1] >= TOP and box[1] + 12 <= BOTTOM
        if inside and not any(_touch(box, other) for other in taken):
            return box
    return None


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
