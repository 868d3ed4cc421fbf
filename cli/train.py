"""``ivl-export train``: the stages of a preset, with progress, checkpoints and exact resume.

``train OPTIONS`` is short for ``train run OPTIONS``; ``train qat`` and ``train scenes`` are the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .groups import group_with_default
from .output import print_json, print_table
from .progress import step_bar
from .qat import qat
from .scenes import scenes

app = typer.Typer(cls=group_with_default("run"), add_completion=False)
app.command("qat")(qat)
app.command("scenes")(scenes)


@app.command(
    "run",
    epilog="Also: 'ivl-export train qat' fine-tunes a checkpoint for a precision; "
    "'ivl-export train scenes' draws pictures with captions.",
)
def train(
    preset: Annotated[
        str, typer.Option(help="What to train from scratch: nano, or nano-chat (on nano's vision tower).")
    ] = "nano",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the finished model (published layout); else runs/internvl-PRESET."),
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Folder for the state that a stopped run resumes from.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Train only so many steps a stage (a smoke test).", min=2)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images a step.", min=2)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores if not given.", min=1)] = None,
    stage: Annotated[
        int | None, typer.Option(help="3: fine-tune the chat checkpoint --model through its decoder.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Stage 3: the InternVL-Chat to start from: its folder, or nano-chat."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Stage 3: conversations, LLaVA's JSON or one a line (.jsonl); else drawn scenes."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Stage 3: the folder of the images that --data names; else its own.")
    ] = None,
    trains: Annotated[
        str, typer.Option(help="Stage 3: what learns: projector, decoder (and projector), or all.")
    ] = "decoder",
    lora_rank: Annotated[
        int | None, typer.Option(help="Stage 3: train low-rank adapters of the decoder alone.", min=1)
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Their scale; else twice the rank.")] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="Write the adapters there too, in PEFT's layout; OUT has them merged.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Stage 3: peak learning rate; else 2e-5, with LoRA 2e-4.", min=0)
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Processes that train together, started here (torchrun works too).", min=1)
    ] = 1,
    strategy: Annotated[str, typer.Option(help="How they share the model: ddp or fsdp.")] = "ddp",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a small InternVL from scratch on drawn scenes, or fine-tune an InternVL-Chat on conversations.

    Stage 1 is contrastive, stage 2 is itc + itm + itg, stage 3 learns the answers of conversations. A run
    that was stopped goes on, and ends with the same weights.
    """
    import torch

    from ..errors import UsageError
    from ..training.presets import NANO_CHAT, PRESETS

    if threads:
        torch.set_num_threads(threads)
    if processes > 1 and (stage is not None or preset == NANO_CHAT.name):
        raise UsageError("Stage 3 trains in one process.", fix="Leave --processes out.")
    if stage is not None or model is not None:
        if stage != 3 or model is None:
            raise UsageError(
                "This cannot be trained.",
                "A checkpoint is fine-tuned by stage 3.",
                "Give --stage 3 --model CHAT.",
            )
        from ..models.shipped import shipped_name
        from ..training.lora import Lora
        from .train_chat import Asked, fine_tune_chat

        folder = out or Path("runs") / (shipped_name(model) or model.resolve().name)
        asked = Asked(folder, work_dir, steps, batch, as_json)
        lora = Lora(lora_rank, lora_alpha or 2.0 * lora_rank) if lora_rank else None
        fine_tune_chat(asked, model, data, images, trains, lora, adapters, lr or (2e-4 if lora else 2e-5))
        return
    out = out or Path("runs") / f"internvl-{preset}"
    if preset == NANO_CHAT.name:
        from .train_chat import Asked, train_nano_chat

        train_nano_chat(Asked(out, work_dir, steps, batch, as_json))
        return
    if preset not in PRESETS:
        raise UsageError(
            f"Unknown preset {preset!r}.", fix=f"Use one of: {', '.join((*PRESETS, NANO_CHAT.name))}."
        )
    from rich.console import Console

    from ..inputs.preprocess import ImageSettings
    from ..inputs.tokenizer import SentencePieceTokenizer
    from ..synthetic import tasks
    from ..training import trainer
    from ..training.distributed import known_strategy, run_processes
    from ..training.evaluate import TorchModel
    from ..training.publish import TrainingRun, publish
    from ..training.tokenizer import train_tokenizer

    chosen = PRESETS[preset]
    if steps or batch:
        chosen = trainer.shortened(chosen, steps, batch)
    options = trainer.Options(
        work_dir or out.with_name(out.name + ".work"), strategy=known_strategy(strategy)
    )
    tokenizer = train_tokenizer()
    with step_bar(chosen.stages[0].name, sum(s.steps for s in chosen.stages)) as report:
        result = run_processes(processes, trainer.train, (chosen, tokenizer, options), report=report)
    if result is None:  # one of torchrun's other processes
        return
    trained, seconds = result
    settings = ImageSettings(size=chosen.model.vision.image_size)
    # The published weights are bf16: measure what is shipped.
    trained = trained.bfloat16().float()
    small: dict[str, Any] = {}
    if steps:
        small = {"n_classify": 50, "n_retrieve": 40, "n_galleries": 1, "n_caption": 20, "n_caption_zh": 10}
    with Console(stderr=True).status("evaluating"):
        accuracy = tasks.evaluate(TorchModel(trained, SentencePieceTokenizer(tokenizer), settings), **small)
    publish(trained, chosen, tokenizer, TrainingRun(seconds / 60, torch.get_num_threads(), accuracy), out)
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
