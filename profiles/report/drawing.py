"""Drawings: marks in pixels, y downwards, laid out once by the charts and drawn alike as SVG and PNG.

Colours are roles with a light and a dark value, so that a page can follow the reader's preference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

PALETTE: dict[str, tuple[str, str]] = {
    "page": ("#ffffff", "#16181d"),
    "text": ("#1c1f26", "#e8eaef"),
    "muted": ("#5b6270", "#a2a9b8"),
    "grid": ("#e3e6ec", "#2c313b"),
    "axis": ("#9aa1ae", "#6b7280"),
    "paper": ("#8a919e", "#8a919e"),
    "s0": ("#2563c9", "#6ea2f5"),
    "s1": ("#c2410c", "#f59a5b"),
    "s2": ("#0f766e", "#3fc4b4"),
    "s3": ("#7e3bbd", "#bd8cf0"),
    "s4": ("#a16207", "#e0b03c"),
    "s5": ("#be185d", "#f27bb1"),
}
"""Role to its colour on a light and on a dark page. ``s0`` to ``s5`` are series."""
SERIES = ("s0", "s1", "s2", "s3", "s4", "s5")
FONT = 12.0
_WIDE = set("mwMW@%")
_THIN = set("iljtfrI.,:;'|!()[] 1")


@dataclass(frozen=True)
class Rect:
    """A filled rectangle; ``title`` is its tooltip; ``opacity`` 0 to 1."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    title: str = ""
    opacity: float = 1.0


@dataclass(frozen=True)
class Line:
    """A line through points."""

    points: tuple[tuple[float, float], ...]
    stroke: str
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """A filled circle."""

    x: float
    y: float
    radius: float
    fill: str
    title: str = ""


@dataclass(frozen=True)
class Text:
    """A line of text whose baseline's ``anchor`` is at x, y."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"
    fill: str = "text"
    size: float = FONT
    bold: bool = False


Mark: TypeAlias = "Rect | Line | Dot | Text"


@dataclass
class Drawing:
    """A chart: ``name`` for files and anchors, ``title`` and ``caption`` for the reader, and its marks."""

    name: str
    title: str
    caption: str
    width: float
    height: float
    marks: list[Mark] = field(default_factory=list)

    def add(self, *marks: Mark) -> None:
        """Draw ``marks`` over the existing ones."""
        self.marks += marks


def text_width(text: str, size: float = FONT) -> float:
    """Pixels that ``text`` takes at most, about: fonts differ."""
    return size * sum(0.95 if c in _WIDE else 0.36 if c in _THIN else 0.62 for c in text)


def fitted(text: str, width: float, size: float = FONT) -> str:
    """``text`` cut so that it fits into ``width`` pixels; empty if not even a few letters do."""
    if text_width(text, size) <= width:
        return text
    for end in range(len(text) - 1, 2, -1):
        if text_width(text[:end] + "…", size) <= width:
            return text[:end].rstrip() + "…"
    return ""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from ``low`` to ``high``; with 2 and 5 between them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    values = [m * 10.0**p for p in powers for m in factors]
    return [value for value in values if low * 0.999 <= value <= high * 1.001]


def number(value: float) -> str:
    """Three significant digits, without an exponent where a reader can do without."""
    if value == 0:
        return "0"
    if 0.001 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.2g}"


@dataclass(frozen=True)
class Scale:
    """Values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of ``value``."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def squarified(
    values: Sequence[float], x: float, y: float, width: float, height: float
) -> list[tuple[float, float, float, float]]:
    """Rectangles (x, y, width, height) with areas as ``values`` (positive, falling) that fill the given one.

    Rows are laid along the shorter side while that makes their rectangles squarer (Bruls, Huizing, van Wijk:
    Squarified Treemaps, 2000).
    """
    total = sum(values)
    if not total:
        return []
    areas = [value * width * height / total for value in values]
    placed: list[tuple[float, float, float, float]] = []
    while areas:
        side = min(width, height)
        count = 1
        while count < len(areas) and _worst(areas[: count + 1], side) <= _worst(areas[:count], side):
            count += 1
        row, areas = areas[:count], areas[count:]
        thick, at = sum(row) / side, 0.0
        for area in row:
            length = area / thick
            placed.append((x, y + at, thick, length) if width >= height else (x + at, y, length, thick))
            at += length
        if width >= height:
            x, width = x + thick, width - thick
        else:
            y, height = y + thick, height - thick
    return placed


def _worst(row: Sequence[float], side: float) -> float:
    """The largest ratio of sides in a row of areas along ``side``."""
    total = sum(row)
    return max(max(side**2 * area / total**2, total**2 / (side**2 * area)) for area in row)


def legend(
    drawing: Drawing, entries: Iterable[tuple[str, str]], x: float, y: float, opacity: float = 1.0
) -> None:
    """Names with squares of their colours in a row, with the baseline ``y``."""
    for name, colour in entries:
        drawing.add(Rect(x, y - 10, 12, 12, colour, opacity=opacity), Text(x + 17, y, name))
        x += 17 + text_width(name) + 18
