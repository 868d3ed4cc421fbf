"""A search index of embeddings: exact with numpy, or FAISS for millions.

Both hold unit vectors and find by cosine. An index is stored as one safetensors file, so that opening one
from a stranger runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..arrays import Floats
from ..errors import CapabilityError, InputError, IntegrityError, UsageError
from ..files.write import atomic
from .zero_shot import l2, top_of

Kind = Literal["numpy", "faiss"]
KINDS: tuple[Kind, ...] = ("numpy", "faiss")
_UNREADABLE = (OSError, SafetensorError, KeyError, ValueError, RecursionError, InputError, UsageError)
BLOCK = 1 << 16
"""Items compared at a time by default: bounds the memory of a search."""


class Index:
    """Unit vectors [N, E] with a name for each.

    Args:
        width: E.
        kind: ``numpy`` compares with every item; ``faiss`` does so in FAISS (extra ``faiss``), or
            with ``factory`` in one of its approximate structures.
        factory: FAISS's index description, ``HNSW32`` or ``IVF1024,PQ64``; those that need training are
            trained on the first embeddings added.

    Raises:
        UsageError: an unknown kind.
        CapabilityError: FAISS is not installed.
    """

    def __init__(self, width: int, kind: Kind = "numpy", factory: str = "Flat") -> None:
        if kind not in KINDS:
            raise UsageError(f"Unknown index {kind!r}.", f"Known: {', '.join(KINDS)}.", "Name one of these.")
        self.width, self.kind, self.factory = width, kind, factory
        self.names: list[str] = []
        self._blocks: list[Floats] = []
        self._faiss: Any = _faiss_index(width, factory) if kind == "faiss" else None

    def __len__(self) -> int:
        return len(self.names)

    def add(self, embeddings: Floats, names: Iterable[str]) -> None:
        """Add [n, E] embeddings (normalised here) under ``names``; InputError where the two do not fit."""
        new, labels = np.ascontiguousarray(l2(embeddings)), list(names)
        if new.ndim != 2 or new.shape[1] != self.width or len(new) != len(labels):
            raise InputError(
                "These embeddings do not fit the index.",
                f"They are {list(new.shape)} with {len(labels)} names; it holds [n, {self.width}].",
                "Embed with the model that the index was made with.",
            )
        if not np.isfinite(new).all():
            raise InputError("An embedding is not finite.", "It could not be found again.")
        self.names += labels
        self._blocks.append(new)
        if self._faiss is not None and len(new):
            if not self._faiss.is_trained:
                self._faiss.train(new)
            self._faiss.add(new)

    def search(
        self, queries: Floats, top: int = 5, *, block: int = BLOCK
    ) -> tuple[NDArray[np.int64], Floats]:
        """The ``top`` items by cosine for each of [Q, E]: places [Q, K] and cosines [Q, K], best first.

        FAISS's approximate structures may find fewer; their places are then -1 and the cosines -inf. Without
        FAISS ``block`` items are compared at a time.
        """
        if top < 1:
            raise UsageError(f"top is {top}.", fix="Ask for 1 or more.")
        unit, count = np.ascontiguousarray(l2(queries)), min(top, len(self))
        if unit.ndim != 2 or unit.shape[1] != self.width:
            raise InputError(
                "These queries do not fit the index.", f"They are {list(unit.shape)}, not [Q, {self.width}]."
            )
        if not count:
            return np.zeros((len(unit), 0), np.int64), np.zeros((len(unit), 0), np.float32)
        if self._faiss is not None:
            scores, places = self._faiss.search(unit, count)
            return places.astype(np.int64), np.where(places < 0, -np.inf, scores).astype(np.float32)
        best = np.zeros((len(unit), 0), np.int64), np.zeros((len(unit), 0), np.float32)
        items = self.vectors()
        for start in range(0, len(items), block):
            scores = unit @ items[start : start + block].T
            nearest = top_of(scores, count)
            places = np.concatenate([best[0], nearest + start], 1)
            values = np.concatenate([best[1], np.take_along_axis(scores, nearest, 1)], 1)
            keep = top_of(values, count)
            best = np.take_along_axis(places, keep, 1), np.take_along_axis(values, keep, 1)
        return best

    def vectors(self) -> Floats:
        """The unit vectors [N, E]."""
        if len(self._blocks) != 1:
            self._blocks = [np.concatenate([np.zeros((0, self.width), np.float32), *self._blocks])]
        return self._blocks[0]

    def save(self, path: Path) -> None:
        """Write ``path``, whole or not at all. An approximate FAISS structure is rebuilt when opened."""
        about = {"names": json.dumps(self.names), "kind": self.kind, "factory": self.factory}
        with atomic(path) as partial:
            save_file({"embeddings": self.vectors()}, partial, about)

    @classmethod
    def load(cls, path: Path, kind: Kind | None = None) -> Index:
        """Open a file of :meth:`save`, as ``kind`` (None: as it was).

        Raises:
            IntegrityError: the file is missing, damaged, or no index.
            CapabilityError: FAISS is not installed.
        """
        try:
            with safe_open(path, "numpy") as file:
                about: dict[str, str] = file.metadata() or {}
                vectors = file.get_tensor("embeddings")
            names = json.loads(about["names"])
            if not _names_fit(names, vectors):
                raise ValueError("names and embeddings do not fit")
            index = cls(vectors.shape[1], kind or about["kind"], about["factory"])  # type: ignore[arg-type]
            index.add(vectors, names)
        except _UNREADABLE as error:
            raise IntegrityError(f"{path} is not an index.", str(error), "Make it again.") from error
        return index


def _names_fit(names: object, vectors: NDArray[Any]) -> bool:
    whole = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return whole and vectors.ndim == 2 and vectors.dtype == np.float32


def _faiss_index(width: int, factory: str) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise CapabilityError(
            "FAISS is not installed.",
            str(error),
            "Install it: pip install 'ivl-export[faiss]', or use a numpy index.",
        ) from error
    try:
        return faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UsageError(f"FAISS knows no index {factory!r}.", str(error).strip().split("\n")[0]) from error
