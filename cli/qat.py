"""``ivl-export train qat``: fine-tune a checkpoint for a precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..settings import SWITCH, Setting, Table, choice, number, read_settings, switch, whole
from .command import SettingsOpt
from .options import ALGORITHM, TRAINING
from .output import print_json, print_table


def _stage(value: object) -> int:
    stage = whole(1)(value)
    if stage > 3:
        raise ValueError(value)
    return stage


SETTINGS: Table = {
    "stage": Setting(
        "2, 1 or 3",
        "losses: 1 contrastive, 2 itc + itm + itg, 3 answers of a chat model; else 2, of a chat model 3",
        _stage,
    ),
    "trains": Setting(
        "all, decoder or projector",
        "part of a chat model that learns; decoder includes the projector; else all",
        choice(("all", "decoder", "projector")),
        default="all",
    ),
    **ALGORITHM,
    "learn-scales": Setting(SWITCH, "train the scales; false keeps them; else true", switch),
    "lr": Setting("5e-4 or another", "peak learning rate of the weights; else 5e-4", number()),
    "scale-lr": Setting(
        "5e-3 or another", "peak learning rate of the scales, as a share of their ranges; else 5e-3", number()
    ),
    "seed": Setting("0, 1 or more", "seed of the data's order; else 0", whole()),
    "evaluate-every": Setting(
        "50, 0 or more", "steps between evaluations on drawn pictures; else 0: only before and after", whole()
    ),
    "save-every": Setting("50, 1 or more", "steps between saved states; else 50", whole(1)),
    **TRAINING,
}
"""Fields of :class:`..pipeline.config.QatConfig`, ``threads`` and ``processes``."""


def qat(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint to start from: its folder, or nano.",
            show_default="nano",
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "--precision", help="The recipe to train for ('build --list-recipes').")
    ] = "w4a4",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the new checkpoint.", show_default="runs/MODEL-RECIPE-qat"),
    ] = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Learn the unrounded model's outputs instead (QAD).")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Images and captions to train on (a folder, JSONL), or a chat model's conversations "
            "(JSON or JSONL).",
            show_default="shipped models: drawn",
        ),
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(help="Images and captions to calibrate on first.", show_default="those of --data"),
    ] = None,
    ranges: Annotated[
        Path | None,
        typer.Option(help="Start from the ranges in this file of 'calibrate' instead of measuring."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 300,
    batch: Annotated[int, typer.Option(help="Images of a step.", min=2)] = 32,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, list what would be trained.")
    ] = False,
    settings: SettingsOpt = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")] = False,
) -> None:
    """Quantisation-aware training: fine-tune a checkpoint with its layers rounded as a recipe rounds them.

    The result is a checkpoint with recipe.yaml and ranges.json, for 'build', which stores exactly the
    integers and scales that training simulated. An interrupted run resumes, and ends with the same weights.
    """
    values = read_settings(SETTINGS, settings or ())
    threads, processes = values.pop("threads", None), values.pop("processes")
    import torch

    from ..models.shipped import shipped_name
    from ..pipeline.config import QatConfig
    from ..pipeline.qat import plan_qat, run
    from .progress import Bars

    if threads:
        torch.set_num_threads(threads)
    name = shipped_name(model) or (model or Path()).resolve().name
    config = QatConfig(
        out=out or Path("runs") / f"{name}-{Path(recipe).stem}-qat",
        model=model,
        recipe=recipe,
        teacher=teacher,
        data=data,
        calib=calib,
        ranges=ranges,
        steps=steps,
        batch=batch,
        **values,
    )
    with Bars() as bars:
        bars.started("open", None)
        plan = plan_qat(config, bars.advanced)
        bars.finished("open", 0.0)
        for notice in plan.notices:
            typer.secho(f"note: {notice}", fg="yellow", err=True)
        if dry_run:
            _print_plan(plan.summary(processes), as_json)
            return
        outcome = run(plan, processes, bars, lambda progress: bars.advanced(progress.done))
    if outcome is None:  # one of torchrun's other processes
        return
    if as_json:
        print_json({"checkpoint": str(outcome.out), **outcome.receipt})
        return
    _print_scores(outcome.receipt, outcome.out)
    typer.echo(f"next: {outcome.build_command}")


def _print_plan(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(summary)
    else:
        layers = [f"{count} in {scheme}" for scheme, count in summary["layers"].items()]
        print_table("Would train", ("", ""), list({**summary, "layers": layers}.items()))


def _print_scores(receipt: dict[str, Any], out: Path) -> None:
    first, last = receipt["losses"][0], receipt["losses"][-1]
    rows: list[tuple[object, ...]] = [(k, f"{first[k]:.4g}", f"{last[k]:.4g}") for k in first]
    print_table(f"{receipt['recipe']} in {out}", ("loss", "first step", "last step"), rows)
    scores = receipt.get("scores")
    if scores is None:
        return
    rows = []
    for group, tasks in scores["fp32"].items():
        for task, score in tasks.items() if group != "settings" else ():
            results = (f"{scores[kind][group][task]['accuracy']:.1%}" for kind in ("fp32", "ptq", "qat"))
            share = receipt["recovered"].get(f"{group} {task}")
            rows.append(
                (f"{group} {task}", *results, "-" if share is None else f"{share:.0%}", score["total"])
            )
    columns = ("task", "fp32", "PTQ", "QAT", "recovered", "questions")
    print_table("Accuracy on held-out questions", columns, rows)
