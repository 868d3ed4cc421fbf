"""``ivl-export build --list-recipes`` and ``--show-recipe NAME``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from .output import print_json, print_table

if TYPE_CHECKING:
    from ..quantization.recipe import Recipe


def show_recipe(name: str, as_json: bool) -> None:
    """Print a shipped recipe as its file, with the comments; a recipe file as it was read.

    Raises:
        UsageError: an unknown recipe.
    """
    from ..quantization.recipe import load_recipe, recipe_file, shipped_recipes

    recipe = load_recipe(name)
    if as_json:
        print_json(recipe.to_json())
        return
    shipped = name in shipped_recipes()
    typer.echo(recipe_file(name).read_text(encoding="utf-8") if shipped else recipe.to_yaml(), nl=False)


def list_recipes(as_json: bool) -> None:
    """Print the shipped recipes: summary, layers, and the GPUs that support their types."""
    from ..quantization.recipe import load_recipe, shipped_recipes

    recipes = [load_recipe(name) for name in shipped_recipes()]
    if as_json:
        print_json([{**recipe.to_json(), "targets": _targets(recipe)} for recipe in recipes])
        return
    rows = [(recipe.name, recipe.summary, _targets(recipe)) for recipe in recipes]
    print_table("Precision recipes", ("recipe", "summary", "TensorRT-RTX targets"), rows)
    layers = [
        (recipe.name, scheme, [rule.pattern for rule in recipe.rules if rule.scheme == scheme])
        for recipe in recipes
        for scheme in dict.fromkeys(rule.scheme for rule in recipe.rules)
    ]
    print_table(
        "Layers; of several patterns that match, the last one applies", ("recipe", "scheme", "layers"), layers
    )
    typer.echo(
        "mixed: build --precision mixed --budget 0.3 searches a recipe (0.3 points of accuracy may be lost)."
    )
    typer.echo("All run in ONNX Runtime on a CPU too, where only INT8 products are faster.")
    typer.echo("To edit one for --precision my.yaml: ivl-export build --show-recipe fp8 > my.yaml")


def _targets(recipe: Recipe) -> list[str]:
    """Generations that have every type of ``recipe``."""
    from ..engines.targets import TARGETS

    return [target.name for target in TARGETS.values() if not recipe.element_types & target.missing]
