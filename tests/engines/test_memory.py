"""Memory of a build: predicted from the graph, refused with the split that fits, near the measured use."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ivl_export.engines import memory
from ivl_export.engines.memory import (
    BLOCK_BYTES,
    LIBRARY_BYTES,
    Load,
    check_memory,
    graph_load,
)
from ivl_export.engines.onnx_graph import read_graph
from ivl_export.engines.products import find_products
from ivl_export.engines.tensorrt.build import build_engine
from ivl_export.errors import BuildError

if TYPE_CHECKING:
    from .conftest import Make


def test_a_load_is_counted_by_block() -> None:
    load = Load.of({"a.layers.1.fc": 5, "a.layers.0.fc": 3, "a.layers.1.norm": 1, "head": 7})
    assert load == Load((3, 6), 7)
    assert load.build_bytes == LIBRARY_BYTES + 16 + 2 * BLOCK_BYTES
    assert load.split(1) == load
    assert load.split(2) == Load((6,), 7)
    assert Load((1, 1, 1, 1, 1), 2).split(3).blocks == (1, 1)


def test_joined_weights_count_twice(make: Make) -> None:
    """q, k and v share their input, gate and up as well; other products are separate."""
    sample = make("step", dtype="bf16", scheme="fp8", own_q=False)
    graph = read_graph(sample.path)
    users = Counter(node.inputs[0] for node in graph.nodes if node.op == "MatMul")
    shared = {value for value, count in users.items() if count > 1}
    assert shared
    load = graph_load(graph)
    names = {node.name for node in graph.nodes if node.op == "MatMul" and node.inputs[0] in shared}
    weights = {p.weight for p in find_products(graph) if p.node in names and p.weight}
    assert len(weights) == 5, "q, k, v and gate, up"
    alone = graph_load(replace(graph, nodes=()))
    twice = sum(math.prod(graph.initializers[name][1]) for name in weights)  # fp8: a byte each
    assert sum(load.blocks) + load.rest == sum(alone.blocks) + alone.rest + twice


def test_too_little_memory_names_the_split_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load((10**9,) * 8, 10**8)
    monkeypatch.setattr(memory, "available_memory", lambda: load.build_bytes)
    check_memory("vision", load)
    monkeypatch.setattr(memory, "available_memory", lambda: load.split(3).build_bytes)
    with pytest.raises(BuildError, match="not enough memory to build the engine of vision") as caught:
        check_memory("vision", load)
    assert "-O split=3," in caught.value.fix
    with pytest.raises(BuildError) as caught:
        check_memory("vision.0", load, 2)
    assert "-O split=6," in caught.value.fix, "each of the two parts in three"
    assert "It takes 8.4 GB, 3.3 GB are free." in str(caught.value)
    monkeypatch.setattr(memory, "available_memory", lambda: 10**8)
    with pytest.raises(BuildError) as caught:
        check_memory("vision", load)
    assert "-O split" not in caught.value.fix
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    check_memory("vision", load)


def test_a_build_that_does_not_fit_writes_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    sample = make("step", dtype="bf16")
    monkeypatch.setattr(memory, "available_memory", lambda: 10**7)
    with pytest.raises(BuildError, match="not enough memory"):
        build_engine(sample.path, sample.spec, tmp_path / "new" / "x.engine")
    assert not (tmp_path / "new").exists()
