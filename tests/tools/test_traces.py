"""Stored traces equal new ones, and a changed input is traced again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from ivl_export.export import trace
from ivl_export.models import InternVLConfig, QLlamaConfig, VisionConfig
from ivl_export.models.registry import ModelConfig
from ivl_export.tests.tools import traces

pytestmark = pytest.mark.slow

CONFIG = InternVLConfig(
    VisionConfig(32, 1, 2, 64, 28, 14), QLlamaConfig(32, 1, 2, 64, vocab_size=40), 16, 2, num_query_token=3
)


@pytest.mark.parametrize("name", ["vision", "qllama_step"])
def test_a_kept_graph_is_the_traced_one(name: str, tmp_path: Path) -> None:
    calls: list[ir.Model] = []

    def traced(name: str, config: ModelConfig) -> ir.Model:
        calls.append(trace.traced_graph(name, config))
        return calls[-1]

    stored = traces.kept(tmp_path, traced)
    first, second = stored(name, CONFIG), stored(name, CONFIG)
    assert len(calls) == 1
    for number, model in enumerate((*calls, first, second)):
        traces.store(model, tmp_path / f"{number}.bin")
    one, *others = (path.read_bytes() for path in sorted(tmp_path.glob("*.bin")))
    assert others == [one, one]
    assert list(first.graph.initializers) == list(calls[0].graph.initializers)
    assert all(value.const_value is None for value in first.graph.initializers.values())
    assert [v.name for v in first.graph.inputs] == [v.name for v in calls[0].graph.inputs]


def test_another_config_or_source_is_another_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, ModelConfig]] = []
    empty = ir.Model(ir.Graph([], [], nodes=[], name="g", opset_imports={"": 24}), ir_version=10)

    def traced(name: str, config: ModelConfig) -> ir.Model:
        heard.append((name, config))
        return empty

    stored = traces.kept(tmp_path, traced)
    other = replace(CONFIG, clip_embed_dim=8)
    for name, config in (("vision", CONFIG), ("vision", other), ("qllama_text", CONFIG), ("vision", CONFIG)):
        stored(name, config)
    assert heard == [("vision", CONFIG), ("vision", other), ("qllama_text", CONFIG)]
    monkeypatch.setattr(traces, "sources", lambda: "changed")
    stored("vision", CONFIG)
    assert heard[3:] == [("vision", CONFIG)]
    assert [path.name for path in tmp_path.iterdir()] == ["changed"], "what is out of date goes"
