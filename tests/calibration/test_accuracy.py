from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.calibration.accuracy import (
    BUDGETS,
    Comparison,
    Metrics,
    Receipt,
    check_budget,
    compare,
    component_accuracy,
)
from ivl_export.calibration.component_chain import Runner, run_chain
from ivl_export.calibration.dataset import CalibrationSet
from ivl_export.calibration.recording import Recording
from ivl_export.errors import AccuracyError, BuildError
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import Tokenizer
from ivl_export.models.calls import Arrays
from ivl_export.models.checkpoint import Checkpoint
from ivl_export.models.registry import component_spec
from ivl_export.tests.calibration.reference import reference_runners

pytestmark = pytest.mark.numeric

Sets = tuple[CalibrationSet, CalibrationSet]


def test_metrics_by_hand() -> None:
    reference = np.array([[3.0, 4.0], [1.0, 0.0]], np.float32)
    candidate = np.array([[3.0, 4.0], [1.0, 1.0]], np.float32)
    result = compare(reference, candidate)
    assert result.cosine == pytest.approx((1 + 2**-0.5) / 2)
    assert result.worst_cosine == pytest.approx(2**-0.5)
    assert result.sqnr_db == pytest.approx(10 * math.log10(26 / 1))
    assert (result.max_abs, result.samples) == (1.0, 2)


def test_equal_arrays() -> None:
    x = np.zeros((3, 2, 2), np.float32)
    assert compare(x, x) == Metrics(1.0, 1.0, math.inf, 0.0, 3)


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1.0))
def test_noise_of_known_power(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((4, 4000)).astype(np.float32)
    candidate = (reference + scale * rng.standard_normal((4, 4000))).astype(np.float32)
    assert compare(reference, candidate).sqnr_db == pytest.approx(-20 * math.log10(scale), abs=0.5)


def test_batches_accumulate_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((7, 5)).astype(np.float32)
    candidate = reference + rng.standard_normal((7, 5)).astype(np.float32)
    parts = Comparison()
    for rows in (slice(0, 3), slice(3, 7)):
        parts.add(reference[rows], candidate[rows])
    whole, result = compare(reference, candidate), parts.metrics()
    assert result.samples == whole.samples
    assert result.max_abs == whole.max_abs
    assert result.sqnr_db == pytest.approx(whole.sqnr_db)
    assert result.cosine == pytest.approx(whole.cosine)


def test_nan_and_wrong_shapes_are_errors() -> None:
    x = np.ones((2, 2), np.float32)
    with pytest.raises(BuildError, match="NaN or infinity"):
        compare(x, np.array([[1, np.nan], [1, 1]], np.float32))
    with pytest.raises(BuildError, match=r"Shapes \[2, 2\] and \[2, 1\]"):
        compare(x, x[:, :1])
    with pytest.raises(BuildError, match="Nothing was compared"):
        Comparison().metrics()


def noisy(runner: Runner, scale: float) -> Runner:
    rng = np.random.default_rng(0)

    def run(inputs: Arrays) -> Arrays:
        outputs = runner(inputs)
        return {
            n: (a + scale * a.std() * rng.standard_normal(a.shape)).astype(a.dtype)
            for n, a in outputs.items()
        }

    return run


def test_a_recording_is_what_whole_modules_give(
    checkpoint: Checkpoint,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    reference, count = reference_runners(checkpoint, ["qllama_step", "qllama_text"]), 0
    recording = Recording(checkpoint, list(reference), scenes[1], settings, tokenizer, tmp_path, batch_size=3)
    for batch, steps in recording:
        for got, want in zip(steps, run_chain(reference, batch, checkpoint.model), strict=True):
            assert got.component == want.component
            for mine, theirs in ((got.inputs, want.inputs), (got.outputs, want.outputs)):
                assert set(mine) == set(theirs)
                for name, array in theirs.items():
                    np.testing.assert_array_equal(mine[name], array)
            count += 1
    assert count > 2 * 3


def test_teacher_forced_and_chained(
    checkpoint: Checkpoint,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    reference = reference_runners(checkpoint, ["qllama_step", "qllama_text"])
    recording = Recording(
        checkpoint,
        ["qllama_step", "qllama_text"],
        scenes[1],
        settings,
        tokenizer,
        tmp_path,
        batch_size=2,
    )
    specs = {c: component_spec(c, checkpoint.config) for c in reference}

    forced, chained = component_accuracy(recording, reference, checkpoint.model)
    assert list(forced) == list(chained) == ["vision", "qllama_query", "qllama_text", "qllama_step"]
    for table in (forced, chained):
        for component, outputs in table.items():
            assert list(outputs) == [t.name for t in specs[component].outputs]
            assert all(m.samples == 4 and m.sqnr_db > 100 for m in outputs.values())

    # noise of the vision tower reaches the queries only where components are chained
    forced, chained = component_accuracy(
        recording, {**reference, "vision": noisy(reference["vision"], 0.1)}, checkpoint.model
    )
    assert 19 < forced["vision"]["tokens"].sqnr_db < 21
    assert forced["qllama_query"]["query_hidden"].sqnr_db > 100
    assert chained["qllama_query"]["query_hidden"].sqnr_db < 60
    assert chained["qllama_text"]["text_embed"].sqnr_db > 100

    # a component alone is compared on fp32 inputs; nothing makes its inputs when chained
    forced, chained = component_accuracy(
        recording, {"qllama_step": reference["qllama_step"]}, checkpoint.model
    )
    assert list(forced) == ["qllama_step"]
    assert chained == {}


def test_receipt_round_trip(tmp_path: Path) -> None:
    equal, near = Metrics(1.0, 1.0, math.inf, 0.0, 3), Metrics(0.9, 0.8, 20.0, 1.0, 3)
    table = {"vision": {"tokens": equal, "image_embed": near}}
    receipt = Receipt("fp8", "onnxruntime", "0" * 64, 3, True, table, {})
    receipt.save(tmp_path / "accuracy.json")
    data = json.loads((tmp_path / "accuracy.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert data["teacher_forced"]["vision"]["tokens"]["sqnr_db"] is None
    assert data == receipt.to_json()
    assert data["teacher_forced"]["vision"]["image_embed"]["sqnr_db"] == 20.0


def test_budget() -> None:
    full = {"classify": 0.95, "recall": 0.80}
    assert check_budget(full, {"classify": 0.94, "recall": 0.81}, BUDGETS["fp8"]) == {
        "classify": pytest.approx(1.0),
        "recall": pytest.approx(-1.0),
    }
    with pytest.raises(AccuracyError, match=r"1 of 2 tasks.*recall: 80\.00% -> 78\.40%, 1\.60 p") as error:
        check_budget(full, {"classify": 0.94, "recall": 0.784}, BUDGETS["int8"])
    assert error.value.exit_code == 7
    with pytest.raises(AccuracyError, match="classify"):
        check_budget(full, {"classify": math.nan, "recall": 0.8}, 1.0)
