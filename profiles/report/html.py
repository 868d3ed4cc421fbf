"""Self-contained HTML pages: one style sheet (light or dark as the reader prefers), SVG figures, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .drawing import PALETTE, Dot, Drawing, Line, Mark, Rect, Text, number


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


Cell = str | float | int | None
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy: nothing is loaded from other places."""
_CSS = """
:root{color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,"DejaVu Sans",sans-serif}
main{max-width:1000px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:36px 0 6px}
p,figcaption,.muted{color:var(--muted)}p{margin:4px 0}
figure{margin:0}svg{width:100%;height:auto;display:block}svg text{font-family:system-ui,sans-serif}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;margin:6px 0}
th,td{padding:3px 10px 3px 0;text-align:left;border-bottom:1px solid var(--grid);white-space:nowrap}
.facts td{white-space:normal;vertical-align:top}.facts td:first-child{white-space:nowrap}
th{color:var(--muted);font-weight:600}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
:focus-visible{outline:2px solid var(--s0)}
@media print{body{background:#fff}}
"""


def document(title: str, body: str, css: str = "", script: str = "") -> str:
    """The whole HTML document: ``body`` is markup below the heading, ``css`` follows the common sheet."""
    policy = f"{_POLICY}; script-src 'unsafe-inline'" if script else _POLICY
    scripts = f"<script>{script}</script>\n" if script else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_CSS}{style()}{css}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
{scripts}</body>
</html>
"""


def figures(drawings: Iterable[Drawing]) -> str:
    """Each drawing under its title, with its caption."""
    return "\n".join(
        f"<h2>{escape(d.title)}</h2><figure>{svg(d)}<figcaption>{escape(d.caption)}</figcaption></figure>"
        for d in drawings
    )


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table under a heading; columns of numbers are right-aligned, missing values are dashes."""
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
