"""``ivl-export profile --layers``: how the time of a component's call is spent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..bundle import Bundle
from .output import print_table

if TYPE_CHECKING:
    from ..profiles.measure.layer_profile import LayerProfile
    from ..progress import Progress

Where = tuple[str, int, int | None, str | None, str | None]
"""Backend, batch, CPU threads, target, device."""


@dataclass(frozen=True)
class LayerOptions:
    """Options and settings of ``--layers``; see the verb's help."""

    component: str | None
    calls: int
    top: int
    trace: Path | None


def time_layers(
    bundle: Bundle, where: Where, options: LayerOptions, progress: Progress
) -> list[LayerProfile]:
    """Time the layers of each component, or of the one that ``options`` name; write the trace.

    Raises: as :func:`..profiles.measure.layer_timing.profile_layers`.
    """
    from ..profiles.measure.layer_timing import profile_layers, write_trace
    from ..progress import reported

    backend, batch, threads, target, device = where
    names = [options.component] if options.component else list(bundle.manifest.components)
    profiles = []
    with reported(progress, "measure layers", len(names)) as advanced:
        for i, name in enumerate(names):
            advanced(i, detail=name)
            profiles.append(
                profile_layers(bundle, name, backend, batch, options.calls, threads, target, device)
            )
    if options.trace is not None:
        write_trace(profiles, options.trace)
    return profiles


def write_layer_profiles(
    title: str, profiles: list[LayerProfile], html: Path | None, png: Path | None
) -> list[Path]:
    """Write the page to ``html`` and the treemap into ``png``, unless None; returns the files."""
    from ..files.write import write_text
    from ..profiles.report.page import layer_page
    from ..profiles.report.treemap import layer_time_map

    files = []
    if html is not None:
        write_text(layer_page(title, profiles), html)
        files.append(html)
    if png is not None and (drawing := layer_time_map(profiles)) is not None:
        from ..profiles.report.png import write_drawings

        files += write_drawings([drawing], png)
    return files


def print_layer_profiles(profiles: list[LayerProfile], top: int) -> None:
    """Tables of the ``top`` slowest layers and groups of each component."""
    for profile in profiles:
        _print(profile, top)
    typer.echo("shares are of a call timed layer by layer, which takes longer than other calls")


def _print(profile: LayerProfile, top: int) -> None:
    def row(name: str, ms: float) -> tuple[object, ...]:
        return name, ms, f"{ms / profile.call_ms:.1%}" if profile.call_ms else None

    sizes = ", ".join(f"{axis} {size}" for axis, size in profile.sizes.items())
    call = f"{profile.call_ms:.3g} ms a call, mean of the quicker half of {profile.calls}"
    print_table(
        f"{profile.component} on {profile.backend}, {sizes}: {call}",
        ("slowest layers", "operator", "ms", "share"),
        [(layer.name, layer.op, *row("", layer.ms)[1:]) for layer in profile.layers[:top]],
    )
    for title, sums in (
        ("operator", profile.by(lambda layer: layer.op)),
        ("layer type", profile.by(lambda layer: layer.type)),
        ("block", profile.by(lambda layer: layer.block)),
    ):
        shown = list(sums.items())[:top]
        rest = sum(sums.values()) - sum(ms for _, ms in shown)
        rows = [row(name, ms) for name, ms in shown]
        rows += [row(f"{len(sums) - top} others", rest)] if len(sums) > top else []
        print_table("", (f"by {title}", "ms", "share"), [*rows, row("in no layer", profile.rest_ms)])
