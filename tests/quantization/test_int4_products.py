"""INT4 weights with rounded activations: what ONNX Runtime computes, and what TensorRT-RTX runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ivl_export.calibration.accuracy import compare
from ivl_export.engines.base import open_engine
from ivl_export.engines.tensorrt.build import build_engine
from ivl_export.errors import BuildError
from ivl_export.models.checkpoint import Checkpoint
from ivl_export.models.registry import component_spec
from ivl_export.quantization.quantize import (
    LOWEST,
    activation_scale,
    dequantise,
    quantise,
    quantise_values,
)
from ivl_export.quantization.schemes import SCHEMES, block_size, excluded
from ivl_export.tests.calibration.reference import reference_modules
from ivl_export.tests.quantization.test_weight_only import written
from ivl_export.verify.expectations import check_expectations
from ivl_export.verify.onnxruntime import read_onnxruntime
from ivl_export.verify.rtx import read_rtx

pytestmark = pytest.mark.numeric

AMAX = 2.0
"""Less than the inputs reach, so that both ends of the range are used."""


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4"])
def test_onnxruntime_multiplies_rounded_values(scheme: str, shallow: Checkpoint, tmp_path: Path) -> None:
    graph, promised, layers = written(shallow, tmp_path / "cpu", scheme, "fp32", "onnxruntime", AMAX)
    assert promised == layers
    report = read_onnxruntime(graph)
    assert len(report.fallbacks) == len(layers) == 4
    assert {g.scheme for g in report.fallbacks} == {scheme}
    assert all("INT4" in g.cause for g in report.fallbacks)
    kind = SCHEMES[scheme].activation
    scale = torch.tensor(activation_scale(AMAX, kind, "bf16"))
    seen = []

    def rounded(_: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        values = quantise_values(args[0], scale, kind, LOWEST[kind]).float()
        seen.append(float(values.min()))
        return (values * scale,)

    module = reference_modules(shallow, ["vision"])["vision"]
    for layer in layers:
        linear = module.get_submodule(layer)
        weight = shallow.load(f"{layer}.weight", torch.float32)
        linear.weight = torch.nn.Parameter(dequantise(*quantise(weight, scheme)), False)
        linear.register_forward_pre_hook(rounded)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 28, 28)).astype(np.float32)
    spec = component_spec("vision", shallow.config)
    with open_engine("onnxruntime", spec, graph) as engine:
        got = engine.run({"pixel_values": pixels})
    with torch.no_grad():
        expected = module(torch.from_numpy(pixels))
    for tensor, want in zip(spec.outputs, expected, strict=True):
        assert compare(want.numpy(), got[tensor.name]).sqnr_db > 60
    assert min(seen) == LOWEST[kind]


@pytest.mark.parametrize(("scheme", "runs"), [("w4a8", "int8xint4"), ("w4a4", "int4xint4")])
@pytest.mark.slow
def test_the_engine_multiplies_integers(scheme: str, runs: str, shallow: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph, promised, layers = written(shallow, tmp_path / "gpu", scheme, "bf16", "tensorrt", AMAX)
    engine = tmp_path / "vision.engine"
    build_engine(graph, component_spec("vision", shallow.config), engine)
    report = read_rtx(engine, graph)
    check_expectations(report, promised)
    assert report.precisions[runs] == len(layers)
    assert report.fallbacks == ()
    with pytest.raises(BuildError, match=f"promised int8, runs {runs}"):
        check_expectations(report, dict.fromkeys(promised, "int8"))
    with pytest.raises(BuildError, match="which nothing promised"):
        check_expectations(report, {})


def test_integer_products_have_one_weight_scale_an_output_channel() -> None:
    assert block_size("int4-weight", 128) == 128
    assert block_size("w4a8", 128) == block_size("w4a4", 128) == 0
    values, scale = quantise(torch.randn(6, 96, generator=torch.Generator().manual_seed(0)), "w4a4")
    assert scale.shape == (6,)
    assert (values.abs().amax(1) == 7).all()
    assert "multiples of 32" in excluded("w4a4", 64, 48)
    assert not excluded("w4a8", 64, 48)
