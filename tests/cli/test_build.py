"""``ivl-export build`` on the tiny golden model: dry runs, exit codes, and a build of one component."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ivl_export.bundle import Bundle
from ivl_export.bundle.manifest import EngineFile
from ivl_export.cli import main
from ivl_export.engines import memory
from ivl_export.engines.gpu import gpus
from ivl_export.models import shipped
from ivl_export.pipeline import accuracy_steps, graph_steps
from ivl_export.quantization.qdq import write_qdq
from ivl_export.runtime import InternVL

pytestmark = pytest.mark.numeric

COMPONENTS = ("vision", "qllama_query", "qllama_text", "qllama_step")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight images without captions."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_a_dry_run_says_what_would_be_done(
    tiny_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    args = ["build", "--model", str(tiny_model), "--calib", str(photos), "--out", str(tmp_path / "out")]
    assert main([*args, "--targets", "sm89,sm120", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    engines = [f"engine-{c}-{target}" for c in COMPONENTS for target in ("sm89", "sm120")]
    writes = {step["step"]: step.pop("writes_bytes") for step in plan["steps"]}
    memory = {step["step"]: step.pop("memory_bytes") for step in plan["steps"]}
    assert {step for step, size in memory.items() if size} == set(engines)
    takes_disk = {"calibrate", "weights", "quantise", *engines, "accuracy"}
    assert {step for step, size in writes.items() if size} == takes_disk
    assert plan["steps"] == [
        {"step": step, "action": "run"}
        for step in ("finite", "preprocess", "calibrate", "weights", "quantise",
                     *(f"graph-{c}" for c in COMPONENTS), "accuracy", *engines, "verification")
    ]  # fmt: skip
    assert plan["layers"] == {"bf16": 26, "fp8": 32}
    assert sum(" stays bf16: " in notice for notice in plan["notices"]) == 16
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.build").exists()


def test_a_bundle_is_named_after_model_and_precision(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "my model")
    assert main(["build", "--model", "my model", "--precision", "bf16", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "Would build bundles/my model-bf16" in captured.out
    assert captured.err.startswith("done open ")
    assert not (tmp_path / "bundles").exists()


@pytest.mark.parametrize(
    ("args", "code", "error"),
    [
        (["--precision", "fp4"], 2, "UsageError"),
        (["--precision", "missing.yaml"], 2, "UsageError"),
        (["--targets", "sm99"], 2, "UsageError"),
        (["--targets", "sm89,sm90"], 2, "UsageError"),
        (["--backend", "openvino"], 2, "UsageError"),
        (["--components", "decoder"], 2, "UsageError"),
        (["--calib-samples", "0"], 2, "UsageError"),
        (["--calib", "EMPTY"], 3, "InputError"),
        (["--calib", "CORRUPT"], 3, "InputError"),
        (["--calib", "missing"], 3, "InputError"),
        ([], 3, "InputError"),  # fp8 without calibration data
        (["--model", "missing"], 4, "CheckpointError"),
        (["--model", "EMPTY"], 4, "CheckpointError"),
        (["--out", "CORRUPT", "--precision", "bf16"], 6, "BuildError"),  # a folder, but not a bundle
    ],
)
def test_errors_have_their_exit_codes(
    args: list[str],
    code: int,
    error: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "a.png").write_bytes(b"no image")
    before = sorted(p.name for p in tmp_path.iterdir())
    places = {"EMPTY": tmp_path / "empty", "CORRUPT": tmp_path / "corrupt", "missing": tmp_path / "missing"}
    arguments = [str(places.get(a, a)) for a in args]
    if "--model" not in args:
        arguments += ["--model", str(tiny_model)]
    if "--out" not in args:
        arguments += ["--out", str(tmp_path / "out")]
    assert main(["build", *arguments]) == code
    captured = capsys.readouterr()
    assert "error: " in captured.err or "Invalid value" in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    assert main(["build", *arguments, "--json"]) == code
    captured = capsys.readouterr()
    said = json.loads(captured.err.splitlines()[-1])
    assert (said["error"], said["exit_code"]) == (error, code)
    assert said["what"]
    assert not captured.out
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # nothing half-written


def test_a_target_without_fp8(
    tiny_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    args = ["build", "--model", str(tiny_model), "--calib", str(photos), "--out", str(tmp_path / "out")]
    assert main([*args, "--targets", "sm86"]) == 5
    said = capsys.readouterr().err
    assert "no FP8" in said
    assert "fix: " in said


def test_without_arguments_it_is_nano_that_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped, "shipped_folder", lambda name: tmp_path / "absent" / "nano")
    assert main(["build"]) == 4
    assert "nano" in capsys.readouterr().err


def one_component(model: Path, photos: Path, out: Path, precision: str) -> list[str]:
    return ["build", "--model", str(model), "--calib", str(photos), "--out", str(out), "--json",
            "--precision", precision, "--components", "qllama_text", "--backend", "onnxruntime"]  # fmt: skip


@pytest.mark.slow
def test_one_component_is_built_reused_and_rebuilt(
    tiny_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """INT8 on the CPU: 28 promised products run as int8 x int8 in ONNX Runtime."""
    args = one_component(tiny_model, photos, tmp_path / "out", "int8")

    def build() -> tuple[dict[str, Any], list[str]]:
        assert main(args) == 0
        report = json.loads(capsys.readouterr().out)
        return report, [s["step"] for s in report["steps"] if not s["reused"]]

    every = ["finite", "preprocess", "calibrate", "weights", "quantise"]
    every += ["graph-qllama_text", "accuracy", "verification"]
    report, ran = build()
    assert ran == every
    proof = report["verification"]["onnxruntime-cpu"]["qllama_text"]
    assert proof["promised"] == proof["precisions"]["int8xint8"] == 4 * 7
    assert (proof["fallbacks"], proof["fused_attention"], proof["attention"]) == (0, 4, 4)
    accuracy = report["components"]["qllama_text"]["text_embed"]
    assert accuracy["cosine"] > 0.98
    assert 10 < accuracy["sqnr_db"] < 60  # it does round
    assert report["tasks"] == {}
    bundle = Bundle.open(tmp_path / "out", verify="hash")
    assert set(bundle.manifest.components) == {"qllama_text"}
    assert bundle.manifest.calibration is not None
    assert bundle.manifest.calibration.samples == 6

    manifest = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    again, ran = build()
    assert ran == []
    assert again["components"] == report["components"]
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == manifest

    (photos / "3.png").unlink()  # other calibration data: what does not follow from it is reused
    _, ran = build()
    assert ran == ["calibrate", "graph-qllama_text", "accuracy", "verification"]
    Bundle.open(tmp_path / "out", verify="hash")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "photos"}


@pytest.mark.slow
def test_what_memory_does_not_hold_is_simulated_and_said(
    tiny_model: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(accuracy_steps, "available_memory", lambda: 1000)
    assert main(one_component(tiny_model, photos, tmp_path / "out", "fp8")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["components_in"] == "simulated in torch"
    assert report["components"]["qllama_text"]["text_embed"]["cosine"] > 0.9
    assert "onnxruntime-cpu" not in report["verification"]
    (note,) = [n for n in report["notices"] if "were not read" in n]
    assert "qllama_text" in note
    assert "0.0 GB are free" in note


@pytest.mark.slow
def test_a_split_component_is_built_in_parts_and_run_as_one(
    tiny_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """INT8: four blocks, three parts of TensorRT-RTX and ONNX Runtime each, one proof."""
    pytest.importorskip("tensorrt_rtx")
    args = [*one_component(tiny_model, photos, tmp_path / "out", "int8"), "--split"]
    args[args.index("--backend") + 1] = "tensorrt-rtx"
    assert main([*args, "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    engines = [f"engine-qllama_text.{part}-sm89" for part in range(3)]
    assert [s["step"] for s in report["steps"] if s["step"].startswith("engine-")] == engines
    for name in ("onnxruntime-cpu", "tensorrt-rtx-sm89"):
        proof = report["verification"][name]["qllama_text"]
        assert proof["promised"] == proof["precisions"]["int8xint8"] == 4 * 7
        assert proof["attention"] == 4

    bundle = Bundle.open(tmp_path / "out", verify="hash")
    files = [e.file for e in bundle.engines("qllama_text", "tensorrt-rtx", "sm89")]
    assert files == [f"engines/tensorrt-rtx-sm89/qllama_text.{part}.engine" for part in range(3)]
    with InternVL.load(tmp_path / "out") as model:
        split = model.encode_text(["a red panda", "two"])
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "qllama_text, part 3 of 3" in capsys.readouterr().out

    assert main([*args, "3"]) == 0
    assert all(s["reused"] for s in json.loads(capsys.readouterr().out)["steps"])
    assert main([*args, "1"]) == 0
    assert not any(".engine" in f and ".0." in f for f in Bundle.open(tmp_path / "out").manifest.files)
    with InternVL.load(tmp_path / "out") as model:
        np.testing.assert_allclose(split, model.encode_text(["a red panda", "two"]), rtol=0, atol=1e-5)
    assert main([*args, "5"]) == 2
    assert "from 1 to 4" in capsys.readouterr().err


@pytest.mark.slow
def test_an_engine_of_an_earlier_build_is_taken_over(
    tiny_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into another bundle, with another shape, and not at all."""
    pytest.importorskip("tensorrt_rtx")

    def built(name: str, *more: str) -> tuple[dict[str, Any], EngineFile]:
        args = one_component(tiny_model, photos, tmp_path / name, "fp8")
        args[args.index("--backend") + 1] = "tensorrt-rtx"
        assert main([*args, *more]) == 0, capsys.readouterr().err
        capsys.readouterr()
        bundle = Bundle.open(tmp_path / name, verify="hash")
        record = bundle.receipt("build")["engine-qllama_text-sm89"]["data"]
        return record, bundle.engines("qllama_text", "tensorrt-rtx")[0]

    first, engine = built("one", "--shapes", "text=1:8:40")
    assert engine.built is not None
    assert engine.built.profiles == ({"batch": (1, 8, 128), "text": (1, 8, 40)},)
    assert (engine.built.dtype, engine.built.options) == ("bf16", {})
    again, _ = built("two", "--shapes", "text=1:8:40")
    assert "cached" not in first
    assert again == {**first, "cached": True}
    files = [tmp_path / name / engine.file for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    other, engine = built("three", "--preset", "latency", "-O", "weight-streaming")
    assert "cached" not in other
    assert engine.built is not None
    assert engine.built.profiles[0]["batch"] == (1, 1, 8)
    assert engine.built.options == {"weight_streaming": True}
    alone, _ = built("four", "--shapes", "text=1:8:40", "--no-cache")
    assert "cached" not in alone
    assert main(["doctor", "cache", "ls", "--kind", "engines", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["entries"]) == 2


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--preset", "fast"], 2, "latency"),
        (["--shapes", "batch=1:2"], 2, "--shapes"),
        (["--shapes", "batch=1:2:999"], 2, "1 to 128"),
        (["--shapes", "depth=1:2:3"], 2, "qllama_step.past"),
        (["-O", "optimization-level=9"], 2, "It takes 0 to 5"),
        (["-O", "workspace=lots"], 2, "-O workspace does not take 'lots'"),
        (["-O", "tiling=wild"], 2, "none, fast, moderate, full"),
        (["--engine-option", "tactic-sources=magic"], 2, "cublas-lt"),
        (["-O", "tilling=fast"], 2, "Did you mean -O tiling"),
        (["-O", "tiling=fast", "-O", "tiling=full"], 2, "given twice"),
        (["-O", "hardware-compatible=ampere+"], 5, "--targets sm80"),
        (["-O", "version-compatible"], 5, "--backend tensorrt"),
        (["-O", "refit"], 5, "machine with one"),
        (["-O", "strip-plan=true"], 5, "machine with one"),
        (["-O", "tactic-sources=cublas"], 5, "TensorRT 10"),
        (["--backend", "tensorrt"], 5, "ivl-export[gpu]"),
    ],
)
def test_engine_options_that_cannot_be_had_are_refused_first(
    args: list[str],
    code: int,
    said: str,
    tiny_model: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tensorrt_rtx")
    if gpus() or find_spec("tensorrt"):
        pytest.skip("this machine has what is refused here")
    arguments = ["build", "--model", str(tiny_model), "--calib", str(photos), "--out", str(tmp_path / "out")]
    assert main([*arguments, *args, "--dry-run", "--json"]) == code
    error = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert said in f"{error['what']} {error['why']} {error['fix']}"
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_said_before_anything_is_made(
    tiny_model: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(memory, "available_memory", lambda: 10**6)
    args = ["build", "--model", str(tiny_model), "--calib", str(photos), "--out", str(tmp_path / "out")]
    for more in ([], ["--dry-run"]):
        assert main([*args, *more]) == 6
        assert "not enough memory to build the engine of vision-sm89" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_full_disk_fails_and_the_next_build_goes_on(
    tiny_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file may grow over 300 kB: the tokenizer fits, the 16-bit weights do not."""
    args = one_component(tiny_model, photos, tmp_path / "out", "bf16")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        code = main(args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    captured = capsys.readouterr()
    error = json.loads(captured.err.splitlines()[-1])
    assert (code, error["exit_code"], error["error"]) == (6, 6, "BuildError")
    assert "base.safetensors" in error["what"] + error["why"]
    assert error["fix"]
    assert not captured.out
    assert {p.name for p in tmp_path.iterdir()} == {"photos", ".out.build"}
    assert main(args) == 0
    steps = {s["step"]: s["reused"] for s in json.loads(capsys.readouterr().out)["steps"]}
    assert steps == {"finite": True, "preprocess": True} | dict.fromkeys(
        ("weights", "graph-qllama_text", "verification", "accuracy"), False
    )
    assert {p.name for p in tmp_path.iterdir()} == {"photos", "out"}


@pytest.mark.slow
def test_a_broken_promise_fails_the_build(
    tiny_model: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The writer forgets a layer that was promised: what ONNX Runtime really runs gives it away."""
    layer = "qllama.model.layers.1.mlp.up_proj"

    def forgetful(model: Any, schemes: dict[str, str], *args: Any, **options: Any) -> dict[str, str]:
        others = {name: scheme for name, scheme in schemes.items() if name != layer}
        return {**write_qdq(model, others, *args, **options), layer: "int8"}

    monkeypatch.setattr(graph_steps, "write_qdq", forgetful)
    every = graph_steps.component_weights

    def with_layer(*args: Any) -> tuple[list[str], list[str]]:
        keys, layers = every(*args)
        return [*keys, f"{layer}.weight"], layers

    monkeypatch.setattr(graph_steps, "component_weights", with_layer)
    assert main(one_component(tiny_model, photos, tmp_path / "out", "int8")) == 6
    error = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert f"{layer}: promised int8, runs fp32xfp32" in error["why"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    args = one_component(tiny_model, photos, tmp_path / "out", "bf16")
    # The test run itself may be in the background, where shells ignore Ctrl-C for all children.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from ivl_export.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    build = subprocess.Popen([sys.executable, "-c", code, *args], stderr=subprocess.PIPE, text=True)
    steps, deadline = tmp_path / ".out.build" / "steps", time.monotonic() + 60
    while not (steps / "weights.json").exists() and build.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    build.send_signal(signal.SIGINT)  # in the middle of tracing, which takes seconds
    said = build.communicate(timeout=60)[1]
    assert build.returncode == 130, said
    assert "Interrupted. The same command resumes here." in said
    assert "Traceback" not in said
    assert {p.stem for p in steps.glob("*.json")} == {"finite", "preprocess", "weights"}
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.build" / "bundle").rglob("*.tmp"))
