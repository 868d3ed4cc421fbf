"""``ivl-export sensitivity``: what each layer loses when it alone is quantised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CapabilityError
from .options import ComponentsOpt, ModelOpt
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..calibration.sensitivity import Sensitivity

app = typer.Typer(add_completion=False)


@app.command()
def sensitivity(
    model: ModelOpt = None,
    out: Annotated[
        Path, typer.Option(help="Folder for sensitivity.json and the heat map sensitivity.png.")
    ] = Path("sensitivity"),
    schemes: Annotated[
        str | None,
        typer.Option(
            help="What is tried on each layer; else fp8,int8,int8-weight,int4-weight,fp8-attention."
        ),
    ] = None,
    calib: Annotated[
        Path | None, typer.Option(help="Images and captions: a folder, or a JSONL; 32 are held out.")
    ] = None,
    calib_samples: Annotated[int, typer.Option(help="How many ranges are measured on.", min=1)] = 64,
    components: ComponentsOpt = None,
    questions: Annotated[
        int,
        typer.Option(min=0, help="Of each task, where the model has an evaluation set; 0 leaves tasks out."),
    ] = 64,
    top: Annotated[int, typer.Option(min=1, help="Rows of the printed table, worst first.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Quantise one layer at a time: the SQNR, cosine and task accuracy it costs, and odd channels.

    SQNR and cosine are of what the layer's block adds to the residual stream, on held-out samples. A run that
    was stopped goes on where it was.
    """
    from ..calibration.heatmap import draw
    from ..calibration.sensitivity import DEFAULT
    from ..pipeline.config import ORT, BuildConfig
    from ..pipeline.plan import plan_build
    from ..pipeline.sensitivity_steps import report
    from ..pipeline.sensitivity_steps import sensitivity as run
    from .inputs import names
    from .progress import Bars

    config = BuildConfig(
        out=out,
        model=model,
        precision="int8",
        calib=calib,
        calib_samples=calib_samples,
        backend=(ORT,),
        components=names(components),
    )
    with Bars() as bars:
        plan = plan_build(config, bars.advanced)
        result = run(plan, names(schemes) or DEFAULT, out, bars, questions)
    plot = out / "sensitivity.png"
    try:
        draw(result, plot)
        drawn = f"{plot}: the heat map"
    except CapabilityError as error:
        drawn = f"no heat map: {error.what} {error.fix}"
    if as_json:
        print_json(report(plan, result, questions))
        return
    for notice in plan.notices:
        typer.echo(f"note: {notice}")
    _print(result, top)
    if not plan.evaluation:
        typer.echo("No task accuracy: the model has no evaluation set.")
    typer.echo(f"{out / 'sensitivity.json'}: all {len(result.losses)} losses")
    typer.echo(drawn)


def _print(result: Sensitivity, top: int) -> None:
    from ..pipeline.sensitivity_steps import noisiest

    worst = noisiest(result, top)
    tasks = list(dict.fromkeys(task for loss in worst for task in loss.tasks))
    print_table(
        f"The {len(worst)} most sensitive of {len(result.worst())}, one layer quantised at a time",
        ("layer", "scheme", "worst in", "SQNR dB", "cosine", *(f"{task}, points lost" for task in tasks)),
        [
            (x.layer, x.scheme, x.component, x.sqnr_db, round(x.cosine, 6), *(x.tasks.get(t) for t in tasks))
            for x in worst
        ],
    )
    if result.findings:
        print_table(
            "Odd channels of layers' inputs",
            ("layer", "component", "kind", "how many", "channels", "largest / median"),
            [
                (f.layer, f.component, f.kind, f.count, f.channels, round(f.ratio, 1))
                for f in sorted(result.findings, key=lambda f: -f.ratio)[:top]
            ],
        )
