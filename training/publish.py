"""Writes a trained model in the published layout, with its model card, and the cards of chat models."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..inputs.preprocess import ImageSettings
from ..models.internvl import InternVLModel
from ..synthetic.glyphs import chinese
from ..synthetic.scenes import (
    ALL_COMBINATIONS,
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    MAX_COUNT,
    RELATIONS,
    SHAPES,
    SIZES,
)
from ..synthetic.sign_questions import ALBUM
from ..synthetic.signs import GRID
from .presets import ChatPreset, Preset, TilesPreset


@dataclass(frozen=True)
class TrainingRun:
    """Facts of a training run for the card."""

    minutes: float
    threads: int
    accuracy: dict[str, Any]


def publish(model: InternVLModel, preset: Preset, tokenizer: bytes, run: TrainingRun, folder: Path) -> None:
    """Write config.json, model.safetensors (bf16), tokenizer, preprocessor and README.md into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(preset.model.to_published(), indent=1) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    settings = ImageSettings(size=preset.model.vision.image_size)
    settings.save(folder / "preprocessor_config.json")
    parameters = sum(p.numel() for p in model.parameters())
    (folder / "README.md").write_text(model_card(preset, run, parameters), encoding="utf-8")
    evaluation = {"tasks": "scenes", "accuracy": run.accuracy}
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")


def model_card(preset: Preset, run: TrainingRun, parameters: int) -> str:
    """The card in Markdown: summary, data, recipe, seed, commit, accuracy."""
    config = preset.model
    stages = "\n".join(
        f"| {s.name} | {s.loss} | {s.steps} | {s.batch} | {s.pairs:.0%} | {s.near:.0%} "
        f"| {s.matrix_lr:g} | {s.lr:g} |"
        for s in preset.stages
    )
    rows = "\n".join(_accuracy_rows(run.accuracy))
    data = (
        f"{len(SHAPES)} shapes, {len(COLORS)} colours, {len(SIZES)} sizes, counts 1-{MAX_COUNT}, "
        f"{' / '.join(RELATIONS)}, {len(BACKGROUNDS)} textured backgrounds"
    )
    return f"""# internvl-{preset.name}

A real InternVL with {parameters:,} parameters, trained from scratch on drawn scenes. It is small: it knows
coloured shapes and nothing else. It exists so that accuracy means something where the published weights
cannot be had: export, quantisation and engines are measured on it end to end.

- **Architecture**: InternViT {config.vision.num_hidden_layers} x {config.vision.hidden_size},
  {config.vision.image_size} px / patch {config.vision.patch_size}; QLLaMA
  {config.qllama.num_hidden_layers} x {config.qllama.hidden_size}, {config.num_query_token} queries,
  cross-attention every {config.cross_attention_frequency} layers; {config.clip_embed_dim}-d embeddings.
- **Data**: scenes from `synthetic/scenes.py` ({data}), captions from `synthetic/captions.py`, English and
  {preset.chinese:.0%} Chinese. {len(HELD_OUT)} of {len(ALL_COMBINATIONS)} (shape, colour) combinations never
  occur in training: {", ".join(f"{color} {shape}" for shape, color in HELD_OUT)}.
- **Recipe**: Muon for the blocks' matrices, AdamW for the rest, bf16 autocast, seed {preset.seed},
  {run.minutes:.0f} minutes on {run.threads} CPU threads, commit {commit()}.
  `ivl-export train --preset {preset.name}` repeats it.
- **Unlike the paper**, a short stage before the two published ones teaches spatial relations
  ({preset.stages[0].focus:.0%} of the caption tokens that are not words of relation are left out of its
  loss), and stage 2 trains all of the model: its LLaMA does not come pretrained.

| stage | loss | steps | batch | pairs | hard negatives | peak lr, Muon | peak lr, AdamW |
|---|---|---:|---:|---:|---:|---:|---:|
{stages}

Accuracy in fp32 on held-out scenes (Wilson 95% interval; "novel" are scenes with a combination never trained
on):

| task | accuracy | interval | questions | novel |
|---|---:|---:|---:|---:|
{rows}

Weights are stored in bf16. License: Apache-2.0, as the project.
"""


def _accuracy_rows(accuracy: dict[str, Any]) -> list[str]:
    rows = []
    for group, scores in accuracy.items():
        if group == "settings":
            continue
        for task, score in scores.items():
            rows.append(
                f"| {group} {task.replace('_', ' ')} | {score['accuracy']:.1%} "
                f"| {score['low']:.1%} - {score['high']:.1%} | {score['total']} "
                f"| {score['novel']['accuracy']:.1%} of {score['novel']['total']} |"
            )
    return rows


def commit() -> str:
    """The short hash of the code's commit, ``unknown`` outside a repository."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_chat_card(preset: ChatPreset, run: TrainingRun, parameters: int, folder: Path) -> None:
    """Write README.md and evaluation.json into ``folder``."""
    _write(folder, chat_model_card(preset, run, parameters), "chat scenes", run)


def chat_model_card(preset: ChatPreset, run: TrainingRun, parameters: int) -> str:
    """The card in Markdown: summary, data, recipe, seed, commit, accuracy."""
    config, stage = preset.model, preset.stage
    rows = "\n".join(
        f"| {kind} | {score['accuracy']:.1%} | {score['low']:.1%} - {score['high']:.1%} | {score['total']} "
        f"| {score['novel']['accuracy']:.1%} of {score['novel']['total']} |"
        for kind, score in run.accuracy["chat"].items()
    )
    return f"""# internvl-{preset.name}

