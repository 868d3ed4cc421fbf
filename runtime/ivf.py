"""A search structure on disk for folders of shards that memory does not hold: FAISS's inverted lists.

Vectors are put into lists by their nearest of some centres, rounded to 8 bits a number. A search reads the
lists of a few centres, mapped from the disk, and scores the best candidates again with the exact vectors of
the shards. It is built a chunk at a time, so that memory holds one chunk and the centres.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Floats
from ..errors import BuildError, CapabilityError, IntegrityError, UsageError
from ..files.hashing import sha256_file
from ..files.json import Count, Sha256, decode
from ..files.write import flush, write_text
from ..progress import SILENT, Progress
from .shards import ShardFolder
from .zero_shot import l2

SCHEMA = "ivl-export.ivf/1"
FOLDER, INDEX, LISTS, RECEIPT = "ivf", "index.faiss", "lists.ivfdata", "ivf.json"
CHUNK = 1 << 18
"""Vectors in memory at a time."""
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
        index: sha256 of its file.
        faiss: the release that built it.
    """

    embedding: Sha256
    plan: Sha256
    rows: Count
    lists: Count
    index: Sha256
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
        index = _trained(faiss, folder, count, progress)
        _fill(faiss, index, folder, staging, progress)
        digest = sha256_file(staging / INDEX)
        receipt = IvfReceipt(
            folder.embedding.digest, folder.plan, folder.rows, count, digest, faiss.__version__
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


def _fill(faiss: Any, index: Any, folder: ShardFolder, staging: Path, progress: Progress) -> None:
    from faiss.contrib.ondisk import merge_ondisk

    empty, first = staging / "empty", 0
    chunks: list[Path] = []
    faiss.write_index(index, str(empty))
    progress.started("inverted lists", folder.rows, "vectors")
    for block in folder.blocks:
        for start in range(0, len(block), CHUNK):
            part = l2(np.asarray(block[start : start + CHUNK], np.float32))
            own = faiss.read_index(str(empty))
            own.add_with_ids(part, np.arange(first, first + len(part), dtype=np.int64))
            chunks.append(staging / f"chunk-{len(chunks)}")
            faiss.write_index(own, str(chunks[-1]))
            first += len(part)
            progress.advanced(first)
    merge_ondisk(index, list(map(str, chunks)), str(staging / LISTS))
    faiss.write_index(index, str(staging / INDEX))
    for path in (empty, *chunks):
        path.unlink()


class Ivf:
    """An opened structure."""

    def __init__(self, folder: ShardFolder, index: Any) -> None:
        self.folder, self._index = folder, index

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
        try:
            if sha256_file(place / INDEX) != receipt.index:
                raise IntegrityError(f"{place / INDEX} is damaged.", "Its hash is not the receipt's.", _AGAIN)
            flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
            index = faiss.read_index(str(place / INDEX), flags)
        except (OSError, RuntimeError) as error:
            raise IntegrityError(f"{place} cannot be opened.", f"{error}."[:400], _AGAIN) from error
        return cls(folder, index)

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
        _, rows = self._index.search(np.ascontiguousarray(queries), count, params=parameters)
        places = np.full((len(queries), top), -1, np.int64)
        scores = np.full((len(queries), top), -np.inf, np.float32)
        for i, query in enumerate(queries):
            own = np.sort(rows[i][rows[i] >= 0])
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
