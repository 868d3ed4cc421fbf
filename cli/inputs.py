"""Images named on the command line: files and folders, read in batches; bad files of folders are skipped."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, UsageError
from ..inputs.images import IMAGE_SUFFIXES
from ..inputs.sources import kind_of, name_of, not_readable

if TYPE_CHECKING:
    from ..arrays import Array
    from ..inputs.preprocess import ReadImages

PIECE = 64  # images in memory at a time, as pixel_values


def names(text: str | None) -> tuple[str, ...]:
    """The names in a list joined by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def numbers(text: str | None, option: str) -> tuple[int, ...]:
    """The whole numbers in a list joined by commas; UsageError, naming ``option``, for anything else."""
    try:
        return tuple(map(int, names(text)))
    except ValueError as error:
        raise UsageError(f"{option} {text} cannot be read.", str(error), f"Give {option} 12,24.") from error


def _track(starts: range) -> Iterable[int]:
    """``starts`` with a progress bar on stderr, if there are several and stderr is a terminal."""
    if len(starts) < 2 or not sys.stderr.isatty():
        return starts
    from rich.console import Console
    from rich.progress import track

    return track(starts, f"{starts.stop} images", console=Console(stderr=True), transient=True)


@dataclass
class ImageFiles:
    """Image files to read; ``skipped`` collects the unreadable files of folders, and why.

    An unreadable file that was named itself is an error.
    """

    files: list[Path]
    named: frozenset[Path]
    skipped: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def find(cls, paths: Sequence[Path]) -> ImageFiles:
        """The files in ``paths``, folders searched recursively (sorted); InputError if there are none."""
        files: list[Path] = []
        for path in paths:
            if kind_of(path) != "path" or kind_of(str(path)) != "path":
                text = path if kind_of(path) != "path" else str(path)
                raise not_readable(text, name_of(text))
            if path.is_dir():
                images = sorted(
                    p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.is_dir()
                )
                if not images:
                    raise InputError(
                        f"No images in {path}.",
                        f"Looked for {', '.join(sorted(IMAGE_SUFFIXES))}.",
                        "Name a folder of images.",
                    )
                files += images
            elif path.exists():
                files.append(path)
            else:
                raise InputError(f"No such image: {path}.", "", "Check the path.")
        if not files:
            raise InputError("No images were named.", "", "Name image files or folders.")
        return cls(files, frozenset(p for p in paths if not p.is_dir()))

    def read(self, read: ReadImages) -> Iterator[tuple[list[Path], Array]]:
        """Files and their ``pixel_values``, up to 64 files at a time.

        Args:
            read: the ``read_images`` of a model.

        Raises:
            InputError: none could be read.
        """
        some = False
        for start in _track(range(0, len(self.files), PIECE)):
            piece = self.files[start : start + PIECE]
            pixels = read(piece, on_error=partial(self._skip, piece))
            if len(pixels.values):
                some = True
                yield [file for file, tiles in zip(piece, pixels.tiles, strict=True) if tiles], pixels.values
        if not some:
            raise InputError(
                "No image could be read.", f"{len(self.skipped)} were tried.", "Check the files."
            )

    def _skip(self, piece: Sequence[Path], index: int, error: InputError) -> None:
        if piece[index] in self.named:
            raise error
        self.skipped.append({"file": str(piece[index]), "why": f"{error.what} {error.why}"})
