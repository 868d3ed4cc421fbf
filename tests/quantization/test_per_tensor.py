"""One scale for a whole weight: as ModelOpt's fake quantisation, in the store, the graph and ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ivl_export.calibration.accuracy import compare
from ivl_export.models.checkpoint import Checkpoint
from ivl_export.pipeline import graph_steps
from ivl_export.pipeline.accuracy_steps import component_receipt
from ivl_export.pipeline.config import ORT, BuildConfig
from ivl_export.pipeline.plan import plan_build
from ivl_export.pipeline.run import build_steps
from ivl_export.pipeline.workspace import Workspace, run_step
from ivl_export.progress import Silent
from ivl_export.quantization import quantize
from ivl_export.quantization.quantize import LIMITS, dequantise, quantise

pytestmark = pytest.mark.numeric

KINDS = ("fp8", "int8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_equals_modelopts_fake_quantisation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[40, 3] = 9.0
    monkeypatch.setattr(quantize, "CHUNK_VALUES", 5 * 256)  # the largest is in another chunk
    values, scale = quantise(weight, f"{kind}-tensor")
    assert scale.shape == ()
    top = scale * LIMITS[kind]
    if kind == "fp8":
        oracle = tensor_quant.scaled_e4m3(weight.clone(), top, None, 4, 3)
    else:
        oracle = tensor_quant.fake_tensor_quant(weight.clone(), top, None, 8, False, True)
    got = dequantise(values, scale)
    assert compare(oracle.numpy(), got.numpy()).sqnr_db > 100
    per_channel = dequantise(*quantise(weight, kind))
    worse, better = (compare(weight.numpy(), w.numpy()).sqnr_db for w in (got, per_channel))
    assert worse <= better + 0.1
    assert worse > 25


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_recipe_may_ask_for_it(kind: str, tmp_path: Path) -> None:
    """Nano's text pass: ONNX Runtime and the simulation agree."""
    recipe = tmp_path / "own.yaml"
    rule = f"{{pattern: 'qllama.model.layers.*.mlp.*_proj', scheme: {kind}-tensor}}"
    recipe.write_text(f"name: own\nrules: [{rule}]\n")
    options = {
        "precision": str(recipe),
        "components": ("qllama_text",),
        "backend": (ORT,),
        "calib_samples": 24,
    }
    plan = plan_build(BuildConfig(tmp_path / "out", **options))  # type: ignore[arg-type]
    with Workspace(tmp_path / "out", Silent()) as space:
        for step in build_steps(plan):
            if step.name == "accuracy":
                break
            run_step(space, step)
        source = graph_steps.graph_source(plan, space.staging_dir)
        ours, theirs = (
            component_receipt(plan, source, space, lambda count: None, simulate).chained["qllama_text"]
            for simulate in (True, False)
        )
        promised = space.records["graph-qllama_text"].data["promised"]
    assert set(promised["bf16"].values()) == {kind}
    assert ours["text_embed"].sqnr_db == pytest.approx(theirs["text_embed"].sqnr_db, abs=1.5)
    assert ours["text_embed"].sqnr_db > 20


def test_the_checkpoint_is_read_twice_and_not_held(shallow: Checkpoint) -> None:
    weight = shallow.load("vision_model.encoder.layers.0.mlp.fc1.weight")
    scales = [scale for _, scale in quantize.quantise_rows(weight, "int8-tensor", "bf16")]
    assert len({float(v) for s in scales for v in s}) == 1
