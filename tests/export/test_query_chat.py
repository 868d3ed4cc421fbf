"""Graphs of a chat model whose tower has queries: against their torch modules, cut in parts, as engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_export.engines.tensorrt.build import build_engine
from ivl_export.errors import UsageError
from ivl_export.export import trace
from ivl_export.export.binding import bind, save_graph
from ivl_export.export.graph import finish
from ivl_export.export.split import split_graph
from ivl_export.export.trace import export_component
from ivl_export.export.unquantized import Exported, export_plain
from ivl_export.export.weight_store import open_store
from ivl_export.models import ChatConfig, InternVLConfig, load_chat
from ivl_export.models.checkpoint import Checkpoint, open_checkpoint
from ivl_export.models.registry import component_module, component_of, component_spec
from ivl_export.profiles.cost.flops import graph_cost
from ivl_export.profiles.cost.roofline import component_macs
from ivl_export.tests.components import QUERY_CHAT_COMPONENTS

from .test_chat import close, run_torch, session

pytestmark = pytest.mark.numeric

SEEN = ("vision_chat", "query_chat")
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def checkpoint(query_chat: Path) -> Checkpoint:
    return open_checkpoint(query_chat)


@pytest.fixture(scope="module")
def exported(query_chat: Path, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_plain(checkpoint, tmp_path_factory.mktemp("out") / "onnx", dtype="fp32")


def config_of(checkpoint: Checkpoint, **changes: Any) -> ChatConfig:
    assert isinstance(checkpoint.model, ChatConfig)
    return replace(checkpoint.model, **changes)


def pixels_of(batch: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((batch, 3, 84, 84), np.float32)


@settings(max_examples=6, deadline=None)
@given(batch=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
@pytest.mark.slow
def test_graphs_are_the_modules_and_together_the_model(
    checkpoint: Checkpoint, exported: Exported, batch: int, seed: int
) -> None:
    assert tuple(exported.graphs) == QUERY_CHAT_COMPONENTS
    sessions = {name: session(exported.graphs[name]) for name in SEEN}
    pixels = {"pixel_values": pixels_of(batch, seed)}
    visual, tokens = sessions["vision_chat"].run(None, pixels)
    close([visual, tokens], run_torch("vision_chat", checkpoint, pixels))
    (queries,) = sessions["query_chat"].run(None, {"tokens": tokens})
    close([queries], run_torch("query_chat", checkpoint, {"tokens": tokens}))
    with torch.no_grad():
        whole = load_chat(checkpoint).visual_embeds(torch.from_numpy(pixels["pixel_values"])).numpy()
    close([np.concatenate([queries, visual], 1)], [whole])
    assert whole.shape == (batch, 6 + 36, 128)


@pytest.mark.slow
def test_graphs_over_the_checkpoints_own_bytes(query_chat: Path, exported: Exported) -> None:
    """Zero copy: nothing but the graphs is written, and they compute the same."""
    before = {path.name for path in query_chat.iterdir()}
    linked = export_plain(open_checkpoint(query_chat), query_chat, SEEN, "fp32", zero_copy=True)
    try:
        pixels = {"pixel_values": pixels_of(2)}
        got = session(linked.graphs["vision_chat"]).run(None, pixels)
        close(got, session(exported.graphs["vision_chat"]).run(None, pixels))
    finally:
        for path in linked.graphs.values():
            path.unlink()
    assert {path.name for path in query_chat.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("select_layer", [-1, -2, 0])
def test_repeated_blocks_equal_traced_ones(checkpoint: Checkpoint, select_layer: int) -> None:
    """Wherever the features leave the tower; the tokens are always the last block's."""
    config = config_of(checkpoint, select_layer=select_layer)
    spec = component_spec("vision_chat", config)

    def chain(model: ir.Model) -> list[Any]:
        model = model.clone()
        finish(model, spec)
        named = [(n.name, [v.producer().name for v in n.inputs if v and v.producer()]) for n in model.graph]  # type: ignore[union-attr]
        return [sorted(named), [v.producer().name for v in model.graph.outputs]]  # type: ignore[union-attr]

    repeated = trace.repeated_graph("vision_chat", config)
    assert chain(repeated) == chain(trace.traced_graph("vision_chat", config))


