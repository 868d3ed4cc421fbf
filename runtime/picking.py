"""The next token, chosen where the logits lie: by numpy on the host, by torch on a device.

Only the token's id comes down from a device. The number that a draw goes by is drawn on the host in either
case, so that both draw the same tokens of the same logits, up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import sampling as decoding
from ..engines.device import as_tensor
from ..sampling import Sampling

if TYPE_CHECKING:
    import torch


def pick(logits: Any, how: Sampling, rng: np.random.Generator, barred: int | None = None) -> int:
    """As :func:`..sampling.pick`, of ``logits`` [V] that are an array, or a tensor on any device."""
    if isinstance(logits, np.ndarray):
        return decoding.pick(logits, how, rng, barred)
    scores = as_tensor(logits).float()
    if barred is not None:
        scores = scores.clone()
        scores[barred] = -np.inf
    if how.temperature == 0:
        return int(scores.argmax())
    return int(_drawn(scores, how, rng.random()))


def _drawn(scores: torch.Tensor, how: Sampling, number: float) -> torch.Tensor:
    """The token [] at ``number`` in [0, 1) of the cut distribution's cumulative function."""
    import torch

    ranked, order = scores.sort(descending=True, stable=True)
    ranked, order = ranked[: how.top_k or None].double() / how.temperature, order[: how.top_k or None]
    mass = torch.exp(ranked - ranked[0]).cumsum(0)
    last = (mass < how.top_p * mass[-1]).sum().clamp(max=len(mass) - 1)  # of the likeliest that make top_p
    place = (mass <= number * mass.take(last)).sum().minimum(last)
    return order.take(place)
