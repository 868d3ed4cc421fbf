"""``ivl-export build``: a checkpoint to a verified bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..engines.tensorrt.options import OPTIONS, BuildOptions
from ..errors import UsageError
from .build_tables import print_dry_run, print_report, print_search
from .options import (
    CalibColumnsOpt,
    CalibOpt,
    CalibSamplesOpt,
    CalibSeedOpt,
    ComponentsOpt,
    FeaturesOpt,
    ModelOpt,
)
from .output import print_json
from .recipes import list_recipes, show_recipe

app = typer.Typer(add_completion=False)

ENGINES: dict[str, Any] = {"rich_help_panel": "GPU engines (tensorrt-rtx, tensorrt)"}


@app.command()
def build(
    model: ModelOpt = None,
    precision: Annotated[
        str,
        typer.Option(help="A recipe (--list-recipes) or its file; or mixed: searched within --budget."),
    ] = "fp8",
    budget: Annotated[
        float | None,
        typer.Option(
            help="Percentage points that a task may lose; else the recipe's. Of mixed, also what its search "
            "keeps to (0.3); without an evaluation set, points of the worst output's cosine.",
            min=0,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The bundle's folder; else bundles/MODEL-PRECISION.")
    ] = None,
    calib: CalibOpt = None,
    calib_samples: CalibSamplesOpt = 256,
    calib_columns: CalibColumnsOpt = None,
    calib_seed: CalibSeedOpt = 0,
    algorithm: Annotated[
        str | None,
        typer.Option(help="How input ranges are picked: max, percentile[-99.99], entropy or mse; else max."),
    ] = None,
    ranges: Annotated[
        Path | None, typer.Option(help="Input ranges that 'calibrate' wrote, instead of measuring them.")
    ] = None,
    targets: Annotated[str, typer.Option(help="GPU generations for TensorRT-RTX: sm89,sm120.")] = "sm89",
    backend: Annotated[
        str | None,
        typer.Option(help="Engines to build: onnxruntime,tensorrt-rtx,tensorrt; else all that can be."),
    ] = None,
    components: ComponentsOpt = None,
    itm: Annotated[
        bool, typer.Option("--itm", help="Build qllama_itm too: 'run retrieve --rerank' needs it.")
    ] = False,
    features: FeaturesOpt = None,
    split: Annotated[
        int, typer.Option(help="Build each component in N parts, that run as one: less memory.", min=1)
    ] = 1,
    preset: Annotated[
        str | None, typer.Option(help="What engines are shaped for: latency, throughput or edge.", **ENGINES)
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            help="Sizes of an axis, smallest:tuned for:largest: batch=1:8:32, qllama_step.text=1:8:32.",
            metavar="AXIS=MIN:OPT:MAX",
            **ENGINES,
        ),
    ] = None,
    engine_options: Annotated[
        list[str] | None,
        typer.Option(
            "-O",
            "--engine-option",
            help="A setting of the engine builder, as often as needed: " + ", ".join(OPTIONS) + ".",
            metavar="KEY=VALUE",
            **ENGINES,
        ),
    ] = None,
    no_cache: Annotated[
        bool,
        typer.Option("--no-cache", help="Take no engine or kernel time of an earlier build.", **ENGINES),
    ] = False,
    cache_size: Annotated[
        str | None,
        typer.Option(help="The most disk for engines kept; else $IVL_EXPORT_CACHE_SIZE or 20G.", **ENGINES),
    ] = None,
    allow_accuracy_loss: Annotated[
        bool, typer.Option(help="Report a loss over the accuracy budget instead of failing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Check everything, say what would be done, write nothing.")
    ] = False,
    recipes: Annotated[
        bool, typer.Option("--list-recipes", help="Show the recipes that ship, and build nothing.")
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option("--show-recipe", help="Print this recipe as a file to edit, and build nothing."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Export, calibrate, quantise, build engines, and prove accuracy and kernel precision.

    With nothing else it builds internvl-nano, the small model that ships with the package. What is there
    already is not made again: a build that was stopped goes on, a second one does nothing.
    """
    if recipes:
        list_recipes(as_json)
        return
    if recipe is not None:
        show_recipe(recipe, as_json)
        return
    from ..files.cache_dir import parse_size
    from ..pipeline import run
    from ..pipeline.config import MIXED, BuildConfig, default_out
    from ..pipeline.report import describe
    from .inputs import names, numbers
    from .progress import Bars

    config = BuildConfig(
        out=out or default_out(model, precision),
        model=model,
        precision=precision,
        budget=budget,
        calib=calib,
        calib_samples=calib_samples,
        calib_columns=names(calib_columns),
        calib_seed=calib_seed,
        algorithm=algorithm,
        ranges=ranges,
        targets=targets,
        backend=names(backend),
        components=names(components),
        itm=itm,
        features=numbers(features, "--features"),
        split=split,
        preset=preset,
        shapes=tuple(shapes or ()),
        engine_options=BuildOptions.of(engine_options or ()),
        no_cache=no_cache,
        cache_size=None if cache_size is None else parse_size(cache_size, "--cache-size"),
        allow_accuracy_loss=allow_accuracy_loss,
    )
    if dry_run and precision == MIXED:
        raise UsageError(
            "A dry run cannot say what a search will find.", fix="Leave --dry-run out, or name a recipe."
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
