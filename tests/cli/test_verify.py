"""``ivl-export verify`` on a sealed bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivl_export import cli
from ivl_export.bundle import Bundle, seal
from ivl_export.bundle.manifest import Calibration, Component, EngineFile, Manifest, Model, manifest_from_json
from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    keys = tuple(TensorSpec(f"key.{i}", "float", ("batch", 2, 8, 4)) for i in range(3))
    tokens = TensorSpec("tokens", "float", ("batch", 5, 8))
    spec = ComponentSpec("qllama_query", (tokens,), keys, (Axis("batch", 1, 2, 4),))
    engine = "engines/tensorrt-rtx-sm89/qllama_query.engine"
    files = {
        "onnx/qllama_query.fp32.onnx": "graph",
        engine: "e" * 3000,
        "receipts/accuracy.json": json.dumps(
            {
                "samples": 512,
                "budget": {"fp8": 1.0},
                "gemms": [{"node": f"gemm{i}"} for i in range(5)],
                "chained": {
                    "vision": {"tokens": {"cosine": 0.99912345, "sqnr_db": 31.5}},
                    "qllama_text": {"text_embed": {"cosine": 0.98, "sqnr_db": None}},
                },
                "layers": {f"layer{i}": {"cause": "unaligned", "loss": i} for i in range(50)},
            }
        ),
    }
    for rel, text in files.items():
        path = tmp_path / "staging" / rel
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    manifest = Manifest(
        model=Model("nano", "models/nano", {}, {}, 2.5, 1234567),
        recipe="fp8",
        compute_dtype="bf16",
        rules={},
        calibration=Calibration("c" * 64, 512, 3, True),
        components={"qllama_query": Component(spec, {"fp32": "onnx/qllama_query.fp32.onnx"})},
        engines=(EngineFile("qllama_query", "tensorrt-rtx", "sm89", engine, "1.7.1.116"),),
        tools={"onnx": "1.23.2"},
        receipts=("accuracy",),
    )
    return seal(tmp_path / "staging", manifest, tmp_path / "bundle")


def test_tables_show_what_the_bundle_says(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["verify", str(bundle.root), "--contents"]) == 0
    out = capsys.readouterr().out
    for text in (
        "nano, 1,234,567 parameters",
        "fp8 (bf16 elsewhere)",
        "512 synthetic samples, 3 skipped",
        "sha256 of every file: intact",
        "key.0 .. 2",
        "[batch, 2, 8, 4]",
        "batch 1..4 (tuned for 2)",
        "1.7.1.116",
        "2.9 KiB",
        "0.9991",
        "31.5",
        "chained qllama_text text_embed",
        "fp8 1",
        "5 entries",
        "layers layer39",
        "10 more with --json",
    ):
        assert text in out, text
    assert "layer40" not in out
    assert cli.main(["verify", str(bundle.root)]) == 0
    out = capsys.readouterr().out
    assert "1.7.1.116" in out
    assert "No verification receipt" in out
    assert "gemm0" not in out


def test_json_is_the_manifest_and_the_receipts(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(bundle.root), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert manifest_from_json(data["manifest"]) == bundle.manifest
    assert data["receipts"]["accuracy"]["samples"] == 512


def test_damage_is_exit_8(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    graph = bundle.root / "onnx/qllama_query.fp32.onnx"
    graph.write_text("grapH")
    assert cli.main(["verify", str(bundle.root), "--quick"]) == 0
    assert "size of every file: intact" in capsys.readouterr().out
    assert cli.main(["verify", str(bundle.root)]) == 8
    assert "qllama_query.fp32.onnx" in capsys.readouterr().err
