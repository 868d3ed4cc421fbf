"""Calls within a GPU's memory: which are planned, and with what; no GPU is needed to plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec
from ivl_export.engines.chain import ChainedEngine
from ivl_export.profiles.measure import device_timing as resident
from ivl_export.profiles.measure.cases import GRAPHS, Task
from ivl_export.profiles.measure.device_timing import resident_tasks, with_graphs

pytest.importorskip("torch")
SPEC = ComponentSpec(
    "vision",
    (TensorSpec("x", "float", ("batch",)),),
    (TensorSpec("y", "float", ("batch",)),),
    (Axis("batch", 1, 1, 4),),
)


class Device:
    """An engine on a device that is called one; ``graphs`` says that its calls are replayed."""

    device = "cuda:0"
    spec = SPEC

    def __init__(self, graphs: bool = False) -> None:
        self.graphs = graphs

    def run_tensors(self, inputs: dict[str, Any]) -> bool:
        return self.graphs


class Graphed(Device):
    def with_graphs(self) -> Device:
        return Device(True)


def plan(engine: Any) -> list[Task]:
    task = Task.component("component", "vision", "images", {"batch": 1}, "host to host", lambda: lambda: None)
    components = SimpleNamespace(open=lambda name: engine)
    return resident_tasks(task, cast(Any, components), lambda: {"x": np.ones(1, np.float32)})


def test_calls_come_with_and_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "has_gpu", lambda: True)
    monkeypatch.setattr(resident, "as_tensor", lambda array, device: array)
    plain, replayed = plan(Graphed())
    assert (plain.backend, replayed.backend) == ("", GRAPHS)
    assert (plain.prepare()(), replayed.prepare()()) == (False, True)
    assert plain.timer is replayed.timer is not None
    assert "CUDA graph" in replayed.boundary
    assert replayed.of(f"tensorrt{replayed.backend}", "fp8").backend == "tensorrt, CUDA graph"
    assert len(plan(Device())) == 1, "a backend without graphs"
    monkeypatch.setattr(resident, "has_gpu", lambda: False)
    assert plan(Graphed()) == []


def test_all_parts_of_a_chain_are_replayed_or_none() -> None:
    chain = with_graphs(ChainedEngine(SPEC, cast(Any, [Graphed(), Graphed()])))
    assert isinstance(chain, ChainedEngine)
    assert all(cast(Any, part).graphs for part in chain.parts)
    assert with_graphs(ChainedEngine(SPEC, cast(Any, [Graphed(), Device()]))) is None
