"""How a quantised model's tokens compare with fp32, by teacher forcing: both see the same text before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Array

LOGITS = "logits"
"""The output that tokens are chosen from."""


@dataclass(frozen=True)
class TokenMetrics:
    """Candidate against reference, over next tokens.

    Args:
        positions: how many next tokens were compared.
        same: share of them whose likeliest token is the same.
        kl: mean of ``sum p log(p / q)`` in nats, p the reference's probabilities and q the candidate's.
        worst_kl: of the worst position.
    """

    positions: int
    same: float
    kl: float
    worst_kl: float


class TokenComparison:
    """Accumulates :class:`TokenMetrics` over batches of logits."""

    def __init__(self) -> None:
        self._same = 0
        self._kl: list[float] = []

    def add(self, reference: Array, candidate: Array) -> None:
        """Logits [B, V] of both."""
        p, q = (_log_softmax(logits.astype(np.float64)) for logits in (reference, candidate))
        self._same += int((reference.argmax(-1) == candidate.argmax(-1)).sum())
        self._kl += np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0).tolist()

    def metrics(self) -> TokenMetrics:
        """The statistics so far, of one position at least."""
        count = len(self._kl)
        return TokenMetrics(count, self._same / count, sum(self._kl) / count, max(self._kl))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    out: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return out
