"""``ivl-export train``: the stages of a preset, with progress, checkpoints and exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import print_json, print_table

app = typer.Typer(add_completion=False)


@app.command()
def train(
    preset: Annotated[str, typer.Option(help="What to train; 'nano' is the only one.")] = "nano",
    out: Annotated[Path, typer.Option(help="Folder for the finished model (published layout).")] = Path(
        "runs/internvl-nano"
    ),
    work_dir: Annotated[
        Path | None, typer.Option(help="Folder for the state that a stopped run resumes from.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Train only so many steps a stage (a smoke test).", min=2)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images a step.", min=2)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores if not given.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train InternVL from scratch on drawn scenes.

    Stage 1 is contrastive, stage 2 is itc + itm + itg.
    """
    from ..errors import UsageError
    from ..training.presets import PRESETS

    if preset not in PRESETS:
        raise UsageError(f"Unknown preset {preset!r}.", fix=f"Use one of: {', '.join(PRESETS)}.")
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from ..preprocess import ImageSettings, Tokenizer
    from ..training import tasks, trainer
    from ..training.evaluate import TorchModel
    from ..training.publish import Run, publish
    from ..training.tokenizer import train_tokenizer

    if threads:
        torch.set_num_threads(threads)
    chosen = PRESETS[preset]
    if steps or batch:
        chosen = trainer.shortened(chosen, steps, batch)
    tokenizer = train_tokenizer()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console) as bar:
        total = sum(s.steps for s in chosen.stages)
        task = bar.add_task(chosen.stages[0].name, total=total, rate="", loss="")

        def report(p: trainer.Progress) -> None:
            rate = f"{bar.tasks[0].speed or 0:.2f} steps/s"
            losses = " ".join(f"{k} {v:.3f}" for k, v in p.losses.items() if k != "grad_norm")
            bar.update(task, completed=p.done, description=p.stage, rate=rate, loss=losses)

        options = trainer.Options(work_dir or out.with_name(out.name + ".work"))
        model, seconds = trainer.train(chosen, tokenizer, options, report)
    settings = ImageSettings(size=chosen.model.vision.image_size)
    # The published weights are bf16: measure what is shipped.
    model = model.bfloat16().float()
    small: dict[str, Any] = {}
    if steps:
        small = {"n_classify": 50, "n_retrieve": 40, "n_galleries": 1, "n_caption": 20, "n_caption_zh": 10}
    with console.status("evaluating"):
        accuracy = tasks.evaluate(TorchModel(model, Tokenizer(tokenizer), settings), **small)
    publish(model, chosen, tokenizer, Run(seconds / 60, torch.get_num_threads(), accuracy), out)
    if as_json:
        print_json({"model": str(out), "minutes": seconds / 60, "accuracy": accuracy})
        return
    rows = [
        (group, name, f"{score['accuracy']:.1%}", score["total"])
        for group, scores in accuracy.items()
        if group != "settings"
        for name, score in scores.items()
    ]
    print_table(f"internvl-{preset} in {out}", ("mode", "task", "accuracy", "questions"), rows)
