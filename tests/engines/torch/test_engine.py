"""The torch backend equals ONNX Runtime on the same bundle: layer by layer, and all layers in a row."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ivl_export.bundle import Bundle, seal
from ivl_export.engines.base import open_engine
from ivl_export.engines.torch import module as torch_module
from ivl_export.engines.torch.exported import exported
from ivl_export.engines.torch.linears import Fp8Linear, Int8Linear
from ivl_export.engines.torch.module import Fp8Attention, component_of
from ivl_export.errors import BuildError, CapabilityError, IntegrityError, UsageError
from ivl_export.profiles.measure.inputs import random_inputs
from ivl_export.runtime import InternVL
from ivl_export.synthetic.render import render
from ivl_export.synthetic.scenes import sample_scene
from ivl_export.tests.numbers import BF16_SQNR, FP32_SQNR, LAYER_SQNR, MODEL_SQNR, sqnr

pytestmark = pytest.mark.numeric

Array = np.ndarray[Any, Any]
QUANTISED = (Fp8Linear, Int8Linear, Fp8Attention)


def feeds(bundle: Bundle, component: str, rows: int = 2) -> dict[str, Array]:
    spec = bundle.spec(component)
    sizes = {axis.name: min(max(axis.opt, 2), axis.max) for axis in spec.axes} | {"batch": rows}
    if "total" in sizes:
        sizes["total"] = sizes["past"] + sizes["text"]
    return random_inputs(spec, sizes, 150)


def compare(path: Path, lowest: float, **options: Any) -> None:
    bundle = Bundle.open(path)
    for component in bundle.manifest.components:
        spec, inputs = bundle.spec(component), feeds(bundle, component)
        graph = bundle.graph(component, "fp32")
        with (
            open_engine("onnxruntime", spec, graph, threads=1) as reference,
            open_engine("torch", spec, path, **options) as engine,
        ):
            want, got = reference.run(inputs), engine.run(inputs)
        assert list(got) == list(want)
        for name in want:
            assert got[name].dtype == np.float32
            assert got[name].shape == want[name].shape
            assert sqnr(got[name], want[name]) > lowest, (component, name)


def layers_of(
    bundle: Bundle, component: str, modules: Mapping[str, torch.nn.Module]
) -> dict[str, tuple[list[Array], Array]]:
    """Results of the graph's Q/DQ pairs: the inputs and the output of each of ``modules``, by name.

    ONNX Runtime runs the nodes as they are written, in fp32, without a processor's 8-bit products.
    """
    path = bundle.graph(component, "fp32")
    model = onnx.load(path, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    sources = {output: node for node in model.graph.node for output in node.output}

    def unrounded(value: str) -> str:
        """A layer rounded as by Q/DQ pairs."""
        return str(sources[sources[value].input[0]].input[0])

    layers: dict[str, tuple[list[str], str]] = {}
    for name, module in modules.items():
        if isinstance(module, Fp8Attention):
            attention = name.removesuffix(".core")
            q, k = (sources[unrounded(f"{attention}.{x}_dq")].input[0] for x in "qk")  # scaled; transposed
            layers[name] = [q, k, unrounded(f"{attention}.v_dq")], nodes[f"{attention}/mixed"].output[0]
        else:
            last = nodes.get(f"{name}/Add") or nodes[name]
            layers[name] = [unrounded(nodes[name].input[0])], last.output[0]
    values = list(dict.fromkeys(name for inputs, output in layers.values() for name in (*inputs, output)))
    outputs = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values if name not in outputs)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    arrays = dict(zip(values, session.run(values, feeds(bundle, component)), strict=True))
    return {
        layer: ([arrays[i] for i in inputs], arrays[output]) for layer, (inputs, output) in layers.items()
    }


def compare_layers(path: Path) -> None:
    """Every quantised layer by itself: no rounding of an earlier one can move it."""
    bundle = Bundle.open(path)
    for component in bundle.manifest.components:
        module = component_of(bundle, component, dtype=torch.float32, device=torch.device("cpu"))
        modules = {name: m for name, m in module.named_modules() if isinstance(m, QUANTISED)}
        assert modules
        for layer, (inputs, want) in layers_of(bundle, component, modules).items():
            got = modules[layer](*map(torch.from_numpy, inputs)).numpy()
            if got.shape != want.shape:  # heads next to each other
                want = want.swapaxes(1, 2).reshape(got.shape)
            assert sqnr(got, want) > LAYER_SQNR, (component, layer)


def test_fp32_equals_onnxruntime(tiny_bundle: Path) -> None:
    compare(tiny_bundle, FP32_SQNR)


def test_bf16_is_as_near_as_bf16_can_be(tiny_bundle: Path) -> None:
    compare(tiny_bundle, BF16_SQNR, dtype="bf16")


@pytest.mark.slow
def test_fp8_equals_onnxruntime(nano_fp8: Path) -> None:
    compare_layers(nano_fp8)
    compare(nano_fp8, MODEL_SQNR)
    module = component_of(Bundle.open(nano_fp8), "vision", dtype=torch.float32, device=torch.device("cpu"))
    depth = Bundle.open(nano_fp8).manifest.model.config["vision_config"]["num_hidden_layers"]
    assert sum(isinstance(m, Fp8Linear) for m in module.modules()) == 4 * depth


@pytest.mark.slow
def test_int8_equals_onnxruntime(nano_int8: Path) -> None:
    compare_layers(nano_int8)
    compare(nano_int8, MODEL_SQNR)
    module = component_of(Bundle.open(nano_int8), "vision", dtype=torch.float32, device=torch.device("cpu"))
    assert any(isinstance(m, Int8Linear) for m in module.modules())


@pytest.mark.slow
def test_fp8_attention_equals_onnxruntime(nano_fp8_attention: Path) -> None:
    compare_layers(nano_fp8_attention)
    compare(nano_fp8_attention, MODEL_SQNR)
    bundle = Bundle.open(nano_fp8_attention)
    module = component_of(bundle, "vision", dtype=torch.float32, device=torch.device("cpu"))
    depth = bundle.manifest.model.config["vision_config"]["num_hidden_layers"]
    assert sum(isinstance(m, Fp8Attention) for m in module.modules()) == depth


@pytest.mark.slow
def test_captions_and_embeddings_of_an_fp8_bundle_are_the_same(nano_fp8: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [np.asarray(render(sample_scene(rng, "heldout"))) for _ in range(6)]
    with InternVL.load(nano_fp8, threads=1) as reference, InternVL.load(nano_fp8, "torch") as model:
        assert model.caption(pictures) == reference.caption(pictures)
        for mode in ("InternVL-C", "InternVL-G"):
            got, want = model.encode_image(pictures, mode), reference.encode_image(pictures, mode)
            assert sqnr(got, want) > MODEL_SQNR


def test_components_share_their_weights(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    text, step = (
        component_of(bundle, name, dtype=torch.float32, device=torch.device("cpu"))
        for name in ("qllama_text", "qllama_step")
    )
    mine, theirs = dict(text.named_parameters()), dict(step.named_parameters())
    both = mine.keys() & theirs.keys()
    assert len(both) > 10
    assert all(mine[key] is theirs[key] for key in both)


def test_tensors_stay_where_they_are(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    spec, inputs = bundle.spec("vision"), feeds(bundle, "vision")
    with open_engine("torch", spec, tiny_bundle) as engine:
        want = engine.run(inputs, ["image_embed"])
        assert list(want) == ["image_embed"]
        bound = torch.empty(want["image_embed"].shape)
        got = engine.run_tensors(
            {"pixel_values": torch.from_numpy(inputs["pixel_values"])},
            ["image_embed"],
            out={"image_embed": bound},
        )
        assert got["image_embed"].data_ptr() == bound.data_ptr()
        assert not got["image_embed"].requires_grad
        np.testing.assert_array_equal(bound.numpy(), want["image_embed"])
    with pytest.raises(UsageError, match="closed"):
        engine.run(inputs)


@pytest.mark.slow
def test_blocks_compile_as_one_graph_each(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without breaks, and once for all; the code generator, which takes a minute here, is torch's."""
    compiled = []

    def graphs(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    whole = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda call, fullgraph, mode, dynamic, backend: whole(call, fullgraph=fullgraph, backend=graphs),
    )
    bundle = Bundle.open(tiny_bundle)
    for component in ("vision", "qllama_step"):
        spec, inputs = bundle.spec(component), feeds(bundle, component)
        with (
            open_engine("torch", spec, tiny_bundle) as eager,
            open_engine("torch", spec, tiny_bundle, compile=True) as fast,
        ):
            want, got = eager.run(inputs), fast.run(inputs)
            for name in want:
                np.testing.assert_allclose(got[name], want[name], atol=1e-4)
            assert len(compiled) == 1, component
            compiled.clear()


