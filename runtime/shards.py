"""Shards of embeddings: Parquet files whose vectors can be mapped into memory, with a receipt in the footer.

Columns: ``vector`` (fixed-size list of float32 or float16), ``key``, ``kind``, with tiles ``tile``, and
``sha256`` of the input. Vectors are stored uncompressed and plain, one page a row group. Parquet ends such a
page with the values themselves: they are the last ``rows * width`` numbers of the column chunk, which
:func:`open_shard` maps. Zeros before the chunk align them at 64 bytes (readers follow the offsets of the
footer). Every page has a checksum.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..arrays import Array, Floats
from ..errors import IntegrityError
from ..files.hashing import sha256_json
from ..files.json import Count, Sha256, decode, parse_json
from ..files.write import atomic_binary
from ..forks import cached_property
from ..inputs.tables import load_pyarrow

SCHEMA = "ivl-export.embeddings/1"
RECEIPT_KEY = b"ivl_export"
GROUP_BYTES = 128 << 20
"""Of the vectors of a row group."""
ALIGNMENT = 64
Dtype = Literal["float32", "float16"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16")


@dataclass(frozen=True)
class Embedding:
    """What vectors are: those of equal ``Embedding`` can be compared.

    Args:
        bundle: sha256 of the bundle's manifest, which has the hashes of all its files.
        name, recipe: of the bundle.
        backend: whose engines computed, and ``target`` which of them.
        width: numbers of a vector.
        dtype: their type.
        mode: ``InternVL-C`` or ``InternVL-G``; empty: of a chat model.
        unit: whether vectors have length 1.
        tiles: whether each tile of an image has a vector.
        resize: how images are made square; empty: as the checkpoint says.
        max_tiles: of an image; 0: as the checkpoint says.
        frames: of a video.
        approximate_jpeg: whether large JPEGs are decoded smaller.
    """

    bundle: Sha256
    name: str
    recipe: str
    backend: str
    target: str
    width: Count
    dtype: Dtype
    mode: str
    unit: bool
    tiles: bool
    resize: str
    max_tiles: Count
    frames: Count
    approximate_jpeg: bool

    @property
    def digest(self) -> str:
        """sha256 of all fields."""
        return sha256_json(asdict(self))

    def differences(self, other: Embedding) -> list[str]:
        """``name: one, other`` of each field that is not equal."""
        own, theirs = asdict(self), asdict(other)
        return [
            f"{key}: {str(own[key])[:16]}, {str(theirs[key])[:16]}" for key in own if own[key] != theirs[key]
        ]


@dataclass(frozen=True)
class Quarantined:
    """An input that could not be embedded: its key, kind, and why."""

    key: str
    kind: str
    reason: str


@dataclass(frozen=True)
class ShardReceipt:
    """What a shard holds, in its footer.

    Args:
        embedding: what its vectors are.
        plan: sha256 of the plan that it belongs to.
        shard, shards: its number, and how many there are.
        items: inputs, with those in quarantine.
        inputs: sha256 of the keys and contents of all of them.
        rows: vectors.
        quarantine: inputs that could not be embedded.
        versions: of the programs that computed and wrote it.
    """

    embedding: Embedding
    plan: Sha256
    shard: Count
    shards: Count
    items: Count
    inputs: Sha256
    rows: Count
    quarantine: tuple[Quarantined, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    schema: str = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"has the schema {self.schema!r}, not {SCHEMA!r}")


def shard_name(number: int) -> str:
    """The file of shard ``number``."""
    return f"shard-{number:06d}.parquet"


def write_shard(path: Path, receipt: ShardReceipt, columns: Mapping[str, Sequence[Any] | Array]) -> None:
    """Write a shard, whole or not at all; its bytes follow from the arguments and pyarrow's version.

    Args:
        path: the file.
        receipt: for the footer.
        columns: ``vector`` [rows, width] of the receipt's type; ``key``, ``kind``, ``sha256`` (32 bytes
            each); and ``tile`` where tiles have vectors.

    Raises:
        OSError: the file system refuses.
    """
    pa = _pyarrow()
    table = _table(pa, receipt, columns)
    rows = max(1, GROUP_BYTES // max(1, columns["vector"].itemsize * receipt.embedding.width))  # type: ignore[union-attr]
    parts = [table.slice(start, rows) for start in range(0, receipt.rows, rows)]
    footer = {RECEIPT_KEY: json.dumps(asdict(receipt), sort_keys=True, separators=(",", ":")).encode()}
    extra = _extra_bytes(pa, table.schema, parts, receipt.embedding)
    with atomic_binary(path, durable=True, exclusive=True) as file:
        sink = pa.PythonFile(file, "w")
        with pa.parquet.ParquetWriter(sink, table.schema, **_OPTIONS) as writer:
            for part, before in zip(parts, extra, strict=True):
                sink.write(bytes(-(sink.tell() + before) % ALIGNMENT))
                writer.write_table(part, row_group_size=len(part))
            writer.add_key_value_metadata(footer)


_PAGE = 1 << 30
_OPTIONS: dict[str, Any] = {
    "compression": {"vector": "none", "key": "zstd", "kind": "zstd", "tile": "zstd", "sha256": "none"},
    "use_dictionary": ["kind"],
    "write_statistics": False,
    "data_page_size": _PAGE,
    "write_batch_size": _PAGE,
    "write_page_checksum": True,
}
"""One page for a column of a row group: more than :data:`GROUP_BYTES` never come."""


def _table(pa: Any, receipt: ShardReceipt, columns: Mapping[str, Any]) -> Any:
    vectors = np.ascontiguousarray(columns["vector"])
    values = pa.array(vectors.reshape(-1))
    kind = pa.list_(pa.field("element", values.type, nullable=False), receipt.embedding.width)
    fields = [("vector", kind), ("key", pa.string()), ("kind", pa.string())]
    fields += [("tile", pa.int32())] if receipt.embedding.tiles else []
    fields.append(("sha256", pa.binary(32)))
    schema = pa.schema([pa.field(name, type_, nullable=False) for name, type_ in fields])
    arrays = [pa.FixedSizeListArray.from_arrays(values, type=kind)]
    arrays += [pa.array(columns[name], type_) for name, type_ in fields[1:]]
    return pa.table(arrays, schema=schema)


def _extra_bytes(pa: Any, schema: Any, parts: Sequence[Any], embedding: Embedding) -> list[int]:
    """Bytes of each row group's vector chunk before its values: the header of the page and its levels."""
    written: list[Any] = []
    with pa.parquet.ParquetWriter(
        pa.MockOutputStream(), schema, metadata_collector=written, **_OPTIONS
    ) as writer:
        for part in parts:
            writer.write_table(part, row_group_size=len(part))
    groups = [written[0].row_group(i) for i in range(written[0].num_row_groups)]
    size = np.dtype(embedding.dtype).itemsize * embedding.width
    return [group.column(0).total_compressed_size - group.num_rows * size for group in groups]


