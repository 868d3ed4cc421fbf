"""Sums of INT8 products are those of integers, on processors with VNNI or AMX and on those without.

Without VNNI an x86 processor multiplies unsigned by signed bytes, adds pairs of products in 16 bits and
saturates there; ONNX Runtime is told not to. So what is measured on one processor holds on all: a layer's
result differs by the rounding of its scales alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec
from ivl_export.engines.base import Engine
from ivl_export.engines.onnxruntime.backend import open_onnxruntime
from ivl_export.tests.numbers import LAYER_SQNR, sqnr

pytestmark = pytest.mark.numeric

Array = np.ndarray[Any, Any]
WIDTH, OUT = 64, 16
DRAWN = np.random.default_rng(0)
WEIGHTS = {
    "largest": np.full((OUT, WIDTH), 127, np.int8),
    "smallest": np.full((OUT, WIDTH), -127, np.int8),
    "drawn": DRAWN.integers(-127, 128, (OUT, WIDTH)).astype(np.int8),
}


def product(path: Path, weight: Array) -> Engine:
    """An engine of ``y = x W^T`` as a bundle has it: all scales are 1, so that every value is an integer."""
    rows, kind = weight.shape[0], TensorProto.INT8
    values = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.ones(rows, np.float32), "w_scale"),
        numpy_helper.from_array(np.zeros(rows, np.int8), "w_zero"),
        numpy_helper.from_array(np.float32(1), "x_scale"),
        helper.make_tensor("x_zero", kind, [], b"\0", raw=True),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "x_scale", "x_zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["dequantised"], axis=0),
        helper.make_node("Transpose", ["dequantised"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["rounded", "turned"], ["y"]),
    ]
    inputs, outputs = (
        TensorSpec(name, "float", ("batch", width))
        for name, width in zip("xy", weight.shape[::-1], strict=True)
    )
    io = [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    spec = ComponentSpec("part", (inputs,), (outputs,), (Axis("batch", 1, 2, 64),))
    return open_onnxruntime(spec, path, threads=1)


def exact(codes: Array, weight: Array) -> Array:
    sums: Array = codes.astype(np.int64) @ weight.astype(np.int64).T
    return sums


def saturating(codes: Array, weight: Array) -> Array:
    """As VPMADDUBSW sums: inputs moved to unsigned bytes, pairs of products in 16 bits."""
    moved, signed = codes.astype(np.int64) + 128, weight.astype(np.int64)
    pairs = (moved[:, None] * signed[None]).reshape(len(codes), len(weight), -1, 2).sum(-1)
    sums: Array = np.clip(pairs, -(2**15), 2**15 - 1).sum(-1) - 128 * signed.sum(1)
    return sums


@pytest.mark.parametrize("kind", WEIGHTS)
def test_an_engine_sums_as_integers_do(kind: str, tmp_path: Path) -> None:
    """Every partial sum is below 2^24, so float32 holds each result as it is."""
    codes = np.concatenate([
        np.full((1, WIDTH), 127), np.full((1, WIDTH), -128), DRAWN.integers(-128, 128, (14, WIDTH))
    ])  # fmt: skip
    want = exact(codes, WEIGHTS[kind])
    assert np.abs(want).max() < 2**24
    with product(tmp_path / "product.onnx", WEIGHTS[kind]) as engine:
        got = engine.run({"x": codes.astype(np.float32)})["y"]
    assert np.array_equal(got, want)
    assert not np.array_equal(saturating(codes, WEIGHTS[kind]), want), "these values tell the two apart"


def test_what_saturation_would_change_is_noticed() -> None:
    """Of ordinary values too: normal inputs up to four deviations, and weights up to each row's largest."""
    x, w = DRAWN.standard_normal((32, 256)), DRAWN.standard_normal((48, 256))
    codes = np.clip(np.rint(x * 127 / 4), -128, 127).astype(np.int64)
    weight = np.rint(w / np.abs(w).max(1, keepdims=True) * 127).astype(np.int64)
    assert sqnr(saturating(codes, weight), exact(codes, weight)) < LAYER_SQNR / 1.5


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), top=st.integers(1, 127))
def test_how_much_saturation_can_change(seed: int, top: int) -> None:
    """A pair of products is off by 2 * 255 * |w| - 32767 at most: by nothing where weights stay within 64."""
    rng = np.random.default_rng(seed)
    codes, weight = rng.integers(-128, 128, (4, WIDTH)), rng.integers(-top, top + 1, (OUT, WIDTH))
    error = np.abs(saturating(codes, weight) - exact(codes, weight)).max()
    assert error <= WIDTH // 2 * max(0, 2 * 255 * top - (2**15 - 1))
