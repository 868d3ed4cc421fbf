"""The card and the figures of a chat model that was trained on scenes."""

from __future__ import annotations

import json
from pathlib import Path

from ..synthetic.scenes import HELD_OUT
from .presets import ChatPreset
from .publish import Run, commit


def write_card(preset: ChatPreset, run: Run, parameters: int, folder: Path) -> None:
    """Write README.md and evaluation.json into ``folder``."""
    card = model_card(preset, run, parameters)
    (folder / "README.md").write_text(card, encoding="utf-8")
    evaluation = {"tasks": "chat scenes", "accuracy": run.accuracy}
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")


def model_card(preset: ChatPreset, run: Run, parameters: int) -> str:
    """The card in Markdown: what it is, data, recipe, seed, commit, accuracy."""
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
