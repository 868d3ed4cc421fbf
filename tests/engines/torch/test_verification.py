"""The torch backend's report agrees with its run: types, kernels, stored weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ivl_export import cli
from ivl_export.bundle import Bundle
from ivl_export.engines.products import FACTORS, factors
from ivl_export.engines.torch.linears import best_product, quantised_linear
from ivl_export.engines.torch.trace import Op, named_ranges, operators, traced
from ivl_export.errors import BuildError
from ivl_export.models.registry import component_module, config_from_published
from ivl_export.profiles.doctor import low_products
from ivl_export.profiles.measure.inputs import random_inputs
from ivl_export.quantization.quantize import pack, quantise
from ivl_export.quantization.recipe import load_recipe
from ivl_export.quantization.schemes import SCHEMES
from ivl_export.verify.expectations import check_expectations
from ivl_export.verify.report import VerificationReport
from ivl_export.verify.torch import (
    addresses,
    as_before,
    by_layer,
    emitted_kernels_named,
    enforceable,
    read_torch,
    runs,
)

from .test_engine import compare

CPU = torch.device("cpu")


def proof(path: Path, component: str, **options: Any) -> tuple[VerificationReport, dict[str, str]]:
    bundle = Bundle.open(path)
    spec = bundle.spec(component)
    sizes = {axis.name: axis.opt for axis in spec.axes} | {"batch": 2}
    return read_torch(bundle, component, random_inputs(spec, sizes, 4), **options)


def fp8_runs_here() -> str:
    """How this CPU multiplies FP8 values: only torch's own operator can tell."""
    values, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    if best_product(CPU) == "restored":
        return "fp32xfp32"

    def call() -> None:
        torch._scaled_mm(values, values.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.float32)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        call()
    return "fp32xfp32" if any(e.name == "aten::mm" for e in recorded.events()) else "fp8xfp8"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("component", ["vision", "qllama_query", "qllama_text", "qllama_step"])
def test_every_layer_of_a_component_is_reported(tiny_bundle: Path, component: str, dtype: str) -> None:
    report, promised = proof(tiny_bundle, component, dtype=dtype)
    config = config_from_published(Bundle.open(tiny_bundle).manifest.model.config, "manifest.json")
    with torch.device("meta"):
        module = component_module(component, config)
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    by_name = {gemm.node: gemm for gemm in report.gemms}
    assert set(linears) <= set(by_name)
    assert set(by_name) - set(linears) <= {"text_projection"}
    assert {gemm.precision for gemm in by_name.values()} == {f"{dtype}x{dtype}"}
    assert all(by_name[name].shape == tuple(part.weight.shape) for name, part in linears.items())
    assert {gemm.weight_bits for gemm in by_name.values()} == {32 if dtype == "fp32" else 16}
    assert [c.node for c in report.convolutions] == [
        name for name, part in module.named_modules() if isinstance(part, nn.Conv2d)
    ]
    assert report.fused_attention == len(report.attention) > 0
    assert {a.types for a in report.attention} == {(dtype,) * 3}
    assert all("_scaled_dot_product_" in a.kernel for a in report.attention)
    assert bool(report.casts) == (dtype == "bf16")
    assert report.kernels > len(report.products) + len(report.attention)
    assert report.constant_bytes >= report.weight_bytes > 0
    assert VerificationReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert promised == {}


@settings(max_examples=20)
@given(
    scheme=st.sampled_from([s for s in SCHEMES if not SCHEMES[s].fold]),
    rows=st.integers(1, 20),
    out=st.integers(1, 3),
    width=st.integers(1, 3),
)
def test_the_factors_of_every_scheme(scheme: str, rows: int, out: int, width: int) -> None:
    values, scale = quantise(torch.randn(32 * out, 32 * width), scheme)
    stored = pack(values) if SCHEMES[scheme].weight == "int4" else values
    module = nn.Sequential(quantised_linear(scheme, stored, scale, None, 0.01), nn.GELU())
    x = torch.randn(rows, 32 * width)
    with named_ranges(module):
        result = by_layer(runs(traced(lambda: module(x), CPU)), module)
    assert list(result) == ["0"]
    (run,) = result["0"]
    fp8 = {"fp8xfp8": torch.float8_e4m3fn, "fp32xfp32": torch.float32}[fp8_runs_here()]
    kind = {"fp8": fp8, "int8": torch.int8, "int4": torch.int8, "": torch.float32}[SCHEMES[scheme].activation]
    assert [factor.dtype for factor in run.factors] == [kind, kind]
    assert run.factors[0].shape == (rows, 32 * width)
    assert sorted(run.factors[1].shape) == sorted((32 * width, 32 * out))
    assert "0.values" in addresses(module).values()


