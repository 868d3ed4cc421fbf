"""The layers of a bundle's components as one page: where the time of a call goes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..measure.layer_profile import LayerProfile
from .html import document, figures, table
from .treemap import layer_times

TOP = 20


def layer_page(title: str, found: Sequence[LayerProfile]) -> str:
    """The whole HTML document of ``found``, the slowest :data:`TOP` layers of each."""
    drawing = layer_times(found)
    charts = figures([drawing]) if drawing else ""
    return document(title, charts + "".join(_component(of) for of in found))


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
