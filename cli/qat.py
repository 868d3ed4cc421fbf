"""``ivl-export train qat``: fine-tune a checkpoint for a precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .output import print_json, print_table


def qat(
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to start from: a published layout's folder; else nano."),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "--precision", help="The recipe to train for ('build --list-recipes').")
    ] = "w4a4",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the new checkpoint; else runs/MODEL-RECIPE-qat.")
    ] = None,
    stage: Annotated[
        int, typer.Option(help="Losses to train with: 1 contrastive, 2 itc + itm + itg.", min=1, max=2)
    ] = 2,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Learn the full-precision model's answers instead (QAD).")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="Images and captions to train on: a folder, or a JSONL; else drawn scenes (nano)."),
    ] = None,
    calib: Annotated[
        Path | None, typer.Option(help="Images and captions to calibrate on first; else those of --data.")
    ] = None,
    ranges: Annotated[
        Path | None, typer.Option(help="Start from the ranges in this ranges.json instead of measuring.")
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="How ranges are picked: max, percentile[-99.99], entropy or mse.")
    ] = None,
    learn_scales: Annotated[
        bool, typer.Option("--learn-scales/--freeze-scales", help="Train the scales, or keep them.")
    ] = True,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 300,
    batch: Annotated[int, typer.Option(help="Images a step.", min=2)] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the weights.", min=0)] = 5e-4,
    scale_lr: Annotated[
        float, typer.Option(help="Peak learning rate of the scales, as a share of their ranges.", min=0)
    ] = 5e-3,
    seed: Annotated[int, typer.Option(help="Of the data's order.")] = 0,
    evaluate_every: Annotated[
        int, typer.Option(help="Steps between evaluations on scenes; 0: before and after only.", min=0)
    ] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between kept states.", min=1)] = 50,
    work_dir: Annotated[
        Path | None, typer.Option(help="Folder for the state that a stopped run resumes from.")
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Processes that train together, started here (torchrun works too).", min=1)
    ] = 1,
    strategy: Annotated[str, typer.Option(help="How they share the model: ddp or fsdp.")] = "ddp",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores if not given.", min=1)] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, say what would be trained.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")] = False,
) -> None:
    """Fine-tune a model whose layers compute as a recipe will quantise them.

    The result is a checkpoint with its recipe.yaml and ranges.json, for 'build', which stores the very
    integers and scales that training simulated. A run that was stopped goes on, and ends with the same
    weights.
    """
    import torch

    from ..models.shipped import shipped_name
    from ..pipeline.config import QatConfig
    from ..pipeline.qat import plan_qat, run
    from ..training.distributed import known_strategy
    from .progress import Bars

    if threads:
        torch.set_num_threads(threads)
    name = shipped_name(model) or (model or Path()).resolve().name
    chosen: Literal[1, 2] = 1 if stage == 1 else 2
    config = QatConfig(
        out=out or Path("runs") / f"{name}-{Path(recipe).stem}-qat",
        model=model,
        recipe=recipe,
        stage=chosen,
        teacher=teacher,
        data=data,
        calib=calib,
        ranges=ranges,
        algorithm=algorithm,
        steps=steps,
        batch=batch,
        lr=lr,
        scale_lr=scale_lr,
        learn_scales=learn_scales,
        seed=seed,
        evaluate_every=evaluate_every,
        save_every=save_every,
        work_dir=work_dir,
        strategy=known_strategy(strategy),
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
        print_table("Would train", ("", ""), list(summary.items()))


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
            found = (f"{scores[kind][group][task]['accuracy']:.1%}" for kind in ("fp32", "ptq", "qat"))
            share = receipt["recovered"].get(f"{group} {task}")
            rows.append((f"{group} {task}", *found, "-" if share is None else f"{share:.0%}", score["total"]))
    columns = ("task", "fp32", "PTQ", "QAT", "recovered", "questions")
    print_table("Accuracy on held-out scenes", columns, rows)