@dataclass(frozen=True)
class Shard:
    """An opened shard: its receipt, and its vectors as mapped blocks [rows, width]."""

    path: Path
    receipt: ShardReceipt
    blocks: tuple[Array, ...]

    def column(self, name: str) -> list[Any]:
        """A column other than the vectors."""
        values: list[Any] = _read(self.path, [name]).column(0).to_pylist()
        return values

    def names(self) -> list[str]:
        """Keys, with tiles ``KEY#TILE``."""
        keys = self.column("key")
        if not self.receipt.embedding.tiles:
            return keys
        return [f"{key}#{tile}" for key, tile in zip(keys, self.column("tile"), strict=True)]


def read_receipt(path: Path) -> ShardReceipt:
    """The receipt of a shard.

    Raises:
        IntegrityError: it is not a shard, or cut off.
    """
    return _footer(path)[0]


def open_shard(path: Path) -> Shard:
    """A shard with its vectors mapped; errors as :func:`read_receipt`, and where they cannot be mapped."""
    receipt, metadata = _footer(path)
    embedding, blocks, size = receipt.embedding, [], path.stat().st_size
    dtype, rows = np.dtype(embedding.dtype), 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunk = group.column(0)
        nbytes = group.num_rows * embedding.width * dtype.itemsize
        begin = chunk.data_page_offset + chunk.total_compressed_size - nbytes
        plain = chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
        if not plain or begin < chunk.data_page_offset or begin + nbytes > size:
            raise _damaged(path, "its vectors are not where a shard has them")
        if group.num_rows:
            shape = (group.num_rows, embedding.width)
            blocks.append(np.memmap(path, dtype, "r", begin, shape))
        rows += group.num_rows
    if rows != receipt.rows:
        raise _damaged(path, f"it has {rows} rows, its receipt says {receipt.rows}")
    return Shard(path, receipt, tuple(blocks))


def check_shard(path: Path) -> None:
    """Read all of a shard; IntegrityError if a page differs from its checksum."""
    _read(path, None)


