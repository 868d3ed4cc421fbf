from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest

from ivl_export import host
from ivl_export.engines.base import open_engine
from ivl_export.engines.onnx_graph import read_graph
from ivl_export.engines.onnxruntime.backend import optimized_graph
from ivl_export.engines.onnxruntime.session import make_session
from ivl_export.errors import BuildError, CapabilityError, InputError, IntegrityError, UsageError
from ivl_export.verify.expectations import check_expectations
from ivl_export.verify.onnxruntime import read_onnxruntime

pytestmark = pytest.mark.numeric

if TYPE_CHECKING:
    from ..conftest import Array, Make, Sample

LIMITS = {"fp8": 448.0, "int8": 127.0}
AMAX = 4.0


def rounded(x: Array, scheme: str, scale: Array | np.float32) -> Array:
    if scheme == "fp8":
        return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return np.clip(np.round(x / scale), -128, 127) * scale


def reference(sample: Sample, x: Array) -> Array:
    """The MLP in numpy, with its factors rounded as the graph rounds them."""
    for i, (name, weight) in enumerate(sample.weights.items()):
        scheme = sample.promised.get(name)
        if scheme is not None:
            per_row = np.abs(weight).max(1, keepdims=True) / np.float32(LIMITS[scheme])
            weight = rounded(weight, scheme, per_row)
            x = rounded(x, scheme, np.float32(AMAX / LIMITS[scheme]))
        x = x @ weight.T
        x = np.maximum(x, 0) if i == 0 else x
    return x


def sqnr(value: Array, exact: Array) -> float:
    return float(10 * np.log10((exact**2).sum() / ((value - exact) ** 2).sum()))


@pytest.mark.parametrize(("scheme", "exactness"), [(None, 110), ("int8", 100), ("fp8", 100)])
def test_runs_what_the_graph_says(make: Make, scheme: str | None, exactness: int) -> None:
    sample = make("mlp", scheme=scheme)
    x = np.random.default_rng(1).standard_normal((3, 5, 64)).astype(np.float32)
    with open_engine("onnxruntime", sample.spec, sample.path, threads=1) as engine:
        y = engine.run({"x": x})["y"]
    assert y.dtype == np.float32
    assert sqnr(y, reference(sample, x)) > exactness
    plain = reference(make("mlp"), x)
    assert scheme is None or 20 < sqnr(y, plain) < 50  # it does round


def test_inputs_of_other_float_types_are_cast_whatever_came_before(make: Make) -> None:
    sample = make("mlp")
    x = np.random.default_rng(1).standard_normal((3, 5, 64)).astype(np.float32)
    with open_engine("onnxruntime", sample.spec, sample.path, threads=1) as engine:
        want = engine.run({"x": x})["y"]
        for other in (">f4", "<f8", ">f8"):
            np.testing.assert_array_equal(engine.run({"x": x.astype(other)})["y"], want)
        half = x.astype(np.float16)
        np.testing.assert_array_equal(
            engine.run({"x": half})["y"], engine.run({"x": half.astype(np.float32)})["y"]
        )


def test_step_with_past_equals_one_long_step(make: Make) -> None:
    sample = make("step")
    ids = np.array([[3, 5, 7]], np.int64)
    cache = np.zeros((1, 4, 4, 32), np.float32)

    def inputs(ids: Array, key: Array, value: Array, mask: Array) -> dict[str, Array]:
        return {"input_ids": ids, "attention_mask": mask, "past_key.0": key, "past_value.0": value}

    hidden = np.zeros((1, 4), np.int64)  # the four empty cache rows
    with open_engine("onnxruntime", sample.spec, sample.path) as engine:
        seen = np.concatenate([hidden, np.ones((1, 3), np.int64)], 1)
        whole = engine.run(inputs(ids, cache, cache, seen), ["logits"])
        assert list(whole) == ["logits"]
        first = engine.run(inputs(ids[:, :2], cache, cache, seen[:, :6]))
        keys = np.concatenate([cache, first["key.0"]], 2)
        values = np.concatenate([cache, first["value.0"]], 2)
        last = engine.run(inputs(ids[:, 2:], keys, values, seen))
    np.testing.assert_allclose(last["logits"], whole["logits"], atol=1e-5)


