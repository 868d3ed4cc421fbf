"""Stage 3 of ``ivl-export train``: nano-chat on drawn scenes, or any chat checkpoint on conversations."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import print_json, print_table
from .progress import step_bar

if TYPE_CHECKING:
    from ..training.lora import Lora
    from ..training.trainer import Options


@dataclass(frozen=True)
class ChatRun:
    """Options of both runs; see the verb's help."""

    out: Path
    work_dir: Path | None
    steps: int | None
    batch: int | None
    as_json: bool


def train_nano_chat(run: ChatRun) -> None:
    """Train internvl-nano-chat from the shipped internvl-nano, measure it, and write it with its card."""
    import torch
    from rich.console import Console

    from ..inputs.preprocess import ImageSettings
    from ..inputs.tokenizer import SentencePieceTokenizer
    from ..models.checkpoint import open_checkpoint
    from ..models.shipped import nano_folder
    from ..synthetic import chat_tasks
    from ..synthetic.dialogues import corpus
    from ..training.chat_model import TorchChat, initialised, write
    from ..training.conversations import ChatBatches, SceneDialogues
    from ..training.presets import NANO_CHAT
    from ..training.publish import TrainingRun, write_chat_card
    from ..training.stage3 import Stage3, fine_tune
    from ..training.tokenizer import train_tokenizer
    from ..training.trainer import shortened_stage

    preset = replace(NANO_CHAT, stage=shortened_stage(NANO_CHAT.stage, run.steps, run.batch))
    stage, tower = preset.stage, open_checkpoint(nano_folder())
    tokenizer = train_tokenizer(corpus(), preset.model.decoder.vocab_size)
    settings = ImageSettings(size=preset.model.image_size, mode="pad")
    model = initialised(preset, tower)
    source = SceneDialogues(preset.seed, preset.model.image_size, preset.turns, stage.near, stage.pairs)
    data = ChatBatches(source, stage, settings, tokenizer, preset.model.decoder.max_position_embeddings)
    identity = {"preset": repr(preset), "tower": tower.revision}
    with step_bar(stage.name, stage.steps) as report:
        stage3 = Stage3(stage, seed=preset.seed, weight_decay=preset.weight_decay)
        seconds = fine_tune(model, stage3, data, identity, _options(run), report)
    # The published weights are bf16: measure what is shipped.
    model = model.bfloat16().float()
    with Console(stderr=True).status("evaluating"):
        answer = TorchChat(model, SentencePieceTokenizer(tokenizer), settings)
        accuracy = chat_tasks.evaluate(answer, 40 if run.steps else chat_tasks.SCENES)
    write(model.state_dict(), preset.model, run.out, tokenizer, settings, tower)
    training = TrainingRun(seconds / 60, torch.get_num_threads(), accuracy)
    write_chat_card(preset, training, sum(p.numel() for p in model.parameters()), run.out)
    if run.as_json:
        print_json({"model": str(run.out), "minutes": seconds / 60, "accuracy": accuracy})
        return
    rows = [(kind, f"{s['accuracy']:.1%}", s["total"]) for kind, s in accuracy["chat"].items()]
    print_table(f"internvl-nano-chat in {run.out}", ("question", "exact", "questions"), rows)


def fine_tune_chat(
    run: ChatRun,
    checkpoint: Path,
    data: Path | None,
    images: Path | None,
    trains: str,
    lora: Lora | None,
    adapters: Path | None,
    lr: float,
) -> None:
    """Fine-tune a chat checkpoint on conversations (drawn scenes without ``data``), and write it."""
    import torch

    from ..errors import UsageError
    from ..inputs.chat_template import ChatFormat
    from ..inputs.tokenizer import MODEL
    from ..models.checkpoint import open_checkpoint
    from ..models.load import load_chat
    from ..models.registry import decoder_place, family_of, image_settings
    from ..models.shipped import checkpoint_path
    from ..training import lora as low_rank
    from ..training.chat_model import write, write_as_stored
    from ..training.conversations import ChatBatches, SceneDialogues, context_for_text, read_llava
    from ..training.presets import Stage
    from ..training.stage3 import TRAINS, Stage3, fine_tune

    if trains not in TRAINS or trains == "lora":
        raise UsageError(
            f"Cannot train {trains!r}.", fix="Use projector, decoder or all; -O lora-rank for LoRA."
        )
    opened = open_checkpoint(checkpoint_path(checkpoint))
    model = load_chat(opened)
    if lora is not None and lora.pattern == low_rank.DECODER:
        lora = replace(lora, pattern=f"{decoder_place(opened.model)}.*_proj")
    family = family_of(opened.model)
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    tokenizer = family.tokenizer(opened.model, folder)
    chat = family.chat_format(opened.model, folder, tokenizer) or ChatFormat()
    settings = image_settings(opened.model, folder)
    steps, batch = run.steps or 1000, run.batch or 16
    patterns = TRAINS["lora" if lora else trains]
    stage = Stage("stage3", "answers", steps, batch, lr, 0.0, max(1, steps * 3 // 100), trainable=patterns)
    source: Any = SceneDialogues(0, settings.size)
    identity = {"model": opened.revision, "data": "scenes"}
    if data is not None:
        source = read_llava(data, images)
        identity["data"] = hashlib.sha256(data.read_bytes()).hexdigest()
    longest = context_for_text(opened.model, chat)
    batches = ChatBatches(source, stage, settings, tokenizer, longest, chat)
    with step_bar(stage.name, steps) as report:
        seconds = fine_tune(model, Stage3(stage, lora), batches, identity, _options(run), report)
    if lora is not None:
        if adapters is not None:
            low_rank.save(model, lora, adapters)
        low_rank.merge(model, lora)
    state = model.state_dict()
    if not write_as_stored(state, opened, run.out):
        dtype = opened.load("lm_head.weight").dtype
        write(state, model.config, run.out, tokenizer.files[MODEL], settings, opened, dtype)
    summary = {
        "model": str(run.out),
        "minutes": seconds / 60,
        "steps": steps,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapters": str(adapters) if lora and adapters else None,
        "threads": torch.get_num_threads(),
    }
    if run.as_json:
        print_json(summary)
        return
    print_table(f"stage 3 of {checkpoint}", ("", ""), [(k, v) for k, v in summary.items() if v is not None])


def _file_of(folder: Path, name: str) -> Path:
    from ..errors import CheckpointError

    if not (folder / name).is_file():
        raise CheckpointError(f"No {name} in {folder}.", fix=f"Copy the {name} of the published model there.")
    return folder / name


def _options(run: ChatRun) -> Options:
    from ..training.trainer import Options

    return Options(run.work_dir or run.out.with_name(run.out.name + ".work"))
