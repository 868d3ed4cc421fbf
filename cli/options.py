"""Options that several verbs of the build take: the checkpoint, its calibration set, its components."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOpt = Annotated[
    Path | None,
    typer.Option(
        help="Checkpoint: a folder of a published layout, an older .pth file, nano or nano-chat; else nano."
    ),
]
CalibOpt = Annotated[
    Path | None,
    typer.Option(help="Images and captions: a folder, JSONL, WebDataset shards, or Hugging Face folder."),
]
CalibSamplesOpt = Annotated[int, typer.Option(help="How many of them.", min=1)]
CalibColumnsOpt = Annotated[
    str | None, typer.Option(help="Columns IMAGE,CAPTION of a data set, where their names are unusual.")
]
CalibSeedOpt = Annotated[int, typer.Option(help="Chooses which of them.")]
ComponentsOpt = Annotated[str | None, typer.Option(help="Only these, joined by commas.")]
FeaturesOpt = Annotated[
    str | None,
    typer.Option(help="Vision blocks whose outputs are given too: 12,24,36 (-1 is the last)."),
]
