"""Histograms of input magnitudes, and the ranges that percentile, entropy and squared error take from them.

The rules are those of NVIDIA ModelOpt's ``HistogramCalibrator`` (2048 bins, at least 128 of them kept). Its
code cannot be used here: it counts in float32, which stops at 16.8 million values a bin; its entropy takes
minutes a layer; its MSE passes the number of bits as a bias; and neither knows FP8. Counts here are integers,
and a histogram that outgrows its first range many times halves its resolution instead of growing on.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..quantization.quantize import LIMITS, quantise_values

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    Counts: TypeAlias = npt.NDArray[np.int64]
    Floats: TypeAlias = npt.NDArray[np.float64]

BINS = 2048
"""Bins that the first input is counted in."""

MAX_BINS = 4 * BINS
"""Later, larger inputs add bins of the same width up to so many; then neighbours are merged."""

FIRST = 128
"""No range is narrower than this many bins: an INT8 value a bin."""

CHUNK = 1 << 22
"""Values counted at a time."""


class Histogram:
    """How often which magnitude was seen; bin ``i`` counts ``width * i`` to ``width * (i + 1)``."""

    def __init__(self) -> None:
        self.width = 0.0
        self.counts: Counts = np.zeros(0, np.int64)
        self._zeros = 0

    def add(self, x: torch.Tensor, peak: float) -> None:
        """Count the magnitudes in ``x``, whose largest is ``peak``."""
        import torch

        if peak == 0 and not self.width:
            self._zeros += x.numel()
            return
        if not self.width:
            self.width = peak / BINS
            self.counts = np.zeros(BINS, np.int64)
            self.counts[0] = self._zeros
        self._reach(peak)
        last = len(self.counts) - 1
        for part in torch.split(x.reshape(-1), CHUNK):
            bins = (part.abs().double() / self.width).long().clamp_(max=last)
            self.counts += torch.bincount(bins, minlength=last + 1).cpu().numpy()

    def _reach(self, peak: float) -> None:
        """Make room for ``peak``."""
        while peak > self.width * MAX_BINS:
            even = np.pad(self.counts, (0, len(self.counts) % 2))
            self.counts, self.width = even.reshape(-1, 2).sum(1), 2 * self.width
        length = max(len(self.counts), int(np.ceil(peak / self.width)))
        self.counts = np.pad(self.counts, (0, length - len(self.counts)))


def percentile_amax(histogram: Histogram, percentile: float) -> float:
    """The lower edge of the bin that ``percentile`` of the magnitudes do not exceed, at least one bin."""
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    return histogram.width * max(1, int(np.searchsorted(share, percentile / 100)))


def mse_amax(histogram: Histogram, kind: str) -> float:
    """The range in which rounding to ``kind`` (``int8``, ``fp8``) costs the least squared error.

    Every bin's values are taken as its centre; candidates are the centres from :data:`FIRST` on.
    """
    import torch

    counts = torch.from_numpy(histogram.counts).double()
    centres = (torch.arange(len(counts)) + 0.5) * histogram.width
    candidates = centres[FIRST:]
    losses = []
    for part in torch.split(candidates, 64):
        scale = part[:, None] / LIMITS[kind]
        rounded = quantise_values(centres.expand(len(part), -1), scale, kind).float() * scale
        losses.append((rounded - centres).double().square() @ counts)
    return float(candidates[int(torch.cat(losses).argmin())])


def entropy_amax(histogram: Histogram, kind: str) -> float:
    """The range whose rounding to ``kind`` keeps the distribution of magnitudes best (Kullback-Leibler).

    The method of TensorRT's INT8 calibrator (S. Migacz, GTC 2017): values beyond a candidate are counted
    in its last bin; every level of ``kind`` then spreads its values evenly over the bins in it that are not
    empty; of equal candidates the widest is taken. INT8 levels are equally wide (128 of them); E4M3's are
    as wide as that type's steps are.
    """
    counts = histogram.counts.copy()
    counts[0] = counts[1]  # zeros say nothing about the range
    beyond = counts.sum() - np.cumsum(counts)
    candidates = np.arange(FIRST, len(counts) + 1)
    losses = [_divergence(counts[:i], int(beyond[i - 1]), _levels(int(i), kind)) for i in candidates]
    best = len(losses) - 1 - int(np.argmin(losses[::-1]))
    return histogram.width * float(candidates[best])


@lru_cache(MAX_BINS)
def _levels(bins: int, kind: str) -> npt.NDArray[np.uint8]:
    """For each of ``bins`` equally wide bins the number of the value of ``kind`` it is rounded to.

    Every layer has the same: they are computed once. Callers must not change them.
    """
    if kind == "int8":
        return (np.arange(bins, dtype=np.int64) * FIRST // bins).astype(np.uint8)
    import torch

    centres = torch.arange(bins) + 0.5
    return quantise_values(centres, torch.tensor(bins / LIMITS[kind]), kind).view(torch.uint8).numpy()


def _divergence(counts: Counts, beyond: int, levels: npt.NDArray[np.uint8]) -> float:
    """Kullback-Leibler divergence of the counts from their rounding to levels."""
    filled = counts > 0
    sums = np.bincount(levels, counts)
    shares = np.bincount(levels, filled)
    q_counts: Floats = np.where(filled, (sums / np.maximum(shares, 1))[levels], 0.0)
    p_counts = counts.astype(np.float64)
    p_counts[-1] += beyond
    there = p_counts > 0
    if not q_counts[there].all():
        return np.inf
    p, q = p_counts[there] / p_counts.sum(), q_counts[there] / q_counts.sum()
    return float((p * np.log(p / q)).sum())
