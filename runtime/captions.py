"""Captions: an image's queries and a prompt become tokens (greedy, sampled, beams), whole or as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..inputs.images import ImageInput
from ..inputs.preprocess import ResizeMode
from ..sampling import Ids, Sampling, Scores, StopCriteria, check_search, decode, stream
from .generation import Run, pad_prompts, prefill, stepper
from .image_batches import Floats, Images
from .kv_cache import KVCache
from .scheduler import Scheduler, Started

if TYPE_CHECKING:
    from .model import InternVL


def stop_criteria(model: InternVL, max_new_tokens: int, min_new_tokens: int) -> StopCriteria:
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
    model: InternVL,
    images: Images,
    prompt: str | Sequence[str],
    stop: StopCriteria,
    num_beams: int = 1,
    sampling: Sampling | None = None,
    resize: ResizeMode | None = None,
) -> list[str]:
    """See :meth:`.model.InternVL.caption`."""
    prompts = [prompt] * len(images) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(images):
        raise UsageError(f"{len(prompts)} prompts for {len(images)} images.", "", "Give one for each.")
    captions: list[str] = []
    for pixels in model.pixel_batches(images, resize):
        ids, mask = _encoded(model, prompts[len(captions) : len(captions) + len(pixels)], stop.pad)
        tokens = generate(model, pixels, ids, mask, stop, num_beams, sampling)
        captions += [model.tokenizer.decode(row.tolist()).strip() for row in tokens]
    return captions


def stream_caption(
    model: InternVL,
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
    model: InternVL,
    pixel_values: Floats,
    prompt_ids: Ids,
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
        cache, first = _prefilled(model, pixel_values[some], prompt_ids[some], mask, new)
        parts.append(decode(first, stepper(_step(model), cache), stop, num_beams, sampling))
    out = np.full((len(pixel_values), max((p.shape[1] for p in parts), default=0)), stop.pad, np.int64)
    for i, part in enumerate(parts):
        out[i * size : i * size + len(part), : part.shape[1]] = part
    return out


def scheduler(model: InternVL, slots: int) -> Scheduler:
    """Decodes up to ``slots`` captions at once, or as many as the step engine takes."""
    spec = model.components.spec("qllama_step")
    return Scheduler(_step(model), spec, min(slots, spec.axis("batch").max))


def start(model: InternVL, requests: Sequence[tuple[Floats, str]]) -> list[Started]:
    """What captions go on from: images [3, S, S] seen, each with its prompt read."""
    ids, mask = _encoded(model, [prompt for _, prompt in requests], 0)
    cache, first = _prefilled(model, np.stack([pixels for pixels, _ in requests]), ids, mask, 1)
    return [Started(cache.row(row), logits) for row, logits in enumerate(first)]


def _encoded(model: InternVL, prompts: Sequence[str], pad: int) -> tuple[Ids, Ids]:
    with model.components.timings.measure("tokenize"):
        return pad_prompts([model.tokenizer.encode_prompt(p) for p in prompts], pad)


def _step(model: InternVL) -> Run:
    return partial(model.components.run_device, "qllama_step")


def _prefilled(
    model: InternVL, pixel_values: Floats, prompt_ids: Ids, mask: Ids | None, new: int
) -> tuple[KVCache, Scores]:
    """Images and prompts that the step engine takes at once, seen and read."""
    run, spec = model.components.run_device, model.components.spec("qllama_step")
    names = [t.name for t in model.components.spec("qllama_query").outputs if "." in t.name]
    tokens = run("vision", {"pixel_values": pixel_values}, ["tokens"])
    queries = run("qllama_query", tokens, names)
    return prefill(_step(model), spec, queries, prompt_ids, mask, new)
