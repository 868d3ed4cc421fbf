"""Fake-quantised layers: the values of the stores and graphs, straight-through gradients, learned scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ivl_export.calibration.calibrate import calibrate
from ivl_export.calibration.dataset import CalibrationSet
from ivl_export.errors import UsageError
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import Tokenizer
from ivl_export.models.checkpoint import Checkpoint
from ivl_export.models.internvl import InternVLModel
from ivl_export.models.load import load_model
from ivl_export.quantization.quantize import (
    LIMITS,
    LOWEST,
    activation_scale,
    dequantise,
    quantise,
    quantise_values,
)
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.quantization.recipe import load_recipe, plan_layers
from ivl_export.quantization.schemes import SCHEMES
from ivl_export.training.fake_quant import (
    CLIP,
    STRETCH,
    FakeQuantLinear,
    Place,
    fake_quantise,
    fake_quantised,
    keep_in_bounds,
    learnable_scale,
    quantised_layers,
    trained_ranges,
    trained_weights,
)
from ivl_export.training.finetune import SceneSamples, Tuning, answers, distillation_losses
from ivl_export.training.losses import Stage2Batch, stage1_loss, stage2_losses
from ivl_export.training.presets import Stage

pytestmark = pytest.mark.numeric

TRAINABLE = [name for name, scheme in SCHEMES.items() if not scheme.fold]
COMPONENTS = ("vision", "qllama_query", "qllama_text", "qllama_step")


def layer(scheme: str, amax: float = 2.0, learn: bool = True) -> FakeQuantLinear:
    torch.manual_seed(0)
    ranges = {"vision": amax} if SCHEMES[scheme].activation else {}
    return FakeQuantLinear(nn.Linear(64, 32), scheme, "bf16", ranges, Place(), learn)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("scheme", TRAINABLE)
def test_values_are_those_that_are_stored(scheme: str, learn: bool) -> None:
    linear, x = layer(scheme, learn=learn), 2 * torch.randn(5, 64)
    weight = dequantise(*quantise(linear.weight.detach(), scheme))
    assert torch.equal(linear.quantised_weight().detach(), weight)
    if kind := SCHEMES[scheme].activation:
        scale = torch.tensor(activation_scale(2.0, kind, "bf16"))
        assert torch.equal(linear.input_scales().detach(), scale[None])
        x = quantise_values(x, scale, kind, LOWEST[kind]).float() * scale
    want = nn.functional.linear(x, weight, linear.bias)
    torch.testing.assert_close(linear(x), want, rtol=0, atol=0)


@given(
    st.sampled_from(TRAINABLE), st.floats(0.05, 1.5), st.floats(0.001, 6.0), st.sampled_from(["bf16", "fp16"])
)
def test_what_is_written_quantises_to_the_same(scheme: str, clip: float, stretch: float, base: str) -> None:
    linear = layer(scheme)
    linear.base = base
    assert linear.clip is not None
    with torch.no_grad():
        linear.clip.fill_(clip)
        linear.clip[::3] = 1.0
    if linear.stretch is not None:
        nn.init.constant_(linear.stretch, stretch)
    keep_in_bounds(linear)
    restored = linear.quantised_weight().detach()
    values, scale = quantise(restored, scheme, base)
    assert torch.equal(dequantise(values, scale), restored)
    kind = SCHEMES[scheme].weight
    share = linear.clip.detach().clamp(*CLIP)
    parts = linear.weight.detach().reshape(linear.rows, -1, linear.block)
    amax = parts.abs().amax(-1, keepdim=True) * share
    expected = learnable_scale(amax, kind, base).squeeze(-1)
    assert torch.equal(scale.reshape(expected.shape), expected)
    integers = quantise_values(parts, expected[..., None], kind).reshape(32, 64)
    assert torch.equal(integers.float(), values.float())
    if linear.stretch is not None:
        kind = SCHEMES[scheme].activation
        scales = linear.input_scales().detach()
        assert activation_scale(float(scales[0]) * LIMITS[kind], kind, base) == float(scales[0])
        assert float(linear.stretch.detach()) == pytest.approx(min(max(stretch, STRETCH[0]), STRETCH[1]))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_gradients_are_straight_through_and_lsqs(kind: str) -> None:
    x = torch.tensor([-20.0, -1.3, 0.2, 3.4, 300.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    y = fake_quantise(x, scale, kind, LOWEST[kind])
    y.sum().backward()  # type: ignore[no-untyped-call]
    scaled = x.detach() / 0.5
    inside = (scaled >= LOWEST[kind]) & (scaled <= LIMITS[kind])
    assert x.grad is not None
    assert x.grad.tolist() == inside.float().tolist()
    # Esser et al. 2020, equation 3: the limit where it saturates, round(v) - v elsewhere.
    limits = scaled.clamp(LOWEST[kind], LIMITS[kind])
    want = torch.where(inside, scaled.round() - scaled, limits).sum()
    assert float(scale.grad) == pytest.approx(float(want), rel=1e-6)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ranges(
    checkpoint: Checkpoint,
    scenes: tuple[CalibrationSet, CalibrationSet],
    settings: ImageSettings,
    tokenizer: Tokenizer,
) -> ActivationRanges:
    return calibrate(checkpoint, COMPONENTS, scenes[0], settings, tokenizer, batch_size=4)


@pytest.fixture
def student(checkpoint: Checkpoint, ranges: ActivationRanges) -> InternVLModel:
    shapes = {n: (m.out_features, m.in_features) for n, m in linears(load_model(checkpoint)).items()}
    layers = plan_layers(load_recipe("int8"), shapes).quantised
    return fake_quantised(load_model(checkpoint), layers, "bf16", ranges.amax, learn=True)


@pytest.fixture
def batch(settings: ImageSettings, tokenizer: Tokenizer) -> Stage2Batch:
    tuning = Tuning(Stage("stage2", "generative", 2, 4, 1e-3, 0.0, 1))
    return SceneSamples(tuning, settings, tokenizer.files["tokenizer.model"], slice(None))[0]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def seen_scales(student: InternVLModel) -> dict[str, list[Tensor]]:
    """The scales that every layer takes, call by call."""
    by_name: dict[str, list[Tensor]] = {}
    for name, module in quantised_layers(student):

        def hook(layer: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            assert isinstance(layer, FakeQuantLinear)
            scale = layer._scales_of(args[0])
            assert scale is not None
            by_name.setdefault(name, []).append(scale.detach().clone())

        module.register_forward_pre_hook(hook)
    return by_name


def test_every_pass_takes_its_components_ranges(
    student: InternVLModel, batch: Stage2Batch, ranges: ActivationRanges
) -> None:
    name = "qllama.model.layers.1.mlp.up_proj"
    scales = {c: activation_scale(ranges.amax[c][name], "int8", "bf16") for c in COMPONENTS[1:]}
    assert len(set(scales.values())) == 3
    seen = seen_scales(student)
    with torch.no_grad():
        student.encode_text(batch.summarize.input_ids)
        student.query_pass(student.vision(batch.pixel_values))
        answers(student, batch, True)
    order = ("text", "query", "text", "query", "step")
    assert [float(s) for s in seen[name]] == [scales[f"qllama_{c}"] for c in order]
    assert {float(s) for s in seen["vision_model.encoder.layers.0.mlp.fc1"]} == {
        activation_scale(ranges.amax["vision"]["vision_model.encoder.layers.0.mlp.fc1"], "int8", "bf16")
    }
    seen[name].clear()
    with torch.no_grad():
        stage2_losses(student, batch)
    (stacked,), rows, queries = seen[name], len(batch.labels), student.config.num_query_token
    assert stacked.shape == (3 * rows, queries + batch.labels.shape[1], 1)
    assert (stacked[:, :queries] == scales["qllama_query"]).all()
    assert (stacked[: 2 * rows, queries:] == scales["qllama_text"]).all()
    assert (stacked[2 * rows :, queries:] == scales["qllama_step"]).all()


def test_layers_of_one_input_share_its_scale(student: InternVLModel) -> None:
    attention = student.get_submodule("qllama.model.layers.0.self_attn")
    assert attention.q_proj.stretch is attention.k_proj.stretch is attention.v_proj.stretch  # type: ignore[union-attr]
    assert attention.o_proj.stretch is not attention.q_proj.stretch  # type: ignore[union-attr]
    mlp = student.get_submodule("qllama.model.layers.0.mlp")
    assert mlp.gate_proj.stretch is mlp.up_proj.stretch  # type: ignore[union-attr]


def test_everything_that_counts_has_a_gradient(student: InternVLModel, batch: Stage2Batch) -> None:
    student.requires_grad_(True)
    stage2_losses(student, batch).total.backward()  # type: ignore[no-untyped-call]
    without = {n for n, p in student.named_parameters() if p.grad is None}
    assert without == set()
    student.zero_grad()
    stage1_loss(student, batch.pixel_values, batch.summarize).backward()  # type: ignore[no-untyped-call]
    first = student.get_submodule("vision_model.encoder.layers.0.mlp.fc1")
    assert isinstance(first, FakeQuantLinear)
    assert first.clip is not None
    assert first.clip.grad is not None


def test_distillation_compares_with_the_teacher(
    checkpoint: Checkpoint, student: InternVLModel, batch: Stage2Batch
) -> None:
    teacher = load_model(checkpoint)
    with torch.no_grad():
        expected = answers(teacher, batch, True)
        own = distillation_losses(expected, expected)
        result = distillation_losses(answers(student, batch, True), expected)
        contrastive = distillation_losses(answers(student, batch, False), answers(teacher, batch, False))
        # The same embeddings as those that are deployed.
        assert torch.equal(expected.embeds[0], teacher.encode_image(batch.pixel_values))
    assert expected.logits is not None
    assert len(expected.logits) == int((batch.labels[:, 1:] != -100).sum())
    assert set(own) == set(result) == {"hidden", "embed", "kl"}
    assert set(contrastive) == {"hidden", "embed"}
    assert all(abs(float(v)) < 1e-5 for v in own.values())
    assert all(float(v) > 1e-6 for v in result.values())


def test_state_and_ranges_are_published_ones(
    student: InternVLModel, checkpoint: Checkpoint, ranges: ActivationRanges
) -> None:
    state = trained_weights(student)
    assert set(state) == set(checkpoint.tensors)
    assert trained_ranges(student, ranges.amax).keys() == ranges.amax.keys()
    for component, layers in trained_ranges(student, ranges.amax).items():
        for name, value in layers.items():
            same = activation_scale(ranges.amax[component][name], "int8", "bf16")
            assert activation_scale(value, "int8", "bf16") == same
            assert value == pytest.approx(ranges.amax[component][name], rel=2**-8)
    assert np.isfinite([float(v.abs().max()) for v in state.values()]).all()


@pytest.mark.parametrize(
    ("name", "scheme", "why"),
    [
        ("vision_model.encoder.layers.0.attn.qkv", "int8-smooth", "between its channels"),
        ("clip_projector.cross_attn.q", "int8-weight", "without its layer"),
    ],
)
def test_layers_that_cannot_be_trained(checkpoint: Checkpoint, name: str, scheme: str, why: str) -> None:
    with pytest.raises(UsageError, match="cannot be fine-tuned") as caught:
        fake_quantised(load_model(checkpoint), {name: scheme}, "bf16", {})
    assert why in caught.value.why
