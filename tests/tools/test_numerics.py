"""The numeric tests under the settings of ``numerics.py``, and checks of these settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ivl_export.tests.tools.headroom import used
from ivl_export.tests.tools.numerics import main
from ivl_export.tests.tools.one_ulp import moved

SELECTION = (
    "tests/models/test_goldens.py",
    "tests/training/test_losses.py",
    "--deselect=tests/training/test_losses.py::test_two_ranks",  # starts processes
    "tests/quantization/test_quantize.py",
    "--deselect=tests/quantization/test_quantize.py::test_equals_modelopt_fake_quantisation_on_the_same_amax",
    "tests/engines/torch/test_linears.py",
    "tests/engines/onnxruntime/test_int8_sums.py",
    "tests/engines/torch/test_engine.py::test_fp32_equals_onnxruntime",
    "tests/engines/torch/test_engine.py::test_fp8_attention_equals_onnxruntime",
    "tests/runtime/test_model.py::test_image_embeddings_equal_the_goldens",
    "tests/runtime/test_model.py::test_text_embeddings_equal_torch",
)
"""One of each kind: models, losses, rounding, engines, the runtime."""

TEMPLATE = """
import os, pytest, torch
pytestmark = pytest.mark.numeric

def test_instructions():
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"

def test_threads():
    assert torch.get_num_threads() == 1
"""


USING = """
import numpy as np, pytest, torch
pytestmark = pytest.mark.numeric

def test_much():
    torch.testing.assert_close(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), rtol=0, atol=1)

def test_little():
    np.testing.assert_allclose([1.0, 2.1], [1.0, 2.0], atol=1)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes on two idle cores
def test_numeric_tests_pass_as_on_other_processors(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--settings", "threads,sse,ulp", *SELECTION])
    assert code == 0, capsys.readouterr().out


@pytest.mark.slow
def test_settings_come_before_torch_and_failures_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_it.py").write_text(TEMPLATE)
    file = str(tmp_path / "test_it.py")
    assert main(["--settings", "sse", file]) == 0
    assert main(["--settings", "threads,sse", f"{file}::test_threads"]) == 1
    rows = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.splitlines()}
    assert rows["sse"] == ["1", "0"]
    assert rows["threads"] == ["0", "1"]
    assert rows["threads:"] == ["test_threads"]


@pytest.mark.slow
def test_nothing_that_ran_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_not_numeric(): ...")
    assert main(["--settings", "native", str(tmp_path)]) == 1


@pytest.mark.slow
def test_how_much_of_a_tolerance_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert used(np.array([1.0, 2.02]), np.array([1.0, 2.0]), 0, 0.05) == pytest.approx(0.4)
    assert used(np.array([1.0, 2.02]), np.array([1.0, 2.0]), 0.01, 0.02) == pytest.approx(0.5)
    assert used(torch.ones(3), np.ones(3), 1e-5, 0) == used(1.0, 2.0, 0, 0) == 0
    (tmp_path / "test_it.py").write_text(USING)
    assert main(["--settings", "native", str(tmp_path / "test_it.py")]) == 0
    out = capsys.readouterr().out
    assert "native uses 50% of a tolerance: test_much" in out
    assert "test_little" not in out


@pytest.mark.parametrize("shape", [(4, 7), (3, 64), (2, 5, 33)])
def test_inputs_move_by_one_unit_in_the_last_place(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    got = moved(x)
    assert got.dtype == np.float32
    assert (np.abs(got - x) <= np.spacing(np.abs(x))).all()
    assert (got != x).any()
    np.testing.assert_array_equal(moved(x[:1]), got[:1])
    ids = np.arange(5)
    assert moved(ids) is ids
