"""Treemaps of layer types: counted work, and measured time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..measure.layer_profile import LayerProfile
from ..measure.receipt import Profile
from .drawing import Drawing, Rect, Text, fitted, legend, number, squarified, text_width

WIDTH = 960.0
HEIGHT = 250.0
"""Of one panel."""
SIZE = 11.0
"""Of the letters."""
_TOP = 30.0
"""Above the panels, of the legend."""
_SHADE = 0.28
_FAMILIES = (("cross_attn", "s3", "cross-attention"), ("attn", "s0", "attention"), ("mlp", "s2", "MLP"))
"""Part of a layer type's name, colour, and family."""
_OTHER = ("s4", "other")


@dataclass(frozen=True)
class _Box:
    """A layer type: its number of layers, its area, and that in words."""

    layer: str
    count: int
    value: float
    amount: str


def work_map(profile: Profile) -> Drawing | None:
    """Where the products are: a panel for each component, areas as the layer types' multiply-accumulates."""
    costs = {}
    for case in profile.of_kind("component"):
        cost = profile.cost(case)
        if cost is not None and case.name not in costs and cost.macs:
            costs[case.name] = cost
    panels = [
        (
            f"{name}: {number(cost.macs / 1e9)} GMAC at {_sizes(cost.sizes)}",
            [
                _Box(layer.layer, layer.count, layer.macs, f"{number(layer.macs / 1e6)} MMAC")
                for layer in cost.layers
            ],
        )
        for name, cost in costs.items()
    ]
    return _drawing(
        "layers",
        "Layers by work, counted",
        "Multiply-accumulates of one call by layer type, counted from the graphs, not timed; the number of "
        "layers of a type in brackets.",
        panels,
    )


def time_map(profile: Profile) -> Drawing | None:
    """Where the time went: as :func:`work_map`, areas as the milliseconds that were measured."""
    return layer_time_map(profile.layers)


def layer_time_map(profiles: Iterable[LayerProfile]) -> Drawing | None:
    """The map of the components' measured layers, None without any."""
    panels = []
    for of in profiles:
        counts = Counter(layer.type for layer in of.layers)
        boxes = [
            _Box(layer, counts[layer], ms, f"{number(ms)} ms")
            for layer, ms in of.by(lambda layer: layer.type).items()
        ]
        at = f"{of.component} on {of.backend}: {number(of.call_ms)} ms at {_sizes(of.sizes)}"
        panels.append((at, boxes))
    return _drawing(
        "layer-times",
        "Layers by time, measured",
        "Milliseconds of one call by layer type, each layer timed by the backend's own profiler, which slows "
        "the call down: shares say where to look. The number of layers of a type in brackets; time in no "
        "layer is left out.",
        panels,
    )


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items() if axis != "total")


def _drawing(
    name: str, title: str, caption: str, panels: Sequence[tuple[str, Sequence[_Box]]]
) -> Drawing | None:
    if not panels:
        return None
    across = min(2, len(panels))
    width = WIDTH / across
    drawing = Drawing(name, title, caption, WIDTH, _TOP + HEIGHT * -(-len(panels) // across) + 4)
    families = {_family(box.layer) for _, boxes in panels for box in boxes}
    known = (*(family[1:] for family in _FAMILIES), _OTHER)
    legend(
        drawing, [(label, colour) for colour, label in known if (colour, label) in families], 8, 20, _SHADE
    )
    for i, (head, boxes) in enumerate(panels):
        _panel(drawing, head, boxes, (i % across) * width + 8, _TOP + (i // across) * HEIGHT, width)
    return drawing


def _panel(drawing: Drawing, head: str, boxes: Sequence[_Box], x: float, y: float, width: float) -> None:
    drawing.add(Text(x, y + 18, fitted(head, width - 24), bold=True))
    shown = sorted((box for box in boxes if box.value > 0), key=lambda box: -box.value)
    total = sum(box.value for box in shown)
    places = squarified([box.value for box in shown], x, y + 28, width - 20, HEIGHT - 40)
    for box, (bx, by, bw, bh) in zip(shown, places, strict=True):
        share = f"{box.value / total:.1%}"
        title = f"{box.layer} ({box.count}): {box.amount}, {share}"
        colour, _ = _family(box.layer)
        drawing.add(Rect(bx, by, max(bw - 2, 0.5), max(bh - 2, 0.5), colour, title, _SHADE))
        if bh >= 34 and (text := _label(box, bw - 12)):
            drawing.add(Text(bx + 5, by + 15, text, size=SIZE))
            if text_width(share, SIZE) <= bw - 12:
                drawing.add(Text(bx + 5, by + 29, share, size=SIZE, fill="muted"))


def _label(box: _Box, width: float) -> str:
    """As much of a type's name as fits: its end matters most, unless that is a number."""
    name = box.layer.rpartition("layers.*.")[2].rstrip("./")
    ends = [name, *(end for m in re.finditer(r"[./]", name) if not (end := name[m.end() :]).isdigit())]
    for text in (*(f"{end} ({box.count})" for end in ends), *ends):
        if text_width(text, SIZE) <= width:
            return text
    return fitted(ends[-1], width, SIZE)


def _family(layer: str) -> tuple[str, str]:
    """The colour and family of a layer type."""
    return next(((colour, label) for part, colour, label in _FAMILIES if part in layer), _OTHER)
