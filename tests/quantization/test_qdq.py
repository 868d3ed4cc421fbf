from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from ivl_export.calibration.accuracy import compare
from ivl_export.calibration.calibrate import calibrate
from ivl_export.calibration.component_chain import Runner, run_chain
from ivl_export.calibration.dataset import CalibrationSet
from ivl_export.errors import BuildError
from ivl_export.export.trace import export_component
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import Tokenizer
from ivl_export.models.checkpoint import Checkpoint
from ivl_export.models.registry import component_spec
from ivl_export.quantization.qdq import quantised_gemms, write_qdq
from ivl_export.quantization.qdq_nodes import Style
from ivl_export.quantization.quantize import LIMITS, activation_scale, dequantise, quantise, stored_names
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.quantization.recipe import load_recipe, plan_layers
from ivl_export.tests.calibration.reference import reference_modules, reference_runners, torch_runner

pytestmark = pytest.mark.numeric

Sets = tuple[CalibrationSet, CalibrationSet]
COMPONENTS = ("vision", "qllama_query", "qllama_step")
COUNTS = {"vision": 4, "qllama_query": 11, "qllama_step": 7}
SCHEMES = ("fp8", "int8")


@pytest.fixture(scope="module")
def ranges(
    shallow: Checkpoint, scenes: Sets, settings: ImageSettings, tokenizer: Tokenizer
) -> ActivationRanges:
    return calibrate(shallow, COMPONENTS, scenes[0], settings, tokenizer, batch_size=4)


@pytest.fixture(scope="module")
def schemes(shallow: Checkpoint) -> Callable[[str], dict[str, str]]:
    shapes = {
        key.removesuffix(".weight"): (ref.shape[0], ref.shape[1])
        for key, ref in shallow.tensors.items()
        if key.endswith(".weight") and len(ref.shape) == 2 and "embed_tokens" not in key
    }
    return lambda recipe: plan_layers(load_recipe(recipe), shapes).schemes


