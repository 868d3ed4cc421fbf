"""``ivl-export train --preset nano-tiles``: the model that reads signs."""

from __future__ import annotations

from .output import print_json, print_table
from .progress import step_bar
from .train_chat import ChatRun


def train_nano_tiles(run: ChatRun) -> None:
    """Train internvl-nano-tiles, measure it with its tiles and with one, and write it with its card."""
    import torch
    from rich.console import Console

    from ..synthetic import sign_tasks
    from ..training.presets import NANO_TILES
    from ..training.publish import TrainingRun, write_tiles_card
    from ..training.signs import shortened, train
    from ..training.tiles_model import TorchSigns, write
    from ..training.trainer import Options

    preset = shortened(NANO_TILES, run.steps, run.batch)
    options = Options(run.work_dir or run.out.with_name(run.out.name + ".work"))
    with step_bar(preset.places.name, sum(stage.steps for stage in preset.stages)) as report:
        model, seconds = train(preset, options, report)
    # The published weights are bf16: measure what is shipped.
    model = model.bfloat16().float()
    questions = 30 if run.steps else sign_tasks.QUESTIONS
    with Console(stderr=True).status("evaluating"):
        accuracy = sign_tasks.evaluate(TorchSigns(model), questions)
        accuracy["one tile"] = sign_tasks.evaluate(TorchSigns(model, 1), questions)["signs"]
    write(model, run.out)
    facts = TrainingRun(seconds / 60, torch.get_num_threads(), accuracy)
    write_tiles_card(preset, facts, sum(p.numel() for p in model.parameters()), run.out)
    if run.as_json:
        print_json({"model": str(run.out), "minutes": seconds / 60, "accuracy": accuracy})
        return
    rows = [
        (task, f"{score['accuracy']:.1%}", f"{accuracy['one tile'][task]['accuracy']:.1%}", score["total"])
        for task, score in accuracy["signs"].items()
    ]
    headings = ("question", "exact", "with one tile", "questions")
    print_table(f"internvl-nano-tiles in {run.out}", headings, rows)
