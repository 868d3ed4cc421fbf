"""Images named on the command line: files and folders, read in pieces, broken files of a folder skipped."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
PIECE = 64  # decoded images held at a time


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
    """With a progress bar on stderr where there is more than one piece and someone to see it."""
    if len(starts) < 2 or not sys.stderr.isatty():
        return starts
    from rich.console import Console
    from rich.progress import track

    return track(starts, f"{starts.stop} images", console=Console(stderr=True), transient=True)


@dataclass
class ImageFiles:
    """Image files to read; ``skipped`` fills with the files of folders that could not be read, and why.

    A broken file that was named itself is an error; one that was found in a folder is skipped.
    """

    files: list[Path]
    named: frozenset[Path]
    skipped: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def find(cls, paths: Sequence[Path]) -> ImageFiles:
        """Files as given, folders searched through (sorted); InputError if there is nothing."""
        files: list[Path] = []
        for path in paths:
            if path.is_dir():
                found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
                if not found:
                    raise InputError(
                        f"No images in {path}.",
                        f"Looked for {', '.join(sorted(SUFFIXES))}.",
                        "Name a folder of images.",
                    )
                files += found
            elif path.exists():
                files.append(path)
            else:
                raise InputError(f"No such image: {path}.", "", "Check the path.")
        if not files:
            raise InputError("No images were named.", "", "Name image files or folders.")
        return cls(files, frozenset(p for p in paths if not p.is_dir()))

    def read(self) -> Iterator[tuple[list[Path], list[Image]]]:
        """Files and their images, up to 64 at a time; InputError if not one could be read."""
        anything = False
        for start in _track(range(0, len(self.files), PIECE)):
            read = [(file, self._read(file)) for file in self.files[start : start + PIECE]]
            good = [(file, image) for file, image in read if image is not None]
            if good:
                anything = True
                yield [file for file, _ in good], [image for _, image in good]
        if not anything:
            raise InputError(
                "No image could be read.", f"{len(self.skipped)} were tried.", "Check the files."
            )

    def _read(self, file: Path) -> Image | None:
        from ..inputs.images import load_image

        try:
            return load_image(file)
        except InputError as error:
            if file in self.named:
                raise
            self.skipped.append({"file": str(file), "why": f"{error.what} {error.why}"})
            return None
