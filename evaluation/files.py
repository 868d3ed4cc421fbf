"""Reads data sets from outside: named errors, no path that leaves the folder, broken images skipped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ..errors import InputError
from ..files.json import parse_json
from ..files.text import read_text as decoded

if TYPE_CHECKING:
    from ..inputs.preprocess import PixelValues, ReadImages

MAX_BYTES = 1 << 30  # the largest published split file, COCO's, has 144 MB
MAX_SKIPPED = 0.1
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Item(Protocol):
    """One question: its name, and the image files that belong to it."""

    @property
    def name(self) -> str:
        """Name, the same on every machine."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Image files; several are frames of a video."""
        ...


T = TypeVar("T", bound=Item)


def read_text(path: Path, what: str) -> str:
    """A UTF-8 file; InputError names the file to provide (with ``what`` in it) or its fault."""
    if not path.is_file():
        raise InputError(f"{path} is missing.", f"It holds {what}.", f"Put {path.name} into {path.parent}.")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is refused.", f"It is larger than {MAX_BYTES} bytes.")
        return decoded(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read.", str(error), "Download it again.") from error


def read_json(path: Path, what: str) -> Any:
    """The JSON value in ``path``; errors as :func:`read_text`."""
    try:
        return parse_json(read_text(path, what))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON.", f"{error}.", "Download it again.") from error


def images_in(folder: Path) -> list[Path]:
    """Image files right in ``folder``, sorted by name; hidden files are none."""
    return [p for p in _visible(folder) if p.suffix.lower() in SUFFIXES and not p.is_dir()]


def subfolders(folder: Path) -> list[Path]:
    """Folders right in ``folder``, sorted by name, without hidden ones."""
    return [p for p in _visible(folder) if p.is_dir()]


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise InputError(f"Cannot read {folder}.", str(error), "Check its permissions.") from error


def choose(items: Sequence[T], limit: int | None) -> list[T]:
    """``limit`` of ``items`` (None: all) by the hash of their names: the same ones on every machine."""
    if limit is None or limit >= len(items):
        return list(items)
    return sorted(items, key=lambda item: hashlib.sha256(_plain(item.name)).digest())[:limit]


def fingerprint(questions: Sequence[str]) -> str:
    """sha256 of the questions, in order: equal for runs with equal questions."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(_plain(question) + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class Piece(Generic[T]):
    """Items that could be read.

    ``pixels``: their images; ``counts``: how many images each item has.
    """

    items: list[T]
    pixels: PixelValues
    counts: list[int]


@dataclass
class Reader:
    """Reads items in pieces; ``skipped`` fills with unreadable items and the reasons."""

    total: int
    skipped: list[dict[str, str]] = field(default_factory=list)

    def pieces(self, items: Sequence[T], size: int, load: ReadImages) -> Iterator[Piece[T]]:
        """Items with their images, about ``size`` images in memory at a time.

        InputError as soon as more than a tenth of all items cannot be read.
        """
        waiting: list[T] = []
        for item in items:
            if not item.files:
                self._skip(item, InputError(f"{item.name} has no image."))
                continue
            waiting.append(item)
            if sum(len(other.files) for other in waiting) >= size:
                yield from self._read(waiting, load)
                waiting = []
        yield from self._read(waiting, load)

    def _read(self, items: list[T], load: ReadImages) -> Iterator[Piece[T]]:
        owners = [number for number, item in enumerate(items) for _ in item.files]
        errors: dict[int, InputError] = {}
        files = [file for item in items for file in item.files]

        def failed(index: int, error: InputError) -> None:
            errors.setdefault(owners[index], error)

        pixels = load(files, on_error=failed)
        for number, error in sorted(errors.items()):
            self._skip(items[number], error)
        readable = [item for number, item in enumerate(items) if number not in errors]
        if errors:
            pixels = pixels[[index for index, owner in enumerate(owners) if owner not in errors]]
        if readable:
            yield Piece(readable, pixels, [len(item.files) for item in readable])

    def _skip(self, item: Item, error: InputError) -> None:
        self.skipped.append({"file": item.name, "why": f"{error.what} {error.why}".strip()})
        if len(self.skipped) > MAX_SKIPPED * self.total:
            listed = "; ".join(s["why"] for s in self.skipped[:5])
            raise InputError(
                f"{len(self.skipped)} of {self.total} samples cannot be read, over {MAX_SKIPPED:.0%}.",
                listed + (" ..." if len(self.skipped) > 5 else ""),
                "Repair or download them again; check that the images are in the data set's folders.",
            )


def _plain(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")
