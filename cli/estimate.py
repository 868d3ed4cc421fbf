"""``ivl-export estimate``: latency, throughput, memory and cost on a GPU that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .estimate_tables import print_chat, print_components, print_embeddings
from .output import print_json
from .profile import parse_sizes

if TYPE_CHECKING:
    from ..models.registry import ModelConfig
    from ..quantization.recipe import Recipe

app = typer.Typer(add_completion=False)


@app.command()
def estimate(
    gpu: Annotated[str, typer.Option(help="GPU: l40s, h100, rtx4090, ...", show_default=False)],
    precision: Annotated[
        str | None,
        typer.Option(help="bf16, fp16, fp8, int8, or a recipe file; else a bundle's own, or fp8."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes with commas between.")] = "1,8,128",
    model: Annotated[
        Path | None,
        typer.Option(
            help="A bundle, a checkpoint's folder (its config.json is read), or a chat model of the paper: "
            "InternVL-Chat-ViT-6B-Vicuna-7B, -13B, InternVL-Chat-QLLaMA-Vicuna-7B, -13B; or nano, nano-chat. "
            "Else InternVL-14B."
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of an image's side.", show_default="the model's")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Of a chat's prompt, beside its image.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of a chat's answer.")] = 128,
    cost_per_hour: Annotated[
        float | None,
        typer.Option(min=0.0, help="The GPU's price, for the cost of a million images or questions."),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Floor and time of each call and layer type too.")
    ] = False,
    evidence: Annotated[
        bool,
        typer.Option(
            "--evidence", help="The shares' sources, the assumptions, and predictions held to times."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON.")] = False,
) -> None:
    """Predict latency, throughput, memory and cost on a GPU you do not have.

    The roofline model, at stated shares of the GPU's published peaks. Of a chat model: the time to the first
    token, tokens per second, and memory with keys and values.
    """
    from ..models.registry import CHAT, CONTRASTIVE, family_of
    from ..profiles.cost import chat_estimate
    from ..profiles.cost.estimate import estimate as run
    from ..profiles.cost.estimate import estimate_components
    from ..profiles.cost.gpus import find_gpu
    from ..profiles.cost.sizes import plan_of

    batches = parse_sizes("--batch", batch)
    peaks = find_gpu(gpu)
    whole, recipe = asked_model(model, precision)
    config: Any = sized(whole, image_size)  # of the family whose form is asked below
    plan = plan_of(recipe, config)
    name = "InternVL-14B" if model is None else model.resolve().name
    form = family_of(config).form
    if form == CHAT:
        arguments = (recipe, plan, peaks, batches, cost_per_hour, text_tokens, new_tokens)
        chat = chat_estimate.estimate(config, *arguments)
        print_json(chat.to_json()) if as_json else print_chat(chat, name, layers, evidence)
        return
    if form != CONTRASTIVE:
        parts = estimate_components(config, recipe, plan, peaks, batches, cost_per_hour)
        print_json(parts.to_json()) if as_json else print_components(parts, name, layers, evidence)
        return
    result = run(config, recipe, plan, peaks, batches, cost_per_hour)
    print_json(result.to_json()) if as_json else print_embeddings(result, name, layers, evidence)


def asked_model(model: Path | None, precision: str | None) -> tuple[ModelConfig, Recipe]:
    """Sizes and recipe of what ``--model`` and ``--precision`` name.

    Raises:
        CheckpointError, IntegrityError: there is no checkpoint and no bundle.
        UsageError: no such recipe.
    """
    from ..bundle import Bundle
    from ..bundle.manifest import MANIFEST
    from ..models.config import InternVLConfig
    from ..models.registry import config_from_published, load_config
    from ..models.shipped import checkpoint_path, no_checkpoint
    from ..profiles.cost.chat_estimate import FULL_SIZE
    from ..quantization.recipe import Recipe, load_recipe

    if model is None or (model.name == str(model) in FULL_SIZE and not model.exists()):
        return FULL_SIZE[str(model)] if model else InternVLConfig(), load_recipe(precision or "fp8")
    path = checkpoint_path(model)
    if not path.exists():
        raise no_checkpoint(path, *FULL_SIZE)
    if (model / MANIFEST).is_file():
        manifest = Bundle.open(model).manifest
        config = config_from_published(dict(manifest.model.config), str(model))
        own = Recipe.from_json(manifest.rules, str(model)) if precision is None and manifest.rules else None
        recipe = own or load_recipe(precision or manifest.recipe)
    else:
        config, recipe = load_config(path / "config.json"), load_recipe(precision or "fp8")
    return config, recipe


def sized(config: ModelConfig, image_size: int | None) -> ModelConfig:
    """``config`` for images of ``image_size`` pixels; UsageError if patches do not fill them."""
    from ..models.registry import family_of

    if image_size is None:
        return config
    family = family_of(config)
    patch = family.patch_size(config)
    if image_size % patch:
        raise UsageError(
            f"--image-size {image_size} is no multiple of the patch size.",
            f"A patch has {patch} pixels a side.",
            f"Give --image-size {max(1, image_size // patch) * patch}.",
        )
    resized: ModelConfig = family.resized(config, image_size)
    return resized