def _footer(path: Path) -> tuple[ShardReceipt, Any]:
    pa = _pyarrow()
    try:
        with pa.parquet.ParquetFile(path) as file:
            metadata = file.metadata
            data = parse_json((metadata.metadata or {})[RECEIPT_KEY])
            first = file.schema_arrow.field(0)
            width, kind = first.type.list_size, first.type.value_type
    except (OSError, pa.ArrowException, KeyError, ValueError, AttributeError, IndexError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error
    receipt = decode(ShardReceipt, data, what=f"The receipt in {path}", fix=_AGAIN)
    wanted = {"float32": pa.float32(), "float16": pa.float16()}[receipt.embedding.dtype]
    if (width, kind) != (receipt.embedding.width, wanted):
        raise _damaged(path, f"its vectors are {kind} [{width}], which is not what its receipt says")
    return receipt, metadata


def _read(path: Path, columns: list[str] | None) -> Any:
    pa = _pyarrow()
    try:
        with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            if columns is not None:
                return file.read(columns, use_threads=False)
            for group in range(file.metadata.num_row_groups):
                file.read_row_group(group, use_threads=False)
            return None
    except (OSError, pa.ArrowException, KeyError) as error:
        raise _damaged(path, str(error)) from error


_AGAIN = "Delete it, and run the same 'ivl-export embed' again: it makes what is missing."


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(f"{path} is not a whole shard of embeddings.", f"{why}."[:400], _AGAIN)


def _pyarrow() -> Any:
    return load_pyarrow("Shards of embeddings", "embed")


@dataclass(frozen=True)
class ShardFolder:
    """A finished folder of shards, mapped.

    Args:
        folder: where it is.
        embedding: what all its vectors are.
        plan: that all its shards belong to.
        shards: in order.
    """

    folder: Path
    embedding: Embedding
    plan: str
    shards: tuple[Shard, ...]

    @cached_property
    def ends(self) -> Array:
        """Rows up to the end of each shard, int64 [shards + 1]; the first is 0."""
        return np.cumsum([0, *(shard.receipt.rows for shard in self.shards)])

    @property
    def rows(self) -> int:
        """All vectors."""
        return int(self.ends[-1])

    @cached_property
    def blocks(self) -> tuple[Array, ...]:
        """Mapped vectors, in order."""
        return tuple(block for shard in self.shards for block in shard.blocks)

    @cached_property
    def block_ends(self) -> Array:
        """Rows up to the end of each block, int64 [blocks + 1]; the first is 0."""
        return np.cumsum([0, *map(len, self.blocks)])

    def take(self, rows: Array) -> Floats:
        """The vectors of these rows, float32 [n, E], as they are stored."""
        out = np.empty((len(rows), self.embedding.width), np.float32)
        blocks = np.searchsorted(self.block_ends, rows, "right") - 1
        for block in np.unique(blocks).tolist():
            own = blocks == block
            out[own] = self.blocks[block][rows[own] - self.block_ends[block]]
        return out


def open_folder(folder: Path) -> ShardFolder:
    """All shards that ``ivl-export embed`` made in ``folder``, mapped.

    Raises:
        IntegrityError: there are none, one is missing or damaged, or they are not of one bundle, setting and
            plan.
    """
    paths = sorted(folder.glob("shard-*.parquet"))
    if not paths:
        raise IntegrityError(
            f"{folder} has no embeddings.", "There is no shard in it.", "Make them: ivl-export embed."
        )
    shards = [open_shard(path) for path in paths]
    first = shards[0].receipt
    for shard in shards[1:]:
        other = shard.receipt
        if other.embedding != first.embedding:
            unlike = "; ".join(first.embedding.differences(other.embedding))
            raise _mixed(folder, f"{paths[0].name} and {shard.path.name} differ in {unlike}.")
        if other.plan != first.plan:
            raise _mixed(folder, f"{paths[0].name} and {shard.path.name} are of two plans.")
    numbers = {shard.receipt.shard: shard for shard in shards}
    missing = [number for number in range(first.shards) if number not in numbers]
    if missing or len(shards) != first.shards:
        why = f"{shard_name(missing[0])} is missing" if missing else "a shard is there twice"
        raise IntegrityError(
            f"{folder} is not whole: {len(shards)} of {first.shards} shards.",
            f"{why}.",
            "Run the same 'ivl-export embed' again: it makes what is missing.",
        )
    return ShardFolder(folder, first.embedding, first.plan, tuple(numbers[i] for i in range(first.shards)))


def _mixed(folder: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"{folder} mixes embeddings that cannot be compared.",
        why,
        "Keep what was made together in a folder of its own.",
    )
