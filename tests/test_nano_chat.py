"""The shipped internvl-nano-chat: its files, its card, and chat end to end through an FP8 bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ivl_export.cli import main
from ivl_export.evaluation.chat import EngineChat
from ivl_export.models import load_chat
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.layout import CHAT_TOWER, VISION
from ivl_export.models.registry import load_config
from ivl_export.models.shipped import nano_chat_folder, nano_folder
from ivl_export.runtime import InternVLChat
from ivl_export.synthetic import chat_tasks
from ivl_export.synthetic.dialogues import corpus
from ivl_export.training.presets import NANO_CHAT
from ivl_export.training.tokenizer import train_tokenizer

pytestmark = pytest.mark.numeric

FOLDER = nano_chat_folder()
AT_LEAST = 0.85


def test_files_are_the_llava_layout_and_small() -> None:
    assert {p.name for p in FOLDER.iterdir()} == {
        "README.md", "config.json", "evaluation.json", "model.safetensors", "preprocessor_config.json",
        "tokenizer.model",
    }  # fmt: skip
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 5_000_000
    assert load_config(FOLDER / "config.json") == NANO_CHAT.model
    assert (FOLDER / "tokenizer.model").read_bytes() == train_tokenizer(corpus())
    model = load_chat(FOLDER, dtype=None)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_its_vision_tower_is_nanos() -> None:
    chat, nano = open_checkpoint(FOLDER), open_checkpoint(nano_folder())
    keys = [key for key in chat.tensors if key.startswith(CHAT_TOWER)]
    assert len(keys) > 50
    assert all(torch.equal(chat.load(k), nano.load(k.replace(CHAT_TOWER, VISION))) for k in keys)


def test_the_card_states_what_was_measured() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    evaluation = json.loads((FOLDER / "evaluation.json").read_text())
    assert evaluation["tasks"] == "chat scenes"
    scores = evaluation["accuracy"]["chat"]
    assert scores["all"]["accuracy"] >= AT_LEAST
    assert scores["all"]["total"] >= 1000
    for kind, score in scores.items():
        assert f"| {kind} | {score['accuracy']:.1%} |" in card
    parameters = sum(p.numel() for p in load_chat(FOLDER).parameters())
    assert f"{parameters:,} parameters" in card
    assert f"{NANO_CHAT.stage.steps} steps" in card


@pytest.mark.slow
def test_training_repeats_itself(tmp_path: Path) -> None:
    """Two runs of two steps write the same model."""
    for name in ("a", "b"):
        args = ["train", "--preset", "nano-chat", "--steps", "2", "--batch", "2", "--threads", "1"]
        assert main([*args, "--out", str(tmp_path / name)]) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == two
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in FOLDER.iterdir())


@pytest.mark.slow
def test_an_fp8_bundle_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoint to bundle to answers; the receipt agrees with the engines."""
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "bundle"
    args = ["build", "--model", "nano-chat", "--out", str(out), "--calib-samples", "64"]
    assert main([*args, "--backend", "onnxruntime"]) == 0
    with InternVLChat.load(out, threads=1) as model:
        scores = json.loads((out / "receipts" / "tasks.json").read_text())["scores"]
        assert set(scores) == {"fp32", "bf16", "fp8", "int8"}
        assert scores["fp8"]["chat"]["all"]["accuracy"] >= AT_LEAST
        manifest = model.bundle.manifest
        assert manifest.model.source == "internvl-nano-chat (shipped)"
        assert sum(s == "fp8" for s in _promised(out)) == 16 + 28
        result = chat_tasks.evaluate(EngineChat(model), 40, seed=1)
        assert result["chat"]["all"]["accuracy"] >= AT_LEAST


def _promised(bundle: Path) -> list[str]:
    kernels = json.loads((bundle / "receipts" / "verification.json").read_text())
    return [s for proof in kernels["onnxruntime-cpu"].values() for s in proof["promised"].values()]
