from __future__ import annotations

import importlib
import json
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest

from ivl_export.engines.targets import TARGETS, TENSORRT_ONLY, check_types, parse_targets
from ivl_export.engines.tensorrt.build import NATIVE, build_engine
from ivl_export.engines.tensorrt.options import BuildOptions
from ivl_export.errors import BuildError, CapabilityError, IntegrityError, IvlError, UsageError
from ivl_export.verify.program import read_programs

if TYPE_CHECKING:
    from ..conftest import Make


def test_targets_are_parsed_in_order_and_once() -> None:
    assert [t.name for t in parse_targets("sm120, SM89+sm120")] == ["sm120", "sm89"]
    for bad in ("sm90", "sm100", "sm70", "", "sm89,,sm120"):
        with pytest.raises(UsageError) as caught:
            parse_targets(bad)
        assert all(f"{t.name} ({t.gpus})" in caught.value.why for t in TARGETS.values()), bad
        assert ("--backend tensorrt" in caught.value.fix) == (bad in TENSORRT_ONLY)
        assert all(f"{bad} ({gpus})" in caught.value.what for n, gpus in TENSORRT_ONLY.items() if n == bad)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("kind", "name", "able"), [("fp8", "sm86", "sm89 (L4"), ("bf16", "sm75", "sm80 (A100")]
)
def test_a_type_that_a_target_lacks_is_refused(kind: str, name: str, able: str) -> None:
    with pytest.raises(CapabilityError, match=f"no {kind.upper()}") as caught:
        check_types("vision", frozenset({kind, "int8"}), parse_targets(f"sm120+{name}"))
    assert able in caught.value.fix
    assert name in caught.value.what
    check_types("vision", frozenset({"int8", "fp16"}), tuple(TARGETS.values()))


def test_an_engine_is_built_and_recorded(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sample = make("step", dtype="bf16", scheme="fp8")
    out = tmp_path / "engines" / "tensorrt-rtx-sm89" / "step.engine"
    record = build_engine(sample.path, sample.spec, out)
    assert (record.component, record.backend, record.target) == ("part", "tensorrt-rtx", "sm89")
    assert record.file == "step.engine"
    assert record.size == out.stat().st_size > 100_000
    assert record.seconds > 0
    assert record.peak_rss > record.size
    assert record.release == importlib.import_module("tensorrt_rtx").__version__
    assert record.to_json()["target"] == "sm89"
    assert [p.name for p in out.parent.iterdir()] == ["step.engine"]


def test_several_targets_and_profiles_share_a_file(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sample = make("step", dtype="bf16", scheme="int8")
    decode = {"text": (1, 1, 1), "total": (5, 9, 13)}
    options = BuildOptions(optimization_level=2, workspace_bytes=1 << 28)
    out = tmp_path / "both.engine"
    record = build_engine(
        sample.path, sample.spec, out, target="sm120,sm89", options=options, profiles=({}, decode)
    )
    assert record.target == "sm120+sm89"
    assert record.built.dtype == "bf16"
    assert [p["text"] for p in record.built.profiles] == [(1, 1, 4), (1, 1, 1)]
    assert record.built.options == {"optimization_level": 2, "workspace_bytes": 1 << 28}
    assert len(read_programs(out)) == 2


@pytest.mark.parametrize(
    ("target", "error"), [("sm86", CapabilityError), ("sm99", UsageError), (NATIVE, UsageError)]
)
def test_targets_are_refused_before_anything_is_written(
    make: Make, tmp_path: Path, target: str, error: type[IvlError]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    sample = make("mlp", dtype="bf16", scheme="fp8")
    with pytest.raises(error):
        build_engine(sample.path, sample.spec, tmp_path / "new" / "x.engine", target=target)
    assert not (tmp_path / "new").exists()


def test_a_refused_node_is_named_with_the_reason(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sample = make("mlp", dtype="bf16")
    model = onnx.load(sample.path, load_external_data=False)
    model.graph.node[2].op_type = "Frobnicate"
    onnx.save(model, sample.path)
    with pytest.raises(BuildError, match=r"Node 2 'act' \(Frobnicate\): .*Plugin not found") as caught:
        build_engine(sample.path, sample.spec, tmp_path / "x.engine")
    assert "cudaError" not in str(caught.value)
    assert not (tmp_path / "x.engine").exists()


def test_a_network_that_cannot_be_compiled_gives_the_builders_reason(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sample = make("mlp", dtype="bf16", scheme="int8")
    model = onnx.load(sample.path)
    zero = next(i for i in model.graph.initializer if i.name == "fc1.input_zero")
    zero.raw_data = b"\x05"
    onnx.save(model, sample.path)
    with pytest.raises(BuildError, match=r"(?i)zero") as caught:
        build_engine(sample.path, sample.spec, tmp_path / "x.engine")
    assert "cudaError" not in str(caught.value)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".onnx", ".weights"]


def test_graph_and_spec_must_agree(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sample = make("step", dtype="bf16")
    with pytest.raises(BuildError, match="not the graph of component part"):
        build_engine(sample.path, replace(sample.spec, outputs=()), tmp_path / "x.engine")
    with pytest.raises(IntegrityError, match="no ONNX graph"):
        build_engine(tmp_path / "absent.onnx", sample.spec, tmp_path / "x.engine")


def test_a_full_disk_leaves_the_old_engine(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sample = make("mlp", dtype="bf16")
    out = tmp_path / "x.engine"
    out.write_bytes(b"old")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(BuildError, match="could not be written") as caught:
            build_engine(sample.path, sample.spec, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "another disk" in caught.value.fix
    assert out.read_bytes() == b"old"
    assert not list(tmp_path.glob(".*tmp"))


def test_a_missing_library_names_the_line_that_installs_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = make("mlp")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(CapabilityError, match="pip install tensorrt-rtx"):
        build_engine(sample.path, sample.spec, tmp_path / "x.engine")
    with pytest.raises(UsageError, match="Known: tensorrt-rtx, tensorrt"):
        build_engine(sample.path, sample.spec, tmp_path / "x.engine", backend="openvino")


def test_a_killed_build_leaves_no_engine(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sample = make("mlp", dtype="bf16")
    code = f"""
import json, os, signal
from pathlib import Path
from ivl_export.engines.tensorrt import network as trt_network
from ivl_export.engines.tensorrt.build import build_engine
from ivl_export.bundle.spec import ComponentSpec
from ivl_export.files.json import decode
write = trt_network.write_engine
def half(parsed, config, out):
    out.write(b"half"); out.flush(); os.kill(os.getpid(), signal.SIGKILL)
trt_network.write_engine = half
spec = decode(ComponentSpec, json.loads({json.dumps(sample.spec.to_json())!r}), what="spec")
build_engine(Path({str(sample.path)!r}), spec, Path({str(tmp_path / "x.engine")!r}))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (tmp_path / "x.engine").exists()
    record = build_engine(sample.path, sample.spec, tmp_path / "x.engine")
    assert (tmp_path / "x.engine").stat().st_size == record.size
    assert not list(tmp_path.glob(".*tmp"))