def test_no_range_outlives_its_module() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with named_ranges(module):
        inside = traced(lambda: module(torch.ones(1, 4)), CPU)
    outside = traced(lambda: module(torch.ones(1, 4)), CPU)

    def scopes(ops: tuple[Op, ...]) -> set[str]:
        return {run.op.scope for run in runs(ops)}

    assert (scopes(inside), scopes(outside)) == ({"0", "1"}, {""})


def test_an_attention_that_falls_apart_says_so(tiny_bundle: Path) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        report, _ = proof(tiny_bundle, "vision")
    assert report.fused_attention == 0
    assert {a.types for a in report.attention} == {("fp32",) * 3}
    assert {a.cause for a in report.attention} == {"torch runs its products one by one"}


@pytest.mark.slow
def test_compiled_code_has_the_same_layers(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the code generator, which takes a minute here."""
    whole: Callable[..., Any] = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda call, fullgraph, mode, dynamic, backend: whole(call, fullgraph=fullgraph, backend="aot_eager"),
    )
    for component in ("vision", "qllama_step"):
        eager, _ = proof(tiny_bundle, component)
        result, _ = proof(tiny_bundle, component, compile=True)
        assert [g.node for g in result.gemms] == [g.node for g in eager.gemms]
        assert result.precisions == eager.precisions
        assert [a.types for a in result.attention] == [a.types for a in eager.attention]
        assert result.fused_attention == eager.fused_attention


@pytest.mark.slow
def test_what_the_code_generator_emits() -> None:
    """A restored weight has no address, a fused one is a kernel."""
    values, scale = quantise(torch.randn(64, 32), "int4-weight")
    module = nn.Sequential(quantised_linear("int4-weight", pack(values), scale, None, None), nn.GELU())
    x = torch.randn(5, 32)
    with named_ranges(module):
        eager = traced(lambda: module(x), CPU)
    before = by_layer(runs(eager), module)
    with torch.no_grad(), emitted_kernels_named():
        result = torch.compile(module, fullgraph=True)
        result(x)
    ops = traced(lambda: result(x), CPU)
    (run,) = as_before(runs(ops), before, module)["0"]
    assert [factor.dtype for factor in run.factors] == [torch.float32] * 2
    assert any("cpp_fused" in op.name for op in ops)
    assert sum(op.work for op in ops) < sum(op.work for op in eager)


@pytest.mark.slow
def test_fp8_on_this_cpu(nano_fp8: Path) -> None:
    here = fp8_runs_here()
    report, promised = proof(nano_fp8, "vision")
    assert set(promised.values()) == {"fp8"}
    by_name = {g.node: g for g in report.gemms if g.node in promised}
    assert set(by_name) == set(promised)
    assert {g.precision for g in by_name.values()} == {here}
    assert {g.weight_bits for g in by_name.values()} == {8}
    assert len(report.fallbacks) == (0 if here == "fp8xfp8" else len(promised))
    check_expectations(report, enforceable(promised, "cpu"))
    restored, _ = proof(nano_fp8, "vision", dtype="bf16", product="restored")
    assert {g.precision for g in restored.gemms} == {"bf16xbf16"}
    assert all("restored" in g.cause for g in restored.fallbacks)
    with pytest.raises(BuildError, match="restored before the product"):
        check_expectations(restored, promised)


@pytest.mark.slow
def test_int8_keeps_its_promise(nano_int8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, promised = proof(nano_int8, "vision", dtype="bf16")
    assert enforceable(promised, "cpu") == promised
    assert report.precisions["int8xint8"] == len(promised) > 0
    check_expectations(report, promised)
    line = ["verify", str(nano_int8), "--layers", "--backend", "torch"]
    assert cli.main(line) == 0
    assert "20 int8xint8" in capsys.readouterr().out


@pytest.mark.slow
def test_fp8_attention_is_recognised(nano_fp8_attention: Path) -> None:
    report, promised = proof(nano_fp8_attention, "vision")
    spelled = {a.nodes[0]: a for a in report.attention if a.nodes[0] in promised}
    assert len(spelled) == 5
    assert {(a.fused, a.types, a.head_size) for a in spelled.values()} == {(False, ("fp32",) * 3, 32)}
    assert all("no attention of FP8" in a.cause for a in spelled.values())
    assert report.fused_attention == 1
    assert not [g for g in report.gemms if not g.weight]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["w4a8", "w4a4"])
def test_int4_weights_are_unpacked(nano_weights: Callable[[str], Path], precision: str) -> None:
    path = nano_weights(precision)
    compare(path, 45)
    report, promised = proof(path, "vision")
    results = [gemm for gemm in report.gemms if gemm.node in promised]
    assert set(promised.values()) == {precision}
    assert {(gemm.precision, gemm.weight_bits) for gemm in results} == {("int8xint4", 4)}
    assert {bool(gemm.cause) for gemm in results} == {precision == "w4a4"}
    check_expectations(report, enforceable(promised, "cpu"))


@pytest.mark.slow
def test_weight_only_bundles_have_no_scales(nano_weights: Callable[[str], Path]) -> None:
    path = nano_weights("int4-weight")
    compare(path, 45)
    report, promised = proof(path, "vision", dtype="bf16")
    check_expectations(report, enforceable(promised, "cpu", "bf16"))
    assert enforceable(promised, "cpu", "bf16") == promised
    assert enforceable(promised, "cpu") == {}


def test_the_verb(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["verify", str(tiny_bundle), "--layers", "--component", "vision", "--backend", "torch"]
    assert cli.main([*line, "--json", "--dtype", "bf16"]) == 0
    receipt = VerificationReport.from_json(json.loads(capsys.readouterr().out)["torch-cpu"]["vision"])
    assert set(receipt.precisions) == {"bf16xbf16"}
    page = tmp_path / "layers.html"
    assert cli.main([*line, "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "vision on torch-cpu" in text
    assert "_scaled_dot_product_flash_attention_for_cpu" in text
    capsys.readouterr()
    assert cli.main([*line[:-1], "onnxruntime", "--json"]) == 0
    assert "onnxruntime-cpu" in json.loads(capsys.readouterr().out)
    assert cli.main([*line[:-1], "torch-tensorrt"]) == 2
    assert cli.main([*line, "--dtype", "fp4"]) == 2
    if not torch.cuda.is_available():
        assert cli.main([*line, "--device", "cuda"]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int8-smoothquant", "w4a8", "w4a4", "int4-weight", "fp8"])
def test_doctor_says_what_the_receipts_show(
    precision: str, nano_fp8: Path, nano_int8: Path, nano_weights: Callable[[str], Path]
) -> None:
    path = {"fp8": nano_fp8, "int8": nano_int8}.get(precision) or nano_weights(precision)
    report, _ = proof(path, "vision")
    receipt = VerificationReport.from_json(
        Bundle.open(path).receipt("verification")["onnxruntime-cpu"]["vision"]
    )
    low = {factors(scheme) for scheme in FACTORS}
    recipe = load_recipe(precision)
    assert low & set(receipt.precisions) == set(low_products("onnxruntime", recipe))
    # A processor with FP8 kernels may do more than is said of CPUs in general.
    assert low & set(report.precisions) - {"fp8xfp8"} == set(low_products("torch", recipe))


def event(kind: str, name: str, *children: Any) -> Any:
    """An event of the profiler's tree, as it is on a GPU."""
    fields = SimpleNamespace(inputs=[])
    return SimpleNamespace(name=name, typed=(SimpleNamespace(name=kind), fields), children=children)


@pytest.mark.parametrize(
    "kernel",
    ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "cutlass_80_tensorop_bf16_s16816gemm",
     "triton_poi_fused_gelu_0", "nvjet_tst_128x256_64x4", "ampere_bf16_s16816gemm"],
)  # fmt: skip
def test_kernels_are_told_from_the_calls_that_launch_them(kernel: str) -> None:
    for launch in ("cudaLaunchKernel", "cuLaunchKernelEx"):
        launched = event("Kineto", launch, event("Kineto", kernel))
        copied = event("Kineto", "cudaMemcpyAsync", event("Kineto", "Memcpy DtoD (Device -> Device)"))
        (op,) = operators([event("TorchOp", "aten::mm", launched, copied)])
        assert (op.kernels, op.work) == ((kernel,), 1)
        # Compiled code launches outside of all operators.
        (op,) = operators([event("PyCall", "forward", launched, copied)])
        assert (op.name, op.kernels, op.work) == (kernel, (kernel,), 1)
