from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ivl_export.errors import CheckpointError
from ivl_export.quantization import quantize
from ivl_export.quantization.quantize import (
    LIMITS,
    dequantise,
    quantise,
    quantise_layer,
    quantise_values,
    round_scale,
    stored_names,
    stored_tensors,
)

pytestmark = pytest.mark.numeric

SCHEMES = ("fp8", "int8")
weights = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 17)),
    elements=st.floats(-1e4, 1e4, width=32),
).map(torch.from_numpy)
scheme_names = st.sampled_from(SCHEMES)
bases = st.sampled_from(["bf16", "fp16"])


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    noise = (reference.double() - other.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise.clamp_min(1e-300)))


@given(weights, scheme_names, bases)
def test_error_is_bounded_by_the_formats_resolution(w: torch.Tensor, scheme: str, base: str) -> None:
    values, scale = quantise(w, scheme, base)
    error = (dequantise(values, scale) - w).abs()
    step = scale[:, None]
    # INT8: half a step. E4M3: 3 mantissa bits give 2^-4 of the value, half of 2^-9 steps when subnormal.
    half = step * 0.5 if scheme == "int8" else torch.maximum(w.abs() / 16, step * 2.0**-10)
    rounding = 2.0**-8 if base == "bf16" else 2.0**-11  # the scale may be that much too small: saturation
    saturated = (w.abs() - LIMITS[scheme] * step).clamp_min(0)
    assert (error <= torch.maximum(half, saturated) * (1 + 1e-5) + 1e-30).all()
    assert (saturated <= w.abs() * rounding * 1.01).all()


@given(weights, scheme_names, bases)
def test_scales_are_exact_in_the_base_type(w: torch.Tensor, scheme: str, base: str) -> None:
    _, scale = quantise(w, scheme, base)
    dtype = torch.bfloat16 if base == "bf16" else torch.float16
    assert torch.equal(scale.to(dtype).float(), scale)
    assert (scale > 0).all()


@given(weights, scheme_names)
def test_quantising_quantised_values_changes_nothing(w: torch.Tensor, scheme: str) -> None:
    values, scale = quantise(w, scheme)
    again = quantise_values(dequantise(values, scale), scale[:, None], scheme)
    assert torch.equal(again.float(), values.float())


@given(weights, scheme_names, st.floats(1e-6, 1.0))
def test_too_large_values_saturate(w: torch.Tensor, scheme: str, scale: float) -> None:
    values = quantise_values(w, torch.tensor(scale), scheme).float()
    assert torch.isfinite(values).all()
    assert (values.abs() <= LIMITS[scheme]).all()
    over = w.abs() / scale >= LIMITS[scheme]
    assert torch.equal(values[over], torch.sign(w[over]) * LIMITS[scheme])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ties_go_to_even(scheme: str) -> None:
    if scheme == "int8":
        x, want = [0.5, 1.5, 2.5, -0.5, -1.5], [0.0, 2.0, 2.0, 0.0, -2.0]
    else:  # between 16 and 32 the step is 2: 17 and 19 are ties
        x, want = [17.0, 19.0, 21.0, -17.0, -19.0], [16.0, 20.0, 20.0, -16.0, -20.0]
    assert quantise_values(torch.tensor(x), torch.tensor(1.0), scheme).float().tolist() == want


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("base", ["bf16", "fp16"])
def test_rows_of_zeros_and_tiny_rows(scheme: str, base: str) -> None:
    w = torch.tensor([[0.0, 0.0], [1e-38, -1e-38], [1.0, -1.0]])
    values, scale = quantise(w, scheme, base)
    assert scale[0] == 1.0
    assert (scale > 0).all()
    assert values[0].float().abs().sum() == 0
    assert torch.isfinite(dequantise(values, scale)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_of_rows_equal_the_whole(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    w = torch.randn(37, 16)
    whole = quantise(w, scheme)
    monkeypatch.setattr(quantize, "CHUNK_VALUES", 16 * 5)
    blocks = list(quantize.quantise_rows(w, scheme, "bf16"))
    assert [len(scale) for _, scale in blocks] == [5] * 7 + [2]
    assert torch.equal(torch.cat([v for v, _ in blocks]).float(), whole[0].float())
    assert torch.equal(torch.cat([s for _, s in blocks]), whole[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_named(bad: float) -> None:
    w = torch.ones(4, 4)
    w[2, 1] = bad
    with pytest.raises(CheckpointError, match=r"a\.weight holds NaN or infinity.*channel 2"):
        list(quantize.quantise_rows(w, "fp8", "bf16", "a.weight"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("base", ["bf16", "fp16"])
def test_what_a_layer_writes_is_what_it_announces(scheme: str, base: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(32, 16).to(torch.bfloat16)
    written: dict[str, list[torch.Tensor]] = {}
    quantise_layer(
        lambda name: {"a.b.weight": w}[name],
        lambda name, rows: written.setdefault(name, []).append(rows),
        "a.b",
        scheme,
        base,
    )
    stored = {name: torch.cat(rows) for name, rows in written.items()}
    announced = stored_tensors("a.b", scheme, base, (32, 16))
    assert [t.name for t in announced] == list(stored_names("a.b", scheme, base)) == list(stored)
    for t in announced:
        assert (tuple(stored[t.name].shape), str(stored[t.name].dtype)) == (t.shape, f"torch.{t.dtype}")
    values, scale, scale32 = stored.values()
    assert torch.equal(scale.float(), scale32)
    want = quantise(w, scheme, base)
    assert torch.equal(values.float(), want[0].float())
    assert torch.equal(scale32, want[1])


@pytest.mark.slow
def test_equals_modelopt_fake_quantisation_on_the_same_amax() -> None:
    tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    torch.manual_seed(0)
    w = torch.randn(64, 256) * torch.logspace(-3, 1, 64)[:, None]
    for scheme in SCHEMES:
        values, scale = quantise(w, scheme)
        amax = scale[:, None] * LIMITS[scheme]  # the amax of the rounded scale
        if scheme == "fp8":
            oracle = tensor_quant.scaled_e4m3(w, amax, None, 4, 3)
        else:
            oracle = tensor_quant.fake_tensor_quant(w, amax, None, 8, False, True)
        assert sqnr(oracle, dequantise(values, scale)) > 100, scheme
        assert sqnr(w, dequantise(values, scale)) > (30 if scheme == "fp8" else 40)


@pytest.mark.slow
def test_int4_blocks_equal_modelopt_fake_quantisation_on_the_same_amax() -> None:
    tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    torch.manual_seed(0)
    w = torch.randn(64, 256) * torch.logspace(-3, 1, 64)[:, None]
    values, scale = quantise(w, "int4-weight")
    assert scale.shape == (64, 2)
    amax = (scale * LIMITS["int4"]).reshape(-1, 1)  # of each block of 128
    oracle = tensor_quant.fake_tensor_quant(w.reshape(-1, 128), amax, None, 4, False, True).reshape(w.shape)
    assert sqnr(oracle, dequantise(values, scale)) > 100
    assert sqnr(w, dequantise(values, scale)) > 15


def test_scale_of_an_activation_is_rounded_as_a_weights_is() -> None:
    amax = torch.tensor([3.3, 100.0])
    got = round_scale(amax, "int8", "bf16")
    assert torch.equal(got, (amax / 127).to(torch.bfloat16).float())
    assert not torch.equal(got, amax / 127)
