"""Captions: an image's queries and a prompt become tokens (greedy, sampled, beams), at once or streamed.

Prefill on ``qllama_step``, then one token a step. The query pass fills the first Q positions of the cache;
the prompt and the new tokens follow. Rotary positions count visible tokens only, the queries included
(``cumsum(mask) - 1``), as the published code does. :mod:`ivl_export.sampling` chooses the tokens, as for the
PyTorch model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Floats, Ids
from ..bundle.spec import ComponentSpec
from ..engines.device import to_host
from ..errors import InputError, UsageError
from ..inputs.preprocess import ResizeMode
from ..inputs.sources import ImageInput, text_sequence
from ..sampling import Sampling, Scores, StepFunction, StopCriteria, check_search, decode, stream
from .image_batches import Images, as_images
from .kv_cache import KVCache
from .loaded import Loaded
from .serving.scheduler import Scheduler, Started

StepEngine = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Arrays in, arrays out; or tensors, where the engine is on a GPU."""


def stop_criteria(model: Loaded, max_new_tokens: int, min_new_tokens: int) -> StopCriteria:
    """When a caption ends, with the token ids of the checkpoint."""
    config: Any = model.bundle.manifest.model.config.get("qllama_config") or {}
    eos, pad = config.get("eos_token_id"), config.get("pad_token_id")
    return StopCriteria(
        model.tokenizer.eos if eos is None else int(eos),
        0 if pad is None else int(pad),
        max_new_tokens,
        min_new_tokens,
    )


def caption(
    model: Loaded,
    images: Images,
    prompt: str | Sequence[str],
    stop: StopCriteria,
    num_beams: int = 1,
    sampling: Sampling | None = None,
    resize: ResizeMode | None = None,
) -> list[str]:
    """See :meth:`.model.InternVL.caption`."""
    images = as_images(images)
    prompts = [prompt] * len(images) if isinstance(prompt, str) else text_sequence(prompt, "prompt")
    if len(prompts) != len(images):
        raise UsageError(f"{len(prompts)} prompts for {len(images)} images.", "", "Give one for each.")
    captions: list[str] = []
    for pixels in model.pixel_batches(images, resize):
        ids, mask = _encoded(model, prompts[len(captions) : len(captions) + len(pixels)], stop.pad)
        tokens = generate(model, pixels, ids, mask, stop, num_beams, sampling)
        captions += [model.tokenizer.decode(row.tolist()).strip() for row in tokens]
    return captions


def stream_caption(
    model: Loaded,
    image: ImageInput,
    prompt: str,
    stop: StopCriteria,
    sampling: Sampling | None = None,
    resize: ResizeMode | None = None,
) -> Iterator[str]:
    """See :meth:`.model.InternVL.stream_caption`."""
    check_search(stop, 1, sampling)
    ids, mask = _encoded(model, [prompt], stop.pad)
    cache, first = _prefilled(model, model.pixel_values([image], resize), ids, mask, stop.max_new_tokens)
    tokens = stream(first, stepper(_step(model), cache), stop, sampling)
    return model.tokenizer.stream(int(token[0]) for token in tokens)


def generate(
    model: Loaded,
    pixel_values: Floats,
    input_ids: Ids,
    attention_mask: Ids | None,
    stop: StopCriteria,
    num_beams: int = 1,
    sampling: Sampling | None = None,
) -> Ids:
    """See :meth:`.model.InternVL.generate`."""
    check_search(stop, num_beams, sampling)
    # As many images at once as fill the step engine with all their beams.
    rows = model.components.spec("qllama_step").axis("batch").max // num_beams
    size = max(1, min(model.components.batch, rows))
    parts = []
    for start in range(0, len(pixel_values), size):
        some = slice(start, start + size)
        mask = None if attention_mask is None else attention_mask[some]
        new = stop.max_new_tokens
        cache, first = _prefilled(model, pixel_values[some], input_ids[some], mask, new)
        parts.append(decode(first, stepper(_step(model), cache), stop, num_beams, sampling))
    out = np.full((len(pixel_values), max((p.shape[1] for p in parts), default=0)), stop.pad, np.int64)
    for i, part in enumerate(parts):
        out[i * size : i * size + len(part), : part.shape[1]] = part
    return out


