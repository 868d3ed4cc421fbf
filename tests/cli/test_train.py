"""``ivl-export train``: a run of two steps a stage writes a whole model; wrong usage writes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ivl_export.cli import main
from ivl_export.models import load_model
from ivl_export.training.presets import NANO
from ivl_export.training.tokenizer import train_tokenizer

MODEL_FILES = [
    "README.md",
    "config.json",
    "evaluation.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.model",
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_two_steps_write_a_model_and_a_second_run_only_loads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "nano"
    args = ["train", "--preset", "nano", "--steps", "2", "--batch", "4", "--threads", "1", "--out", str(out)]
    assert main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == str(out)
    assert sorted(p.name for p in out.iterdir()) == MODEL_FILES
    assert (out / "tokenizer.model").read_bytes() == train_tokenizer()
    model = load_model(out)
    assert model.config == NANO.model

    accuracy = result["accuracy"]
    assert json.loads((out / "evaluation.json").read_text()) == {"tasks": "scenes", "accuracy": accuracy}
    for mode in ("InternVL-C", "InternVL-G"):
        totals = {task: score["total"] for task, score in accuracy[mode].items()}
        assert totals == {"classify": 50, "text_to_image": 40, "image_to_text": 40}
    assert {lang: score["total"] for lang, score in accuracy["caption"].items()} == {"en": 20, "zh": 10}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| stage1 | contrastive | 2 | 4 |" in card
    assert "| stage2 | generative | 2 | 4 |" in card

    work = tmp_path / "nano.work"
    state = torch.load(work / "state.pt", weights_only=True)
    assert (state["stage"], state["step"]) == (2, 2)
    weights = (out / "model.safetensors").read_bytes()
    other = tmp_path / "again"
    assert main([*args[:-1], str(other), "--work-dir", str(work)]) == 0
    printed = capsys.readouterr().out
    assert (other / "model.safetensors").read_bytes() == weights
    assert f"internvl-nano in {other}" in printed
    assert "InternVL-G" in printed


def test_another_runs_state_is_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    work.mkdir()
    torch.save({"identity": {"preset": "another", "tokenizer": ""}}, work / "state.pt")
    args = ["train", "--steps", "2", "--batch", "4", "--work-dir", str(work), "--out", str(tmp_path / "out")]
    assert main(args) == 3
    assert "holds another run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args", [["--preset", "giant"], ["--steps", "1"], ["--batch", "1"], ["--threads", "0"]]
)
def test_wrong_usage(args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *args, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert args[0].strip("-") in err
    assert "nano" in err or args[0] != "--preset"
    assert list(tmp_path.iterdir()) == []
