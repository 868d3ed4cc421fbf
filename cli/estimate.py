"""``ivl-export estimate``: latency, throughput, memory and cost, predicted for a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..settings import Setting, Table, read_settings, whole
from .command import SettingsOpt, command
from .estimate_tables import print_chat, print_components, print_embeddings
from .output import print_json
from .profile import parse_sizes

if TYPE_CHECKING:
    from ..models.registry import ModelConfig
    from ..quantization.recipe import Recipe

app = typer.Typer(add_completion=False)

SETTINGS: Table = {
    "image-size": Setting("224, 448 or another", "side of an image in pixels; else the model's", whole(1)),
    "text-tokens": Setting(
        "64, 1 or more", "tokens of a chat's prompt, its image not counted; else 64", whole(1), default=64
    ),
    "new-tokens": Setting("128, 1 or more", "tokens of a chat's answer; else 128", whole(1), default=128),
}


@app.command(cls=command(SETTINGS))
def estimate(
    gpu: Annotated[str, typer.Option(help="GPU: l40s, h100, rtx4090, ...", show_default=False)],
    precision: Annotated[
        str | None,
        typer.Option(help="bf16, fp16, fp8, int8, or a recipe file.", show_default="the bundle's, or fp8"),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes with commas between.")] = "1,8,128",
    model: Annotated[
        Path | None,
        typer.Option(
            help="A bundle, a checkpoint's folder (only its config.json is read), nano, nano-chat, "
            "nano-tiles, or a chat model of the paper: InternVL-Chat-ViT-6B-Vicuna-7B, -13B, "
            "InternVL-Chat-QLLaMA-Vicuna-7B, -13B.",
            show_default="InternVL-14B",
        ),
    ] = None,
    cost_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="The GPU's price per hour, for the cost of a million images or questions."
        ),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also show each call and layer type, with its lower bound.")
    ] = False,
    evidence: Annotated[
        bool,
        typer.Option(
            "--evidence",
            help="Also show the sources of the efficiencies, the assumptions, and predictions against times.",
        ),
    ] = False,
    settings: SettingsOpt = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON.")] = False,
) -> None:
    """Predict latency, throughput, memory and cost on a GPU you do not have.

    A roofline model, at stated fractions of the GPU's published peaks. For a chat model: time to the first
    token, tokens per second, and memory including keys and values.
    """
    from ..models.registry import CHAT, CONTRASTIVE, family_of
    from ..profiles.cost import chat_estimate
    from ..profiles.cost.estimate import estimate as run
    from ..profiles.cost.estimate import estimate_components
    from ..profiles.cost.gpus import find_gpu
    from ..profiles.cost.sizes import plan_of

    batches = parse_sizes("--batch", batch)
    peaks = find_gpu(gpu)
    values = read_settings(SETTINGS, settings or ())
    full_size, recipe = model_and_recipe(model, precision)
    config: Any = sized(full_size, values.get("image_size"))
    plan = plan_of(recipe, config)
    name = "InternVL-14B" if model is None else model.resolve().name
    form = family_of(config).form
    if form == CHAT:
        arguments = (recipe, plan, peaks, batches, cost_per_hour, values["text_tokens"], values["new_tokens"])
        chat = chat_estimate.estimate(config, *arguments)
        print_json(chat.to_json()) if as_json else print_chat(chat, name, layers, evidence)
        return
    if form != CONTRASTIVE:
        parts = estimate_components(config, recipe, plan, peaks, batches, cost_per_hour)
        print_json(parts.to_json()) if as_json else print_components(parts, name, layers, evidence)
        return
    result = run(config, recipe, plan, peaks, batches, cost_per_hour)
    print_json(result.to_json()) if as_json else print_embeddings(result, name, layers, evidence)


def model_and_recipe(model: Path | None, precision: str | None) -> tuple[ModelConfig, Recipe]:
    """The config and the recipe that ``--model`` and ``--precision`` name.

    Raises:
        CheckpointError, IntegrityError: not a checkpoint, not an intact bundle.
        UsageError: an unknown recipe.
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
            f"-O image-size={image_size} is not a multiple of the patch size.",
            f"A patch is {patch} x {patch} pixels.",
            f"Give -O image-size={max(1, image_size // patch) * patch}.",
        )
    resized: ModelConfig = family.resized(config, image_size)
    return resized
