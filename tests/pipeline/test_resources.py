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
from ivl_export.pipeline import graphs, resources
from ivl_export.pipeline.job import Job
from ivl_export.pipeline.request import Request
from ivl_export.pipeline.resources import check_disk, stored_bytes
from ivl_export.pipeline.step import Step
from ivl_export.pipeline.steps import steps
from ivl_export.quantization.ranges import Scales

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("precision", ["fp8", "int8", "fp16"])
def test_stores_have_the_size_that_was_predicted(precision: str, tmp_path: Path) -> None:
    job = Job(Request(out=tmp_path / "out", precision=precision, calib_samples=4))
    made = graphs.Source(job.checkpoint, job.recipe, job.plan, None)
    kept, quantised = stored_bytes(made, job.components)
    keys, layers = graphs.component_weights(made, job.components)
    graphs.write_base_store(made, keys, tmp_path)
    header = 1 << 16
    assert 0 <= (tmp_path / graphs.BASE_STORE).stat().st_size - kept < header
    assert bool(layers) == bool(quantised) == job.recipe.quantises
    if layers:
        graphs.write_quantised_store(made, layers, tmp_path)
        assert 0 <= (tmp_path / graphs.LOW_STORE).stat().st_size - quantised < header
    planned = {step.name: step.writes for step in steps(job)}
    assert planned["weights"] == kept
    assert planned.get("quantise", 0) == quantised


def test_too_little_disk_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(name: str, writes: int) -> Step:
        return Step(name, {}, lambda space, advanced: ([], {}), writes=writes)

    plan = [step("weights", 3 * 10**9), step("engine-vision-sm89", 6 * 10**9), step("kernels", 0)]
    out = tmp_path / "not" / "there" / "yet"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, 10**10))
    check_disk(out, plan)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, 9 * 10**9))
    with pytest.raises(BuildError, match="not enough disk") as error:
        check_disk(out, plan)
    assert "9.3 GB, 9.0 GB are free" in error.value.why
    assert "engine-vision-sm89 (6.0 GB), weights (3.0 GB)." in error.value.why
    check_disk(out, plan[:1])  # what is there already takes no more
    assert resources.HEADROOM < 10**9


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_memory_of_an_engine_is_known_before_its_graph(precision: str, tmp_path: Path) -> None:
    job = Job(Request(out=tmp_path / "out", precision=precision, calib_samples=4, split=2))
    planned = {step.name: step.load for step in steps(job)}
    made = graphs.Source(job.checkpoint, job.recipe, job.plan, None)
    layers = {c: graphs.component_weights(made, [c])[1] for c in job.components}
    if job.recipe.quantises:
        amax = {c: dict.fromkeys(names, 1.0) for c, names in layers.items()}
        made = replace(made, scales=Scales(amax, "max", 1, "", True, 0, ""))
    graphs.write_base_store(made, graphs.component_weights(made, job.components)[0], tmp_path)
    graphs.write_quantised_store(made, graphs.component_weights(made, job.components)[1], tmp_path)
    for component in ("vision", "qllama_query"):
        graphs.write_graph(made, component, tmp_path, "bf16", "tensorrt")
        found = graph_load(read_graph(tmp_path / graphs.graph_path(component, "bf16")))
        ours = resources.build_load(made, component)
        assert len(ours.blocks) == len(found.blocks)
        # The store holds the scales of both graphs, which weigh at this size.
        assert sum(ours.blocks) == pytest.approx(sum(found.blocks), rel=0.05)
        assert ours.rest == pytest.approx(found.rest, rel=0.05)
        if "tensorrt-rtx" in job.backends:
            assert planned[f"engine-{component}.1-sm89"] == ours.split(2)
