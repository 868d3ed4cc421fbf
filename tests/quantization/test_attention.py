from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.calibration.accuracy import compare
from ivl_export.calibration.calibrate import calibrate
from ivl_export.calibration.component_chain import run_chain
from ivl_export.calibration.dataset import CalibrationSet
from ivl_export.errors import BuildError, InputError
from ivl_export.export.trace import export_component
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import Tokenizer
from ivl_export.models.checkpoint import Checkpoint
from ivl_export.models.config import InternVLConfig
from ivl_export.models.layers import attention
from ivl_export.models.registry import component_spec
from ivl_export.quantization.attention import (
    FP8_ATTENTION,
    SOFTMAX_AMAX,
    AttentionShape,
    attention_scales,
    attentions,
    core_attentions,
    fake_attention,
    operand_names,
)
from ivl_export.quantization.qdq import quantised_gemms, write_qdq
from ivl_export.quantization.qdq_attention import quantised_attentions
from ivl_export.quantization.quantize import activation_scale
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.quantization.recipe import Recipe, Rule, load_recipe, plan_layers
from ivl_export.tests.calibration.reference import reference_modules, reference_runners, torch_runner
from ivl_export.tests.components import COMPONENTS, OPTIONAL
from ivl_export.tests.quantization.test_qdq import bound, runner

pytestmark = pytest.mark.numeric

EVERY = (*COMPONENTS, *OPTIONAL)
Sets = tuple[CalibrationSet, CalibrationSet]


@pytest.fixture(scope="module")
def ranges(
    shallow: Checkpoint, scenes: Sets, settings: ImageSettings, tokenizer: Tokenizer
) -> ActivationRanges:
    return calibrate(shallow, EVERY, scenes[0], settings, tokenizer, batch_size=4)


def everything(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """All attentions, whether TensorRT-RTX would fuse them or not."""
    return {c: tuple(result) for c, result in attentions(checkpoint.config, EVERY).items()}


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    masked=st.booleans(),
)
@pytest.mark.slow
def test_it_equals_modelopts_fake_quantisation(seed: int, rows: int, columns: int, masked: bool) -> None:
    tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, n, 16, generator=generator) for n in (rows, columns, columns))
    mask = torch.rand(2, 1, rows, columns, generator=generator) > 0.5 if masked else None
    names = operand_names("a")
    amax = {n: float(x.abs().max()) for n, x in zip(names, (q / 4, k, v), strict=True)}
    scales = attention_scales("a", amax, "bf16")

    def fake(x: torch.Tensor, scale: float) -> torch.Tensor:
        return tensor_quant.scaled_e4m3(x, torch.tensor(448 * scale), None, 4, 3)  # type: ignore[no-any-return]

    scores = fake(q * 0.25, scales[0]) @ fake(k.clone(), scales[1]).mT
    if mask is not None:
        scores = torch.where(mask, scores, torch.finfo(torch.float32).min)
    weights = fake(scores.softmax(-1), activation_scale(SOFTMAX_AMAX, "fp8", "bf16"))
    want = (weights @ fake(v.clone(), scales[2])).transpose(1, 2).flatten(2)
    got = fake_attention(q, k, v, mask, scales=scales, base="bf16")
    assert torch.isfinite(got).all(), "a row without visible keys stays finite"
    assert torch.allclose(got, want, atol=1e-6)
    exact = attention(q, k, v, mask=mask)
    seen = torch.ones(2, rows, 1, dtype=torch.bool) if mask is None else mask.any(-1).transpose(1, 2)
    assert torch.nn.functional.mse_loss(got * seen, exact * seen) < 0.01


def test_a_causal_row_attends_to_earlier_rows() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 16).unbind(0)
    scales = (0.01, 0.01, 0.01)
    whole = fake_attention(q, k, v, causal=True, scales=scales, base="bf16")
    for n in range(1, 6):
        parts = q[:, :, :n], k[:, :, :n], v[:, :, :n]
        part = fake_attention(*parts, causal=True, scales=scales, base="bf16")
        assert torch.allclose(part, whole[:, :n], atol=1e-6)


def test_calibration_sees_the_scaled_query(shallow: Checkpoint, ranges: ActivationRanges) -> None:
    for component, names in everything(shallow).items():
        operands = {name for attention in names for name in operand_names(attention)}
        assert operands <= set(ranges.amax[component])
    shapes = {k.removesuffix(".weight"): r.shape for k, r in shallow.tensors.items() if len(r.shape) == 2}
    names = operand_names("vision_model.encoder.layers.0.attn")
    expected = {"vision": dict.fromkeys(names, "fp8")}
    ranges.check(shapes, expected, shallow.revision)
    amax = {"vision": {k: v for k, v in ranges.amax["vision"].items() if k != names[1]}}
    with pytest.raises(InputError, match=r"no range.*attn\.k"):
        replace(ranges, amax=amax).check(shapes, expected, shallow.revision)
    with pytest.raises(InputError, match="do not belong"):
        replace(ranges, amax={"vision": {"elsewhere.attn.q": 1.0}}).check(shapes, {}, shallow.revision)
    # QK-norm holds every row of q to a mean square of 1, so the scaled amax is at most 1.
    assert ranges.amax["vision"]["vision_model.encoder.layers.0.attn.q"] < 64**0.5 / 4


