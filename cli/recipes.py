"""``ivl-export recipes``: the precision recipes that ship, and one as a file to edit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..quantization.recipe import Recipe

app = typer.Typer(add_completion=False)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="A shipped recipe, or a recipe file.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print YAML, as recipe files are written.")] = False,
) -> None:
    """Show the recipes that --precision takes; with a name, that one as a file to edit.

    Save what is printed, change it, and give the file to build: --precision my.yaml.
    """
    from ..quantization.recipe import load_recipe, recipe_file, shipped_recipes

    if as_json and as_yaml:
        raise UsageError("--json and --yaml were both given.", fix="Give one of them.")
    if name is not None:
        recipe = load_recipe(name)
        if as_json:
            print_json(recipe.to_json())
        else:  # the file as it stands, with its comments
            shipped = name in shipped_recipes()
            typer.echo(
                recipe_file(name).read_text(encoding="utf-8") if shipped else recipe.to_yaml(), nl=False
            )
        return
    found = [load_recipe(shipped) for shipped in shipped_recipes()]
    if as_yaml:
        typer.echo("---\n".join(recipe.to_yaml() for recipe in found), nl=False)
    elif as_json:
        print_json([{**recipe.to_json(), "targets": _targets(recipe)} for recipe in found])
    else:
        rows = [(recipe.name, recipe.summary, _targets(recipe)) for recipe in found]
        print_table("Precision recipes", ("recipe", "what it does", "TensorRT-RTX targets"), rows)
        layers = [
            (rule.pattern, *(_scheme(recipe, rule.pattern) for recipe in found if recipe.rules))
            for rule in {rule.pattern: rule for recipe in found for rule in recipe.rules}.values()
        ]
        print_table(
            "Layers; the last pattern that matches one counts",
            ("pattern", *(recipe.name for recipe in found if recipe.rules)),
            layers,
        )
        typer.echo(
            "mixed: searched for the model by build --precision mixed --budget 0.3 (points of accuracy)."
        )
        typer.echo("All of them also run in ONNX Runtime on a CPU, where only INT8 products are faster.")


def _targets(recipe: Recipe) -> list[str]:
    """Generations that have every type of ``recipe``."""
    from ..engines.targets import TARGETS

    return [target.name for target in TARGETS.values() if not recipe.element_types & target.missing]


def _scheme(recipe: Recipe, pattern: str) -> str | None:
    return next((rule.scheme for rule in reversed(recipe.rules) if rule.pattern == pattern), None)
