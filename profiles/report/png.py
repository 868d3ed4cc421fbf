"""Drawings as PNG files, through matplotlib (extra ``plots``), which is imported here only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import BuildError, CapabilityError
from ...files.write import atomic
from .drawing import PALETTE, Dot, Drawing, Line, Rect

_DPI = 100
_SCALE = 2
"""Pixels of the file for one of the drawing."""
_ANCHORS = {"start": "left", "middle": "center", "end": "right"}


def write_drawings(drawings: Iterable[Drawing], folder: Path) -> list[Path]:
    """Write every drawing as ``<name>.png`` into ``folder`` (made if it is missing).

    Raises:
        CapabilityError: matplotlib is not installed.
        BuildError: the file system refuses.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CapabilityError(
            "PNG files cannot be drawn.", str(error), "pip install 'ivl-export[plots]'"
        ) from error
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for drawing in drawings:
            out = folder / f"{drawing.name}.png"
            with atomic(out) as partial:
                _draw(drawing, partial)
            written.append(out)
    except OSError as error:
        raise BuildError(f"Cannot write into {folder}.", str(error), "Choose another -O png.") from error
    return written


def _draw(drawing: Drawing, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    head = 58  # pixels for the title, which the page has as a heading
    height = drawing.height + head
    figure = Figure(figsize=(drawing.width / _DPI, height / _DPI), facecolor=_colour("page"))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, -head)
    axes.axis("off")
    axes.text(8, -head + 26, drawing.title, fontsize=_points(17), weight="bold", color=_colour("text"))
    for order, mark in enumerate(drawing.marks):
        _mark(axes, mark, order + 1)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DPI * _SCALE, format="png", facecolor=_colour("page"))


def _mark(axes: Any, mark: Any, order: int) -> None:
    from matplotlib.patches import Circle, Rectangle

    if isinstance(mark, Rect):
        box = Rectangle(
            (mark.x, mark.y),
            mark.width,
            mark.height,
            color=_colour(mark.fill),
            alpha=mark.opacity,
            linewidth=0,
            zorder=order,
        )
        axes.add_patch(box)
    elif isinstance(mark, Dot):
        axes.add_patch(
            Circle((mark.x, mark.y), mark.radius, color=_colour(mark.fill), linewidth=0, zorder=order)
        )
    elif isinstance(mark, Line):
        xs, ys = zip(*mark.points, strict=True)
        kind = (0, (5, 4)) if mark.dashed else "solid"
        axes.plot(
            xs, ys, color=_colour(mark.stroke), linewidth=mark.width * 72 / _DPI, linestyle=kind, zorder=order
        )
    else:
        axes.text(
            mark.x, mark.y, mark.text, fontsize=_points(mark.size), color=_colour(mark.fill),
            ha=_ANCHORS[mark.anchor], va="baseline", weight="bold" if mark.bold else "normal",
            parse_math=False, zorder=order,
        )  # fmt: skip


def _colour(role: str) -> str:
    return PALETTE[role][0]


def _points(pixels: float) -> float:
    # A little smaller than on the page: matplotlib's own font is wider than a browser's.
    return pixels * 72 / _DPI * 0.9
