"""Disk that a build takes is said, and checked, before anything runs."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from ivl_export.engines.memory import graph_load
from ivl_export.engines.onnx_graph import read_graph
from ivl_export.errors import BuildError
from ivl_export.pipeline import graph_steps
from ivl_export.pipeline.config import BuildConfig
from ivl_export.pipeline.graph_steps import build_load, stored_bytes
from ivl_export.pipeline.plan import plan_build
from ivl_export.pipeline.run import HEADROOM, build_steps, check_disk
from ivl_export.pipeline.workspace import Step
from ivl_export.quantization.ranges import ActivationRanges

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("precision", ["fp8", "int8", "fp16"])
def test_stores_have_the_size_that_was_predicted(precision: str, tmp_path: Path) -> None:
    plan = plan_build(BuildConfig(out=tmp_path / "out", precision=precision, calib_samples=4))
    source = graph_steps.GraphSource(plan.checkpoint, plan.recipe, plan.layers, None)
    stored, quantised = stored_bytes(source, plan.components)
    keys, layers = graph_steps.component_weights(source, plan.components)
    graph_steps.write_base_store(source, keys, tmp_path)
    header = 1 << 16
    assert 0 <= (tmp_path / graph_steps.BASE_STORE).stat().st_size - stored < header
    assert bool(layers) == bool(quantised) == plan.recipe.quantises
    if layers:
        graph_steps.write_quantised_store(source, layers, tmp_path)
        assert 0 <= (tmp_path / graph_steps.LOW_STORE).stat().st_size - quantised < header
    planned = {step.name: step.writes for step in build_steps(plan)}
    assert planned["weights"] == stored
    assert planned.get("quantise", 0) == quantised


def test_too_little_disk_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(name: str, writes: int) -> Step:
        return Step(name, {}, lambda space, advanced: ([], {}), writes=writes)

    plan = [step("weights", 3 * 10**9), step("engine-vision-sm89", 6 * 10**9), step("verification", 0)]
    out = tmp_path / "not" / "there" / "yet"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, 10**10))
    check_disk(out, plan)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, 9 * 10**9))
    with pytest.raises(BuildError, match="not enough disk") as error:
        check_disk(out, plan)
    assert "9.3 GB, 9.0 GB are free" in error.value.why
    assert "engine-vision-sm89 (6.0 GB), weights (3.0 GB)." in error.value.why
    check_disk(out, plan[:1])  # existing files take no more
    assert HEADROOM < 10**9


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_memory_of_an_engine_is_known_before_its_graph(precision: str, tmp_path: Path) -> None:
    plan = plan_build(BuildConfig(out=tmp_path / "out", precision=precision, calib_samples=4, split=2))
    planned = {step.name: step.load for step in build_steps(plan)}
    source = graph_steps.GraphSource(plan.checkpoint, plan.recipe, plan.layers, None)
    layers = {c: graph_steps.component_weights(source, [c])[1] for c in plan.components}
    if plan.recipe.quantises:
        amax = {c: dict.fromkeys(names, 1.0) for c, names in layers.items()}
        source = replace(source, ranges=ActivationRanges(amax, "max", 1, "", True, 0, ""))
    graph_steps.write_base_store(source, graph_steps.component_weights(source, plan.components)[0], tmp_path)
    graph_steps.write_quantised_store(
        source, graph_steps.component_weights(source, plan.components)[1], tmp_path
    )
    for component in ("vision", "qllama_query"):
        graph_steps.write_graph(source, component, tmp_path, "bf16", "tensorrt")
        result = graph_load(read_graph(tmp_path / graph_steps.graph_path(component, "bf16")))
        ours = build_load(source, component)
        assert len(ours.blocks) == len(result.blocks)
        # The store holds the scales of both graphs, which weigh at this size.
        assert sum(ours.blocks) == pytest.approx(sum(result.blocks), rel=0.05)
        assert ours.rest == pytest.approx(result.rest, rel=0.05)
        if "tensorrt-rtx" in plan.backends:
            assert planned[f"engine-{component}.1-sm89"] == ours.split(2)
