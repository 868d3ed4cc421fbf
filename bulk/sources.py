"""Inputs of a bulk embedding: folders, JSON Lines, WebDataset tars and Parquet files as numbered items.

A source is a list of files in a fixed order; each file is a list of items. An item has a key, a kind (image,
video or text) and a way to read it. Files are untrusted: names in them never leave their folder, tar members
are read in place, and only known suffixes are opened.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import InputError, UsageError
from ..files.hashing import file_notes
from ..files.json import parse_json
from ..files.lfs import refuse_lfs_pointer
from ..files.paths import inside
from ..files.read import read_bytes
from ..inputs.images import IMAGE_SUFFIXES
from ..inputs.sources import data_of, kind_of, name_of, not_readable
from ..inputs.tables import IMAGE_COLUMNS, TEXT_COLUMNS, is_image, is_text, load_pyarrow
from ..inputs.webdataset import Caption, Member, braced, members, sample_key

Kind = Literal["image", "video", "text"]
KINDS: tuple[Kind, ...] = ("image", "video", "text")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".mpg", ".mpeg")
TEXT_SUFFIXES = (".txt",)
MAX_LINE = 64 << 20
"""Bytes of a line of JSON Lines."""
TABLE_ROWS = 64
"""Rows of a Parquet file that are decoded at a time."""


class Content(Protocol):
    """Anything whose bytes can be read: a member of an archive, for one."""

    def read(self) -> bytes:
        """Its bytes; InputError if they cannot be read."""
        ...


@dataclass(frozen=True)
class Item:
    """One input.

    Args:
        key: name, unique among the items of its kind.
        kind: image, video or text.
        content: a file, bytes, or where they can be read.
    """

    key: str
    kind: Kind
    content: Path | bytes | Content

    def read(self) -> bytes:
        """Its bytes (UTF-8 of a text); InputError if they cannot be read."""
        if isinstance(self.content, bytes):
            return self.content
        return read_bytes(self.content) if isinstance(self.content, Path) else self.content.read()


@dataclass(frozen=True)
class InputFile:
    """One file of a source: which source, its name there, size, time of its last change, number of items."""

    source: int
    name: str
    size: int
    mtime_ns: int
    items: int

    def unchanged(self, other: InputFile) -> bool:
        """Whether size and time say that it is the file that ``other`` was."""
        return (self.size, self.mtime_ns) == (other.size, other.mtime_ns)


@dataclass(frozen=True)
class Choice:
    """Which items are taken.

    Args:
        kinds: of items.
        image_column, text_column: of Parquet files; None: by their usual names.
        key_column: whose values are keys; None: rows are numbered.
    """

    kinds: tuple[Kind, ...] = ("image", "video")
    image_column: str | None = None
    text_column: str | None = None
    key_column: str | None = None


def source_files(source: Path, number: int, choice: Choice) -> Iterator[tuple[InputFile, Path]]:
    """The files of ``source`` that may have items, by name; their ``items`` are not counted yet (0).

    Args:
        source: a folder, a file, or tars named as ``train-{000..011}.tar``.
        number: of the source.
        choice: which items are taken.

    Raises:
        InputError: no such source, or nothing of a known suffix in it.
    """
    if kind_of(source) != "path" or kind_of(str(source)) != "path":
        text = source if kind_of(source) != "path" else str(source)
        raise not_readable(text, name_of(text), "source")
    known = _suffixes(choice)
    if source.is_dir():
        names = sorted(_walk(source, ""))
        known = tuple(suffix for suffix in known if suffix != ".jsonl")  # often names the images next to it
        chosen = [name for name in names if name.lower().endswith(known)]
        if not chosen:
            why = f"None of its {len(names)} files ends with {', '.join(known)}." if names else "It is empty."
            raise InputError(
                f"Nothing to embed in {source}.",
                why,
                "Name another source, or say what is embedded: --kinds image,video,text.",
            )
        for name in chosen:
            yield _noted(source / name, name, number), source / name
        return
    if not source.exists() and "{" in str(source.parent):
        raise InputError(
            f"There is no source {source}.", "Only a file's name may have braces.", "Name its folder."
        )
    for path in map(Path, braced(str(source))) if not source.exists() else (source,):
        if not path.is_file():
            raise InputError(f"There is no source {path}.", "", "Check the path.")
        if not path.name.lower().endswith(known):
            raise InputError(
                f"The source {path} is of no known kind.",
                f"With the kinds {', '.join(choice.kinds)} its name must end with {', '.join(known)}.",
                "Name a folder, images, .jsonl, .tar or .parquet files; texts need --kinds text.",
            )
        yield _noted(path, path.name, number), path


def _suffixes(choice: Choice) -> tuple[str, ...]:
    single = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES, "text": TEXT_SUFFIXES}
    return (*(s for kind in choice.kinds for s in single[kind]), *_CONTAINERS)


def _walk(folder: Path, prefix: str) -> Iterator[str]:
    """Visible files below ``folder``; links to folders are not followed."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield from _walk(folder / entry.name, f"{prefix}{entry.name}/")
                elif entry.is_file():
                    yield prefix + entry.name
    except OSError as error:
        raise InputError(
            f"Cannot read {folder}.", f"{error.strerror or error}.", "Check its permissions."
        ) from error


