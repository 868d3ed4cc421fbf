"""``ivl-export build`` of the shipped nano in FP8: killed, continued, proven, and used. One build in all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ivl_export.bundle import Bundle
from ivl_export.cli import main
from ivl_export.models.config import InternVLConfig
from ivl_export.synthetic import tasks
from ivl_export.synthetic.captions import caption
from ivl_export.synthetic.render import render
from ivl_export.synthetic.scenes import ALL_COMBINATIONS, Scene

pytestmark = [pytest.mark.slow, pytest.mark.numeric]
pytest.importorskip("tensorrt_rtx")

COMPONENTS = ("vision", "qllama_query", "qllama_text", "qllama_step", "qllama_itm")
BUILD = ("build", "--itm", "--features", "2")
BUDGETS = {"fp8": 0.010, "int8": 0.015}
RUN = """
import sys
from pathlib import Path
from ivl_export.cli import main
from ivl_export.export import trace
from ivl_export.tests.tools.traces import kept
trace.traced_graph = kept(Path(sys.argv[1]), trace.traced_graph)
sys.exit(main(sys.argv[2:]))
"""
# A verb, in a process that must not come to import torch or onnx.
LIGHT = """
import sys
from ivl_export.cli import main
code = main(sys.argv[1:])
heavy = sorted({"torch", "onnx", "onnxscript", "tensorrt_rtx"} & set(sys.modules))
sys.exit(f"imported {heavy}" if heavy else code)
"""


@dataclass(frozen=True)
class Killed:
    """A build that was stopped by SIGKILL: the steps recorded until then, and whether a bundle was there."""

    out: Path
    steps: frozenset[str]
    bundle_was_there: bool
    exit_code: int


@dataclass(frozen=True)
class Built:
    """The bundle of the resumed build, and its report."""

    root: Path
    report: dict[str, Any]
    bundle: Bundle


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IVL_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(tmp_path_factory.mktemp("work"))  # bundles/internvl-nano-fp8 is the default
        yield


@pytest.fixture(scope="module")
def killed(cache: Any, request: pytest.FixtureRequest) -> Killed:
    """``ivl-export build``, killed when the second graph is there."""
    out = Path("bundles/internvl-nano-fp8").absolute()
    steps = out.parent / ".internvl-nano-fp8.build" / "steps"
    command = [sys.executable, "-c", RUN, str(request.config.cache.mkdir("traces")), *BUILD]
    build = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (steps / "graph-qllama_query.json").exists():
        if build.poll() is not None or time.monotonic() > deadline:
            build.kill()
            pytest.fail(f"no second graph: {build.communicate()[1][-3000:]}")
        time.sleep(0.02)
    os.kill(build.pid, signal.SIGKILL)
    build.communicate()
    return Killed(out, frozenset(p.stem for p in steps.glob("*.json")), out.exists(), build.returncode)


def build_again() -> dict[str, Any]:
    said = StringIO()
    with redirect_stdout(said):
        code = main([*BUILD, "--json"])
    assert code == 0
    report: dict[str, Any] = json.loads(said.getvalue())
    return report


@pytest.fixture(scope="module")
def build(killed: Killed) -> Built:
    """The same command again."""
    report = build_again()
    return Built(killed.out, report, Bundle.open(killed.out, verify="hash"))


def layers(config: InternVLConfig) -> dict[str, int]:
    """How many linear layers of each component FP8 is for, counted from the config alone."""
    q = config.qllama
    crossing = len(range(0, q.num_hidden_layers, config.cross_attention_frequency))
    text = q.num_hidden_layers * 7  # q, k, v, o, gate, up, down
    vision = config.vision.num_hidden_layers * 4  # qkv, proj, fc1, fc2
    both = text + crossing * 4  # queries attend to the image too
    return dict(zip(COMPONENTS, (vision, both, text, text, both), strict=True))


def test_a_killed_build_leaves_no_bundle_and_goes_on(killed: Killed, build: Built) -> None:
    assert killed.exit_code == -signal.SIGKILL
    assert not killed.bundle_was_there
    count = {"finite", "preprocess", "calibrate", "weights", "quantise", "graph-vision", "graph-qllama_query"}
    assert count <= killed.steps
    steps = {step["step"]: step["reused"] for step in build.report["steps"]}
    assert {name for name, reused in steps.items() if reused} == killed.steps
    assert not steps["tasks"]
    assert [p.name for p in build.root.parent.iterdir()] == [build.root.name]


def test_every_promised_layer_runs_in_fp8(build: Built) -> None:
    expected = layers(InternVLConfig.from_published(build.bundle.manifest.model.config))
    engines = build.report["verification"]["tensorrt-rtx-sm89"]
    assert set(engines) == set(expected) == set(COMPONENTS)
    for component, proof in engines.items():
        assert proof["promised"] == proof["precisions"]["fp8xfp8"] == expected[component], component
        assert proof["fallbacks"] == 0
        assert proof["fused_attention"] == proof["attention"] > 0
    # ONNX Runtime multiplies the same rounded values in fp32, and that is said.
    for component, proof in build.report["verification"]["onnxruntime-cpu"].items():
        assert (proof["promised"], proof["fallbacks"]) == (expected[component], expected[component])
    assert all("no FP8 kernels" in cause for cause in build.report["fallback_causes"])


def test_accuracy_stays_within_budget(build: Built) -> None:
    scores = build.report["tasks"]
    assert set(scores) == {"fp32", "bf16", "fp8", "int8"}
    assert build.report["over_budget"] == ""
    for figure, full in scores["fp32"].items():
        assert full > 0.5, figure  # of a model that can do nothing, nothing is lost
        for precision, budget in BUDGETS.items():
            assert scores[precision][figure] >= full - budget - 1e-9, (precision, figure)
    assert scores["fp8"] != scores["fp32"] or scores["int8"] != scores["fp32"]  # rounding shows somewhere
    for outputs in build.report["components"].values():
        for figures in outputs.values():
            assert figures["cosine"] > 0.99
            assert 15 < figures["sqnr_db"] < 70  # close, and yet rounded


def test_the_bundle_tells_what_it_is(build: Built) -> None:
    manifest = build.bundle.manifest
    assert (manifest.recipe, manifest.compute_dtype, manifest.model.name) == ("fp8", "bf16", "nano")
    assert all(manifest.compute_dtype in part.graphs for part in manifest.components.values())
    assert manifest.calibration is not None
    assert (manifest.calibration.samples, manifest.calibration.synthetic) == (256, True)
    assert {(e.component, e.backend, e.target) for e in manifest.engines} == {
        (c, *where) for c in COMPONENTS for where in (("onnxruntime", "cpu"), ("tensorrt-rtx", "sm89"))
    }
    assert {"accuracy", "verification", "tasks", "build"} <= set(manifest.receipts)
    assert str(Path.home()) not in manifest.dumps()
    stored = (build.root / "onnx" / "weights" / "quantised.safetensors").stat().st_size
    values = 0
    for step in ("quantised", "base"):
        path = build.root / "onnx" / "weights" / f"{step}.safetensors"
        header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
        values += sum(1 for name, t in header.items() if name != "__metadata__" and t["dtype"] == "F8_E4M3")
    assert values == layers(InternVLConfig.from_published(manifest.model.config))["qllama_query"] + (
        4 * InternVLConfig.from_published(manifest.model.config).vision.num_hidden_layers
    )
    assert stored < build.bundle.manifest.model.parameters * 1.2  # a byte a weight and some scales


def test_a_second_build_reuses_every_step(build: Built) -> None:
    before = {p: p.stat().st_mtime_ns for p in build.root.rglob("*")}
    report = build_again()
    assert all(step["reused"] for step in report["steps"])
    assert report["tasks"] == build.report["tasks"]
    assert {p: p.stat().st_mtime_ns for p in build.root.rglob("*")} == before
    assert [p.name for p in build.root.parent.iterdir()] == [build.root.name]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Scene]]:
    """Sixteen held-out scenes of single shapes as PNG files, and their scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    result = tasks.eval_scenes(9, 16, 7, kind="single", distinct=True)
    for i, scene in enumerate(result):
        Image.fromarray(render(scene)).save(folder / f"{i:02}.png")
    return folder, result


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from skimage import data

    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "coffee", "chelsea", "camera"):  # the last has one channel
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.jpg", quality=90)
    return folder


