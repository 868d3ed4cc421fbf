"""Runs a model over a data set in pieces: unit embeddings of texts and images, captions, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..errors import InputError
from ..progress import SILENT, Progress, reported
from ..runtime.matching import Ranking, log_odds, rescored
from ..runtime.zero_shot import ensemble, fill, l2, rank
from .datasets import Captioned, Classes, Labelled
from .files import Item, Reader
from .scores import CHUNK, Measure, check_cider, cider, mean, ranks, share

if TYPE_CHECKING:
    from ..inputs.preprocess import ResizeMode
    from ..runtime import InternVL, Mode

PIECE = 32  # decoded images, or texts, held at a time
BEAMS, MIN_TOKENS, MAX_TOKENS = 5, 8, 30

T = TypeVar("T", bound=Item)


class Runner:
    """A model, the mode its images are embedded in, and the receiver of the progress."""

    def __init__(self, model: InternVL, mode: Mode, progress: Progress = SILENT) -> None:
        self.model, self.mode, self.progress = model, mode, progress

    def classify(
        self, classes: Classes, items: Sequence[Labelled], reader: Reader
    ) -> tuple[list[Labelled], list[Measure]]:
        """Zero-shot accuracy of ``items``: top-1, top-5, their mean, and recall averaged over classes."""
        texts = [fill(t, name) for name in classes.names for t in classes.templates]
        weights = ensemble(self.texts(texts, "class prompts"), len(classes.names))
        readable, embeds = self.images(items, reader, "center_crop")
        place = ranks(embeds, weights, [np.array([item.label]) for item in readable])
        labels = np.array([item.label for item in readable])
        recalls = [(place[labels == label] == 0).mean() for label in np.unique(labels)]
        measures = [share("top-1", place < 1), share("top-5", place < 5)]
        measures.append(mean("mean of top-1 and top-5", ((place < 1) + 1.0 * (place < 5)) / 2))
        return readable, [*measures, mean("mean recall of the classes", recalls)]

    def retrieve(
        self, items: Sequence[Captioned], reader: Reader, rerank: int | None = None
    ) -> tuple[list[Captioned], list[Measure]]:
        """Recall at 1, 5 and 10 both ways; an image is found by any of its captions.

        With ``rerank`` also that of the best so many in the order of both heads.
        """
        readable, images = self.images(items, reader, "square")
        said = [text for item in readable for text in item.captions]
        owner = np.repeat(np.arange(len(readable)), [len(item.captions) for item in readable])
        texts = l2(self.texts(said, "captions"))
        own = [np.flatnonzero(owner == i) for i in range(len(readable))], [np.array([i]) for i in owner]
        ways = ("image to text", "text to image")
        ranks_by = {
            (ways[0], ""): ranks(images, texts, own[0]),
            (ways[1], ""): ranks(texts, images, own[1]),
        }
        if rerank is not None:
            searched = best(images, texts, rerank), best(texts, images, rerank)
            with reported(self.progress, "matching", len(readable)) as advanced:
                both = matched(self.model, readable, said, *searched, PIECE, advanced)
            for way, ranking, right in zip(ways, both, own, strict=True):
                ranks_by[way, f", best {rerank} re-ranked"] = places_after(ranks_by[way, ""], ranking, right)
        order = sorted(ranks_by, key=lambda key: ways.index(key[0]))
        measures = [
            share(f"{way} R@{k}{how}", ranks_by[way, how] < k) for way, how in order for k in (1, 5, 10)
        ]
        return readable, measures

    def caption(self, items: Sequence[Captioned], reader: Reader) -> tuple[list[Captioned], list[Measure]]:
        """CIDEr of the model's captions."""
        check_cider()
        readable: list[Captioned] = []
        said: list[str] = []
        with reported(self.progress, "captions", len(items)) as advanced:
            for piece in reader.pieces(items, PIECE, partial(self.model.read_images, resize="square")):
                said += self.model.caption(
                    piece.pixels, num_beams=BEAMS, max_new_tokens=MAX_TOKENS, min_new_tokens=MIN_TOKENS
                )
                readable += piece.items
                advanced(len(readable) + len(reader.skipped))
        return readable, [mean("CIDEr", cider(said, [item.captions for item in readable]))]

    def texts(self, texts: Sequence[str], name: str) -> Array:
        """Embeddings [len(texts), E], not normalised."""
        parts = []
        with reported(self.progress, name, len(texts)) as advanced:
            for start in range(0, len(texts), PIECE):
                parts.append(self.model.encode_text(texts[start : start + PIECE]))
                advanced(min(start + PIECE, len(texts)))
        return np.concatenate(parts)

    def images(self, items: Sequence[T], reader: Reader, resize: ResizeMode) -> tuple[list[T], Array]:
        """The items that could be read and a unit vector for each [N, E]: the mean over its frames."""
        readable: list[T] = []
        parts = []
        with reported(self.progress, "images", len(items)) as advanced:
            for piece in reader.pieces(items, PIECE, partial(self.model.read_images, resize=resize)):
                embeds = l2(self.model.encode_image(piece.pixels, self.mode))
                starts = np.cumsum([0, *piece.counts[:-1]])
                parts.append(l2(np.add.reduceat(embeds, starts, axis=0)))
                readable += piece.items
                advanced(len(readable) + len(reader.skipped))
        return readable, np.concatenate(parts)


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
    advanced: Callable[[int], object],
) -> tuple[Ranking, Ranking]:
    """Both rankings in the order of both heads; an image is read once, and a pair of both matched once.

    Args:
        model: its bundle has ``qllama_itm``.
        items: the images.
        texts: all captions.
        of_images: for each image the captions found.
        of_texts: for each caption the images found.
        piece: images in memory at a time.
        advanced: callback with the number of images done.
    """
    pairs = [
        np.arange(len(items))[:, None] * len(texts) + of_images.indices,
        of_texts.indices * len(texts) + np.arange(len(texts))[:, None],
    ]
    pair_numbers = np.unique(np.concatenate([p.ravel() for p in pairs]))
    odds, (shown, said), first = np.empty(len(pair_numbers)), np.divmod(pair_numbers, len(texts)), 0
    reader = Reader(len(items))
    for batch in reader.pieces(items, piece, partial(model.read_images, resize="square")):
        here = (shown >= first) & (shown < first + len(batch.items))
        odds[here] = log_odds(model, batch.pixels.values, texts, shown[here] - first, said[here])
        first += len(batch.items)
        advanced(first)
    if reader.skipped:
        raise InputError(
            f"{reader.skipped[0]['file']} changed while it was measured.", reader.skipped[0]["why"]
        )
    again = (odds[np.searchsorted(pair_numbers, p.ravel())] for p in pairs)
    return rescored(model, of_images, next(again)), rescored(model, of_texts, next(again))


def places_after(place: Places, ranking: Ranking, owner: Sequence[Places]) -> Places:
    """``place`` [Q] (of :func:`.scores.ranks`) of each query's best right item in ``ranking`` [Q, K].

    Items outside the search's best K keep their places. Ties and NaN count against the query.
    """
    out: Places = place.copy()
    for row in np.flatnonzero(place < ranking.indices.shape[1]).tolist():
        scores, own = ranking.scores[row], np.isin(ranking.indices[row], owner[row])
        if own.any():  # equals within rounding may have taken its place
            out[row] = (~own & ~(scores < scores[own].max())).sum()
    return out
