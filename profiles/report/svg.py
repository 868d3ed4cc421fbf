"""Drawings as inline SVG; colours are classes of the page's style sheet."""

from __future__ import annotations

from html import escape

from .drawing import PALETTE, Dot, Drawing, Line, Mark, Rect, Text


def svg(drawing: Drawing) -> str:
    """An ``svg`` element that grows with its page; titles of marks are its tooltips."""
    marks = "\n".join(_mark(mark) for mark in drawing.marks)
    size = f"{drawing.width:g} {drawing.height:g}"
    label = escape(f"{drawing.title}. {drawing.caption}")
    return f'<svg id="{drawing.name}" viewBox="0 0 {size}" role="img" aria-label="{label}">\n{marks}\n</svg>'


def style() -> str:
    """CSS: a variable and two classes for each colour, light or dark as the reader prefers."""
    light, dark = (
        "".join(f"--{role}:{values[which]};" for role, values in PALETTE.items()) for which in (0, 1)
    )
    classes = "".join(
        f"svg .f-{role}{{fill:var(--{role})}}svg .l-{role}{{stroke:var(--{role});fill:none}}"
        for role in PALETTE
    )
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{classes}"


def _mark(mark: Mark) -> str:
    if isinstance(mark, Rect):
        opacity = "" if mark.opacity == 1 else f' fill-opacity="{mark.opacity:g}"'
        box = f'x="{mark.x:.1f}" y="{mark.y:.1f}" width="{mark.width:.1f}" height="{mark.height:.1f}"'
        return _titled("rect", f'class="f-{mark.fill}" {box}{opacity}', mark.title)
    if isinstance(mark, Dot):
        place = f'cx="{mark.x:.1f}" cy="{mark.y:.1f}" r="{mark.radius:g}"'
        return _titled("circle", f'class="f-{mark.fill}" {place}', mark.title)
    if isinstance(mark, Line):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)
        dashes = ' stroke-dasharray="5 4"' if mark.dashed else ""
        kind = f'class="l-{mark.stroke}" stroke-width="{mark.width:g}"'
        return f'<polyline {kind}{dashes} points="{points}"/>'
    return _text(mark)


def _text(mark: Text) -> str:
    anchor = "" if mark.anchor == "start" else f' text-anchor="{mark.anchor}"'
    weight = ' font-weight="600"' if mark.bold else ""
    place = f'x="{mark.x:.1f}" y="{mark.y:.1f}" font-size="{mark.size:g}"'
    return f'<text class="f-{mark.fill}" {place}{anchor}{weight}>{escape(mark.text)}</text>'


def _titled(tag: str, attributes: str, title: str) -> str:
    if not title:
        return f"<{tag} {attributes}/>"
    return f"<{tag} {attributes}><title>{escape(title)}</title></{tag}>"
