"""``ivl-export doctor``: what can be built and run here, and what to install.

``doctor OPTIONS`` is short for ``doctor check OPTIONS``; ``doctor cache`` shows and deletes kept files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CapabilityError
from .cache import app as cache
from .estimate import asked_model
from .groups import group_with_default
from .output import human_bytes, print_json, print_table

if TYPE_CHECKING:
    from ..profiles.doctor import Ability, Diagnosis

app = typer.Typer(cls=group_with_default("check"), add_completion=False)
app.add_typer(cache, name="cache")


@app.command("check", epilog="Also: 'ivl-export doctor cache ls' and 'doctor cache prune'.")
def doctor(
    model: Annotated[
        Path | None,
        typer.Option(help="Check disk and memory for building this model, as estimate --model names it."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Check building in it: bf16, fp16, fp8, ...", show_default="fp8")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Python, packages, GPUs, disk and memory: what can be built and run here.

    The exit code is 0, or 5 if what --model and --precision ask for cannot be built here, or cannot run on
    the GPU that is here.
    """
    from ..profiles.cost.sizes import plan_of
    from ..profiles.doctor import Asked, diagnose

    asked = None
    if model is not None or precision is not None:
        config, recipe = asked_model(model, precision)
        asked = Asked(recipe, plan_of(recipe, config), None if model is None else config)
    found = diagnose(asked)
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)
    if found.problems:
        raise typer.Exit(CapabilityError.exit_code)


def _print(found: Diagnosis) -> None:
    here = found.machine
    memory = None if here.memory_bytes is None else human_bytes(here.memory_bytes)
    gpus = [
        ("GPU", f"{g.name}, {g.sm or 'unknown generation'}, {g.memory_mib} MiB, driver {g.driver}")
        for g in here.gpus
    ]
    print_table(
        "This machine",
        ("", ""),
        [
            ("Python", found.python),
            ("CPU", f"{here.cpu}, {here.cores} cores, {memory or 'unknown'} of memory"),
            *(gpus or [("GPU", "none: nvidia-smi is not there or found none")]),
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
            for extra in found.extras
        ],
    )
    print_table(
        "Backends",
        ("backend", "installed", "runs here", "otherwise"),
        [
            (
                here.backend,
                here.release,
                f"no: {here.blocked}" if here.blocked else here.note or "yes",
                here.install if here.release is None else None,
            )
            for here in found.backends
        ],
    )
    print_table(
        "What can be done here",
        ("backend", "precision", "build", "run"),
        [(a.backend, a.precision, _build(a), _run(a)) for a in found.abilities],
    )
    if found.needs is not None:
        needs = found.needs
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
    for problem in found.problems:
        typer.secho(f"problem: {problem.what}", fg="red")
        typer.echo(f"  why: {problem.why}\n  fix: {problem.fix}")
    if not found.problems:
        typer.echo("No problems found.")


def _run(ability: Ability) -> str:
    if ability.run:
        return f"no: {ability.run}"
    return f"yes, {ability.note}" if ability.note else "yes"


def _build(ability: Ability) -> str:
    if ability.build:
        return f"no: {ability.build}"
    return f"yes, for {', '.join(ability.targets)}" if ability.targets else "yes"
