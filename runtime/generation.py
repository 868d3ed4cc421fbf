"""Token generation over the ``qllama_step`` engine: prefill, then one token a step. Needs no torch.

The query pass fills the first Q cache positions; the prompt and the new tokens follow. Rotary positions count
visible tokens only, the queries included (``cumsum(mask) - 1``), as the published code does. Which tokens are
taken is :mod:`ivl_export.sampling`'s business, shared with the PyTorch model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.spec import ComponentSpec
from ..engines.device import to_host
from ..errors import InputError
from ..sampling import Ids, Sampling, Scores, StepFunction, StopCriteria, check_search, decode
from .kv_cache import KVCache

Run = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Arrays in, arrays out; or tensors, where the engine is on a GPU."""


def generate(
    run: Run,
    spec: ComponentSpec,
    queries: Mapping[str, Any],
    prompt_ids: Ids,
    attention_mask: Ids | None,
    stop: StopCriteria,
    num_beams: int = 1,
    sampling: Sampling | None = None,
) -> Ids:
    """New token ids [B, <= max_new_tokens], ``stop.pad`` after each row's EOS.

    ``num_beams`` and ``sampling`` as :func:`~ivl_export.sampling.decode` has them, the rest and the errors as
    :func:`prefill`.
    """
    check_search(stop, num_beams, sampling)
    cache, first = prefill(run, spec, queries, prompt_ids, attention_mask, stop.max_new_tokens)
    return decode(first, stepper(run, cache), stop, num_beams, sampling)


def prefill(
    run: Run,
    spec: ComponentSpec,
    queries: Mapping[str, Any],
    prompt_ids: Ids,
    attention_mask: Ids | None,
    new: int,
) -> tuple[KVCache, Scores]:
    """The cache that holds the prompts, and the logits [B, V] after them.

    Args:
        run: the ``qllama_step`` engine.
        spec: its contract.
        queries: ``key.{i}`` and ``value.{i}`` [B, heads, Q, head_dim] of the query pass; the cache lies where
            they do.
        prompt_ids: [B, T], T >= 1.
        attention_mask: [B, T], 0 at padding (either side); None: no padding.
        new: tokens that may follow, for which there is room in the cache.

    Raises:
        InputError: no prompt, a mask of another shape, or more positions than the engine was built for.
    """
    batch, length = prompt_ids.shape
    mask = np.ones_like(prompt_ids) if attention_mask is None else attention_mask.astype(np.int64)
    if length < 1 or mask.shape != prompt_ids.shape or queries["key.0"].shape[0] != batch:
        raise InputError(
            "The prompt cannot be used.",
            f"ids {list(prompt_ids.shape)}, mask {list(mask.shape)}, images {queries['key.0'].shape[0]}.",
            "Give every image a prompt of at least one token, and a mask of the same shape.",
        )
    count = queries["key.0"].shape[2]
    capacity = count + length + new - 1  # the last token is never fed back
    past = spec.axis("past")
    if capacity > past.max:
        raise InputError(
            "The prompt and the answer are too long for this bundle.",
            f"{count} queries, {length} prompt tokens and {new} new ones need a past of {capacity}; the "
            f"engine was built for {past.max}.",
            "Ask for fewer new tokens, or rebuild with a larger range.",
        )
    cache = KVCache.of_queries(queries, _layers(spec), max(capacity, past.min))
    positions = (count + mask.cumsum(1) - 1).astype(np.int64)
    positions[mask == 0] = 1  # as the published code; only an answer to a right-padded prompt depends on it
    chunk = spec.axis("text").max
    logits: Scores = np.empty((batch, 0), np.float32)
    for start in range(0, length, chunk):
        part = np.s_[:, start : start + chunk]
        logits = _advance(run, cache, prompt_ids[part], positions[part], mask[part])

    return cache, logits


def stepper(run: Run, cache: KVCache) -> StepFunction:
    """What advances the sequences that ``cache`` holds by a token each."""

    def step(tokens: Ids, rows: Ids | None) -> Scores:
        nonlocal cache
        if rows is not None and len(rows) != cache.rows:
            cache = cache.expand(rows)
        elif rows is not None:
            cache.reorder(rows)
        seen = cache.mask.sum(1, keepdims=True)
        return _advance(run, cache, tokens[:, None], seen, np.ones((len(tokens), 1), np.int64))

    return step


def pad_prompts(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[Ids, Ids]:
    """Prompts of different lengths as (ids, mask), both int64 [B, T], padded on the left."""
    longest = max((len(p) for p in prompts), default=0)
    ids = np.full((len(prompts), longest), pad, np.int64)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        if prompt:
            ids[row, -len(prompt) :] = prompt
            mask[row, -len(prompt) :] = 1
    return ids, mask


def _advance(run: Run, cache: KVCache, ids: Ids, positions: Ids, mask: NDArray[np.int64]) -> Scores:
    outputs = run(
        {
            "input_ids": np.ascontiguousarray(ids),
            "positions": np.ascontiguousarray(positions),
            "attention_mask": np.concatenate([cache.mask, mask], 1),
            **cache.feeds(),
        }
    )
    cache.append(outputs, mask)
    return to_host(outputs["logits"])


def _layers(spec: ComponentSpec) -> int:
    return sum(t.name.startswith("past_key.") for t in spec.inputs)
