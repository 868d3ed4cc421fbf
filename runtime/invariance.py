"""Batches in which a row's bits do not depend on the other rows.

A row alone runs through other kernels than a row in company (ONNX Runtime on the CPU), and company of any
size gives the same bits. So a batch of one row is computed as two.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..arrays import Array, Floats
from ..inputs.tokenizer import buckets_of

if TYPE_CHECKING:
    from .model import InternVL


def in_batches(run: Callable[[Array], Floats], rows: Array, size: int) -> list[Floats]:
    """``run`` over ``rows`` in batches of ``size``, a lone row twice; the results of all rows, in order.

    Engines that take one row at a time have no company, and get none.
    """
    results: list[Floats] = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        lone = len(part) == 1 and size > 1
        results.append(run(np.concatenate([part, part]) if lone else part)[: len(part)])
    return results


def encode_texts(model: InternVL, texts: Sequence[str], size: int) -> list[Floats]:
    """The embeddings [E] of ``texts``, those of one padded length in batches of ``size``."""
    spec = model.components.spec("qllama_text")
    axis, size = spec.axis("text"), min(size, spec.axis("batch").max)
    buckets = buckets_of(axis.min, axis.max)
    ids, lengths = model.tokenizer.encode_contrastive(texts, buckets[-1], buckets)
    padded = [bisect_left(buckets, length) for length in lengths.tolist()]
    out: dict[int, Floats] = {}
    for bucket in sorted(set(padded)):
        own = np.array([row for row, other in enumerate(padded) if other == bucket])
        parts = in_batches(lambda rows: model.encode_tokens(ids[rows], lengths[rows]), own, size)
        out.update(zip(own.tolist(), np.concatenate(parts), strict=True))
    return [out[row] for row in range(len(texts))]
