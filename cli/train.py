"""``ivl-export train``: the stages of a preset, with progress, checkpoints and exact resume.

``train OPTIONS`` is short for ``train run OPTIONS``; also: ``train qat`` and ``train scenes``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..settings import Setting, Table, choice, number, path, read_settings, whole
from .command import SettingsOpt, command, group_with_default
from .options import TRAINING
from .output import print_json, print_table
from .progress import step_bar
from .qat import SETTINGS as QAT
from .qat import qat
from .scenes import SETTINGS as SCENES
from .scenes import scenes

app = typer.Typer(cls=group_with_default("run"), add_completion=False)
app.command("qat", cls=command(QAT, {"--freeze-scales": "--no-learn-scales"}))(qat)
app.command("scenes", cls=command(SCENES))(scenes)

SETTINGS: Table = {
    "images": Setting("a folder: images", "images that --data names; else the folder of --data", path),
    "trains": Setting(
        "decoder, projector or all",
        "trained part of --model; decoder (the default) includes the projector",
        choice(("decoder", "projector", "all")),
        default="decoder",
    ),
    "lora-rank": Setting("8, 1 or more", "train only low-rank adapters of the decoder of --model", whole(1)),
    "lora-alpha": Setting("16.0 or another", "scale of the adapters; else twice their rank", number()),
    "adapters": Setting(
        "a folder: adapters", "also write the adapters there, in PEFT's layout; --out has them merged", path
    ),
    "lr": Setting("2e-5 or another", "peak learning rate for --model; else 2e-5, with LoRA 2e-4", number()),
    **TRAINING,
}


@app.command(
    "run",
    cls=command(SETTINGS),
    epilog="Also: 'ivl-export train qat' fine-tunes a checkpoint for a precision; "
    "'ivl-export train scenes' draws pictures with captions.",
)
def train(
    preset: Annotated[
        str,
        typer.Option(help="Model to train from scratch: nano, nano-chat (on nano's tower) or nano-tiles."),
    ] = "nano",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the trained model, in the published layout.", show_default="runs/internvl-PRESET"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of each stage; a few for a smoke test.", min=2)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images of a step.", min=2)] = None,
    stage: Annotated[int | None, typer.Option(hidden=True)] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Fine-tune this InternVL-Chat instead: its folder, or nano-chat (stage 3)."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Conversations for --model: LLaVA's JSON, or .jsonl with one a line.",
            show_default="drawn scenes",
        ),
    ] = None,
    settings: SettingsOpt = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a small InternVL from scratch on drawn pictures, or fine-tune an InternVL-Chat on conversations.

    Stage 1 is contrastive, stage 2 is itc + itm + itg, stage 3 learns the answers of conversations. An
    interrupted run resumes, and ends with the same weights.
    """
    values = read_settings(SETTINGS, settings or ())
    processes = values["processes"]
    import torch

    from ..errors import UsageError
    from ..training.presets import NANO_CHAT, NANO_TILES, PRESETS

    if "threads" in values:
        torch.set_num_threads(values["threads"])
    if processes > 1 and (
        stage is not None or model is not None or preset in (NANO_CHAT.name, NANO_TILES.name)
    ):
        raise UsageError("Chat models train in one process.", fix="Leave -O processes out.")
    if stage is not None or model is not None:
        if stage not in (None, 3) or model is None:
            raise UsageError(
                f"--stage {stage} cannot be run like this.",
                "Stages 1 and 2 are those of a preset; stage 3 fine-tunes a chat model.",
                "Give --preset NAME or --model CHAT, without --stage.",
            )
        from ..models.shipped import shipped_name
        from ..training.lora import Lora
        from .train_chat import ChatRun, fine_tune_chat

        folder = out or Path("runs") / (shipped_name(model) or model.resolve().name)
        rank = values.get("lora_rank")
        lora = Lora(rank, values.get("lora_alpha") or 2.0 * rank) if rank else None
        fine_tune_chat(
            ChatRun(folder, values.get("work_dir"), steps, batch, as_json),
            model,
            data,
            values.get("images"),
            values["trains"],
            lora,
            values.get("adapters"),
            values.get("lr") or (2e-4 if lora else 2e-5),
        )
        return
    out = out or Path("runs") / f"internvl-{preset}"
    if preset == NANO_CHAT.name:
        from .train_chat import ChatRun, train_nano_chat

        train_nano_chat(ChatRun(out, values.get("work_dir"), steps, batch, as_json))
        return
    if preset == NANO_TILES.name:
        from .train_chat import ChatRun
        from .train_tiles import train_nano_tiles

        train_nano_tiles(ChatRun(out, values.get("work_dir"), steps, batch, as_json))
        return
    if preset not in PRESETS:
        known = ", ".join((*PRESETS, NANO_CHAT.name, NANO_TILES.name))
        raise UsageError(f"Unknown preset {preset!r}.", fix=f"Use one of: {known}.")
    from rich.console import Console

    from ..inputs.preprocess import ImageSettings
    from ..inputs.tokenizer import SentencePieceTokenizer
    from ..synthetic import tasks
    from ..training import trainer
    from ..training.distributed import run_processes
    from ..training.evaluate import TorchModel
    from ..training.publish import TrainingRun, publish
    from ..training.tokenizer import train_tokenizer

    schedule = PRESETS[preset]
    if steps or batch:
        schedule = trainer.shortened(schedule, steps, batch)
    options = trainer.Options(
        values.get("work_dir") or out.with_name(out.name + ".work"), strategy=values["strategy"]
    )
    tokenizer = train_tokenizer()
    with step_bar(schedule.stages[0].name, sum(s.steps for s in schedule.stages)) as report:
        result = run_processes(processes, trainer.train, (schedule, tokenizer, options), report=report)
    if result is None:  # one of torchrun's other processes
        return
    trained, seconds = result
    image_settings = ImageSettings(size=schedule.model.vision.image_size)
    # The published weights are bf16: measure what is shipped.
    trained = trained.bfloat16().float()
    small: dict[str, Any] = {}
    if steps:
        small = {"n_classify": 50, "n_retrieve": 40, "n_galleries": 1, "n_caption": 20, "n_caption_zh": 10}
    with Console(stderr=True).status("evaluating"):
        accuracy = tasks.evaluate(
            TorchModel(trained, SentencePieceTokenizer(tokenizer), image_settings), **small
        )
    publish(trained, schedule, tokenizer, TrainingRun(seconds / 60, torch.get_num_threads(), accuracy), out)
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