@pytest.mark.slow
def test_repeated_query_blocks_equal_traced_ones(checkpoint: Checkpoint) -> None:
    assert isinstance(checkpoint.model, ChatConfig)
    queries = checkpoint.model.queries
    assert queries is not None
    deep = replace(queries, qllama=replace(queries.qllama, num_hidden_layers=4))
    config = config_of(checkpoint, tower=deep)
    spec = component_spec("query_chat", config)

    def nodes(model: ir.Model) -> list[Any]:
        model = model.clone()
        finish(model, spec)
        return [(n.name, n.op_type, [str(v.shape) for v in n.outputs]) for n in model.graph]

    repeated = trace.repeated_graph("query_chat", config)
    assert nodes(repeated) == nodes(trace.traced_graph("query_chat", config))


@pytest.mark.parametrize(("name", "count"), [("vision_chat", 2), ("vision_chat", 3), ("query_chat", 2)])
def test_parts_one_after_another_are_the_component(
    checkpoint: Checkpoint, exported: Exported, tmp_path: Path, name: str, count: int
) -> None:
    """The cut before, after and at the selected layer; its projector is in one part only."""
    spec, store = component_spec(name, checkpoint.model), exported.store
    assert store is not None
    folder = tmp_path / "parts"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / store.name).write_bytes(store.read_bytes())
    values: dict[str, Array] = {"pixel_values": pixels_of(3)}
    if name == "query_chat":
        values = {"tokens": np.random.default_rng(0).standard_normal((3, 37, 64), np.float32)}
    want = session(exported.graphs[name]).run(None, values)
    holders = []
    place = component_of(name, checkpoint.model).place(checkpoint.model)
    for model, part in split_graph(export_component(name, checkpoint, "fp32"), spec, place, count):
        bind(model, open_store(folder / "weights" / store.name), folder)
        save_graph(model, folder / f"{part.name}.onnx")
        weights = onnx.load(folder / f"{part.name}.onnx", load_external_data=False).graph.initializer
        holders += [part.name] * any("mm_projector" in w.name for w in weights)
        run = session(folder / f"{part.name}.onnx")
        result = run.run(None, {t.name: values[t.name] for t in part.inputs})
        values |= dict(zip((t.name for t in part.outputs), result, strict=True))
    close([values[t.name] for t in spec.outputs], want)
    assert len(holders) == 1


@pytest.mark.parametrize("name", QUERY_CHAT_COMPONENTS)
def test_macs_of_the_graph_are_those_of_the_configuration(
    checkpoint: Checkpoint, exported: Exported, name: str
) -> None:
    spec = component_spec(name, checkpoint.model)
    sizes = {"batch": 3, "text": 5, "past": 7, "total": 12}
    sizes = {axis.name: sizes[axis.name] for axis in spec.axes}
    result = graph_cost(exported.graphs[name], spec, sizes)
    want = component_macs(name, config_of(checkpoint), sizes)
    assert {layer.layer: layer.macs for layer in result.layers} == want


def test_components_together_hold_just_the_model(checkpoint: Checkpoint) -> None:
    with torch.device("meta"):
        parts = [component_module(n, checkpoint.model).state_dict() for n in QUERY_CHAT_COMPONENTS]
    assert {key for part in parts for key in part} == set(load_chat(checkpoint).state_dict())
    assert sum(len(part) for part in parts) == len(load_chat(checkpoint).state_dict()), "nothing twice"


def test_contracts_of_the_published_sizes() -> None:
    config = ChatConfig(InternVLConfig())
    vision, query = (component_spec(name, config) for name in SEEN)
    assert [t.shape[1:] for t in vision.outputs] == [(576, 4096), (577, 3200)]
    assert vision.outputs[1] == query.inputs[0]
    assert [t.shape[1:] for t in query.outputs] == [(96, 4096)]
    for act in (component_spec, component_module):
        with pytest.raises(UsageError, match=r"Unknown component 'query_chat'.*vision_chat, decoder_embed"):
            act("query_chat", ChatConfig())


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEN)
def test_engines_build(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    export = export_plain(checkpoint, tmp_path / "out", [name], "bf16")
    engine = tmp_path / "engine"
    build_engine(export.graphs[name], component_spec(name, checkpoint.model), engine, target="sm89")
    assert engine.read_bytes().startswith(b"vtrt")
