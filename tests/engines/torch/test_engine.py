"""The torch backend on whole bundles equals ONNX Runtime: same weights, same scales, same results."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ivl_export.bundle import Bundle, seal
from ivl_export.engines.base import open_engine
from ivl_export.engines.torch.attention import Fp8Attention
from ivl_export.engines.torch.exported import exported
from ivl_export.engines.torch.linears import Fp8Linear, Int8Linear
from ivl_export.engines.torch.module import component_of
from ivl_export.errors import CapabilityError, IntegrityError, UsageError
from ivl_export.profiles.measure.inputs import random_inputs
from ivl_export.runtime import InternVL
from ivl_export.synthetic.render import render
from ivl_export.synthetic.scenes import sample_scene

Array = np.ndarray[Any, Any]


def feeds(bundle: Bundle, component: str, rows: int = 2) -> dict[str, Array]:
    spec = bundle.spec(component)
    sizes = {axis.name: min(max(axis.opt, 2), axis.max) for axis in spec.axes} | {"batch": rows}
    if "total" in sizes:
        sizes["total"] = sizes["past"] + sizes["text"]
    return random_inputs(spec, sizes, 150)


def sqnr(got: Array, want: Array) -> float:
    error = float(((got - want) ** 2).sum())
    return float("inf") if error == 0 else 10 * float(np.log10(float((want**2).sum()) / error))


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


def test_fp32_equals_onnxruntime(tiny_bundle: Path) -> None:
    compare(tiny_bundle, 100)


def test_bf16_is_as_near_as_bf16_can_be(tiny_bundle: Path) -> None:
    compare(tiny_bundle, 25, dtype="bf16")


@pytest.mark.slow
def test_fp8_equals_onnxruntime(nano_fp8: Path) -> None:
    compare(
        nano_fp8, 45
    )  # where a value is halfway between two of FP8, another order of sums rounds it elsewhere
    module = component_of(Bundle.open(nano_fp8), "vision", dtype=torch.float32, device=torch.device("cpu"))
    depth = Bundle.open(nano_fp8).manifest.model.config["vision_config"]["num_hidden_layers"]
    assert sum(isinstance(m, Fp8Linear) for m in module.modules()) == 4 * depth


@pytest.mark.slow
def test_int8_equals_onnxruntime(nano_int8: Path) -> None:
    compare(nano_int8, 45)
    module = component_of(Bundle.open(nano_int8), "vision", dtype=torch.float32, device=torch.device("cpu"))
    assert any(isinstance(m, Int8Linear) for m in module.modules())


@pytest.mark.slow
def test_fp8_attention_equals_onnxruntime(nano_fp8_attention: Path) -> None:
    compare(nano_fp8_attention, 33)  # twice as many roundings that may fall elsewhere
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
            assert sqnr(got, want) > 45


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


def test_blocks_compile_as_one_graph_each(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without breaks, and once for all; the code generator, which takes a minute here, is torch's."""
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    whole = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda call, fullgraph, mode, dynamic: whole(call, fullgraph=fullgraph, backend=backend),
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


def test_the_exported_program_is_the_module(tiny_bundle: Path) -> None:
    """What Torch-TensorRT is given; compiling it needs a GPU."""
    bundle = Bundle.open(tiny_bundle)
    place = torch.device("cpu")
    program = exported(bundle.spec("qllama_text"), bundle, torch.float32, place)
    module = component_of(bundle, "qllama_text", dtype=torch.float32, device=place)
    inputs = [torch.from_numpy(a) for a in feeds(bundle, "qllama_text", rows=4).values()]
    torch.testing.assert_close(program.module()(*inputs)[0], module(*inputs)[0])


def test_the_runtime_imports_no_torch_unless_asked() -> None:
    code = "import sys, ivl_export.runtime, ivl_export.engines.base; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
