"""How engines enter the manifest and the proof."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ivl_export.bundle.manifest import Built
from ivl_export.bundle.spec import ComponentSpec
from ivl_export.files.json import decode
from ivl_export.pipeline import engine_steps
from ivl_export.pipeline.manifest import engine_file
from ivl_export.pipeline.workspace import Record

BUILT = Built("bf16", ({"batch": (1, 8, 128)},), {"tactic_sources": []}, "NVIDIA H100", "sm90")
DATA = {"component": "vision", "part": 0, "backend": "tensorrt", "target": "native", "release": "11.4",
        "built": asdict(BUILT), "size": 5}  # fmt: skip
RECORD = Record("0" * 64, {"engines/tensorrt-native/vision.engine": 5}, 1.0, DATA)


def test_a_record_says_the_same_before_and_after_it_was_json() -> None:
    again = decode(Record, json.loads(json.dumps(asdict(RECORD))), what="The record")
    assert engine_file(RECORD) == engine_file(again)
    assert engine_file(again).built == BUILT


def test_native_engines_are_proved_by_their_inspector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the GPU they were built for; the library is not here, so what opens them is put in its place."""
    requests: dict[str, Any] = {}

    def opened(spec: ComponentSpec, path: Path, **options: Any) -> Any:
        requests.update(path=path, **options)
        return nullcontext(SimpleNamespace(layers=lambda: "[1]"))

    monkeypatch.setattr(engine_steps, "open_tensorrt", opened)
    monkeypatch.setattr(engine_steps, "read_inspector", lambda info, graph: (info.read_text(), graph.name))
    plan: Any = SimpleNamespace(recipe=SimpleNamespace(base="bf16"))
    space: Any = SimpleNamespace(staging_dir=tmp_path, records={"engine-vision-native": RECORD})
    spec = ComponentSpec("vision", (), (), ())
    result: Any = engine_steps._engine_report(plan, space, spec, "tensorrt", "native")
    assert (tmp_path / "receipts" / "layers-tensorrt-native-vision.json").read_text() == "[1]"
    assert result == ("[1]", "vision.bf16.onnx")
    assert requests["path"] == tmp_path / "engines" / "tensorrt-native" / "vision.engine"
    assert requests["record"] == engine_file(RECORD)