A real InternVL-Chat (LLaVA layout) with {parameters:,} parameters, {config.vision_blocks} of its
{config.vision.num_hidden_layers} vision blocks in use. It answers questions about drawn scenes, and about
nothing else. It exists so that chat can be measured end to end where published weights cannot be had.

- **Architecture**: the vision tower of internvl-nano ({config.vision.hidden_size} wide,
  {config.image_size} px), {config.num_visual} patches of block {config.vision_blocks}; a two-layer
  projector; a LLaMA decoder {config.decoder.num_hidden_layers} x {config.decoder.hidden_size}.
- **Data**: dialogues of one to {preset.turns} turns (`synthetic/dialogues.py`) about scenes
  (`synthetic/scenes.py`), in English: color, shape, size, count, place, yes or no, descriptions, and
  questions
  that refer to the turn before. {len(HELD_OUT)} (shape, color) combinations never occur in training.
- **Recipe**: stage 3 (loss on answers only), vision tower frozen, all else from random weights; Muon for the
  blocks' matrices (peak lr {stage.matrix_lr:g}), AdamW for the rest ({stage.lr:g}), {stage.steps} steps of
  {stage.batch} dialogues, bf16 autocast, seed {preset.seed}, {run.minutes:.0f} minutes on {run.threads} CPU
  threads, commit {commit()}. `ivl-export train --preset {preset.name}` repeats it.

Exact answers in fp32 about held-out scenes (Wilson 95% interval; "novel" are scenes with a combination never
trained on):

| question | exact | interval | questions | novel |
|---|---:|---:|---:|---:|
{rows}

Weights are stored in bf16. License: Apache-2.0, as the project.
"""


def write_tiles_card(preset: TilesPreset, run: TrainingRun, parameters: int, folder: Path) -> None:
    """Write README.md and evaluation.json into ``folder``."""
    _write(folder, tiles_model_card(preset, run, parameters), "signs", run)


def _write(folder: Path, card: str, tasks: str, run: TrainingRun) -> None:
    (folder / "README.md").write_text(card, encoding="utf-8")
    evaluation = {"tasks": tasks, "accuracy": run.accuracy}
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")


def tiles_model_card(preset: TilesPreset, run: TrainingRun, parameters: int) -> str:
    """The card in Markdown: summary, data, recipe, seed, commit, accuracy with tiles and with one."""
    config, (first, second, third, last) = preset.model, preset.stages
    vision, decoder = config.vision, config.decoder
    rows = "\n".join(
        f"| {task} | {score['accuracy']:.1%} | {score['low']:.1%} - {score['high']:.1%} | {score['total']} "
        f"| {run.accuracy['one tile'][task]['accuracy']:.1%} |"
        for task, score in run.accuracy["signs"].items()
    )
    return f"""# internvl-{preset.name}

A real model of InternVL 2.5's form with {parameters:,} parameters, trained from scratch. It reads small text
in wide and tall pictures, counts small shapes and distinguishes two pictures, and knows nothing else. It
exists so that tiles, the thumbnail and several images can be measured end to end where published weights
cannot be had.

- **Architecture**: InternViT {vision.num_hidden_layers} x {vision.hidden_size} (RMSNorm, norms of queries and
  keys), 1 to {config.max_tiles} tiles of {config.image_size} px / patch {vision.patch_size} and the
  thumbnail; pixel shuffle {config.shuffle}, {config.num_visual} embeddings a tile; a two-layer projector; a
  Qwen2 decoder {decoder.num_hidden_layers} x {decoder.hidden_size}, {decoder.num_attention_heads} heads over
  {decoder.num_key_value_heads}, biases of q, k and v; byte-level BPE, {decoder.vocab_size} tokens.
- **Data**: drawn signs (`synthetic/signs.py`, `synthetic/sign_questions.py`): numbers of 2 to 6 digits,
  words of 3 to 6 capitals, 2 or 3 of {len(chinese())} Chinese characters, and shapes. Text is 16 pixels high,
  all at multiples of {GRID} pixels, and no item crosses two tiles. Questions are English, in
  part Chinese. One text in eight is held out: training never shows it.
- **Recipe**: tower and projector learn the content of each place of a tile, with a head that is
  thrown away ({first.steps} steps of {first.batch} tiles, peak lr {first.matrix_lr:g} Muon, {first.lr:g}
  AdamW); projector and decoder learn to read tiles from end to end and to count in one ({second.steps} steps
  of {second.batch}, {second.matrix_lr:g} and {second.lr:g}), then the answers of dialogues of one to
  {preset.turns} questions ({third.steps} steps of {third.batch}, {third.matrix_lr:g} and {third.lr:g}; one in
  {1 / preset.single:.0f} is shown as one tile), and the same with albums of two to {ALBUM} small pictures
  ({last.steps} steps of {last.batch}, {last.matrix_lr:g} and {last.lr:g}). fp32, seed {preset.seed},
  {run.minutes:.0f} minutes on {run.threads} CPU threads, commit {commit()}. `ivl-export train --preset
  {preset.name}` repeats it.

Exact answers in fp32 about held-out texts (Wilson 95% interval), and about the same pictures in one tile
each:

| question | exact | interval | questions | one tile |
|---|---:|---:|---:|---:|
{rows}

Weights are stored in bf16. License: Apache-2.0, as the project. The glyphs in the training pictures are GNU
Unifont's (SIL Open Font License 1.1).
"""
