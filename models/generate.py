"""Captioning: one query pass, then plain LLaMA steps over a KV cache (InternVL paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arrays import Ids
from ..sampling import Scores, StopCriteria, decode
from .qllama import KeyValue, Visible

if TYPE_CHECKING:
    from .internvl import InternVLModel


def text_step(
    model: InternVLModel, input_ids: Tensor, positions: Tensor, mask: Tensor, past: list[KeyValue]
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
    """The cache with the new positions after the past ones."""
    return [
        (torch.cat([pk, k], 2), torch.cat([pv, v], 2)) for (pk, pv), (k, v) in zip(past, new, strict=True)
    ]


@torch.no_grad()
def generate(
    model: InternVLModel,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int = 30,
    num_beams: int = 1,
    min_new_tokens: int = 0,
) -> Tensor:
    """New token ids [B, <= max_new_tokens]; see :meth:`.InternVLModel.generate`.

    Padding may be on either side of the prompt. Rotary positions count visible tokens only
    (``cumsum(mask) - 1``, the queries included), as the published code does.
    """
    config = model.config
    past = model.query_pass(model.vision(pixel_values))[1]
    mask = torch.cat([attention_mask.new_ones(len(input_ids), config.num_query_token), attention_mask], 1)
    positions = (mask.cumsum(1) - 1)[:, config.num_query_token :].masked_fill(attention_mask == 0, 1)
    first, new = text_step(model, input_ids, positions, mask, past)
    stop = StopCriteria(
        config.qllama.eos_token_id, config.qllama.pad_token_id, max_new_tokens, min_new_tokens
    )
    return search(partial(text_step, model), first, extend(past, new), mask, stop, num_beams)


def search(
    step: Callable[[Tensor, Tensor, Tensor, list[KeyValue]], tuple[Tensor, list[KeyValue]]],
    first: Tensor,
    past: list[KeyValue],
    mask: Tensor,
    stop: StopCriteria,
    num_beams: int,
) -> Tensor:
    """Token search after a prompt: new ids [B, <= max_new_tokens].

    Args:
        step: arguments and results as of :func:`text_step` after ``model``.
        first: logits [B, V] after the prompt.
        past: keys and values of the P positions of the prompt.
        mask: [B, P], nonzero where a position may be seen.
        stop: token ids and lengths.
        num_beams: 1 is greedy.
    """

    def advance(tokens: Ids, rows: Ids | None) -> Scores:
        nonlocal past, mask
        if rows is not None:
            index = torch.from_numpy(rows).to(mask.device)
            past, mask = [(k[index], v[index]) for k, v in past], mask[index]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        ids = torch.from_numpy(tokens).to(mask.device)[:, None]
        logits, new = step(ids, mask.sum(1, keepdim=True) - 1, mask, past)
        past = extend(past, new)
        return logits.float().numpy(force=True)

    return torch.from_numpy(decode(first.float().numpy(force=True), advance, stop, num_beams))
