"""What is measured, with its 95% interval and the number the paper gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..synthetic.tasks import Score

Array = np.ndarray[Any, Any]
RESAMPLES = 1000
CHUNK = 256  # rows of a similarity matrix held at a time


@dataclass(frozen=True)
class Measure:
    """``value`` in percent (CIDEr: times 100) of ``samples`` questions; ``low`` to ``high`` holds 95%.

    ``reference`` is the paper's number.
    """

    name: str
    value: float
    low: float
    high: float
    samples: int
    interval: str
    reference: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def share(name: str, right: Array, reference: float | None = None) -> Measure:
    """The percentage of true values in ``right`` [N], with its Wilson interval."""
    score = Score(int(right.sum()), len(right))
    low, high = score.interval
    return Measure(name, 100 * score.accuracy, 100 * low, 100 * high, len(right), "wilson", reference)


def mean(name: str, values: Sequence[float] | Array, reference: float | None = None) -> Measure:
    """The mean of ``values`` [N] times 100, with a percentile bootstrap over the samples (seeded)."""
    data = np.asarray(values, np.float64)
    rng = np.random.default_rng(0)
    means = [data[rng.integers(0, len(data), len(data))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    value = float(100 * data.mean())
    return Measure(name, value, 100 * float(low), 100 * float(high), len(data), "bootstrap", reference)


def ranks(queries: Array, items: Array, owner: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """For each query [Q, E] how many wrong items [N, E] stand before the best of its right ones: int64 [Q].

    ``owner[q]`` are the right items of a query. Rows are unit vectors. A tie counts against the query, and so
    does NaN: a model that says the same of everything must not score.
    """
    out = np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), CHUNK):
        similarity = queries[start : start + CHUNK] @ items.T
        for row, scores in enumerate(similarity, start):
            own = owner[row]
            best = scores[own].max()
            before = ~(scores < best)
            before[own] = False
            out[row] = before.sum()
    return out