def test_inputs_and_outputs_are_checked(make: Make) -> None:
    sample = make("mlp")
    with open_engine("onnxruntime", sample.spec, sample.path) as engine:
        good = np.zeros((1, 5, 64), np.float32)
        for bad in ({}, {"x": good, "z": good}, {"x": good[0]}, {"x": good[:, :3]}, {"x": good.repeat(9, 0)}):
            with pytest.raises(InputError):
                engine.run(bad)
        with pytest.raises(UsageError, match="no output 'z'"):
            engine.run({"x": good}, ["z"])
    with pytest.raises(UsageError, match="closed"):
        engine.run({"x": good})
    engine.close()


def test_int8_products_fuse_only_with_a_quantizer_of_their_own(make: Make) -> None:
    own = make("step", scheme="int8")
    assert sum(node.op == "MatMulIntegerToFloat" for node in optimized_graph(own.path).nodes) == 7
    check_expectations(read_onnxruntime(own.path), own.promised)
    shared = make("step", scheme="int8", own_q=False)
    with pytest.raises(BuildError, match=r"self_attn\.q_proj: promised int8, runs fp32xfp32 .*of its own"):
        check_expectations(read_onnxruntime(shared.path), shared.promised)


def test_fp8_is_reported_as_fp32_on_rounded_values(make: Make) -> None:
    report = read_onnxruntime(make("vit", scheme="fp8").path)
    assert report.precisions == {"fp32xfp32": 4}
    assert [g.node for g in report.fallbacks] == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert all("no FP8 kernels" in g.cause for g in report.fallbacks)
    assert report.fused_attention == len(report.attention) == 1


def test_stored_weights_are_those_of_the_optimised_graph(make: Make) -> None:
    for scheme, bits in (("fp8", 32), ("int8", 8), (None, 32)):
        report = read_onnxruntime(make("vit", scheme=scheme).path)
        assert {g.weight_bits for g in report.gemms} == {bits}
        assert report.weight_bytes < report.constant_bytes < report.weight_bytes + 16384
    (patch,) = read_onnxruntime(make("patches").path).convolutions
    assert (patch.precision, patch.kernel, patch.weight_bits) == ("fp32xfp32", "Conv", 32)


def test_damaged_and_foreign_files_are_refused(make: Make, tmp_path: Path) -> None:
    sample = make("mlp")
    other = make("vit").path
    with pytest.raises(IntegrityError, match="not the graph of component part"):
        open_engine("onnxruntime", make("step").spec, other)
    with pytest.raises(IntegrityError):
        open_engine("onnxruntime", sample.spec, tmp_path / "absent.onnx")
    weights = sample.path.with_suffix(".weights")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(IntegrityError, match="cannot load"):
        open_engine("onnxruntime", sample.spec, sample.path)
    half = make("mlp", dtype="bf16")
    with pytest.raises(CapabilityError, match="Use the fp32 graph"):
        open_engine("onnxruntime", half.spec, half.path)


def test_unknown_backend_and_missing_library(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = make("mlp")
    with pytest.raises(UsageError, match=r"onnxruntime \(pip install 'ivl-export\[cpu\]'\)"):
        open_engine("openvino", sample.spec, sample.path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(CapabilityError, match=r"pip install 'ivl-export\[cpu\]'"):
        open_engine("onnxruntime", sample.spec, sample.path)


def test_importing_loads_no_backend() -> None:
    modules = ["base", "onnx_graph", "onnxruntime.backend", "targets", "tensorrt.build", "tensorrt.library"]
    heavy = ["onnx", "onnxruntime", "torch", "tensorrt_rtx", "tensorrt"]
    code = "import sys\n" + "".join(f"import ivl_export.engines.{m}\n" for m in modules)
    code += (
        f"sys.exit(str([m for m in {heavy} if m in sys.modules]) if set({heavy}) & set(sys.modules) else 0)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_threads_follow_the_quota_of_the_container(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default; without a quota the choice is ONNX Runtime's."""
    sample = make("mlp")

    def threads(chosen: int | None) -> int:
        graph = read_graph(sample.path)
        session = make_session(sample.path, graph, threads=chosen, settings={})
        return int(session.get_session_options().intra_op_num_threads)

    monkeypatch.setattr(host, "cores", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert (threads(None), threads(7)) == (3, 7)
    monkeypatch.setattr(host, "cores", lambda: 64)
    assert threads(None) == 0
