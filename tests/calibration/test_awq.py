"""AWQ: folded exactly, searched on calibration inputs, and no worse than plain INT4 weights."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

import pytest
import torch

from ivl_export.calibration import awq
from ivl_export.calibration.accuracy import Table, compare
from ivl_export.calibration.awq import Inputs, awq_factors, scaling, search
from ivl_export.calibration.dataset import CalibrationSet
from ivl_export.calibration.folding import fold, groups_apart
from ivl_export.errors import InputError, UsageError
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import Tokenizer
from ivl_export.models.checkpoint import Checkpoint
from ivl_export.models.load import load_model
from ivl_export.pipeline.accuracy_steps import component_receipt
from ivl_export.pipeline.config import ORT, BuildConfig
from ivl_export.pipeline.graph_steps import graph_source
from ivl_export.pipeline.plan import plan_build
from ivl_export.pipeline.run import build_steps
from ivl_export.pipeline.workspace import Workspace, run_step
from ivl_export.progress import Silent
from ivl_export.quantization.quantize import dequantise, quantise
from ivl_export.quantization.recipe import load_recipe, schemes

pytestmark = pytest.mark.numeric

Sets = tuple[CalibrationSet, CalibrationSet]
COMPONENTS = ("vision", "qllama_query", "qllama_text", "qllama_step")
VIT, LLAMA = "vision_model.encoder.layers.0.", "qllama.model.layers.0."
SOURCES = {
    *(VIT + name for name in ("norm1", "norm2", "attn.qkv")),
    *(LLAMA + name for name in ("input_layernorm", "post_attention_layernorm", "mlp.up_proj")),
    *(f"{LLAMA}cross_attn.{name}" for name in ("norm1", "norm2", "v_proj")),
}


@pytest.fixture(scope="module")
def planned(shallow: Checkpoint) -> dict[str, str]:
    names = [k.removesuffix(".weight") for k, r in shallow.tensors.items() if len(r.shape) == 2]
    return schemes(load_recipe("int4-awq"), names)


def test_every_source_is_found(
    shallow: Checkpoint,
    planned: dict[str, str],
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    run = (scenes[0], settings, tokenizer, tmp_path)
    factors = awq_factors(shallow, COMPONENTS, planned, *run, batch_size=4)
    assert set(factors) == SOURCES
    again = awq_factors(shallow, COMPONENTS, planned, *run, batch_size=4)
    assert all(torch.equal(factors[name], again[name]) for name in factors), "the same rows are drawn"
    assert all(torch.equal(f.log2(), f.log2().round()) for f in factors.values())


def test_any_factors_fold_into_a_model_that_computes_the_same(shallow: Checkpoint) -> None:
    generator = torch.Generator().manual_seed(0)

    def divisor(source: str) -> torch.Tensor:
        width = shallow.tensors[f"{source}.weight"].shape[0] // (3 if source.endswith("qkv") else 1)
        return torch.exp2(torch.randint(-3, 4, (width,), generator=generator).float())

    folded = fold(shallow, {name: divisor(name) for name in sorted(SOURCES)})
    plain, same = load_model(shallow), load_model(folded)
    changed = [n for n, p in plain.named_parameters() if not torch.equal(p, same.get_parameter(n))]
    assert len(changed) >= 18, "sources and the layers they feed"
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    ids = torch.randint(3, 500, (2, 9), generator=generator)
    with torch.no_grad():
        close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
        close(same.encode_image(pixels), plain.encode_image(pixels))
        close(same.encode_text(ids), plain.encode_text(ids))
        tokens = plain.vision(pixels)
        for got, want in zip(same.query_pass(tokens)[1], plain.query_pass(tokens)[1], strict=True):
            for a, b in zip(got, want, strict=True):  # keys and values that leave the component
                close(a, b)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"lm_head": torch.ones(3)}, "feeds no layers"),
        ({f"{VIT}norm1": torch.ones(3)}, "do not belong to this model"),
        ({"vision_model.encoder.layers.9.norm1": torch.ones(64)}, "do not belong to this model"),
        ({f"{VIT}norm1": torch.zeros(64)}, "not finite and over 0"),
    ],
)
def test_factors_from_elsewhere_are_checked(
    factors: dict[str, torch.Tensor], message: str, shallow: Checkpoint
) -> None:
    with pytest.raises(InputError, match=message):
        fold(shallow, factors)


def test_layers_of_one_input_have_one_way_of_folding() -> None:
    both = {f"{LLAMA}mlp.gate_proj": "int8-smooth", f"{LLAMA}mlp.up_proj": "int4-awq"}
    with pytest.raises(UsageError, match="both SmoothQuant and AWQ"):
        groups_apart(both)


def test_rows_are_drawn_from_all_inputs_alike() -> None:
    inputs = Inputs()
    for i in range(40):
        inputs.add(torch.full((10, 20, 4), float(i)))
    assert inputs.rows.shape == (awq.ROWS, 4)
    assert len(set(inputs.rows[:, 0].tolist())) == 40
    torch.testing.assert_close(inputs.mean, torch.full((4,), 19.5))


def test_outlier_channels_keep_their_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 128, generator=generator)
    x[:, [3, 70]] *= 60
    x[:, 5] = 0
    weight = torch.randn(64, 128, generator=generator)
    inputs = Inputs()
    inputs.add(x[:1000])
    result = search(inputs, {"a": weight}, {"a": "int4-awq"}, "bf16", lambda rows, w: [rows @ w["a"].T])

    def sqnr(divisor: torch.Tensor) -> float:
        rounded = dequantise(*quantise(weight * divisor, "int4-awq")) / divisor
        unseen = x[1000:]
        return compare((unseen @ weight.T).numpy(), (unseen @ rounded.T).numpy()).sqnr_db

    assert sqnr(result) > sqnr(torch.ones(128)) + 6
    assert result[3] >= 2 * result[4], "powers of two: one step apart, or more"
    assert torch.isfinite(scaling(torch.zeros(4), 0.5)).all()


def nano_accuracy(precision: str, out: Path) -> Table:
    plan = plan_build(BuildConfig(out, precision=precision, calib_samples=64, backend=(ORT,)))
    with Workspace(out, Silent()) as space:
        for step in build_steps(plan):
            if step.name.startswith("graph-"):
                break
            run_step(space, step)
        return component_receipt(
            plan, graph_source(plan, space.staging_dir), space, lambda count: None, True
        ).teacher_forced


@pytest.mark.slow
def test_nano_loses_no_more_than_with_plain_int4(tmp_path: Path) -> None:
    """Nano has no outliers: there is little to gain. Single outputs move by what rounding ties move them."""
    plain, searched = (nano_accuracy(p, tmp_path / p) for p in ("int4-weight", "int4-awq"))
    gains = [
        searched[component][output].sqnr_db - metrics.sqnr_db
        for component, outputs in plain.items()
        for output, metrics in outputs.items()
    ]
    assert statistics.fmean(gains) > -0.2  # measured 0.08
    assert min(gains) > -2
