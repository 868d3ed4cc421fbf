"""Disk that a build takes is said, and checked, before anything runs."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from ivl_export.errors import BuildError
from ivl_export.pipeline import graphs, resources
from ivl_export.pipeline.request import Job, Request
from ivl_export.pipeline.resources import check_disk, stored_bytes
from ivl_export.pipeline.steps import Step, steps

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
