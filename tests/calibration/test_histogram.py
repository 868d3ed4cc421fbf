"""Ranges picked from histograms: as ModelOpt's calibrator picks them where that works, and by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_export.calibration.histogram import (
    BINS,
    FIRST,
    MAX_BINS,
    Histogram,
    entropy_amax,
    mse_amax,
    percentile_amax,
)
from ivl_export.quantization.quantize import LIMITS

pytestmark = pytest.mark.numeric


def inputs(seed: int, growth: float) -> list[torch.Tensor]:
    """Two inputs with outliers, the second ``growth`` times as large."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(300, 16, generator=generator) ** 3
    return [first, growth * torch.randn(300, 16, generator=generator) ** 3]


def counted(parts: list[torch.Tensor]) -> Histogram:
    histogram = Histogram()
    for x in parts:
        histogram.add(x, float(x.abs().max()))
    return histogram


@pytest.mark.parametrize(("seed", "growth"), [(0, 0.5), (1, 1.4)])
@pytest.mark.slow
def test_percentiles_are_modelopts(seed: int, growth: float) -> None:
    calib = pytest.importorskip("modelopt.torch.quantization.calib")
    theirs, parts = calib.HistogramCalibrator(num_bits=8, axis=None, unsigned=False), inputs(seed, growth)
    for x in parts:
        theirs.collect(x.clone())
    ours = counted(parts)
    for percentile in (99.0, 99.9, 99.99, 100.0):
        want = float(theirs.compute_amax("percentile", percentile=percentile))
        assert percentile_amax(ours, percentile) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.slow
def test_entropy_is_modelopts_to_the_bin(seed: int) -> None:
    """Of 300 bins: theirs looks at each candidate in Python."""
    calib = pytest.importorskip("modelopt.torch.quantization.calib")
    x = inputs(seed, 1)[0]
    theirs = calib.HistogramCalibrator(num_bits=8, axis=None, unsigned=False, num_bins=300)
    theirs.collect(x.clone())
    ours = Histogram()
    ours.width = float(x.abs().max()) / 300
    ours.counts = theirs._calib_hist.long().numpy()
    assert entropy_amax(ours, "int8") == pytest.approx(float(theirs.compute_amax("entropy")), rel=1e-5)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.slow
def test_mse_is_the_best_of_modelopts_fake_quantisation(kind: str) -> None:
    tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    ours = counted(inputs(4, 1.0))
    centres = ((torch.arange(len(ours.counts)) + 0.5) * ours.width).float()
    counts = torch.from_numpy(ours.counts)

    def loss(amax: torch.Tensor) -> float:
        if kind == "fp8":
            rounded = tensor_quant.scaled_e4m3(centres.clone(), amax, None, 4, 3)
        else:
            rounded = tensor_quant.fake_tensor_quant(centres.clone(), amax, None, 8, False, True)
        return float(((rounded - centres).double().square() * counts).sum())

    losses = {float(amax): loss(amax) for amax in centres[FIRST:]}
    picked = mse_amax(ours, kind)
    assert loss(torch.tensor(picked)) <= min(losses.values()) * 1.0001


@given(st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=1, max_size=6), st.integers(0, 9))
def test_every_value_is_counted_in_its_bin(scales: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(7, 5, generator=generator) * scale for scale in scales]
    histogram = counted([torch.zeros(2, 3), *parts])
    values = torch.cat([part.reshape(-1) for part in parts]).double().numpy()
    assert histogram.counts.sum() == len(values) + 6
    assert BINS <= len(histogram.counts) <= MAX_BINS
    assert values.max() <= histogram.width * len(histogram.counts) * (1 + 1e-9)
    median = np.sort(values)[len(values) // 2]
    below = histogram.counts[: int(median / histogram.width) + 2].sum()
    assert below >= len(values) // 2


@pytest.mark.slow
@settings(max_examples=8)
@given(st.integers(0, 50), st.sampled_from(["int8", "fp8"]), st.sampled_from([0.3, 1.0, 30.0]))
def test_ranges_are_within_the_inputs(seed: int, kind: str, growth: float) -> None:
    parts = inputs(seed, growth)
    histogram, peak = counted(parts), max(float(x.abs().max()) for x in parts)
    for amax in (percentile_amax(histogram, 99.9), mse_amax(histogram, kind), entropy_amax(histogram, kind)):
        assert 0 < amax <= peak + histogram.width


def test_an_outlier_does_not_cost_int8_its_resolution() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[0] = 300.0
    histogram = counted([x])

    def error(amax: float) -> float:
        scale = amax / LIMITS["int8"]
        rounded = (x / scale).round().clamp(-127, 127) * scale
        return float((rounded - x)[1:].square().mean())

    for amax in (mse_amax(histogram, "int8"), percentile_amax(histogram, 99.99)):
        assert error(amax) < error(300.0) / 2


def test_counts_do_not_saturate() -> None:
    """float32 counters stop at 2^24."""
    histogram = Histogram()
    histogram.add(torch.ones(1), 1.0)
    histogram.counts[0] = 1 << 24
    histogram.add(torch.zeros(5), 0.0)
    assert histogram.counts[0] == (1 << 24) + 5