@pytest.mark.parametrize("component", EVERY)
def test_the_graph_equals_the_simulation(
    component: str,
    shallow: Checkpoint,
    ranges: ActivationRanges,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
) -> None:
    names, amax = everything(shallow)[component], ranges.amax[component]
    model = export_component(component, shallow, "fp32")
    promised = write_qdq(model, {}, amax, compute="fp32", style="onnxruntime", attentions=names)
    assert promised == {f"{name}/softmax": "fp8" for name in names} == quantised_attentions(model)
    assert quantised_gemms(model) == {}
    assert not [node for node in model.graph if node.op_type == "Attention"], "one would unfuse the others"
    proto = bound(model, shallow, {})
    onnx.checker.check_model(proto, full_check=True)

    module = reference_modules(shallow, EVERY)[component]
    quantise_attention(module, names, amax)
    batch = next(scenes[1].batches(settings, tokenizer, 4))
    steps = run_chain(reference_runners(shallow, EVERY), batch, shallow.model)
    step = next(s for s in steps if s.component == component)
    got = runner(proto, True)(step.inputs)
    want = torch_runner(module, component_spec(component, shallow.config))(step.inputs)
    for name, reference in step.outputs.items():
        same, loss = compare(want[name], got[name]), compare(reference, got[name])
        # only a rounding tie that falls the other way separates the two; a first layer's keys come before it
        assert same.sqnr_db > min(loss.sqnr_db + 10, 100), (name, same, loss)
        assert loss.sqnr_db > 20


def quantise_attention(module: torch.nn.Module, names: tuple[str, ...], amax: Mapping[str, float]) -> None:
    cores = core_attentions(module)
    for name in names:

        def hook(_: Any, args: Any, __: Any, own: tuple[float, float, float]) -> torch.Tensor:
            return fake_attention(*args, scales=own, base="bf16")

        own = attention_scales(name, amax, "bf16")
        cores[name].register_forward_hook(lambda m, a, o, own=own: hook(m, a, o, own))


def test_unmeasured_attention(shallow: Checkpoint, ranges: ActivationRanges) -> None:
    name = "vision_model.encoder.layers.0.attn"
    lacking = {k: v for k, v in ranges.amax["vision"].items() if k != f"{name}.k"}
    model = export_component("vision", shallow, "bf16")
    with pytest.raises(BuildError, match=r"attn\.k"):
        write_qdq(model, {}, lacking, compute="bf16", style="tensorrt", attentions=[name])


def test_which_attentions_fit() -> None:
    full = attentions(InternVLConfig(), EVERY)
    assert {c: len(by_name) for c, by_name in full.items()} == dict(
        zip(EVERY, (48, 48, 32, 32, 48), strict=True)
    )
    matching = full["qllama_itm"]["qllama.model.layers.0.self_attn"]
    assert matching == AttentionShape(128, 97), "the queries and one token at least"
    assert full["vision"]["vision_model.encoder.layers.47.attn"] == AttentionShape(128, 257)
    shapes = {"vision_model.encoder.layers.0.attn.qkv": (9600, 3200)}
    recipe = Recipe("x", (Rule("vision*", "fp8"),), attention="fp8")
    by_name = plan_layers(recipe, shapes, full)
    assert {c: len(names) for c, names in by_name.attention.items()} == {
        "vision": 48, "qllama_query": 48, "qllama_text": 0, "qllama_step": 32, "qllama_itm": 48,
    }  # fmt: skip
    (left_out,) = by_name.exclusions
    assert (left_out.layer, left_out.scheme) == ("qllama_text: self_attn", FP8_ATTENTION)
    assert "32" in left_out.reason
    assert plan_layers(recipe, shapes).attention == {}
    assert "head size 24" in AttentionShape(24, 99).excluded


def test_the_recipe_with_attention_alone() -> None:
    recipe = Recipe("x", attention="fp8")
    assert recipe.quantises
    assert recipe.element_types == {"bf16", "fp8"}
    assert load_recipe("fp8-attention").attention == "fp8"
    assert load_recipe("fp8-attention").rules == load_recipe("fp8").rules


@pytest.mark.slow
def test_tensorrt_rtx_fuses_it(tmp_path: Path) -> None:
    """One block at InternVL-14B's widths: every promised attention is one kernel on fp8, fp8, fp8."""
    pytest.importorskip("tensorrt_rtx")
    from ivl_export.benchmarks.fullsize.make_checkpoint import make_checkpoint
    from ivl_export.engines.tensorrt.build import build_engine
    from ivl_export.export.binding import bind, save_graph, unbound
    from ivl_export.export.weight_store import open_store
    from ivl_export.export.weights import write_store
    from ivl_export.models.checkpoint import open_checkpoint
    from ivl_export.models.registry import sliced
    from ivl_export.verify.expectations import check_expectations
    from ivl_export.verify.rtx import read_rtx

    config = sliced(InternVLConfig(), 1, 1)
    make_checkpoint(tmp_path / "model", config, holes=True)
    checkpoint = open_checkpoint(tmp_path / "model")
    for component in ("vision", "qllama_query"):
        names = tuple(attentions(config, [component])[component])
        amax = dict.fromkeys((o for name in names for o in operand_names(name)), 8.0)
        root, spec = tmp_path / component, component_spec(component, config)
        root.mkdir()
        model = export_component(component, checkpoint, "bf16")
        promised = write_qdq(model, {}, amax, compute="bf16", style="tensorrt", attentions=names)
        write_store(checkpoint, unbound(model), root / "weights.safetensors", "bf16")
        bind(model, open_store(root / "weights.safetensors"), root)
        save_graph(model, root / "graph.onnx")
        build_engine(root / "graph.onnx", spec, root / "e.engine", target="sm89")
        report = read_rtx(root / "e.engine", root / "graph.onnx")
        assert len(promised) == len(names)
        check_expectations(report, promised)
        fused = {a.nodes[1]: (a.fused, a.types[:3]) for a in report.attention if a.nodes[1] in promised}
        assert fused == dict.fromkeys(promised, (True, ("fp8",) * 3))
