"""Recipes built for TensorRT-RTX, checked against their promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivl_export.pipeline.config import ORT, RTX, BuildConfig
from ivl_export.pipeline.plan import plan_build
from ivl_export.pipeline.run import build
from ivl_export.tests.cli.test_sensitivity import Heard


@pytest.mark.slow
def test_fp8_attention_of_nano(tmp_path: Path) -> None:
    """Every attention that is promised is one kernel on fp8, fp8, fp8; what cannot be is said."""
    pytest.importorskip("tensorrt_rtx")
    request = BuildConfig(
        tmp_path / "out",
        precision="fp8-attention",
        calib_samples=16,
        components=("vision", "qllama_query"),
        backend=(ORT, RTX),
    )
    plan = plan_build(request)
    assert any("qllama_query: self_attn stays bf16: it may see 16 keys" in note for note in plan.notices)
    kernels = build(plan, Heard()).bundle.receipt("verification")["tensorrt-rtx-sm89"]
    for component, names in plan.layers.attention.items():
        fused = {a["nodes"][1]: (a["fused"], set(a["types"][:3])) for a in kernels[component]["attention"]}
        for name in names:
            assert fused[f"{name}/softmax"] == (True, {"fp8"})
            assert kernels[component]["promised"][f"{name}/softmax"] == "fp8"
    assert {c: len(names) for c, names in plan.layers.attention.items()} == {"vision": 5, "qllama_query": 2}
