"""Recipes built for TensorRT-RTX, held to what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivl_export.pipeline.build import build
from ivl_export.pipeline.job import Job
from ivl_export.pipeline.request import ORT, RTX, Request
from ivl_export.tests.cli.test_sensitivity import Heard


@pytest.mark.slow
def test_fp8_attention_of_nano(tmp_path: Path) -> None:
    """Every attention that is promised is one kernel on fp8, fp8, fp8; what cannot be is said."""
    pytest.importorskip("tensorrt_rtx")
    request = Request(
        tmp_path / "out",
        precision="fp8-attention",
        calib_samples=16,
        components=("vision", "qllama_query"),
        backends=(ORT, RTX),
    )
    job = Job(request)
    assert any("qllama_query: self_attn stays bf16: it may see 16 keys" in note for note in job.notices)
    kernels = build(job, Heard()).bundle.receipt("kernels")["tensorrt-rtx-sm89"]
    for component, names in job.plan.attention.items():
        fused = {a["nodes"][1]: (a["fused"], set(a["types"][:3])) for a in kernels[component]["attention"]}
        for name in names:
            assert fused[f"{name}/softmax"] == (True, {"fp8"})
            assert kernels[component]["promised"][f"{name}/softmax"] == "fp8"
    assert {c: len(names) for c, names in job.plan.attention.items()} == {"vision": 5, "qllama_query": 2}
