"""``ivl-export estimate``: latency, throughput, memory and cost on a GPU that is not here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .output import human_bytes, print_json, print_table
from .profile import parse_sizes

if TYPE_CHECKING:
    from ..models.config import InternVLConfig
    from ..profiles.estimate import Estimate
    from ..profiles.roofline import Arithmetic

app = typer.Typer(add_completion=False)


@app.command()
def estimate(
    gpu: Annotated[str, typer.Option(help="GPU: l40s, h100, rtx4090, ...", show_default=False)],
    precision: Annotated[str, typer.Option(help="bf16, fp16, fp8, int8, or a recipe file.")] = "fp8",
    batch: Annotated[str, typer.Option(help="Batch sizes with commas between.")] = "1,8,128",
    model: Annotated[
        Path | None, typer.Option(help="A checkpoint's folder; its config.json is read. Else InternVL-14B.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of an image's side.", show_default="the model's")
    ] = None,
    cost_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="The GPU's price, for the cost of a million images.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Floor and time of each layer type too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON.")] = False,
) -> None:
    """Predict a model on a GPU you do not have: the roofline at stated shares, all assumptions named."""
    from ..calibration.recipe import load_recipe
    from ..models.config import InternVLConfig
    from ..profiles.estimate import estimate as run
    from ..profiles.gpus import find_gpu
    from ..profiles.roofline import Arithmetic
    from ..profiles.sizes import plan_of

    def arithmetic_of(name: str) -> Arithmetic:
        shipped = load_recipe(name)
        return Arithmetic.of(shipped, plan_of(shipped, InternVLConfig()))

    batches = parse_sizes("--batch", batch)
    found = find_gpu(gpu)
    config = sized(
        InternVLConfig() if model is None else InternVLConfig.load(model / "config.json"), image_size
    )
    recipe = load_recipe(precision)
    result = run(config, recipe, plan_of(recipe, config), found, batches, arithmetic_of, cost_per_hour)
    if as_json:
        print_json(result.to_json())
        return
    _print(result, "InternVL-14B" if model is None else model.resolve().name, layers)


def sized(config: InternVLConfig, image_size: int | None) -> InternVLConfig:
    """``config`` for images of ``image_size`` pixels; UsageError if patches do not fill them."""
    if image_size is None:
        return config
    if image_size % config.vision.patch_size:
        raise UsageError(
            f"--image-size {image_size} is no multiple of the patch size.",
            f"A patch has {config.vision.patch_size} pixels a side.",
            f"Give --image-size {max(1, image_size // config.vision.patch_size) * config.vision.patch_size}.",
        )
    return replace(config, vision=replace(config.vision, image_size=image_size))


def _print(result: Estimate, model: str, with_layers: bool) -> None:
    gpu = result.gpu
    subject = f"{model} at {result.image_size} px, {result.precision}, on {gpu.title} ({gpu.sm})"
    typer.echo(f"{subject}: predicted, not measured")
    print_table(
        "One call, ms: floor (published peaks) and what to expect",
        ("batch", "component", "GMAC", "floor", "expected", "of the floor", "bound by"),
        [
            (
                point.batch,
                t.component,
                round(t.gmacs),
                t.floor_ms,
                t.expected_ms,
                f"{t.floor_ms / t.expected_ms:.0%}",
                t.bound,
            )
            for point in result.points
            for t in point.components
        ],
    )
    priced = result.points[0].cost_c is not None
    print_table(
        f"Images (C: InternViT; G: and QLLaMA's queries) and texts of {result.text_tokens} tokens",
        (
            "batch", "C ms", "G ms", "text ms", "C images/s", "G images/s", "texts/s", "GPU memory", "fits",
            *(("cost of 1M, C", "cost of 1M, G") if priced else ()),
        ),
        [
            (
                p.batch, p.image_c_ms, p.image_g_ms, p.text_ms, p.images_c_per_s, p.images_g_per_s,
                p.texts_per_s, human_bytes(p.memory_bytes), p.fits,
                *((round(p.cost_c or 0, 2), round(p.cost_g or 0, 2)) if priced else ()),
            )
            for p in result.points
        ],
    )  # fmt: skip
    if with_layers:
        last = result.points[-1]
        print_table(
            f"Layers at batch {last.batch}, ms of all layers of a type",
            ("layer", "multiplies", "GMAC", "floor", "expected", "bound by"),
            [
                (x.layer, x.kind, x.gmacs, x.floor_ms, x.expected_ms, x.bound)
                for t in last.components
                for x in t.layers
            ],
        )
    shares = (("16-bit", result.efficiencies.wide), ("8-bit", result.efficiencies.low))
    print_table(
        "Shares of the published peaks",
        ("", "share", "known from", "source"),
        [
            (name, f"{share.value:.0%}", share.known, share.source)
            for name, share in (*shares, ("memory", result.efficiencies.memory))
        ],
    )
    typer.echo("Assumptions:")
    for line in result.assumptions:
        typer.echo(f"- {line}")
    typer.echo(f"- Peaks of {gpu.title}: {gpu.source}")
    print_table(
        "Checked against measurements",
        ("measured", "GPU", "ms", "predicted", "error"),
        [(c.name, c.gpu, c.measured_ms, c.predicted_ms, f"{c.error:+.1%}") for c in result.checks],
    )
    if not all(c.published for c in result.checks):
        typer.echo("its ceilings: without a GPU of the table, a receipt is held to those measured with it.")
    if not any(c.receipt and c.published for c in result.checks):
        typer.echo(
            "No receipt of this repository has a latency on a GPU yet: Table 19's lines are the paper's, "
            "and the 16-bit share comes from these same lines."
        )
