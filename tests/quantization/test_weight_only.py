"""Weight-only schemes through store, graph, ONNX Runtime and TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from ivl_export.calibration.accuracy import compare
from ivl_export.engines.base import open_engine
from ivl_export.engines.tensorrt.build import build_engine
from ivl_export.errors import BuildError
from ivl_export.export.binding import bind, save_graph
from ivl_export.export.trace import export_component
from ivl_export.export.weight_store import StoreWriter, open_store
from ivl_export.export.weights import write_store
from ivl_export.models.checkpoint import Checkpoint
from ivl_export.models.registry import component_spec
from ivl_export.quantization.qdq import write_qdq
from ivl_export.quantization.qdq_nodes import Style
from ivl_export.quantization.quantize import (
    dequantise,
    pack,
    quantise,
    quantise_layer,
    stored_tensors,
    unpack,
)
from ivl_export.quantization.recipe import Recipe, Rule, load_recipe, plan_layers
from ivl_export.quantization.schemes import block_size
from ivl_export.tests.calibration.reference import reference_modules
from ivl_export.verify.expectations import check_expectations
from ivl_export.verify.onnxruntime import read_onnxruntime
from ivl_export.verify.rtx import read_rtx

pytestmark = pytest.mark.numeric

SCHEMES = ("int8-weight", "int4-weight")


def written(
    checkpoint: Checkpoint, folder: Path, scheme: str, compute: str, style: Style, amax: float = 0.0
) -> tuple[Path, dict[str, str], dict[str, str]]:
    """The vision graph with its store, the promise, and the plan's layers."""
    shapes = {
        key.removesuffix(".weight"): (ref.shape[0], ref.shape[1])
        for key, ref in checkpoint.tensors.items()
        if key.startswith("vision_model.") and key.endswith(".weight") and len(ref.shape) == 2
    }
    rules = tuple(r for r in load_recipe(scheme).rules if "encoder" in r.pattern)  # the vision tower's
    layers = plan_layers(Recipe(scheme, rules), shapes).quantised
    model = export_component("vision", checkpoint, compute)
    stored = [n for n in model.graph.initializers if n in checkpoint.tensors]
    promised = write_qdq(model, layers, dict.fromkeys(layers, amax), compute=compute, style=style)
    low = {f"{layer}.weight" for layer in layers}
    folder.mkdir()
    write_store(checkpoint, [k for k in stored if k not in low], folder / "base.safetensors", "bf16")
    layout = [t for n in layers for t in stored_tensors(n, scheme, "bf16", shapes[n])]
    with StoreWriter(folder / "low.safetensors", layout) as store:
        for layer in layers:
            quantise_layer(checkpoint.load, store.write, layer, scheme, "bf16")
    bind(model, open_store(folder / "base.safetensors", folder / "low.safetensors"), folder)
    save_graph(model, folder / "vision.onnx")
    return folder / "vision.onnx", promised, layers


@pytest.mark.parametrize("scheme", SCHEMES)
def test_onnxruntime_multiplies_by_the_dequantised_weights(
    scheme: str, shallow: Checkpoint, tmp_path: Path
) -> None:
    graph, promised, layers = written(shallow, tmp_path / "cpu", scheme, "fp32", "onnxruntime")
    assert promised == layers
    assert len(layers) == 4
    precisions = read_onnxruntime(graph).precisions
    assert precisions[f"fp32x{scheme.removesuffix('-weight')}"] == len(layers)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 28, 28)).astype(np.float32)
    plain, rounded = (reference_modules(shallow, ["vision"])["vision"] for _ in range(2))
    for layer in layers:
        weight = shallow.load(f"{layer}.weight", torch.float32)
        values = dequantise(*quantise(weight, scheme))
        rounded.get_submodule(layer).weight = torch.nn.Parameter(values, False)
    spec = component_spec("vision", shallow.config)
    with open_engine("onnxruntime", spec, graph) as engine:
        got = engine.run({"pixel_values": pixels})
    with torch.no_grad():
        expected, exact = (m(torch.from_numpy(pixels)) for m in (rounded, plain))
    for tensor, want, true in zip(spec.outputs, expected, exact, strict=True):
        assert (compare(want.numpy(), got[tensor.name]).sqnr_db or 999) > 80
        loss = compare(true.numpy(), want.numpy()).sqnr_db
        assert compare(true.numpy(), got[tensor.name]).sqnr_db == pytest.approx(loss, abs=0.2)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.slow
def test_the_engine_keeps_the_weights_small(scheme: str, shallow: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph, promised, layers = written(shallow, tmp_path / "gpu", scheme, "bf16", "tensorrt")
    kind = scheme.removesuffix("-weight")
    stored = {i.name: i for i in onnx.load(graph, load_external_data=False).graph.initializer}
    for layer in layers:
        tensor = stored[f"{layer}.weight.{kind}"]
        assert tensor.data_type == getattr(onnx.TensorProto, kind.upper())
    engine = tmp_path / "vision.engine"
    build_engine(graph, component_spec("vision", shallow.config), engine)
    report = read_rtx(engine, graph)
    check_expectations(report, promised)
    assert report.precisions[f"bf16x{kind}"] == len(layers)
    with pytest.raises(BuildError, match=f"promised int8, runs bf16x{kind}"):
        check_expectations(report, dict.fromkeys(promised, "int8"))
    other = next(s for s in SCHEMES if s != scheme)
    with pytest.raises(BuildError, match=f"promised {other}, runs bf16x{kind}"):
        check_expectations(report, dict.fromkeys(promised, other))


@pytest.mark.parametrize(("width", "block"), [(256, 128), (192, 64), (352, 32)])
def test_int4_rounds_block_by_block(width: int, block: int) -> None:
    assert block_size("int4-weight", width) == block
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 50.0  # spoils its own block only
    values, scale = quantise(weight, "int4-weight")
    assert scale.shape == (6, width // block)
    assert int(values.abs().max()) == 7
    error = (dequantise(values, scale) - weight).abs().reshape(6, -1, block)
    # half a step, and the clipping by a scale that was rounded down to bf16
    assert (error <= scale[..., None] * 0.5 + 7 * scale[..., None] * 2.0**-8).all()
    assert error[0, 1:].max() < 0.5
    assert torch.equal(dequantise(pack(values), scale), dequantise(values, scale))


def test_packing_is_onnx_own() -> None:
    values = torch.tensor([[-7, 7, 0, -1], [1, -2, 3, 4]], dtype=torch.int8)
    tensor = onnx.helper.make_tensor(
        "w", onnx.TensorProto.INT4, (2, 4), pack(values).numpy().tobytes(), raw=True
    )
    layer: Any = onnx.numpy_helper.to_array(tensor).astype(np.int8)
    assert layer.tolist() == values.tolist()
    assert torch.equal(unpack(pack(values)), values)


def test_widths_without_a_block_are_excluded() -> None:
    rules = (Rule("*", "int4-weight"),)
    plan = plan_layers(Recipe("x", rules), {"narrow": (6, 48), "wide": (6, 96)})
    assert plan.quantised == {"wide": "int4-weight"}
    assert "in features 48 must be a multiple of 32" in plan.exclusions[0].reason