def _noted(path: Path, name: str, number: int) -> InputFile:
    try:
        state = path.stat()
    except OSError as error:
        raise InputError(f"Cannot read {path}.", f"{error.strerror or error}.", "Check it.") from error
    return InputFile(number, name, state.st_size, state.st_mtime_ns, 0)


class Reader(Protocol):
    """The items of one file."""

    def __len__(self) -> int: ...

    def keys(self) -> Iterator[tuple[str, Kind]]:
        """Key and kind of every item."""
        ...

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Items ``start`` to ``stop``."""
        ...


def open_file(path: Path, name: str, choice: Choice) -> Reader:
    """The items of ``path``, whose keys begin with ``name``.

    Raises:
        InputError: it cannot be read, a line of it is wrong (its number is named), a column is missing.
        CapabilityError: pyarrow is not installed.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in _CONTAINERS:
        kinds = {**dict.fromkeys(VIDEO_SUFFIXES, "video"), **dict.fromkeys(TEXT_SUFFIXES, "text")}
        return _Single(path, _text_name(name), kinds.get(suffix, "image"))  # type: ignore[arg-type]
    try:
        return _opened(path, _text_name(name), choice, file_notes(path))
    except OSError as error:
        raise InputError(f"Cannot read {path}.", f"{error.strerror or error}.", "Check it.") from error


@lru_cache(maxsize=4)
def _opened(path: Path, name: str, choice: Choice, notes: tuple[int, ...]) -> Reader:
    reader: Reader = _CONTAINERS[Path(name).suffix.lower()](path, name, choice)
    return reader