def scheduler(model: Loaded, slots: int) -> Scheduler:
    """A scheduler of up to ``slots`` captions at once, or as many as the step engine takes."""
    spec = model.components.spec("qllama_step")
    return Scheduler(_step(model), spec, min(slots, spec.axis("batch").max))


def start(model: Loaded, requests: Sequence[tuple[Floats, str]]) -> list[Started]:
    """Images [3, S, S] and prompts, prefilled for :meth:`Scheduler.submit`."""
    ids, mask = _encoded(model, [prompt for _, prompt in requests], 0)
    cache, first = _prefilled(model, np.stack([pixels for pixels, _ in requests]), ids, mask, 1)
    return [Started(cache.row(row), logits) for row, logits in enumerate(first)]


def _encoded(model: Loaded, prompts: Sequence[str], pad: int) -> tuple[Ids, Ids]:
    with model.components.timings.measure("tokenize"):
        return pad_prompts([model.tokenizer.encode_prompt(p) for p in prompts], pad)


def _step(model: Loaded) -> StepEngine:
    return partial(model.components.run_device, "qllama_step")


def _prefilled(
    model: Loaded, pixel_values: Floats, input_ids: Ids, mask: Ids | None, new: int
) -> tuple[KVCache, Scores]:
    """Images and prompts prefilled, no more than the step engine takes at once."""
    run, spec = model.components.run_device, model.components.spec("qllama_step")
    names = [t.name for t in model.components.spec("qllama_query").outputs if "." in t.name]
    tokens = run("vision", {"pixel_values": pixel_values}, ["tokens"])
    queries = run("qllama_query", tokens, names)
    return prefill(_step(model), spec, queries, input_ids, mask, new)


def generate_tokens(
    run: StepEngine,
    spec: ComponentSpec,
    queries: Mapping[str, Any],
    input_ids: Ids,
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
    cache, first = prefill(run, spec, queries, input_ids, attention_mask, stop.max_new_tokens)
    return decode(first, stepper(run, cache), stop, num_beams, sampling)


def prefill(
    run: StepEngine,
    spec: ComponentSpec,
    queries: Mapping[str, Any],
    input_ids: Ids,
    attention_mask: Ids | None,
    new: int,
) -> tuple[KVCache, Scores]:
    """The cache that holds the prompts, and the logits [B, V] after them.

    Args:
        run: the ``qllama_step`` engine.
        spec: its contract.
        queries: ``key.{i}`` and ``value.{i}`` [B, heads, Q, head_dim] of the query pass; the cache is made
            on their device.
        input_ids: [B, T], T >= 1.
        attention_mask: [B, T], 0 at padding (either side); None: no padding.
        new: tokens that may follow, for which there is room in the cache.

    Raises:
        InputError: no prompt, a mask of another shape, or more positions than the engine was built for.
    """
    batch, length = input_ids.shape
    mask = np.ones_like(input_ids) if attention_mask is None else attention_mask.astype(np.int64)
    if length < 1 or mask.shape != input_ids.shape or queries["key.0"].shape[0] != batch:
        raise InputError(
            "The prompt cannot be used.",
            f"ids {list(input_ids.shape)}, mask {list(mask.shape)}, images {queries['key.0'].shape[0]}.",
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
        logits = _advance(run, cache, input_ids[part], positions[part], mask[part])

    return cache, logits


def stepper(run: StepEngine, cache: KVCache) -> StepFunction:
    """The scheduler's step: a token for each sequence in ``cache``."""

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


def _advance(run: StepEngine, cache: KVCache, ids: Ids, positions: Ids, mask: NDArray[np.int64]) -> Scores:
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