def use(*args: str | Path) -> Any:
    """The JSON that a verb prints, in a process that must not import torch."""
    command = [sys.executable, "-c", LIGHT, *map(str, args), "--json"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_embed(build: Built, photographs: Path, scenes: tuple[Path, list[Scene]]) -> None:
    size = build.bundle.manifest.model.config["clip_embed_dim"]
    for mode in ("C", "G"):
        out = use("run", "embed", build.root, photographs, scenes[0], "--text", "a red ring", "--mode", mode)
        assert out["shape"] == [4 + 16 + 1, size]
        assert all(len(item["embedding"]) == size and item["norm"] > 0.1 for item in out["items"])
        assert len({tuple(item["embedding"]) for item in out["items"]}) == 21
        assert out["skipped"] == []


def test_classify(build: Built, photographs: Path, scenes: tuple[Path, list[Scene]]) -> None:
    folder, shown = scenes
    labels = ",".join(f"{color} {shape}" for shape, color in ALL_COMBINATIONS)
    ask = ["--labels", labels, "--template", "a small {}", "--template", "a large {}", "--mode", "G"]
    out = use("run", "classify", build.root, folder, *ask)
    truth = [f"{s.objects[0].color} {s.objects[0].shape}" for s in shown]
    right = sum(item["label"] == want for item, want in zip(out["items"], truth, strict=True))
    assert right >= 12, [(i["label"], want) for i, want in zip(out["items"], truth, strict=True)]
    out = use("run", "classify", build.root, photographs, *ask, "--top", "5")
    for item in out["items"]:
        assert [p["label"] in labels for p in item["top"]] == [True] * 5
        assert 0 < sum(p["probability"] for p in item["top"]) <= 1 + 1e-6


def test_retrieve(build: Built, photographs: Path, scenes: tuple[Path, list[Scene]]) -> None:
    folder, shown = scenes
    questions = [text for scene in shown for text in ("--query", caption(scene))]
    out = use("run", "retrieve", build.root, folder, photographs, *questions, "--top", "1")
    assert out["images"] == 20
    results = [Path(item["results"][0]["file"]).name for item in out["items"]]
    right = sum(name == f"{i:02}.png" for i, name in enumerate(results))
    assert right >= 10, results
    again = use("run", "retrieve", build.root, folder, photographs, *questions, "--top", "1", "--rerank", "4")
    best = [Path(item["results"][0]["file"]).name for item in again["items"]]
    assert sum(name == f"{i:02}.png" for i, name in enumerate(best)) >= right, best


def test_features(build: Built, scenes: tuple[Path, list[Scene]], tmp_path: Path) -> None:
    request = ("--blocks", "2,-1", "--out", tmp_path / "f.safetensors")
    out = use("run", "features", build.root, scenes[0], *request)
    config = InternVLConfig.from_published(build.bundle.manifest.model.config).vision
    shape = [16, config.num_tokens, config.hidden_size]
    assert out["shapes"] == {"features.2": shape, f"features.{config.num_hidden_layers}": shape}


def test_caption(build: Built, photographs: Path, scenes: tuple[Path, list[Scene]]) -> None:
    folder, shown = scenes
    out = use("run", "caption", build.root, folder)
    said = [item["caption"].strip() for item in out["items"]]
    truth = [caption(scene) for scene in shown]
    assert sum(a == b for a, b in zip(said, truth, strict=True)) >= 9, list(zip(said, truth, strict=True))
    chinese = use("run", "caption", build.root, folder / "00.png", "--prompt", "中文描述:")
    assert any("\u4e00" <= c <= "\u9fff" for c in chinese["items"][0]["caption"])
    out = use("run", "caption", build.root, photographs, "--beams", "3")
    assert all(item["caption"].strip() for item in out["items"])  # of scenes only: right for no photograph


def test_verify_and_profile(build: Built) -> None:
    out = use("verify", build.root)
    assert out["manifest"]["recipe"] == "fp8"
    assert set(out["receipts"]) == set(build.bundle.manifest.receipts)
    said = StringIO()
    with redirect_stdout(said):
        line = ["profile", str(build.root), "--batch", "1", "--seconds", "0.2", "--no-ceilings", "--json"]
        assert main(line) == 0
    receipt = json.loads(said.getvalue())
    cases = {case["name"]: case["measurement"]["summary"] for case in receipt["cases"]}
    assert set(COMPONENTS) < set(cases)
    for summary in cases.values():
        assert 0 < summary["p50_ms"] <= summary["p90_ms"] <= summary["p99_ms"]
    assert len(receipt["costs"]) >= len(COMPONENTS)