def bound(model: ir.Model, shallow: Checkpoint, schemes: Mapping[str, str]) -> bytes:
    """The serialised graph with its weights inside."""
    stored: dict[str, torch.Tensor] = {}
    for layer, scheme in schemes.items():
        if scheme in LIMITS:
            values, scale = quantise(shallow.load(f"{layer}.weight"), scheme)
            names = stored_names(layer, scheme, "bf16")
            stored.update(zip(names, (values, scale.bfloat16(), scale), strict=True))
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None
            tensor = stored[name] if name in stored else shallow.load(name)
            if name not in stored and value.dtype == ir.DataType.FLOAT:
                tensor = tensor.float()
            if value.dtype == ir.DataType.FLOAT8E4M3FN:
                array = tensor.view(torch.uint8).numpy().view(value.dtype.numpy())
            elif value.dtype == ir.DataType.BFLOAT16:
                array = tensor.contiguous().view(torch.int16).numpy().view(value.dtype.numpy())
            else:
                array = tensor.contiguous().numpy()
            assert list(value.shape or ()) == list(tensor.shape)
            value.const_value = ir.tensor(array, dtype=value.dtype, name=name)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def runner(graph: bytes, fp8: bool, optimised: str = "") -> Runner:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if fp8:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    else:  # as the backend does: without VNNI x86 saturates the sums of INT8 products, to 46 dB instead of 68
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimised:
        options.optimized_model_filepath = optimised
        options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def modelopt_fake_quantised(
    module: torch.nn.Module, shallow: Checkpoint, schemes: Mapping[str, str], amax: Mapping[str, float]
) -> None:
    """Fake-quantise the linears of ``module`` in place, with ModelOpt's functions on the rounded scales."""
    tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")

    def fake(x: torch.Tensor, scheme: str, top: torch.Tensor) -> torch.Tensor:
        if scheme == "fp8":
            return tensor_quant.scaled_e4m3(x, top, None, 4, 3)  # type: ignore[no-any-return]
        return tensor_quant.fake_tensor_quant(x, top, None, 8, False, True)  # type: ignore[no-any-return]

    for layer, scheme in schemes.items():
        if layer not in amax or scheme not in LIMITS:
            continue
        linear = module.get_submodule(layer)
        _, scale = quantise(shallow.load(f"{layer}.weight"), scheme)
        weight = shallow.load(f"{layer}.weight", torch.float32)
        linear.weight = torch.nn.Parameter(fake(weight, scheme, scale[:, None] * LIMITS[scheme]), False)
        top = torch.tensor(activation_scale(amax[layer], scheme, "bf16") * LIMITS[scheme])

        def hook(_: Any, args: Any, scheme: str = scheme, top: torch.Tensor = top) -> Any:
            return (fake(args[0].clone(), scheme, top),)

        linear.register_forward_pre_hook(hook)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_onnxruntime_equals_modelopts_fake_quantisation(
    scheme: str,
    shallow: Checkpoint,
    ranges: ActivationRanges,
    schemes: Callable[[str], dict[str, str]],
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
) -> None:
    fakes = reference_modules(shallow, COMPONENTS)
    specs = {c: component_spec(c, shallow.config) for c in COMPONENTS}
    planned = schemes(scheme)
    batch = next(scenes[1].batches(settings, tokenizer, 4))
    steps = list(run_chain(reference_runners(shallow, COMPONENTS), batch, shallow.model))
    for component in COMPONENTS:
        model = export_component(component, shallow, "fp32")
        promised = write_qdq(model, planned, ranges.amax[component], compute="fp32", style="onnxruntime")
        assert len(promised) == COUNTS[component]
        proto = bound(model, shallow, planned)
        onnx.checker.check_model(proto, full_check=True)
        modelopt_fake_quantised(fakes[component], shallow, planned, ranges.amax[component])
        graph, fake = runner(proto, scheme == "fp8"), torch_runner(fakes[component], specs[component])
        step = next(s for s in steps if s.component == component)
        got, oracle = graph(step.inputs), fake(step.inputs)
        for name, reference in step.outputs.items():
            ours, theirs = compare(reference, got[name]), compare(reference, oracle[name])
            assert ours.sqnr_db == pytest.approx(theirs.sqnr_db, abs=0.6), (component, name)
            assert 15 < ours.sqnr_db < 80, (component, name)
            # only a rounding tie that falls the other way separates the two
            assert compare(oracle[name], got[name]).sqnr_db > ours.sqnr_db + 4, (component, name)


@pytest.mark.parametrize("component", COMPONENTS)
def test_int8_fuses_to_integer_gemms_in_onnxruntime(
    component: str,
    shallow: Checkpoint,
    ranges: ActivationRanges,
    schemes: Callable[[str], dict[str, str]],
    tmp_path: Any,
) -> None:
    model = export_component(component, shallow, "fp32")
    planned = schemes("int8")
    promised = write_qdq(model, planned, ranges.amax[component], compute="fp32", style="onnxruntime")
    path = str(tmp_path / "optimised.onnx")
    runner(bound(model, shallow, planned), False, path)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    integer = sum(kind in ("MatMulIntegerToFloat", "QLinearMatMul") for kind in kinds)
    assert integer == len(promised) == COUNTS[component]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("component", COMPONENTS)
def test_tensorrt_style(
    component: str,
    scheme: str,
    shallow: Checkpoint,
    ranges: ActivationRanges,
    schemes: Callable[[str], dict[str, str]],
) -> None:
    model = export_component(component, shallow, "bf16")
    planned = schemes(scheme)
    promised = write_qdq(model, planned, ranges.amax[component], compute="bf16", style="tensorrt")
    assert promised == {n: scheme for n in ranges.amax[component] if planned.get(n) == scheme}
    onnx.checker.check_model(bound(model, shallow, planned), full_check=True)
    nodes = {node.name: node for node in model.graph}
    for name in promised:  # DQ directly before the GEMM, stored weights, nothing folded
        x, w = nodes[name].inputs
        assert x is not None
        assert w is not None
        assert x.producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
        dequantise_weight = w.producer().inputs[0].producer()  # type: ignore[union-attr]
        assert [v.name for v in dequantise_weight.inputs] == [  # type: ignore[union-attr]
            f"{name}.weight.{scheme}",
            f"{name}.weight.scale.bfloat16",
        ]
        assert f"{name}.weight" not in model.graph.initializers
    if component == "qllama_step":  # one pair in front of q, k and v, one in front of gate and up
        llama = "qllama.model.layers.0."
        for group in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            assert len({nodes[f"{llama}{part}_proj"].inputs[0] for part in group}) == 1


