"""Options and settings that several verbs take: the checkpoint, calibration data, how a bundle is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import IntegrityError
from ..settings import Setting, Table, choice, names, number, path, text, whole


def a_bundle(folder: Path) -> Path:
    """``folder``, unless it is the name of a shipped model; IntegrityError says how to build its bundle."""
    from ..models.shipped import shipped_name

    if (name := shipped_name(folder)) is not None:
        raise IntegrityError(
            f"{folder} is a shipped model, not a bundle.",
            "Bundles are built from models.",
            f"Run: ivl-export build --model {folder}, then give bundles/{name}-fp8.",
        )
    return folder


BundleArg = Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False, callback=a_bundle)]
BackendOpt = Annotated[str, typer.Option(help="Engines to use: onnxruntime, tensorrt-rtx, ...")]
ModelOpt = Annotated[
    Path | None,
    typer.Option(
        help="Checkpoint: its folder, an older .pth file, nano, nano-chat or nano-tiles.", show_default="nano"
    ),
]
CalibOpt = Annotated[
    Path | None,
    typer.Option(help="Images and captions: a folder, JSONL, WebDataset shards, or Hugging Face folder."),
]
CalibSamplesOpt = Annotated[int, typer.Option(help="Number of samples taken from --calib.", min=1)]
ComponentsOpt = Annotated[
    str | None, typer.Option(help="Only these components, joined by commas.", show_default="all")
]
FeaturesOpt = Annotated[
    str | None,
    typer.Option(help="Vision blocks whose outputs become outputs too: 12,24,36; -1 is the last."),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON.")]

THREADS: Table = {"threads": Setting("1, 2 or more", "CPU threads of an engine; else all cores", whole(1))}
ENGINE: Table = {
    "target": Setting("sm89, sm120 or another", "which engines of the backend to use", text),
    "device": Setting("cpu, cuda or cuda:1", "where onnxruntime and torch run; else cpu", text),
    **THREADS,
}
"""How a bundle is opened: keyword arguments of :meth:`..runtime.InternVL.load`."""

SAMPLING: Table = {
    "top-k": Setting("20, 0 or more", "draw from this many likeliest tokens; 0: all", whole(), default=0),
    "top-p": Setting(
        "0.9, or more, up to 1",
        "draw from the likeliest tokens with this share of the probability",
        number(),
        default=1.0,
    ),
    "seed": Setting("0, 1 or more", "seed of the draws", whole(), default=0),
}
"""With ``--temperature``: further arguments of :class:`..sampling.Sampling`."""

FRAMES: Table = {
    "frames": Setting("1, 8 or more", "frames read of a video, evenly spread; else 8", whole(1), default=8)
}
ALGORITHM: Table = {
    "algorithm": Setting(
        "max, percentile, percentile-99.99, entropy or mse",
        "how activation ranges are picked; else max",
        text,
    )
}
CALIBRATION: Table = {
    "calib-columns": Setting(
        "names: IMAGE,CAPTION", "columns of a calibration set, where their names are unusual", names
    ),
    "calib-seed": Setting("0, 1 or more", "chooses the calibration samples", whole(), default=0),
}
TRAINING: Table = {
    "work-dir": Setting(
        "a folder: work", "state that an interrupted run resumes from; else next to --out", path
    ),
    "threads": Setting("1, 2 or more", "CPU threads; else all cores", whole(1)),
    "processes": Setting(
        "1, 2 or more", "processes that train together, started here; torchrun works too", whole(1), default=1
    ),
    "strategy": Setting(
        "ddp or fsdp", "how processes share the model", choice(("ddp", "fsdp")), default="ddp"
    ),
}
