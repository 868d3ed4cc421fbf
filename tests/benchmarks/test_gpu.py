"""The GPU scripts, on the CPU with a tiny model: they run to the end, and write the promised rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ivl_export.benchmarks.gpu import fp8_accuracy, rtx_on_h200, towers
from ivl_export.benchmarks.gpu.shared import (
    TINY,
    Budget,
    cosine,
    random_component,
    random_inputs,
    to_fp8,
)

pytestmark = pytest.mark.numeric


def receipt(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    assert {"machine", "gpu", "versions", "commit", "goals", "rows"} <= data.keys()
    assert data["versions"]["torch"] == torch.__version__
    return data


@pytest.mark.slow
def test_towers(tmp_path: Path) -> None:
    out = tmp_path / "towers.json"
    assert towers.main(["--tiny", "--device", "cpu", "--batches", "1,2", "--out", str(out)]) == 0
    data = receipt(out)
    timed = [row for row in data["rows"] if "ms_per_item" in row]
    assert {(row["case"], row["way"], row["batch"]) for row in timed} == {
        (component, way, batch)
        for component in ("vision", "qllama_query", "qllama_text")
        for way in towers.WAYS
        for batch in (1, 2)
    }
    assert all(row["tflops"] > 0 and row["share_of_peak"] > 0 for row in timed)
    assert len(data["goals"]) == 3
    assert set(data["goals"].values()) <= {"met", "missed"}


def test_goals_follow_from_the_rows(tmp_path: Path) -> None:
    from ivl_export.benchmarks.gpu.shared import Receipt

    result = Receipt("t", tmp_path / "t.json")
    for way, ms, share in (("bf16", 9.0, 0.9), ("bf16 compiled", 3.0, 0.71), ("fp8 rowwise", 2.1, 0.5)):
        result.add(case="vision", size=224, way=way, batch=128, ms_per_item=ms, share_of_peak=share)
    towers._goals(result, 224, 128)
    assert list(receipt(tmp_path / "t.json")["goals"].values()) == ["met", "missed", "missed"]
    towers._goals(result, 336, 128)
    assert "not measured" in receipt(tmp_path / "t.json")["goals"].values()


@pytest.mark.slow
def test_what_does_not_fit_into_the_limit_is_said(tmp_path: Path) -> None:
    out = tmp_path / "late.json"
    assert fp8_accuracy.main(["--model", "nano", "--device", "cpu", "--limit", "0", "--out", str(out)]) == 0
    data = receipt(out)
    assert [row["note"] for row in data["rows"]] == ["left out: out of time"] * 3
    assert set(data["goals"].values()) == {"not measured"}
    assert not Budget(0).left()


@pytest.mark.slow
def test_fp8_accuracy(tmp_path: Path) -> None:
    out = tmp_path / "accuracy.json"
    assert fp8_accuracy.main(["--tiny", "--device", "cpu", "--out", str(out)]) == 0
    rows = receipt(out)["rows"]
    assert {row["way"] for row in rows} == set(fp8_accuracy.WAYS)
    assert all(0.98 < row["cosine"] < 1 for row in rows)
    worst = {way: min(row["cosine"] for row in rows if row["way"] == way) for way in fp8_accuracy.WAYS}
    assert worst["bf16"] > worst["fp8 rowwise"]


def test_fp8_layers_are_those_of_the_recipe() -> None:
    module = random_component("vision", TINY, "cpu", torch.float32)
    inputs = random_inputs("vision", TINY, 2, "cpu", torch.float32)
    want = module(*inputs)[0]
    assert to_fp8(module, inputs) == 4 * TINY.vision.num_hidden_layers
    assert 0.99 < cosine(module(*inputs)[0], want) < 1


def test_engines_that_do_not_run_here_are_a_row_each(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "rtx.json"
    assert rtx_on_h200.main([str(tiny_bundle), "--device", "cpu", "--out", str(out)]) == 0
    data = receipt(out)
    assert [row["ran"] for row in data["rows"] if "ran" in row] == [False] * 5
    assert list(data["goals"].values()) == ["missed", "not measured"]


@pytest.mark.slow
def test_engines_that_run_are_compared(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "ort.json"
    line = [str(tiny_bundle), "--device", "cpu", "--backend", "onnxruntime", "--out", str(out)]
    assert rtx_on_h200.main(line) == 0
    data = receipt(out)
    assert set(data["goals"].values()) == {"met"}
    assert all(row["cosine"] > 1 - 1e-6 for row in data["rows"] if "cosine" in row)
