"""``ivl-export calibrate``: input ranges of a model, measured once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import CalibColumnsOpt, CalibOpt, CalibSamplesOpt, CalibSeedOpt, ComponentsOpt, ModelOpt
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..quantization.ranges import ActivationRanges

app = typer.Typer(add_completion=False)


@app.command()
def calibrate(
    model: ModelOpt = None,
    out: Annotated[Path, typer.Option(help="Where the ranges are written.")] = Path("ranges.json"),
    calib: CalibOpt = None,
    calib_samples: CalibSamplesOpt = 256,
    calib_columns: CalibColumnsOpt = None,
    calib_seed: CalibSeedOpt = 0,
    algorithm: Annotated[
        str, typer.Option(help="How ranges are picked: max, percentile[-99.99], entropy or mse.")
    ] = "max",
    precision: Annotated[
        str, typer.Option(help="The recipe that will be built: entropy and mse pick ranges for its types.")
    ] = "fp8",
    components: ComponentsOpt = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Measure the input range of every linear layer, for 'build --ranges'.

    A recipe that folds factors into the weights also gets smoothing.safetensors beside the file: keep the two
    together. A run that was stopped goes on where it was.
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
        calib_columns=names(calib_columns),
        calib_seed=calib_seed,
        algorithm=algorithm,
        backend=(ORT,),
        components=names(components),
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
