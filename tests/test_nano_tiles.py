"""The shipped internvl-nano-tiles: its files, its card, and answers from tiles through an FP8 bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ivl_export.cli import main
from ivl_export.evaluation.chat import EngineChat
from ivl_export.models import load_chat
from ivl_export.models.registry import load_config
from ivl_export.models.shipped import shipped_folder
from ivl_export.runtime import InternVLChat
from ivl_export.synthetic import sign_tasks
from ivl_export.synthetic.sign_questions import TASKS
from ivl_export.training.presets import NANO_TILES
from ivl_export.training.tiles_model import completed, image_settings, tokenizer_json

pytestmark = pytest.mark.numeric

FOLDER = shipped_folder("nano-tiles")
AT_LEAST = 0.85
WITH_ONE_TILE = 0.4
POINTS = 0.015
"""What 8 bits may cost."""


def test_files_are_opengvlabs_layout_and_small() -> None:
    assert {p.name for p in FOLDER.iterdir()} == {
        "README.md", "config.json", "evaluation.json", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 8_000_000
    assert load_config(FOLDER / "config.json") == completed(NANO_TILES.model)
    assert (FOLDER / "tokenizer.json").read_text(encoding="utf-8") == tokenizer_json() + "\n"
    model = load_chat(FOLDER, dtype=None)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_its_form_is_that_of_the_newer_models() -> None:
    config = NANO_TILES.model
    assert config.vision.norm_type == "rms_norm"
    assert config.vision.qk_normalization
    assert config.shuffle == "v2"
    assert config.decoder.qkv_bias
    assert config.decoder.num_key_value_heads < config.decoder.num_attention_heads
    tiling = image_settings(config).tiling
    assert tiling is not None
    assert tiling.thumbnail
    assert tiling.max_tiles > 1


def test_the_card_states_what_was_measured() -> None:
    card = " ".join((FOLDER / "README.md").read_text(encoding="utf-8").split())
    evaluation = json.loads((FOLDER / "evaluation.json").read_text())
    assert evaluation["tasks"] == "signs"
    scores, single = (evaluation["accuracy"][name] for name in ("signs", "one tile"))
    assert scores["all"]["total"] == sign_tasks.QUESTIONS
    for task in TASKS:
        assert scores[task]["accuracy"] >= AT_LEAST, task
    assert single["read"]["accuracy"] <= WITH_ONE_TILE
    for task, score in scores.items():
        assert f"| {task} | {score['accuracy']:.1%} |" in card
    parameters = sum(p.numel() for p in load_chat(FOLDER).parameters())
    assert f"{parameters:,} parameters" in card
    for stage in NANO_TILES.stages:
        assert f"({stage.steps} steps of {stage.batch}" in card


@pytest.mark.slow
def test_an_fp8_bundle_reads_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoint to bundle to answers: 8 bits cost what they may, and one tile is not enough to read."""
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "bundle"
    args = ["build", "--model", "nano-tiles", "--out", str(out), "--calib-samples", "32"]
    assert main([*args, "--backend", "onnxruntime"]) == 0
    scores = json.loads((out / "receipts" / "tasks.json").read_text())["scores"]
    exact = {name: one["signs"]["all"]["accuracy"] for name, one in scores.items()}
    assert set(exact) == {"fp32", "bf16", "fp8", "int8"}
    assert min(exact["fp8"], exact["int8"]) >= exact["fp32"] - POINTS
    with InternVLChat.load(out, threads=1) as model:
        assert model.bundle.manifest.model.source == "internvl-nano-tiles (shipped)"
        asked = sign_tasks.evaluate(EngineChat(model).signs, 60, seed=1)["signs"]
        assert asked["all"]["accuracy"] >= AT_LEAST - 0.1  # 60 questions: 10 points are two deviations
