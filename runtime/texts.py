"""Embeddings of texts. Short ones run in shorter batches: padding on the right never changes an embedding."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache

import numpy as np

from ..errors import InputError
from ..inputs.preprocess import Tokenizer, buckets_of
from ..sampling import Ids
from .components import Components
from .image_batches import Floats
from .loaded import fixed


def encode_texts(components: Components, tokenizer: Tokenizer, texts: Sequence[str]) -> Floats:
    """Embeddings [B, E] float32, not normalised, of ``texts`` cut to what the engine takes."""
    with components.timings.measure("tokenize"):
        buckets = _buckets(components)
        ids, lengths = tokenizer.encode_contrastive(texts, buckets[-1], buckets)
    return encode_tokens(components, ids, lengths)


def encode_tokens(components: Components, ids: Ids, lengths: Ids) -> Floats:
    """Embeddings [B, E] float32, not normalised.

    Args:
        components: the engines.
        ids: int64 [B, T], as :meth:`~ivl_export.inputs.preprocess.Tokenizer.encode_contrastive` makes
        them; what
            stands behind a row's length counts for nothing.
        lengths: int64 [B], tokens of each row with bos and eos.

    Raises:
        InputError: a row is empty, or longer than ``ids`` or than the engine takes.
    """
    if ids.ndim != 2 or lengths.shape != ids.shape[:1]:
        raise InputError(
            "These tokens are not texts.",
            f"ids have shape {list(ids.shape)}, lengths {list(lengths.shape)}.",
            "Use Tokenizer.encode_contrastive, which gives both.",
        )
    if not len(lengths):
        shapes = {t.name: t.shape for t in components.spec("qllama_text").outputs}
        return np.zeros((0, fixed(shapes["text_embed"][1])), np.float32)
    buckets, each = _buckets(components), lengths.tolist()
    most = min(ids.shape[1], buckets[-1])
    if min(each) < 1 or max(each) > most:
        raise InputError(
            "These tokens are not texts.",
            f"Their lengths are {min(each)} to {max(each)}; 1 to {most} can be.",
            "Use Tokenizer.encode_contrastive, which cuts long ones.",
        )
    padded = [buckets[bisect_left(buckets, length)] for length in each]
    used = sorted(set(padded))
    if len(used) == 1:
        return _run(components, ids, lengths, used[0])
    parts = [(rows, _run(components, ids[rows], lengths[rows], size)) for size, rows in _rows(padded, used)]
    out = np.empty((len(lengths), parts[0][1].shape[1]), np.float32)
    for rows, embeddings in parts:
        out[rows] = embeddings
    return out


def _rows(padded: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Each of ``sizes`` with the rows that are padded to it."""
    return [(size, [row for row, own in enumerate(padded) if own == size]) for size in sizes]


def _run(components: Components, ids: Ids, lengths: Ids, size: int) -> Floats:
    """Embeddings of rows that are cut or padded to ``size`` tokens."""
    ids = ids[:, :size]
    if ids.shape[1] < size:
        ids = np.pad(ids, ((0, 0), (0, size - ids.shape[1])))
    feeds = {"input_ids": np.ascontiguousarray(ids), "lengths": lengths}
    found: Floats = components.run("qllama_text", feeds, ["text_embed"])["text_embed"]
    return found


def _buckets(components: Components) -> list[int]:
    """Lengths that texts are padded to."""
    axis = components.spec("qllama_text").axis("text")
    return _between(axis.min, axis.max)


_between = cache(buckets_of)
