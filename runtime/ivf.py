"""A search structure on disk for folders of shards that memory does not hold: FAISS's inverted lists.

Vectors are put into lists by their nearest of some centres, rounded to 8 bits a number. A search reads the
lists of a few centres, mapped from the disk, and scores the best candidates again with the exact vectors of
the shards. Large folders have several parts with the same centres, so that memory holds one part while it is
built. (FAISS can merge them in one file, but keeps the absolute path of it, and prints to stdout.)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Floats
from ..errors import BuildError, CapabilityError, IntegrityError, UsageError
from ..files.json import Count, Sha256, decode
from ..files.write import flush, write_text
from ..progress import SILENT, Progress
from .shards import ShardFolder
from .zero_shot import l2

SCHEMA = "ivl-export.ivf/1"
FOLDER, RECEIPT = "ivf", "ivf.json"
PART_BYTES = 1 << 31
"""Of the rounded vectors of a part."""
CHUNK = 1 << 16
"""Vectors that are added at a time."""
TRAINED = 40
"""Vectors a list that its centre is found with; FAISS asks for 39 at least."""
PROBES = 16
"""Lists that a search reads."""
CANDIDATES = 4
"""Candidates for each place of the result, whose exact cosines are computed."""


@dataclass(frozen=True)
class IvfReceipt:
    """What a structure was made of.

    Args:
        embedding, plan: digests of the shards' receipts.
        rows: vectors in it.
        lists: number of centres.
        parts: bytes of each part's file.
        faiss: the release that built it.
    """

    embedding: Sha256
    plan: Sha256
    rows: Count
    lists: Count
    parts: tuple[Count, ...]
    faiss: str
    schema: str = SCHEMA


def default_lists(rows: int) -> int:
    """Lists for so many vectors: about ``4 * sqrt(rows)``, a power of two, and enough vectors for each.

    200,000 vectors have 2,048 lists, 5 million 8,192.
    """
    wanted = 2 ** round(np.log2(max(1.0, 4 * np.sqrt(rows))))
    return int(max(1, min(wanted, rows // TRAINED)))


def build(folder: ShardFolder, lists: int | None = None, progress: Progress = SILENT) -> Path:
    """Make the structure of ``folder`` in its folder ``ivf``, which appears whole or not at all.

    Args:
        folder: the shards.
        lists: number of centres; None: :func:`default_lists`.
        progress: receives the vectors.

    Raises:
        UsageError: no vectors, or more lists than vectors.
        CapabilityError: FAISS is not installed.
        BuildError: the disk is full.
    """
    faiss = load_faiss()
    count = default_lists(folder.rows) if lists is None else lists
    if not 1 <= count <= folder.rows:
        raise UsageError(f"{count} lists of {folder.rows} vectors cannot be made.", "", "Give fewer lists.")
    out, staging = folder.folder / FOLDER, folder.folder / f".{FOLDER}.tmp"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        empty = staging / "empty"
        faiss.write_index(_trained(faiss, folder, count, progress), str(empty))
        sizes = tuple(_parts(faiss, empty, folder, staging, progress))
        empty.unlink()
        receipt = IvfReceipt(
            folder.embedding.digest, folder.plan, folder.rows, count, sizes, faiss.__version__
        )
        write_text(json.dumps(asdict(receipt), indent=1) + "\n", staging / RECEIPT)
        for path in (*staging.iterdir(), staging):
            flush(path)
        shutil.rmtree(out, ignore_errors=True)
        staging.replace(out)
    except (OSError, RuntimeError) as error:
        raise BuildError(
            f"Cannot write {out}.", f"{error}."[:400], "Make room, and build it again."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def _trained(faiss: Any, folder: ShardFolder, lists: int, progress: Progress) -> Any:
    """An empty index with its centres, found with vectors that are evenly spread over the shards."""
    rows = np.linspace(0, folder.rows - 1, min(folder.rows, TRAINED * lists)).astype(np.int64)
    progress.started("centres", None)
    index = faiss.index_factory(folder.embedding.width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(l2(folder.take(np.unique(rows))))
    return index


def _parts(faiss: Any, empty: Path, folder: ShardFolder, staging: Path, progress: Progress) -> Iterator[int]:
    """Write the parts; the bytes of each."""
    rows = max(1, PART_BYTES // folder.embedding.width)
    progress.started("inverted lists", folder.rows, "vectors")
    for number, start in enumerate(range(0, folder.rows, rows)):
        part, stop = faiss.read_index(str(empty)), min(start + rows, folder.rows)
        for first in range(start, stop, CHUNK):
            own = np.arange(first, min(first + CHUNK, stop), dtype=np.int64)
            part.add_with_ids(l2(folder.take(own)), own)
            progress.advanced(int(own[-1]) + 1)
        path = staging / _part_name(number)
        faiss.write_index(part, str(path))
        yield path.stat().st_size


def _part_name(number: int) -> str:
    return f"part-{number:04d}.faiss"


class Ivf:
    """An opened structure."""

    def __init__(self, folder: ShardFolder, parts: Sequence[Any]) -> None:
        self.folder, self._parts = folder, parts

    @classmethod
    def open(cls, folder: ShardFolder) -> Ivf:
        """The structure in the folder of the shards, its lists mapped.

        Raises:
            UsageError: there is none.
            IntegrityError: it is damaged, or of other shards.
            CapabilityError: FAISS is not installed.
        """
        faiss, place = load_faiss(), folder.folder / FOLDER
        if not (place / RECEIPT).is_file():
            raise UsageError(
                f"{folder.folder} has no search structure.",
                "",
                "Make it: Index.build(folder), or embed --index.",
            )
        receipt = decode(IvfReceipt, place / RECEIPT, what=f"The receipt in {place}", fix=_AGAIN)
        own = (folder.embedding.digest, folder.plan, folder.rows)
        if (receipt.embedding, receipt.plan, receipt.rows) != own:
            raise IntegrityError(f"{place} is of other shards than are in {folder.folder}.", "", _AGAIN)
        paths = [place / _part_name(number) for number in range(len(receipt.parts))]
        try:
            for path, size in zip(paths, receipt.parts, strict=True):
                if path.stat().st_size != size:
                    raise IntegrityError(f"{path} is damaged.", f"It should have {size} bytes.", _AGAIN)
            parts = [faiss.read_index(str(path), faiss.IO_FLAG_MMAP) for path in paths]
        except (OSError, RuntimeError) as error:
            raise IntegrityError(f"{place} cannot be opened.", f"{error}."[:400], _AGAIN) from error
        if any((part.d, part.nlist) != (folder.embedding.width, receipt.lists) for part in parts):
            raise IntegrityError(f"{place} is not what its receipt says.", "", _AGAIN)
        return cls(folder, parts)

    def search(
        self, queries: Floats, top: int, probes: int | None = None
    ) -> tuple[NDArray[np.int64], Floats]:
        """Rows [Q, K] and cosines [Q, K] of the best, exact in value; -1 and -inf where fewer were found.

        Args:
            queries: unit vectors [Q, E].
            top: K.
            probes: lists that are read; None: :data:`PROBES`.
        """
        faiss, count = load_faiss(), min(top * CANDIDATES, self.folder.rows)
        parameters = faiss.SearchParametersIVF(nprobe=probes or PROBES)
        queries = np.ascontiguousarray(queries)
        found = [part.search(queries, count, params=parameters) for part in self._parts]
        near = np.argsort(-np.concatenate([scores for scores, _ in found], 1), 1, kind="stable")[:, :count]
        rows = np.take_along_axis(np.concatenate([rows for _, rows in found], 1), near, 1)
        places = np.full((len(queries), top), -1, np.int64)
        scores = np.full((len(queries), top), -np.inf, np.float32)
        for i, query in enumerate(queries):
            own = np.sort(rows[i][(rows[i] >= 0) & (rows[i] < self.folder.rows)])
            cosines = l2(self.folder.take(own)) @ query
            best = np.argsort(-cosines, kind="stable")[:top]
            places[i, : len(best)], scores[i, : len(best)] = own[best], cosines[best]
        return places, scores


def load_faiss() -> Any:
    """The module faiss; CapabilityError if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise CapabilityError(
            "FAISS is not installed.",
            str(error),
            "Install it: pip install 'ivl-export[faiss]', or use a numpy index.",
        ) from error
    return faiss


_AGAIN = "Make it again: Index.build(folder), or 'ivl-export embed' with --index."
