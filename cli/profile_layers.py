"""``ivl-export profile layers``: where the time of a component's call goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bundle import Bundle
from ..errors import UsageError
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..profiles.layers import LayerProfile


def layers(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    component: Annotated[
        str | None, typer.Option(help="Only this component.", show_default="all of them")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="onnxruntime: time of each node; torch: of each operator in each module.")
    ] = "onnxruntime",
    batch: Annotated[int, typer.Option(min=1, help="Rows of a call.")] = 1,
    calls: Annotated[int, typer.Option(min=1, help="Calls that are timed.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of an engine.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the slowest layers are printed.")] = 12,
    trace: Annotated[
        Path | None, typer.Option(help="Write a call's timeline for chrome://tracing or Perfetto here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all layers as JSON.")] = False,
) -> None:
    """Show where the time of a call goes: the slowest layers, by operator, by layer type, by block."""
    from ..profiles.layers import SCHEMA, profile_layers, write_trace

    opened = Bundle.open(bundle)
    if trace is not None and (trace.is_dir() or not trace.absolute().parent.is_dir()):
        raise UsageError(f"--trace {trace} is no file that can be written.", "", "Name another.")
    names = [component] if component else list(opened.manifest.components)
    found = [profile_layers(opened, name, backend, batch, calls, threads) for name in names]
    if trace is not None:
        write_trace(found, trace)
    if as_json:
        print_json({"schema": SCHEMA, "components": [profile.to_json() for profile in found]})
        return
    for profile in found:
        _print(profile, top)
    typer.echo("shares are of a call that was timed layer by layer, which takes longer than one that is not")
    if trace is not None:
        typer.echo(f"timeline: {trace}")


def _print(found: LayerProfile, top: int) -> None:
    def row(name: str, ms: float) -> tuple[object, ...]:
        return name, ms, f"{ms / found.call_ms:.1%}" if found.call_ms else None

    sizes = ", ".join(f"{axis} {size}" for axis, size in found.sizes.items())
    call = f"{found.call_ms:.3g} ms a call, mean of {found.calls}"
    print_table(
        f"{found.component} on {found.backend}, {sizes}: {call}",
        ("slowest layers", "operator", "ms", "share"),
        [(layer.name, layer.op, *row("", layer.ms)[1:]) for layer in found.layers[:top]],
    )
    for title, sums in (
        ("operator", found.by(lambda layer: layer.op)),
        ("layer type", found.by(lambda layer: layer.type)),
        ("block", found.by(lambda layer: layer.block)),
    ):
        shown = list(sums.items())[:top]
        rest = sum(sums.values()) - sum(ms for _, ms in shown)
        rows = [row(name, ms) for name, ms in shown]
        rows += [row(f"{len(sums) - top} others", rest)] if len(sums) > top else []
        print_table("", (f"by {title}", "ms", "share"), [*rows, row("in no layer", found.rest_ms)])
