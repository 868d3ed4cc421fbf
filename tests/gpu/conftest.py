"""What the tests of a GPU share. They are collected everywhere, and skipped where torch finds no GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ivl_export.arrays import Array
from ivl_export.models.shipped import nano_folder
from ivl_export.tests.conftest import shared

torch = pytest.importorskip("torch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder's tests without a GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))


@pytest.fixture(scope="session")
def nano_fp8(request: pytest.FixtureRequest) -> Path:
    """A bundle of nano in FP8, for ONNX Runtime on the CPU and torch on the GPU."""

    def build(out: Path) -> None:
        from ivl_export.cli import main

        line = ["build", "--precision", "fp8", "--backend", "onnxruntime", "--calib-samples", "40"]
        assert main([*line, "--out", str(out)]) == 0

    return shared(request, "gpu-nano-fp8", build, nano_folder() / "model.safetensors", Path(__file__))


@pytest.fixture(scope="session")
def pictures() -> list[Array]:
    """Eight pictures of noise, uint8 [112, 112, 3]."""
    return list(np.random.default_rng(0).integers(0, 256, (8, 112, 112, 3), dtype=np.uint8))
