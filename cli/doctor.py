"""``ivl-export doctor``: builds and runs that this machine can do, and packages to install.

``doctor OPTIONS`` is short for ``doctor check OPTIONS``; ``doctor cache`` lists and deletes cached files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..engines.products import FACTORS
from ..engines.targets import TARGETS, TENSORRT_ONLY
from ..engines.tensorrt.library import BUILDERS
from ..errors import CapabilityError
from .cache import app as cache
from .command import command, group_with_default
from .estimate import model_and_recipe
from .output import human_bytes, print_json, print_table, print_text

if TYPE_CHECKING:
    from ..profiles.doctor import Ability, Diagnosis

app = typer.Typer(cls=group_with_default("check"), add_completion=False)
app.add_typer(cache, name="cache")


@app.command("check", cls=command({}), epilog="Also: 'ivl-export doctor cache ls' and 'doctor cache prune'.")
def doctor(
    model: Annotated[
        Path | None,
        typer.Option(help="Check disk and memory for building this model (as in estimate)."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Check builds of this recipe: bf16, fp16, fp8, ...", show_default="fp8")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check Python, packages, GPUs, disk and memory for building and running bundles.

    The exit code is 0, or 5 if --model in --precision cannot be built here, or cannot run on this GPU.
    """
    from ..profiles.cost.sizes import plan_of
    from ..profiles.doctor import Request, diagnose

    request = None
    if model is not None or precision is not None:
        config, recipe = model_and_recipe(model, precision)
        request = Request(recipe, plan_of(recipe, config), None if model is None else config)
    diagnosis = diagnose(request)
    if as_json:
        print_json(diagnosis.to_json())
    else:
        _print(diagnosis)
    if diagnosis.problems:
        raise typer.Exit(CapabilityError.exit_code)


def _print(diagnosis: Diagnosis) -> None:
    here = diagnosis.machine
    memory = None if here.memory_bytes is None else human_bytes(here.memory_bytes)
    gpus = [
        ("GPU", f"{g.name}, {g.sm or 'unknown generation'}, {g.memory_mib} MiB, driver {g.driver}")
        for g in here.gpus
    ]
    print_table(
        "This machine",
        ("", ""),
        [
            ("Python", diagnosis.python),
            ("CPU", f"{here.cpu}, {here.cores} cores, {memory or 'unknown'} of memory"),
            *(gpus or [("GPU", "none: nvidia-smi is missing or lists none")]),
        ],
    )
    print_table(
        "Packages",
        ("to", "extra", "installed", "otherwise"),
        [
            (
                extra.purpose,
                extra.name,
                [f"{package} {version or 'MISSING'}" for package, version in extra.packages.items()],
                None if extra.installed else extra.install,
            )
            for extra in diagnosis.extras
        ],
    )
    _print_backends(diagnosis)
    if diagnosis.needs is not None:
        needs = diagnosis.needs
        free = None if needs.free_memory is None else human_bytes(needs.free_memory)
        print_table(
            "The model",
            ("", "takes", "free"),
            [
                ("weights", human_bytes(needs.weights), None),
                ("bundle, one target", human_bytes(needs.bundle), human_bytes(needs.free_disk)),
                (f"memory, engine of {needs.largest or '-'}", human_bytes(needs.memory), free),
            ],
        )
    for problem in diagnosis.problems:
        typer.secho(f"problem: {problem.what}", fg="red")
        typer.echo(f"  why: {problem.why}\n  fix: {problem.fix}")
    if not diagnosis.problems:
        typer.echo("No problems found.")


def _print_backends(diagnosis: Diagnosis) -> None:
    """One line a backend; below the table, reasons why one does not build or run."""
    pairs = list(zip(diagnosis.backends, diagnosis.abilities, strict=True))
    print_table(
        "Backends",
        ("backend", "installed", "builds", "runs here", "8-bit products of recipes", "others in"),
        [
            (
                here.backend,
                here.release or "no",
                "no" if ability.build else _count(ability.targets) or "yes",
                "no" if here.blocked else "yes",
                "all" if ability.backend in BUILDERS else list(ability.products) or "none",
                ability.rest,
            )
            for here, ability in pairs
        ],
    )
    for here, ability in pairs:
        targets = _targets(ability.targets)
        notes = [
            f"builds for {', '.join(targets)}" if targets else "",
            f"does not build: {ability.build}" if ability.build else "",
            f"does not run: {here.blocked}" if here.blocked and here.blocked != ability.build else here.note,
            here.install if here.release is None else "",
            *(f"{name} as {kind.replace('x', ' x ')}" for name, kind in _replaced(ability)),
        ]
        print_text(f"{here.backend}: {'; '.join(filter(None, notes))}")
    others = ", ".join(f"{sm} ({gpus})" for sm, gpus in TENSORRT_ONLY.items())
    print_text(f"On {others}: build --backend tensorrt on that GPU; TensorRT-RTX does not support it.")


def _targets(targets: Mapping[str, Sequence[str]]) -> list[str]:
    names = {name for of_recipe in targets.values() for name in of_recipe}
    return sorted(names, key=list(TARGETS).index)


def _count(targets: Mapping[str, Sequence[str]]) -> str:
    return f"{len(_targets(targets))} GPU types" if targets else ""


def _replaced(ability: Ability) -> Iterator[tuple[str, str]]:
    """Recipes whose products run with other types than the recipe's own."""
    for name, kinds in ability.products.items():
        own = FACTORS.get(name)
        if own is not None and "x".join(own) not in kinds:
            yield name, ", ".join(kinds)
