"""Scores with their 95% interval and the paper's number; CIDEr (PTB tokens, then the standard package)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..errors import CapabilityError
from ..synthetic.tasks import Score

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
    """For each query [Q, E] how many wrong items [N, E] rank before the best of its right ones: int64 [Q].

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


def check_cider() -> None:
    """CapabilityError where captions cannot be scored here; checked before hours of captioning."""
    try:
        import pycocoevalcap.cider.cider
        import pycocoevalcap.tokenizer.ptbtokenizer  # noqa: F401
    except ImportError as error:
        raise CapabilityError(
            "CIDEr cannot be computed here.",
            f"{error}.",
            "Install it: pip install 'ivl-export[eval]'.",
        ) from error
    if shutil.which("java") is None:
        raise CapabilityError(
            "CIDEr cannot be computed here.",
            "Its tokenizer, Stanford's PTBTokenizer, is a Java program, and there is no java.",
            "Install a Java runtime (Debian: apt install default-jre-headless).",
        )


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr of each caption against its references (1.0 is usually printed as 100).

    Document frequencies come from ``references``: scores of a part of a set are not those of the whole.
    Raises CapabilityError as :func:`check_cider`, and where the tokenizer fails.
    """
    check_cider()
    from pycocoevalcap.cider.cider import Cider

    said = _tokens([[caption] for caption in captions])
    reference_tokens = _tokens(references)
    _, scores = Cider().compute_score(reference_tokens, said)
    return [float(score) for score in scores]


def _tokens(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # One text a line, and none empty: lines that are left out would shift all that follow.
    rows = {i: [{"caption": " ".join(t.split()) or "."} for t in group] for i, group in enumerate(texts)}
    try:
        tokens = PTBTokenizer().tokenize(rows)
    except OSError as error:  # it writes into its own folder
        raise CapabilityError(
            "The captions cannot be tokenized.",
            str(error),
            "Install pycocoevalcap where it can be written to.",
        ) from error
    if {i: len(group) for i, group in tokens.items()} != {i: len(group) for i, group in rows.items()}:
        raise CapabilityError(
            "The captions cannot be tokenized.",
            "PTBTokenizer did not answer.",
            "Check that java -version works.",
        )
    return dict(tokens)
