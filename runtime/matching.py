"""Image-text matching (ITM): the probability that a text describes an image. QLLaMA reads both together.

Every pair is a separate pass, so it re-ranks the best of a search (InternVL paper section 3.3; ALBEF, arXiv
2107.07651). Needs ``qllama_itm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Floats
from ..errors import CapabilityError, InputError, UsageError
from ..inputs.preprocess import PixelValues, ResizeMode
from ..inputs.sources import text_sequence
from ..inputs.tokenizer import buckets_of
from .image_batches import Images, as_images
from .loaded import Loaded

COMPONENT = "qllama_itm"


@dataclass(frozen=True)
class Ranking:
    """Per query the best images: ``indices`` [Q, K] and ``scores`` [Q, K], best first.

    Scores are cosines, or those of :func:`rerank`.
    """

    indices: NDArray[np.int64]
    scores: Floats


def match(
    model: Loaded, images: Images, texts: Sequence[str], resize: ResizeMode | None = "square"
) -> Floats:
    """The probability that text i describes image i, [B] float32.

    Raises:
        InputError: another number of texts than of images, or an image cannot be read.
        CapabilityError: the bundle has no ``qllama_itm``.
    """
    images, texts = as_images(images), text_sequence(texts)
    if len(images) != len(texts):
        raise InputError(f"{len(texts)} texts for {len(images)} images.", "", "Give one for each.")
    pairs = np.arange(len(texts))
    return probability(log_odds(model, images, texts, pairs, pairs, resize))


def rerank(
    model: Loaded,
    queries: Sequence[str],
    images: Images,
    ranking: Ranking,
    resize: ResizeMode | None = "square",
) -> Ranking:
    """``ranking`` with its images in the order of both heads together.

    A score is the log odds of a match plus the contrastive logit, exp(logit_scale) times the cosine: two
    estimates of one thing, summed as BLIP-2's evaluation does. Places of -1 (nothing found) stay at the end.

    Args:
        model: its bundle has ``qllama_itm``.
        queries: the texts of ``ranking``, one a row.
        images: all that its indices are places in; only those it names are read, each once.
        ranking: the result of :meth:`.InternVL.retrieve` or of a search of an index.
        resize: see :class:`.InternVL`.

    Raises:
        UsageError: ``ranking`` is not of these queries and images.
        InputError, CapabilityError: as :func:`match`.
    """
    images, queries = as_images(images), text_sequence(queries, "query")
    order = checked(ranking, len(queries), len(images))
    rows, columns = np.nonzero(order >= 0)
    matched = log_odds(model, images, queries, order[rows, columns], rows, resize)
    return rescored(model, ranking, matched)


def checked(ranking: Ranking, queries: int, images: int) -> NDArray[np.int64]:
    """Its indices; UsageError if they are not those of so many queries and images."""
    order = np.asarray(ranking.indices)
    if order.ndim != 2 or len(order) != queries or not np.all((order >= -1) & (order < images)):
        raise UsageError(
            "This ranking is not of these queries and images.",
            f"Indices {list(order.shape)}, {queries} queries, {images} images.",
        )
    return order


def rescored(model: Loaded, ranking: Ranking, matched: NDArray[np.float64]) -> Ranking:
    """``ranking`` in the order of both heads: ``matched`` are the log odds of its pairs, row by row."""
    order, totals = np.asarray(ranking.indices), np.full(ranking.indices.shape, -np.inf)
    totals[order >= 0] = (
        matched + np.exp(model.bundle.manifest.model.logit_scale) * ranking.scores[order >= 0]
    )
    best = np.argsort(-totals, axis=1, kind="stable")
    scores = np.take_along_axis(totals, best, 1).astype(np.float32)
    return Ranking(np.take_along_axis(order, best, 1), scores)


def probability(log_odds: NDArray[np.float64]) -> Floats:
    """The probability of each match: a sigmoid without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -log_odds)), np.float32)


def check_matching(model: Loaded) -> None:
    """CapabilityError if the bundle has no ``qllama_itm``."""
    if COMPONENT not in model.bundle.manifest.components:
        raise CapabilityError(
            f"{model.bundle.root} cannot match images with texts.",
            f"It has no {COMPONENT}.",
            "Build it again with --itm.",
        )


def chosen(images: Images, places: NDArray[Any]) -> Images:
    """``images`` at ``places``, in that order."""
    if isinstance(images, PixelValues):
        return images[places.tolist()]
    return images[places] if isinstance(images, np.ndarray) else [images[i] for i in places]


def log_odds(
    model: Loaded,
    images: Images,
    texts: Sequence[str],
    shown: NDArray[Any],
    said: NDArray[Any],
    resize: ResizeMode | None = "square",
) -> NDArray[np.float64]:
    """Logit of a match less that of none, for image ``shown[i]`` with text ``said[i]``: [pairs].

    Images that are shown are read and encoded once each. Errors as :func:`match`.
    """
    check_matching(model)
    components = model.components
    if not len(shown):
        return np.empty(0)
    axis = components.spec(COMPONENT).axis("text")
    buckets = buckets_of(axis.min, axis.max)
    with components.timings.measure("tokenize"):
        ids, lengths = model.tokenizer.encode_contrastive(texts, buckets[-1], buckets, prefix="")
    width = np.asarray(buckets)[np.searchsorted(buckets, lengths)]  # padding is masked, and costs time
    used, place = np.unique(shown, return_inverse=True)
    out, limit, first = np.empty(len(shown)), components.batch, 0
    for pixels in model.pixel_batches(chosen(images, used), resize):
        tokens: Any = components.run_device("vision", {"pixel_values": pixels}, ["tokens"])["tokens"]
        here = np.flatnonzero((place >= first) & (place < first + len(pixels)))
        for size in np.unique(width[said[here]]):
            pairs = here[width[said[here]] == size]
            for start in range(0, len(pairs), limit):
                part = pairs[start : start + limit]
                feeds = {
                    "tokens": tokens[(place[part] - first).tolist()],
                    "input_ids": ids[said[part], :size],
                    "lengths": lengths[said[part]],
                }
                logits = components.run(COMPONENT, feeds, ["itm_logits"])["itm_logits"]
                out[part] = np.diff(logits.astype(np.float64))[:, 0]
        first += len(pixels)
    return out
