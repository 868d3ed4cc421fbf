"""``ivl-export sensitivity``: the loss of each layer when it alone is quantised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CapabilityError
from ..settings import Setting, Table, read_settings, whole
from .command import SettingsOpt, command
from .options import ComponentsOpt, ModelOpt
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..calibration.sensitivity import Sensitivity

app = typer.Typer(add_completion=False)

SETTINGS: Table = {
    "calib-samples": Setting(
        "64, 1 or more", "samples that ranges are measured on; else 64", whole(1), default=64
    ),
    "questions": Setting(
        "64, 0 or more",
        "questions of each task, for models with an evaluation set; else 64. 0 scores no tasks",
        whole(),
        default=64,
    ),
    "top": Setting("20, 1 or more", "rows of the printed table, worst first; else 20", whole(1), default=20),
}


@app.command(cls=command(SETTINGS))
def sensitivity(
    model: ModelOpt = None,
    out: Annotated[
        Path, typer.Option(help="Folder for sensitivity.json and the heat map sensitivity.png.")
    ] = Path("sensitivity"),
    schemes: Annotated[
        str | None,
        typer.Option(
            help="Schemes to try on each layer.",
            show_default="fp8,int8,int8-weight,int4-weight,fp8-attention",
        ),
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(help="Images and captions: a folder or a JSONL file; 32 of them are held out."),
    ] = None,
    components: ComponentsOpt = None,
    settings: SettingsOpt = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Quantise one layer at a time: its loss in SQNR, cosine and task accuracy, and its outlier channels.

    SQNR and cosine compare what the layer's block adds to the residual stream, on held-out samples. An
    interrupted run resumes.
    """
    from ..calibration.sensitivity import DEFAULT
    from ..pipeline.config import ORT, BuildConfig
    from ..pipeline.plan import plan_build
    from ..pipeline.plots import sensitivity_heatmap
    from ..pipeline.sensitivity_steps import report
    from ..pipeline.sensitivity_steps import sensitivity as run
    from .inputs import names
    from .progress import Bars

    values = read_settings(SETTINGS, settings or ())
    questions = values["questions"]
    config = BuildConfig(
        out=out,
        model=model,
        precision="int8",
        calib=calib,
        calib_samples=values["calib_samples"],
        backend=(ORT,),
        components=names(components),
    )
    with Bars() as bars:
        plan = plan_build(config, bars.advanced)
        result = run(plan, names(schemes) or DEFAULT, out, bars, questions)
    plot = out / "sensitivity.png"
    try:
        sensitivity_heatmap(result, plot)
        drawn = f"{plot}: the heat map"
    except CapabilityError as error:
        drawn = f"no heat map: {error.what} {error.fix}"
    if as_json:
        print_json(report(plan, result, questions))
        return
    for notice in plan.notices:
        typer.echo(f"note: {notice}")
    _print(result, values["top"])
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
            "Outlier channels of layers' inputs",
            ("layer", "component", "kind", "count", "channels", "largest / median"),
            [
                (f.layer, f.component, f.kind, f.count, f.channels, round(f.ratio, 1))
                for f in sorted(result.findings, key=lambda f: -f.ratio)[:top]
            ],
        )