def test_a_layer_can_be_left_out_and_mixed(
    shallow: Checkpoint, ranges: ActivationRanges, schemes: Callable[[str], dict[str, str]]
) -> None:
    model = export_component("qllama_step", shallow, "bf16")
    layer = "qllama.model.layers.0.self_attn."
    planned = {**schemes("fp8"), f"{layer}k_proj": "bf16", f"{layer}v_proj": "int8"}
    promised = write_qdq(model, planned, ranges.amax["qllama_step"], compute="bf16", style="tensorrt")
    assert len(promised) == 6
    assert promised[f"{layer}v_proj"] == "int8"
    assert f"{layer}k_proj" not in promised
    assert f"{layer}k_proj.weight" in model.graph.initializers
    assert quantised_gemms(model) == promised
    onnx.checker.check_model(bound(model, shallow, planned), full_check=True)


@pytest.mark.parametrize("style", ["tensorrt", "onnxruntime"])
def test_no_scheme_leaves_the_graph_as_it_was(style: Style, shallow: Checkpoint) -> None:
    model = export_component("vision", shallow, "fp32")
    before = ir.to_proto(model).SerializeToString()
    assert write_qdq(model, {}, {}, compute="fp32", style=style) == {}
    assert ir.to_proto(model).SerializeToString() == before


def test_graph_and_calibration_must_agree(
    shallow: Checkpoint, ranges: ActivationRanges, schemes: Callable[[str], dict[str, str]]
) -> None:
    amax = ranges.amax["vision"]
    some = {n: v for n, v in amax.items() if not n.endswith("0.attn.qkv")}
    planned = schemes("fp8")

    def write(planned: dict[str, str], amax: dict[str, float], compute: str = "bf16") -> None:
        model = export_component("vision", shallow, "bf16")
        write_qdq(model, planned, amax, compute=compute, style="tensorrt")

    with pytest.raises(BuildError, match=r"1 layers of graph vision have no activation scale.*0\.attn\.qkv"):
        write(planned, some)
    extra = "vision_model.encoder.layers.7.mlp.fc1"
    with pytest.raises(
        BuildError, match=r"lacks 1 layers that calibration measured in it.*layers\.7\.mlp\.fc1"
    ):
        write({**planned, extra: "fp8"}, {**amax, extra: 1.0})
    with pytest.raises(BuildError, match="It is BFLOAT16, the graph is said to compute in fp32"):
        write(planned, amax, "fp32")
    with pytest.raises(BuildError, match="computes in fp16, the recipe's base is bf16"):
        write(planned, amax, "fp16")


def test_a_weight_that_no_gemm_multiplies_by(shallow: Checkpoint) -> None:
    model = export_component("qllama_step", shallow, "bf16")
    name = "qllama.model.embed_tokens"
    with pytest.raises(BuildError, match="its weight is input 0 of Gather"):
        write_qdq(model, {name: "fp8"}, {name: 1.0}, compute="bf16", style="tensorrt")


def test_stored_weights_are_what_both_variants_read(shallow: Checkpoint) -> None:
    layer = "vision_model.encoder.layers.0.mlp.fc1"
    values, scale = quantise(shallow.load(f"{layer}.weight"), "fp8")
    assert torch.equal(dequantise(values, scale), dequantise(values, scale.bfloat16()))
    assert np.isclose(activation_scale(3.0, "fp8", "bf16"), 3 / 448, rtol=2**-8)
