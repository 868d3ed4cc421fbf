"""``ivl-export export``: a checkpoint to plain ONNX graphs, with a copy of the weights or without one."""

from __future__ import annotations

import atexit
import gc
import time
from pathlib import Path
from typing import Annotated

import typer

from .command import command
from .options import ComponentsOpt, FeaturesOpt, ModelOpt
from .output import human_bytes, print_json, print_table
from .progress import Bars

app = typer.Typer(add_completion=False)


@app.command(cls=command({}))
def export(
    model: ModelOpt = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A new folder; with --zero-copy the folder of the shards, or one above it.",
            show_default="onnx/MODEL-DTYPE",
        ),
    ] = None,
    components: ComponentsOpt = None,
    features: FeaturesOpt = None,
    dtype: Annotated[str, typer.Option(help="Type that the graphs compute in: bf16 or fp32.")] = "bf16",
    zero_copy: Annotated[
        bool, typer.Option("--zero-copy", help="Write graphs next to the shards, which refer to their bytes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write plain ONNX graphs of a checkpoint's components: no calibration, no quantisation, no engines."""
    from ..export.features import with_features
    from ..export.unquantized import export_plain
    from ..models.checkpoint import open_checkpoint
    from ..models.shipped import checkpoint_path, shipped_name
    from .inputs import names, numbers

    started = time.perf_counter()
    atexit.register(gc.freeze)  # else the process searches all of torch's objects for garbage at its end
    checkpoint = with_features(open_checkpoint(checkpoint_path(model)), numbers(features, "--features"))
    for note in checkpoint.notes:
        typer.echo(f"note: {note}", err=True)
    shards = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    name = shipped_name(model) or checkpoint.path.resolve().name.removesuffix(".pth")
    folder = out or (shards if zero_copy else Path("onnx") / f"{name}-{dtype}")
    with Bars() as bars:
        files = export_plain(checkpoint, folder, names(components), dtype, zero_copy, bars)
    seconds = time.perf_counter() - started
    if as_json:
        print_json(
            {
                "graphs": {component: str(path) for component, path in files.graphs.items()},
                "store": str(files.store) if files.store else None,
                "dtype": dtype,
                "zero_copy": zero_copy,
                "notices": list(checkpoint.notes),
                "bytes_written": files.bytes_written,
                "bytes_referred": files.bytes_referred,
                "seconds": seconds,
            }
        )
        return
    weights = files.store or f"the {len({r.file for r in checkpoint.tensors.values()})} files of {shards}"
    rows = [(component, str(path)) for component, path in files.graphs.items()]
    print_table(f"{dtype} graphs of {checkpoint.path}", ("component", "graph"), rows)
    typer.echo(f"weights: {weights} ({human_bytes(files.bytes_referred)} used)")
    typer.echo(f"written: {human_bytes(files.bytes_written)} in {seconds:.1f} s")
