"""A search index of embeddings: exact with numpy, or FAISS for millions.

Both find by cosine. An index is stored as one safetensors file, so that opening one from a stranger runs
nothing; or it is a folder of shards (``ivl-export embed``), mapped.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..arrays import Array, Floats
from ..errors import InputError, IntegrityError, UsageError
from ..files.write import atomic
from ..progress import SILENT, Progress
from . import ivf
from .shards import Embedding, ShardFolder, open_folder
from .zero_shot import l2, top_of

Kind = Literal["numpy", "faiss"]
KINDS: tuple[Kind, ...] = ("numpy", "faiss")
_UNREADABLE = (OSError, SafetensorError, KeyError, ValueError, RecursionError, InputError, UsageError)
BLOCK = 1 << 16
"""Items compared at a time by default: bounds the memory of a search."""


class Index:
    """Vectors [N, E] with a name for each.

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
        self.width, self.kind, self.factory = width, _known(kind), factory
        self.names: Sequence[str] = []
        self.embedding: Embedding | None = None
        self._folder: ShardFolder | None = None
        self._ivf: ivf.Ivf | None = None
        self._blocks: list[Array] = []
        self._faiss: Any = _faiss_index(width, factory) if kind == "faiss" else None

    @classmethod
    def open(cls, folder: Path | str, kind: Kind = "numpy") -> Index:
        """The shards in ``folder``, mapped: nothing is read before a search, nothing can be added.

        ``embedding`` says what the vectors are: compare ``embedding.bundle`` with the bundle of the queries.

        Args:
            folder: what ``ivl-export embed`` made.
            kind: ``numpy`` compares with every vector; ``faiss`` searches the structure of :meth:`build`.

        Raises:
            IntegrityError: a shard is missing or damaged, or shards are of different bundles, settings or
                runs.
            UsageError: ``faiss``, and no structure was built.
            CapabilityError: pyarrow or FAISS is not installed.
        """
        shards = open_folder(Path(folder))
        index = cls(shards.embedding.width)
        index.kind, index.embedding, index._folder = _known(kind), shards.embedding, shards
        index.names, index._blocks = _ShardNames(shards), list(shards.blocks)
        index._ivf = ivf.Ivf.open(shards) if kind == "faiss" else None
        return index

    @staticmethod
    def build(folder: Path | str, lists: int | None = None, progress: Progress = SILENT) -> Path:
        """Make the structure on disk that ``open(folder, "faiss")`` searches; see :func:`.ivf.build`."""
        return ivf.build(open_folder(Path(folder)), lists, progress)

    def __len__(self) -> int:
        return len(self.names)

    def add(self, embeddings: Floats, names: Iterable[str]) -> None:
        """Add [n, E] embeddings (normalised here) under ``names``; InputError where the two do not fit."""
        if not isinstance(self.names, list):
            raise UsageError(
                "This index is a folder of shards.", "Nothing can be added to it.", "Use ivl-export embed."
            )
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
        self, queries: Floats, top: int = 5, *, block: int = BLOCK, probes: int | None = None
    ) -> tuple[NDArray[np.int64], Floats]:
        """The ``top`` items by cosine for each of [Q, E]: places [Q, K] and cosines [Q, K], best first.

        FAISS's approximate structures may find fewer; their places are then -1 and the cosines -inf. Without
        FAISS ``block`` items are compared at a time. ``probes``: lists that are read of a structure of
        :meth:`build`; more find more, and take longer.
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
        if self._ivf is not None:
            return self._ivf.search(unit, count, probes)
        if self._faiss is not None:
            scores, places = self._faiss.search(unit, count)
            return places.astype(np.int64), np.where(places < 0, -np.inf, scores).astype(np.float32)
        best = np.zeros((len(unit), 0), np.int64), np.zeros((len(unit), 0), np.float32)
        for start, items in self._pieces(block):
            scores = unit @ items.T
            nearest = top_of(scores, count)
            places = np.concatenate([best[0], nearest + start], 1)
            values = np.concatenate([best[1], np.take_along_axis(scores, nearest, 1)], 1)
            keep = top_of(values, count)
            best = np.take_along_axis(places, keep, 1), np.take_along_axis(values, keep, 1)
        return best

    def _pieces(self, size: int) -> Iterator[tuple[int, Floats]]:
        """First place and unit vectors of up to ``size`` items at a time; mapped ones are not copied."""
        first = 0
        for block in self._blocks:
            for start in range(0, len(block), size):
                yield first + start, self._units(block[start : start + size])
            first += len(block)

    def _units(self, block: Array) -> Floats:
        stored_so = self.embedding is None or (self.embedding.unit and block.dtype == np.float32)
        return block if stored_so else l2(np.asarray(block, np.float32))

    def vectors(self) -> Floats:
        """The unit vectors [N, E], in memory; of one mapped block of float32 the map itself."""
        if len(self._blocks) == 1:
            return self._units(self._blocks[0])
        blocks = [np.zeros((0, self.width), np.float32), *map(self._units, self._blocks)]
        whole: Floats = np.concatenate(blocks)
        if self._folder is None:
            self._blocks = [whole]
        return whole

    def save(self, path: Path) -> None:
        """Write ``path``, whole or not at all. An approximate FAISS structure is rebuilt when opened."""
        about = {"names": json.dumps(list(self.names)), "kind": self.kind, "factory": self.factory}
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


def _known(kind: Kind) -> Kind:
    if kind not in KINDS:
        raise UsageError(f"Unknown index {kind!r}.", f"Known: {', '.join(KINDS)}.", "Name one of these.")
    return kind


class _ShardNames(Sequence[str]):
    """The names of all rows of a folder; those of a shard are read when one of them is asked for."""

    def __init__(self, folder: ShardFolder) -> None:
        self._folder, self._ends = folder, folder.ends.tolist()
        self._names = lru_cache(maxsize=64)(lambda shard: folder.shards[shard].names())

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        row = int(place) % len(self)
        shard = bisect_right(self._ends, row) - 1
        name: str = self._names(shard)[row - self._ends[shard]]
        return name


def _faiss_index(width: int, factory: str) -> Any:
    faiss = ivf.load_faiss()
    try:
        return faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UsageError(f"FAISS knows no index {factory!r}.", str(error).strip().split("\n")[0]) from error
