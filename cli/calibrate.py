"""``ivl-export calibrate``: activation ranges of a model, measured once for many builds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..settings import read_settings
from .command import SettingsOpt, command
from .options import CALIBRATION, CalibOpt, CalibSamplesOpt, ComponentsOpt, ModelOpt
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..quantization.ranges import ActivationRanges

app = typer.Typer(add_completion=False)


@app.command(cls=command(CALIBRATION))
def calibrate(
    model: ModelOpt = None,
    out: Annotated[Path, typer.Option(help="File for the ranges.")] = Path("ranges.json"),
    calib: CalibOpt = None,
    calib_samples: CalibSamplesOpt = 256,
    algorithm: Annotated[
        str, typer.Option(help="How ranges are picked: max, percentile, percentile-99.99, entropy or mse.")
    ] = "max",
    precision: Annotated[
        str, typer.Option(help="The recipe of the build; entropy and mse pick ranges for its types.")
    ] = "fp8",
    components: ComponentsOpt = None,
    settings: SettingsOpt = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Measure the activation range of every linear layer's input, for 'build --ranges'.

    A recipe that folds factors into the weights also gets smoothing.safetensors next to the file: keep the
    two together. An interrupted run resumes.
    """
    from ..pipeline import run
    from ..pipeline.config import ORT, BuildConfig
    from .inputs import names
    from .progress import Bars

    config = BuildConfig(
        out=out,
        model=model,
        precision=precision,
        calib=calib,
        calib_samples=calib_samples,
        algorithm=algorithm,
        backend=(ORT,),
        components=names(components),
        **read_settings(CALIBRATION, settings or ()),
    )
    with Bars() as bars:
        plan = run.open_plan(config, bars)
        for notice in plan.calibration.notices:
            typer.secho(f"warning: {notice}", fg="yellow", err=True)
        ranges = run.calibrate(plan, bars)
    if as_json:
        print_json({"ranges": str(out), "notices": list(plan.notices), **_summary(ranges)})
        return
    rows = _summary(ranges)
    rows["layers"] = [f"{component}: {len(layers)}" for component, layers in ranges.amax.items()]
    print_table(f"Input ranges in {out}", ("", ""), list(rows.items()))


def _summary(ranges: ActivationRanges) -> dict[str, object]:
    return {
        "algorithm": ranges.algorithm,
        "samples": ranges.samples,
        "skipped": ranges.skipped,
        "without_caption": ranges.without_caption,
        "synthetic": ranges.synthetic,
        "set_hash": ranges.set_hash,
        "model": ranges.model,
        "layers": {component: len(layers) for component, layers in ranges.amax.items()},
    }