def _text_name(name: str) -> str:
    """A file's name as UTF-8: bytes that are none become ``\\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class _Single:
    """A file that is one item."""

    path: Path
    name: str
    kind: Kind

    def __len__(self) -> int:
        return 1

    def keys(self) -> Iterator[tuple[str, Kind]]:
        yield self.name, self.kind

    def items(self, start: int, stop: int) -> Iterator[Item]:
        if start < stop:
            yield Item(self.name, self.kind, self.path)


# --- JSON Lines ---

_FORM = (
    'Write lines as {"image": "a.jpg"}, {"video": "a.mp4"} or {"text": "a panda"}, with an "id" if wanted.'
)


@dataclass(frozen=True)
class _Named:
    """A file that a line names, relative to the folder of its list."""

    folder: Path
    text: str
    where: str
    noun: str

    def read(self) -> bytes:
        if kind_of(self.text) == "data":
            return data_of(self.text, self.where, self.noun)
        return read_bytes(self.path())

    def path(self) -> Path:
        """The file; InputError for an address, or a path that leaves the folder."""
        if kind_of(self.text) != "path":
            raise not_readable(self.text, name_of(self.text), self.noun)
        return inside(self.folder, self.text, self.where)


class _Lines:
    """JSON Lines: each line one object with an ``image``, a ``video`` or a ``text``, or several of them."""

    def __init__(self, path: Path, name: str, choice: Choice) -> None:
        self.path, self.name, self.kinds = path, name, choice.kinds
        refuse_lfs_pointer(path)
        offsets, lines, ends, count = [], [], [0], 0
        for number, offset, raw in self._lines():
            row = self._row(raw, number)
            own = sum(kind in row for kind in self.kinds)
            if own:
                count += own
                offsets.append(offset)
                lines.append(number)
                ends.append(count)
        self._offsets, self._numbers, self._ends = (np.array(v, np.int64) for v in (offsets, lines, ends))

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, offset and bytes of each line that is not empty."""
        offset = 0
        with self.path.open("rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                if len(raw) > MAX_LINE:
                    raise self._wrong(number, f"It is longer than {MAX_LINE >> 20} MiB.")
                if raw.strip(b" \t\r\n\xef\xbb\xbf"):
                    yield number, offset, raw
                offset += len(raw)

    def _wrong(self, number: int, why: str) -> InputError:
        return InputError(f"Line {number} of {self.path} cannot be used.", why, _FORM)

    def _row(self, raw: bytes, number: int) -> dict[str, Any]:
        try:
            row = parse_json(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:
            raise self._wrong(number, f"It is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise self._wrong(number, f"It is a {type(row).__name__}, not an object.")
        if not any(kind in row for kind in KINDS):
            raise self._wrong(number, "It has no image, video or text.")
        for kind in KINDS:
            if kind in row and (not isinstance(row[kind], str) or not _encodable(row[kind])):
                raise self._wrong(number, f"Its {kind} is not a text: {row[kind]!r:.80}.")
        if "id" in row and (type(row["id"]) not in (str, int) or not _encodable(str(row["id"]))):
            raise self._wrong(number, f"Its id is neither a text nor a whole number: {row['id']!r:.80}.")
        return row

    def __len__(self) -> int:
        return int(self._ends[-1])

    def keys(self) -> Iterator[tuple[str, Kind]]:
        for number, _, raw in self._lines():
            row = self._row(raw, number)
            yield from ((self._key(row, number), kind) for kind in self.kinds if kind in row)

    def _key(self, row: dict[str, Any], number: int) -> str:
        return str(row["id"]) if "id" in row else f"{self.name}#{number}"

    def items(self, start: int, stop: int) -> Iterator[Item]:
        first, place = bisect_right(self._ends, start) - 1, start
        with self.path.open("rb") as file:
            for index in range(first, len(self._offsets)):
                if place >= stop:
                    return
                number = int(self._numbers[index])
                file.seek(int(self._offsets[index]))
                row = self._row(file.readline(MAX_LINE + 1), number)
                own = [kind for kind in self.kinds if kind in row]
                for kind in own[place - int(self._ends[index]) :]:
                    if place < stop:
                        yield self._item(row, kind, number)
                        place += 1

    def _item(self, row: dict[str, Any], kind: Kind, number: int) -> Item:
        where = f"{self.name}, line {number}"
        if kind == "text":
            return Item(self._key(row, number), kind, row[kind].encode())
        content = _Named(self.path.parent, row[kind], where, kind)
        return Item(self._key(row, number), kind, content)


def _encodable(text: str) -> bool:
    """Whether ``text`` has no lone surrogates, which JSON can name."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- tars ---


@dataclass(frozen=True)
class _CaptionOf:
    """The text of a sample, as bytes."""

    caption: Caption
    where: str

    def read(self) -> bytes:
        text = self.caption()
        if text is None or not _encodable(text):
            raise InputError(f"{self.where} has no text.")
        return text.encode()


class _Tar:
    """A WebDataset tar: members with one key before the first dot are one sample."""

    def __init__(self, path: Path, name: str, choice: Choice) -> None:
        files: dict[tuple[str, Kind], Member] = {}
        texts: dict[str, Member] = {}
        for member in members(path):
            key, suffix = sample_key(member.name)
            if suffix in IMAGE_SUFFIXES:
                files.setdefault((key, "image"), member)
            elif suffix in VIDEO_SUFFIXES:
                files.setdefault((key, "video"), member)
            elif suffix in (".txt", ".json") and "text" in choice.kinds:
                files.setdefault((key, "text"), member)
                texts[f"{key}{suffix}"] = member
        self._items = [
            Item(f"{name}/{_text_name(key)}", kind, self._content(key, kind, member, texts))
            for (key, kind), member in files.items()
            if kind in choice.kinds
        ]

    @staticmethod
    def _content(key: str, kind: Kind, member: Member, texts: dict[str, Member]) -> Content:
        if kind != "text":
            return member
        pair = texts.get(f"{key}.txt"), texts.get(f"{key}.json")
        return _CaptionOf(Caption(*pair, None), f"{key} in {member.shard.name}")

    def __len__(self) -> int:
        return len(self._items)

    def keys(self) -> Iterator[tuple[str, Kind]]:
        return ((item.key, item.kind) for item in self._items)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        return iter(self._items[start:stop])


# --- Parquet ---


@dataclass(frozen=True)
class _Missing:
    """A cell without content."""

    where: str
    noun: str

    def read(self) -> bytes:
        raise InputError(f"{self.where} has no {self.noun}.")


class _Table:
    """A Parquet file: rows with an image or a text, or both."""

    def __init__(self, path: Path, name: str, choice: Choice) -> None:
        pa = self._pa = load_pyarrow("Parquet files", "embed")
        self.path, self.name = path, name
        try:
            with pa.parquet.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
                self._groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except (OSError, pa.ArrowException) as error:
            refuse_lfs_pointer(path)
            raise InputError(f"{path} cannot be read.", f"{error}.", "Write or download it again.") from error
        self._columns = self._chosen(schema, choice)
        self._key = choice.key_column
        if self._key is not None and self._key not in schema.names:
            raise self._lacking(schema, self._key, "key-column")

    def _chosen(self, schema: Any, choice: Choice) -> list[tuple[Kind, str]]:
        columns: list[tuple[Kind, str]] = []
        wanted: list[tuple[Kind, str | None, Sequence[str], Any]] = [
            ("image", choice.image_column, IMAGE_COLUMNS, is_image),
            ("text", choice.text_column, TEXT_COLUMNS, is_text),
        ]
        for kind, named, usual, fits in wanted:
            if kind not in choice.kinds:
                continue
            column = next((n for n in ((named,) if named else usual) if n in schema.names), None)
            if column is not None and fits(schema.field(column).type):
                columns.append((kind, column))
            elif named:
                raise self._lacking(schema, named, f"{kind}-column")
        if not columns:
            kinds = " or ".join(kind for kind in choice.kinds if kind != "video") or "image"
            raise self._lacking(schema, kinds, f"{kinds.partition(' ')[0]}-column")
        return columns

    def _lacking(self, schema: Any, column: str, setting: str) -> InputError:
        listed = ", ".join(f"{field.name} ({field.type})" for field in schema)[:1000]
        return InputError(
            f"{self.path} has no column {column!r} that can be used.",
            f"It has {listed or 'none'}. Images are bytes, or structs of bytes and path; texts are strings.",
            f"Name the column: -O {setting}=NAME.",
        )

    def __len__(self) -> int:
        return int(sum(self._groups)) * len(self._columns)

    def keys(self) -> Iterator[tuple[str, Kind]]:
        kinds = [kind for kind, _ in self._columns]
        if self._key is None:
            yield from ((f"{self.name}#{row}", kind) for row in range(sum(self._groups)) for kind in kinds)
            return
        for row, cells in self._rows(0, sum(self._groups), [self._key]):
            yield from ((self._key_of(cells, row), kind) for kind in kinds)

    def _key_of(self, cells: dict[str, Any], row: int) -> str:
        if self._key is None:
            return f"{self.name}#{row}"
        value = cells[self._key]
        if type(value) not in (str, int):
            raise InputError(
                f"Row {row} of {self.path} has no key.",
                f"Its {self._key} is {value!r:.80}; a text or a whole number is needed.",
                "Repair it, or name another -O key-column.",
            )
        return str(value)

    def _rows(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows ``start`` to ``stop``: their numbers and cells, some of them in memory at a time."""
        first, groups = 0, []
        skipped = None
        for group, rows in enumerate(self._groups):
            if first < stop and first + rows > start:
                groups.append(group)
                skipped = first if skipped is None else skipped
            first += rows
        row = skipped or 0
        try:
            with self._pa.parquet.ParquetFile(self.path) as file:
                names = sorted(set(columns))
                for batch in file.iter_batches(TABLE_ROWS, groups, columns=names, use_threads=False):
                    low, high = max(start - row, 0), min(stop - row, len(batch))
                    if low < high:
                        for place, cells in enumerate(batch.slice(low, high - low).to_pylist()):
                            yield row + low + place, cells
                    row += len(batch)
                    if row >= stop:
                        return
        except (OSError, self._pa.ArrowException) as error:
            raise InputError(
                f"{self.path}, about row {row}, cannot be read.", f"{error}.", "Write it again."
            ) from error

    def items(self, start: int, stop: int) -> Iterator[Item]:
        width = len(self._columns)
        names = [column for _, column in self._columns] + ([self._key] if self._key else [])
        for row, cells in self._rows(start // width, -(-stop // width), names):
            for place, (kind, column) in enumerate(self._columns, row * width):
                if start <= place < stop:
                    yield Item(self._key_of(cells, row), kind, self._content(cells[column], kind, row))

    def _content(self, value: Any, kind: Kind, row: int) -> bytes | Content:
        where = f"{self.name}, row {row}"
        if isinstance(value, dict):
            path, value = value.get("path"), value.get("bytes")
            if value is None and isinstance(path, str):
                return _Named(self.path.parent, path, where, kind)
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, str) and kind == "text":
            return value.encode()
        return value if isinstance(value, bytes) else _Missing(where, kind)


_CONTAINERS: dict[str, Any] = {".jsonl": _Lines, ".tar": _Tar, ".parquet": _Table}


# --- keys ---


def key_hashes(reader: Reader) -> np.ndarray[Any, Any]:
    """64 bits of a hash of every key and kind, to look for duplicates."""
    digest = (blake2b(f"{kind}\0{key}".encode(), digest_size=8).digest() for key, kind in reader.keys())  # noqa: SIM118
    return np.frombuffer(b"".join(digest), np.uint64)


def refuse_duplicates(hashes: Sequence[np.ndarray[Any, Any]], readers: Sequence[tuple[str, Any]]) -> None:
    """InputError if an item's key and kind occur twice.

    Args:
        hashes: those of :func:`key_hashes` of each file.
        readers: name of each file, and a function that opens it.
    """
    every = np.concatenate([np.zeros(0, np.uint64), *hashes])
    values, counts = np.unique(every, return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    seen: dict[tuple[str, Kind], str] = {}
    for own, (name, opened) in zip(hashes, readers, strict=True):
        if suspects.isdisjoint(own.tolist()):
            continue
        for key in opened().keys():  # noqa: SIM118 - a reader, not a mapping
            if key in seen:
                both = f"in {name}" if seen[key] == name else f"in {seen[key]} and in {name}"
                raise InputError(
                    f"The key {key[0]!r} of {'an' if key[1] == 'image' else 'a'} {key[1]} is given twice.",
                    f"It is {both}.",
                    "Give each item an id of its own.",
                )
            if int.from_bytes(_hash(key), "little") in suspects:
                seen[key] = name


def _hash(key: tuple[str, Kind]) -> bytes:
    return blake2b(f"{key[1]}\0{key[0]}".encode(), digest_size=8).digest()


def refuse_sources(sources: Sequence[Path], out: Path) -> None:
    """UsageError where sources are none, have one name, or hold ``out``."""
    if not sources:
        raise UsageError("Nothing to embed.", "No source was named.", "Name folders or files.")
    labels = labels_of(sources)
    for number, label in enumerate(labels):
        if label in labels[:number]:
            raise UsageError(
                f"Two sources are called {label}.",
                "Keys begin with the name of their source, and would be the same.",
                "Rename one, or name the folder that holds both.",
            )
    for source in sources:
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise UsageError(
                f"The output {out} is inside the source {source}.",
                "Its shards would be sources of the next run.",
                "Give --out a folder elsewhere.",
            )


def labels_of(sources: Sequence[Path]) -> list[str]:
    """What the keys of each source begin with: nothing for one source, else its name."""
    return [""] if len(sources) == 1 else [f"{source.resolve().name}/" for source in sources]
