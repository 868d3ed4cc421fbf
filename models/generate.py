"""Captioning: one query pass, then plain LLaMA steps over a KV cache (InternVL paper section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .qllama import KeyValue, Visible

if TYPE_CHECKING:
    from .internvl import InternVL


def text_step(
    model: InternVL, input_ids: Tensor, positions: Tensor, mask: Tensor, past: list[KeyValue]
) -> tuple[Tensor, list[KeyValue]]:
    """One causal step of T new tokens after a past of P positions.

    Args:
        input_ids, positions: [B, T].
        mask: [B, P + T], nonzero where a position may be seen.
        past: keys and values of P positions, one pair a layer.

    Returns:
        Logits of the last position [B, V], and the keys and values of the T new positions.
    """
    visible = Visible(step_mask(mask, input_ids.shape[1]))
    hidden, new = model.qllama(model.qllama.embed(input_ids), positions, visible, past=past)
    return model.qllama.lm_head(hidden[:, -1]), new


def step_mask(mask: Tensor, length: int) -> Tensor:
    """[B, P + T] key mask -> bool [B, 1, T, P + T], causal among the last T = ``length`` positions."""
    total = mask.shape[1]
    causal = torch.ones(length, total, dtype=torch.bool, device=mask.device).tril(total - length)
    return causal & mask.bool()[:, None, None, :]


def extend(past: list[KeyValue], new: list[KeyValue]) -> list[KeyValue]:
    """The cache with the new positions behind the past ones."""
    return [
        (torch.cat([pk, k], 2), torch.cat([pv, v], 2)) for (pk, pv), (k, v) in zip(past, new, strict=True)
    ]