@pytest.mark.slow
def test_compiled_blocks_take_all_calls_in_any_order(nano_fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Components share the code of a decoder layer, and all their shapes count against one limit."""
    monkeypatch.setattr(torch_module, "COMPILER", "eager")
    images = list(np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), dtype=np.uint8))
    with (
        InternVL.load(nano_fp8, "torch") as eager,
        InternVL.load(nano_fp8, "torch", compile=True) as fast,
    ):
        for rows in (2, 1):
            want, got = (model.encode_image(images[:rows], mode="InternVL-G") for model in (eager, fast))
            np.testing.assert_allclose(got, want, atol=1e-3)
            want, got = (model.encode_text(["a red circle"] * rows) for model in (eager, fast))
            np.testing.assert_allclose(got, want, atol=1e-3)
            assert fast.caption(images[:rows]) == eager.caption(images[:rows])


def test_what_the_compiler_refuses_is_an_error(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny_bundle)
    spec, inputs = bundle.spec("vision"), feeds(bundle, "vision")
    monkeypatch.setattr(torch_module, "COMPILER", "eager")
    monkeypatch.setattr(torch_module, "COMPILATIONS", 1)
    torch._dynamo.reset()  # other tests' compilations count, too
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    with open_engine("torch", spec, tiny_bundle, compile=True) as engine:
        engine.run(inputs)
        with pytest.raises(BuildError, match=r"vision cannot be compiled.*compile=False"):
            engine.run(feeds(bundle, "vision", 3))


def test_what_cannot_be_had_says_so(tiny_bundle: Path, tmp_path: Path) -> None:
    spec = Bundle.open(tiny_bundle).spec("vision")
    with pytest.raises(UsageError, match="dtype"):
        open_engine("torch", spec, tiny_bundle, dtype="fp4")
    with pytest.raises(UsageError, match="device"):
        open_engine("torch", spec, tiny_bundle, device="gpu?")
    with pytest.raises(CapabilityError, match="CUDA graphs"):
        open_engine("torch", spec, tiny_bundle, cuda_graphs=True)
    if not torch.cuda.is_available():
        with pytest.raises(CapabilityError, match="no GPU"):
            open_engine("torch", spec, tiny_bundle, device="cuda")
    with pytest.raises(CapabilityError, match="torch-tensorrt") as caught:
        open_engine("torch-tensorrt", spec, tiny_bundle)
    assert "pip install torch-tensorrt" in caught.value.fix


def test_a_bundle_without_its_weights_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    shutil.copytree(tiny_bundle, staging)
    shutil.rmtree(staging / "onnx" / "weights")
    (staging / "manifest.json").unlink()
    manifest = Bundle.open(tiny_bundle).manifest
    bare = seal(staging, manifest, tmp_path / "bare")
    with pytest.raises(IntegrityError, match="lacks"):
        open_engine("torch", bare.spec("vision"), bare.root)


@pytest.mark.slow
def test_the_exported_program_is_the_module(tiny_bundle: Path) -> None:
    """What Torch-TensorRT is given; compiling it needs a GPU."""
    bundle = Bundle.open(tiny_bundle)
    place = torch.device("cpu")
    program = exported(bundle.spec("qllama_text"), bundle, torch.float32, place)
    module = component_of(bundle, "qllama_text", dtype=torch.float32, device=place)
    inputs = [torch.from_numpy(a) for a in feeds(bundle, "qllama_text", rows=4).values()]
    torch.testing.assert_close(program.module()(*inputs)[0], module(*inputs)[0])


def test_the_runtime_imports_torch_only_on_request() -> None:
    code = "import sys, ivl_export.runtime, ivl_export.engines.base; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
