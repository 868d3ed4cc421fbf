"""Two real processes train as one does: the published two-rank gradients, and the trainer's own runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ivl_export.errors import UsageError
from ivl_export.models.config import InternVLConfig
from ivl_export.models.internvl import InternVLModel
from ivl_export.tests.training.test_trainer import STAGES, TINY
from ivl_export.training import distributed as dist
from ivl_export.training.distributed import run_processes
from ivl_export.training.losses import Stage2Batch, Text, across_ranks, stage2_losses
from ivl_export.training.tokenizer import train_tokenizer
from ivl_export.training.trainer import Options, TrainingProgress, initialised, train

pytestmark = pytest.mark.numeric

GOLDENS = Path(__file__).parents[1] / "goldens" / "tiny"
PRESET = replace(
    TINY, stages=tuple(replace(stage, steps=3, batch=8, lr=2e-4, matrix_lr=2e-3) for stage in STAGES)
)


def published(model: InternVLModel, batch: Stage2Batch) -> dict[str, Tensor]:
    """The published losses, where every rank takes the mean over its own items."""
    result = stage2_losses(model, batch, across_ranks)
    assert result.itg is not None
    return {"itc": result.itc, "itm": result.itm, "itg": result.itg}


def golden_gradients(strategy: dist.Strategy, out: str) -> None:
    """Save this rank's losses and the averaged gradients of the golden batch."""
    torch.set_num_threads(1)
    golden = load_file(GOLDENS / "train_ws2.safetensors")
    prefix = f"in.rank{dist.rank()}."

    def text(kind: str) -> Text:
        return Text(golden[f"{prefix}{kind}input_ids"], golden[f"{prefix}{kind}attention_mask"])

    batch = Stage2Batch(
        golden[f"{prefix}pixel_values"],
        text("positive_"),
        text("negative_"),
        text("summarize_"),
        text(""),
        golden[f"{prefix}labels"],
    )
    model = InternVLModel(InternVLConfig.load(GOLDENS / "config.json"))
    model.load_state_dict(load_file(GOLDENS / "model.safetensors"))
    objective = dist.parallel(dist.Objective(model, published), strategy)
    losses = objective(batch)
    torch.autograd.backward(torch.stack(list(losses.values())).sum())
    norm = dist.clip_gradients([p for p in model.parameters() if p.grad is not None], 1e9)
    gradients = dist.whole({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    by_name = {
        **{f"loss.{k}": v.detach() for k, v in losses.items()},
        "norm": torch.tensor(norm),
        **gradients,
    }
    torch.save(by_name, f"{out}.{dist.rank()}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", dist.STRATEGIES)
def test_gradients_are_the_published_ones(strategy: str, tmp_path: Path) -> None:
    golden = load_file(GOLDENS / "train_ws2.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As torchrun starts them.
    command = [sys.executable, __file__, strategy, str(tmp_path / "out")]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **where, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]
    assert [p.wait(timeout=120) for p in ranks] == [0, 0]
    results = [torch.load(f"{tmp_path / 'out'}.{r}", weights_only=True) for r in range(2)]
    means = {key[10:]: value for key, value in golden.items() if key.startswith("grad_mean")}
    largest = max(float(value.abs().max()) for value in means.values())
    assert "logit_scale" in means
    for rank, result in enumerate(results):
        for part in ("itc", "itm"):
            assert result[f"loss.{part}"] == pytest.approx(
                float(golden[f"out.rank{rank}.loss_{part}"]), abs=2e-5
            )
        for key, value in means.items():
            assert float((result[key] - value).abs().max()) <= 5e-5 * largest, key
        everything = [v for k, v in result.items() if k != "norm" and not k.startswith("loss.")]
        assert float(result["norm"]) == pytest.approx(
            float(torch.stack([v.square().sum() for v in everything]).sum().sqrt()), rel=1e-5
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TrainingProgress], Tensor]:
    """Reports of one process, and the change of its weights."""
    return trained(tmp_path_factory.mktemp("alone"), 1, "ddp")


def trained(folder: Path, processes: int, strategy: dist.Strategy) -> tuple[list[TrainingProgress], Tensor]:
    heard: list[TrainingProgress] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options = Options(folder, save_every=2, workers=0, bf16=False, strategy=strategy)
    try:
        result = run_processes(processes, train, (PRESET, train_tokenizer(), options), report=heard.append)
    finally:
        torch.set_num_threads(threads)
    assert result is not None
    model = result[0].state_dict()
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    assert all(torch.equal(v, state["model"][k]) for k, v in model.items())
    before = initialised(PRESET).state_dict()
    return heard, torch.cat([(model[k] - before[k]).flatten() for k in before])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", dist.STRATEGIES)
def test_two_processes_train_as_one_does(
    strategy: dist.Strategy, alone: tuple[list[TrainingProgress], Tensor], tmp_path: Path
) -> None:
    result, moved = trained(tmp_path, 2, strategy)
    expected_values, expected = alone
    assert [p.done for p in result] == [p.done for p in expected_values] == list(range(1, 7))
    assert result[0].losses == pytest.approx(expected_values[0].losses, rel=1e-5)  # its gradient's norm too
    for ours, theirs in zip(result, expected_values, strict=True):
        # Rounding grows: Muon's iteration is in bf16, and its steps have one size for every gradient.
        losses = {k: v for k, v in theirs.losses.items() if k != "grad_norm"}
        assert {k: ours.losses[k] for k in losses} == pytest.approx(losses, rel=5e-3), ours.done
    assert float(torch.cosine_similarity(moved, expected, 0)) > 0.95
    assert float(moved.norm()) == pytest.approx(float(expected.norm()), rel=0.02)
    # A state of several processes is whole: one process resumes from it.
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({**state, "step": 2}, tmp_path / "state.pt")
    again, _ = trained(tmp_path, 1, "ddp")
    assert [p.done for p in again] == [6]


def test_batches_that_cannot_be_shared_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dist.own_rows(7) == slice(0, None, 1)
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "rank", lambda: 1)
    assert list(range(8))[dist.own_rows(8)] == [1, 3, 5, 7]
    with pytest.raises(UsageError, match="multiple of 4"):
        dist.own_rows(6)


if __name__ == "__main__":
    run_processes(1, golden_gradients, (sys.argv[1], sys.argv[2]))
