"""``ivl-export profile layers``: where the time of a component's call goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bundle import Bundle
from .output import check_writable, print_json, print_table

if TYPE_CHECKING:
    from ..profiles.measure.layer_profile import LayerProfile


def layers(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    component: Annotated[
        str | None, typer.Option(help="Only this component.", show_default="all of them")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="onnxruntime: time of each node; torch: of each operator in each module; tensorrt, "
            "tensorrt-rtx: of each layer of the engine, on a GPU."
        ),
    ] = "onnxruntime",
    target: Annotated[str | None, typer.Option(help="Which engines of the backend: sm89, ...")] = None,
    device: Annotated[str | None, typer.Option(help="The GPU of TensorRT engines: cuda:0.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a call.")] = 1,
    calls: Annotated[int, typer.Option(min=1, help="Calls that are timed.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of an engine.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the slowest layers are printed.")] = 12,
    trace: Annotated[
        Path | None, typer.Option(help="Write a call's timeline for chrome://tracing or Perfetto here.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the treemap as a PNG into this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all layers as JSON.")] = False,
) -> None:
    """Show where the time of a call goes: the slowest layers, by operator, by layer type, by block."""
    from ..profiles.measure.layers import SCHEMA, profile_layers, write_trace
    from ..profiles.report.treemap import layer_times

    opened = Bundle.open(bundle)
    for option, path in (("--trace", trace), ("--html", html)):
        check_writable(option, path)
    names = [component] if component else list(opened.manifest.components)
    found = [profile_layers(opened, name, backend, batch, calls, threads, target, device) for name in names]
    written = [] if trace is None else [trace]
    if trace is not None:
        write_trace(found, trace)
    if html is not None:
        from ..files.write import write_text
        from ..profiles.report.layer_page import layer_page

        write_text(layer_page(f"Layers of {opened.root.resolve().name}", found), html)
        written.append(html)
    if png is not None and (drawing := layer_times(found)) is not None:
        from ..profiles.report.png import write_drawings

        written += write_drawings([drawing], png)
    if as_json:
        print_json({"schema": SCHEMA, "components": [profile.to_json() for profile in found]})
        return
    for profile in found:
        _print(profile, top)
    typer.echo("shares are of a call that was timed layer by layer, which takes longer than one that is not")
    for path in written:
        typer.echo(f"Written: {path}")


def _print(found: LayerProfile, top: int) -> None:
    def row(name: str, ms: float) -> tuple[object, ...]:
        return name, ms, f"{ms / found.call_ms:.1%}" if found.call_ms else None

    sizes = ", ".join(f"{axis} {size}" for axis, size in found.sizes.items())
    call = f"{found.call_ms:.3g} ms a call, mean of the quicker half of {found.calls}"
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
