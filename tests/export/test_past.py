"""Attention in two pieces over past and new positions equals the one over both merge_reports, which copies
them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_export.bundle.spec import ComponentSpec
from ivl_export.export.binding import bind, save_graph, unbound
from ivl_export.export.cached_attention import separate_past
from ivl_export.export.split import split_graph
from ivl_export.export.trace import export_component
from ivl_export.export.weight_store import open_store
from ivl_export.export.weights import write_store
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.registry import component_of, component_spec

pytestmark = pytest.mark.numeric

GOLDENS = Path(__file__).parents[1] / "goldens"
STEPS = {"tiny": "qllama_step", "chat": "decoder"}


class Both:
    """A step's graph with its attention whole and in pieces."""

    def __init__(self, which: str, folder: Path) -> None:
        checkpoint, name = open_checkpoint(GOLDENS / which), STEPS[which]
        self.spec: ComponentSpec = component_spec(name, checkpoint.model)
        self.place = component_of(name, checkpoint.model).place(checkpoint.model)
        self.vocab = self.spec.outputs[0].shape[1]
        self.whole, self.pieces = (export_component(name, checkpoint, "fp32") for _ in range(2))
        self.count = separate_past(self.pieces)
        write_store(checkpoint, unbound(self.whole), folder / "store.safetensors", "fp32")
        self.sessions = []
        for kind, model in (("whole", self.whole), ("pieces", self.pieces)):
            bind(model, open_store(folder / "store.safetensors"), folder)
            save_graph(model, folder / f"{kind}.onnx")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            self.sessions.append(onnxruntime.InferenceSession(folder / f"{kind}.onnx", options))

    def feeds(self, batch: int, past: int, text: int, seed: int) -> dict[str, Any]:
        sizes = {"batch": batch, "past": past, "text": text, "total": past + text}
        rng = np.random.default_rng(seed)
        calls = {}
        for tensor in self.spec.inputs:
            shape = [d if isinstance(d, int) else sizes[d] for d in tensor.shape]
            calls[tensor.name] = (
                rng.integers(0, 100, shape)
                if tensor.dtype == "int64"
                else rng.standard_normal(shape).astype(np.float32)
            )
        calls["attention_mask"] = rng.integers(0, 2, (batch, past + text))
        return calls


@pytest.fixture(scope="module", params=list(STEPS))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(request.param, tmp_path_factory.mktemp(request.param))


@settings(max_examples=25)
@given(batch=st.integers(1, 4), past=st.integers(1, 40), text=st.integers(1, 9), seed=st.integers(0, 99))
@pytest.mark.slow
def test_pieces_equal_the_whole(both: Both, batch: int, past: int, text: int, seed: int) -> None:
    feeds = both.feeds(batch, past, text, seed)
    for want, got in zip(*(session.run(None, feeds) for session in both.sessions), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_what_is_hidden_is_not_read(both: Both) -> None:
    feeds = both.feeds(2, 7, 1, 0)
    feeds["attention_mask"][1, :7] = 0  # a row with nothing but itself
    want = both.sessions[1].run(None, feeds)
    hidden = feeds["attention_mask"][:, None, :7, None] == 0
    other = {k: np.where(hidden, 9.0, v).astype(np.float32) if "past" in k else v for k, v in feeds.items()}
    for a, b in zip(want, both.sessions[1].run(None, other), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


def test_no_cache_is_joined(both: Both) -> None:
    layers = sum(t.name.startswith("past_key") for t in both.spec.inputs)
    assert both.count == layers
    ops = Counter(node.op_type for node in both.pieces.graph)
    assert "Attention" not in ops
    past = {value for value in both.pieces.graph.inputs if str(value.name).startswith("past_")}
    assert {node.op_type for value in past for node, _ in value.uses()} <= {"Transpose", "MatMul", "Shape"}
    assert separate_past(both.pieces) == 0, "nothing is left"


def test_parts_read_their_own_inputs(both: Both) -> None:
    for model, spec in split_graph(both.pieces, both.spec, both.place, 2):
        assert {v.name for v in model.graph.inputs} == {t.name for t in spec.inputs}
        assert "positions" in {t.name for t in spec.inputs}


def test_a_component_without_a_cache_stays(tmp_path: Path) -> None:
    model = export_component("qllama_text", open_checkpoint(GOLDENS / "tiny"), "fp32")
    before = [node.name for node in model.graph]
    assert separate_past(model) == 0
    assert [node.name for node in model.graph] == before
