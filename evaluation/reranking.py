"""The best of a search in the order of both heads, contrastive and matching: what that does to recall."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..runtime.matching import Ranking, log_odds, rescored
from ..runtime.zero_shot import rank
from .datasets import Captioned
from .files import Reader
from .scores import CHUNK, Array

if TYPE_CHECKING:
    from ..runtime import InternVL
    from .runner import Advanced

Places = NDArray[np.int64]


def best(queries: Array, items: Array, top: int) -> Ranking:
    """The ``top`` items [N, E] for each query [Q, E], rows of unit vectors."""
    parts = [rank(queries[start : start + CHUNK], items, top) for start in range(0, len(queries), CHUNK)]
    return Ranking(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))


def matched(
    model: InternVL,
    items: Sequence[Captioned],
    texts: Sequence[str],
    of_images: Ranking,
    of_texts: Ranking,
    piece: int,
    advanced: Advanced,
) -> tuple[Ranking, Ranking]:
    """Both rankings in the order of both heads; an image is read once, and a pair of both matched once.

    Args:
        model: its bundle has ``qllama_itm``.
        items: the images.
        texts: all captions.
        of_images: for each image the captions found.
        of_texts: for each caption the images found.
        piece: images in memory at a time.
        advanced: is told how many images are done.
    """
    pairs = [
        np.arange(len(items))[:, None] * len(texts) + of_images.indices,
        of_texts.indices * len(texts) + np.arange(len(texts))[:, None],
    ]
    wanted = np.unique(np.concatenate([p.ravel() for p in pairs]))
    odds, (shown, said), first = np.empty(len(wanted)), np.divmod(wanted, len(texts)), 0
    reader = Reader(len(items))
    for found in reader.pieces(items, piece, partial(model.read_images, resize="square")):
        here = (shown >= first) & (shown < first + len(found.items))
        odds[here] = log_odds(model, found.pixels.values, texts, shown[here] - first, said[here])
        first += len(found.items)
        advanced(first)
    if reader.skipped:
        raise InputError(
            f"{reader.skipped[0]['file']} changed while it was measured.", reader.skipped[0]["why"]
        )
    again = (odds[np.searchsorted(wanted, p.ravel())] for p in pairs)
    return rescored(model, of_images, next(again)), rescored(model, of_texts, next(again))


def moved(place: Places, ranking: Ranking, owner: Sequence[Places]) -> Places:
    """``place`` [Q] (of :func:`.scores.ranks`) of each query's best right item in ``ranking`` [Q, K].

    What the search had not among its best K stays where it was. Ties and NaN count against the query.
    """
    out: Places = place.copy()
    for row in np.flatnonzero(place < ranking.indices.shape[1]).tolist():
        scores, own = ranking.scores[row], np.isin(ranking.indices[row], owner[row])
        if own.any():  # equals within rounding may have taken its place
            out[row] = (~own & ~(scores < scores[own].max())).sum()
    return out
