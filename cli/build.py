"""``ivl-export build``: a checkpoint to a verified bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..engines.tensorrt import shapes as engine_shapes
from ..engines.tensorrt.options import OPTIONS, BuildOptions
from ..errors import UsageError
from ..files.cache_dir import parse_size
from ..settings import SWITCH, Setting, Table, keyword, read_settings, switch, text, whole
from .build_tables import print_dry_run, print_report, print_search
from .command import SettingsOpt, command
from .options import ALGORITHM, CALIBRATION, CalibOpt, CalibSamplesOpt, ComponentsOpt, FeaturesOpt, ModelOpt
from .output import print_json
from .recipes import list_recipes, show_recipe

app = typer.Typer(add_completion=False)


def _size(value: object) -> int:
    return parse_size(text(value), "a size")


SETTINGS: Table = {
    **CALIBRATION,
    **ALGORITHM,
    "split": Setting(
        "1, 2 or more", "parts of a component, which run as one, to save memory", whole(1), default=1
    ),
    "preset": Setting(", ".join(engine_shapes.PRESETS), "shapes that engines are tuned for", text),
    "no-cache": Setting(SWITCH, "use no engine or kernel time of an earlier build", switch, default=False),
    "cache-size": Setting(
        "a size: 20G, 512M", "disk space for cached engines; else $IVL_EXPORT_CACHE_SIZE or 20G", _size
    ),
    **OPTIONS,
}
"""Settings of calibration and the cache, and those of the engine builder (:data:`.OPTIONS`)."""


@app.command(cls=command(SETTINGS, {"--engine-option": "--setting"}))
def build(
    model: ModelOpt = None,
    precision: Annotated[
        str,
        typer.Option(help="A recipe (--list-recipes), a recipe file, or mixed: searched within --budget."),
    ] = "fp8",
    budget: Annotated[
        float | None,
        typer.Option(
            help="Accuracy that a task may lose, in percentage points. Models without an evaluation set lose "
            "points of the worst output's cosine.",
            min=0,
            show_default="the recipe's; mixed: 0.3",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The bundle's folder.", show_default="bundles/MODEL-PRECISION")
    ] = None,
    calib: CalibOpt = None,
    calib_samples: CalibSamplesOpt = 256,
    ranges: Annotated[
        Path | None, typer.Option(help="Use the ranges in this file of 'calibrate' instead of measuring.")
    ] = None,
    targets: Annotated[str, typer.Option(help="GPU generations for TensorRT-RTX: sm89,sm120.")] = "sm89",
    backend: Annotated[
        str | None,
        typer.Option(
            help="Engines to build: onnxruntime,tensorrt-rtx,tensorrt.", show_default="all possible here"
        ),
    ] = None,
    components: ComponentsOpt = None,
    itm: Annotated[
        bool, typer.Option("--itm", help="Also build qllama_itm, for 'run retrieve --rerank'.")
    ] = False,
    features: FeaturesOpt = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            help="Sizes of an axis, the middle one tuned for: batch=1:8:32, qllama_step.text=1:8:32.",
            metavar="AXIS=MIN:OPT:MAX",
        ),
    ] = None,
    allow_accuracy_loss: Annotated[
        bool, typer.Option("--allow-accuracy-loss", help="Only warn about a loss over the budget.")
    ] = False,
    require_proof: Annotated[
        bool,
        typer.Option("--require-proof", help="Fail where an engine does not tell a product's types."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, list the steps, write nothing.")
    ] = False,
    settings: SettingsOpt = None,
    recipes: Annotated[
        bool,
        typer.Option(
            "--list-recipes", help="List the shipped recipes.", rich_help_panel="Instead of building"
        ),
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--show-recipe",
            help="Print this recipe as a file to edit.",
            rich_help_panel="Instead of building",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Convert a checkpoint to a bundle: export, calibrate, quantise, build engines, verify.

    Without options it builds internvl-nano, the small model in this package. Finished steps are reused: an
    interrupted build resumes, and a second one has nothing to do.
    """
    if recipes:
        list_recipes(as_json)
        return
    if recipe is not None:
        show_recipe(recipe, as_json)
        return
    from ..pipeline import run
    from ..pipeline.config import MIXED, BuildConfig, default_out
    from ..pipeline.report import describe
    from .inputs import names, numbers
    from .progress import Bars

    values = read_settings(SETTINGS, settings or ())
    engine = {keyword(OPTIONS, key) for key in OPTIONS} & {*values}
    config = BuildConfig(
        out=out or default_out(model, precision),
        model=model,
        precision=precision,
        budget=budget,
        calib=calib,
        calib_samples=calib_samples,
        ranges=ranges,
        targets=targets,
        backend=names(backend),
        components=names(components),
        itm=itm,
        features=numbers(features, "--features"),
        shapes=tuple(shapes or ()),
        engine_options=BuildOptions(**{name: values.pop(name) for name in engine}),
        allow_accuracy_loss=allow_accuracy_loss,
        require_proof=require_proof,
        **values,
    )
    if dry_run and precision == MIXED:
        raise UsageError(
            "A dry run cannot predict the recipe of a search.", fix="Leave --dry-run out, or name a recipe."
        )
    with Bars() as bars:
        plan = run.open_plan(config, bars)
        if dry_run:
            steps = run.preview(plan, bars)
        else:
            result = run.build(plan, bars)
    if dry_run:
        print_dry_run(as_json, steps, plan)
        return
    report = describe(result, plan.notices)
    if as_json:
        print_json(report)
    else:
        print_report(report)
        if plan.searched:
            print_search(result.bundle.receipt(MIXED))
