"""Hugging Face datasets on disk: a folder of ``save_to_disk`` (Arrow), or a downloaded snapshot (Parquet).

Needs pyarrow, and nothing else of the datasets library: images are structs of bytes and path, or bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files.lfs import refuse_lfs_pointer
from ..files.paths import inside
from ..files.text import read_text
from ..inputs.tables import IMAGE_COLUMNS, TEXT_COLUMNS, is_image, is_text, load_pyarrow
from .dataset import Stored, read_bytes
from .entries import MAX_ENTRIES, Entry

if TYPE_CHECKING:
    import pyarrow as pa


def dataset_files(folder: Path) -> list[Path]:
    """The Arrow or Parquet files of a data set's folder, sorted; empty if it is none.

    Raises:
        InputError: a folder of several splits.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.parent for p in folder.glob("*/state.json"))
        if len(splits) != 1:
            names = ", ".join(p.name for p in splits) or "none"
            raise InputError(
                f"{folder} holds several splits.", f"They are {names}.", f"Name one: {folder / 'train'}."
            )
        return dataset_files(splits[0])
    state = folder / "state.json"
    if state.is_file():
        try:
            data = json.loads(read_text(state))
            named = [entry["filename"] for entry in data["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{state} lists no data files.", f"{error!r}", "Save the data set again."
            ) from error
        return [inside(folder, str(name), f"{state}") for name in named]
    return sorted(p for p in folder.rglob("*.parquet") if p.is_file())


def table_entries(files: Sequence[Path], root: Path, columns: tuple[str, ...] = ()) -> list[Entry]:
    """The rows of ``files`` as candidates; no image is read.

    Args:
        files: Arrow or Parquet files of one schema.
        root: the data set's folder, which images given by path may not leave.
        columns: of the image and of the caption; those left out are found by their usual names.

    Raises:
        CapabilityError: pyarrow is not installed.
        InputError: a broken file, or columns that are missing or of another type (the columns of the file
            are named).
    """
    entries: list[Entry] = []
    for file in files:
        schema, rows = _opened(file)
        image, caption = _columns(schema, file, columns)
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
        if len(entries) + rows > MAX_ENTRIES:
            raise InputError(f"{root} has over {MAX_ENTRIES:,} rows.", fix="Name one split, or fewer files.")
        for row in range(rows):
            text = _Caption(file, caption, row)
            entries.append(Entry(f"{name}#{row}", _Image(file, root, image, row), text))
    return entries


@dataclass(frozen=True)
class _Image(Stored):
    """The image of a row: bytes, or a struct of bytes and path as the datasets library stores it."""

    file: Path
    root: Path
    column: str
    row: int

    def read(self) -> bytes:
        """Its encoded bytes."""
        value = _value(self.file, self.column, self.row)
        where = f"{self.file}, row {self.row}"
        if isinstance(value, dict):
            path = value.get("path")
            value = value.get("bytes")
            if value is None and isinstance(path, str):
                return read_bytes(inside(self.root, path, where))
        if not isinstance(value, bytes):
            raise InputError(f"{where} has no image.", f"Its {self.column} is empty.")
        return value


@dataclass(frozen=True)
class _Caption:
    """Reads the caption of a row; of several the first."""

    file: Path
    column: str | None
    row: int

    def __call__(self) -> str | None:
        value = _value(self.file, self.column, self.row) if self.column is not None else None
        if isinstance(value, list):
            value = value[0] if value else None
        return value if isinstance(value, str) else None


def _pyarrow() -> Any:
    return load_pyarrow("Hugging Face data sets", "datasets")


def _opened(file: Path) -> tuple[pa.Schema, int]:
    """Schema and number of rows."""
    pa = _pyarrow()
    try:
        if file.suffix == ".parquet":
            with pa.parquet.ParquetFile(file) as parquet:
                return parquet.schema_arrow, parquet.metadata.num_rows
        return (table := _table(file)).schema, table.num_rows
    except (OSError, pa.ArrowException) as error:
        refuse_lfs_pointer(file)
        raise InputError(f"{file} cannot be read.", f"{error}.", "Download the data set again.") from error


@lru_cache(maxsize=16)
def _table(file: Path) -> pa.Table:
    """An Arrow file, mapped into memory: rows are read when they are used."""
    pa = _pyarrow()
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


@lru_cache(maxsize=2)
def _group(file: Path, group: int, column: str) -> pa.ChunkedArray:
    """One column of a row group of a Parquet file."""
    with _pyarrow().parquet.ParquetFile(file) as parquet:
        return parquet.read_row_group(group, columns=[column]).column(0)


def _value(file: Path, column: str, row: int) -> Any:
    pa = _pyarrow()
    try:
        if file.suffix != ".parquet":
            return _table(file).column(column)[row].as_py()
        first = 0
        for group, count in enumerate(_group_rows(file)):
            if row < first + count:
                return _group(file, group, column)[row - first].as_py()
            first += count
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file}, row {row} cannot be read.", f"{error}.") from error
    raise InputError(f"{file} has no row {row}.")


@lru_cache(maxsize=1024)
def _group_rows(file: Path) -> tuple[int, ...]:
    with _pyarrow().parquet.ParquetFile(file) as parquet:
        return tuple(parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups))


def _columns(schema: pa.Schema, file: Path, named: tuple[str, ...]) -> tuple[str, str | None]:
    """Names of the image column and of the caption column, if there is one."""
    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)[:1000]
    for name in named:
        if name not in schema.names:
            raise InputError(
                f"{file} has no column {name!r}.", f"It has {listed}.", "Give -O calib-columns=IMAGE,CAPTION."
            )
    images = [n for n in (named[:1] or IMAGE_COLUMNS) if n in schema.names and is_image(schema.field(n).type)]
    if not images:
        raise InputError(
            f"{file} has no image column{f' {named[0]!r}' if named else ''}.",
            f"It has {listed}. An image is a struct of bytes and path, or bytes.",
            "Name the columns: -O calib-columns=IMAGE,CAPTION.",
        )
    if len(named) > 1:
        return images[0], named[1]
    captions = [n for n in TEXT_COLUMNS if n in schema.names and is_text(schema.field(n).type)]
    return images[0], captions[0] if captions else None
