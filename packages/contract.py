"""What a format of packages is: the files that it makes of a bundle, and the settings that it takes.

To add a format, write ``packages/<name>.py`` with a module-level ``FORMAT``, and name it in
:data:`.registry.MODULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..bundle import Bundle
from ..bundle.manifest import MANIFEST
from ..errors import IntegrityError
from ..progress import Progress
from ..runtime.loaded import is_chat
from ..settings import Table

Ability = Literal["embed", "caption", "match", "chat"]
_ABILITIES: dict[str, Ability] = {"image_embed": "embed", "logits": "caption", "itm_logits": "match"}
"""An output of a component, and what a model that gives it can do."""
BUNDLE = "bundle"
"""The folder of the bundle in every package."""


@dataclass(frozen=True)
class Pieces:
    """A file made of pieces of others: ``parts`` are the place of each in it, its file, offset and length."""

    parts: tuple[tuple[int, Path, int, int], ...]

    @property
    def size(self) -> int:
        """Bytes; those between the pieces are zeros."""
        return max((place + length for place, _, _, length in self.parts), default=0)

    def write(self, out: Path) -> None:
        """Write the file; at most 1 MiB is in memory."""
        with out.open("wb") as writer:
            for place, source, offset, length in self.parts:
                writer.seek(place)
                with source.open("rb") as reader:
                    reader.seek(offset)
                    while length:
                        block = reader.read(min(length, 1 << 20))
                        if not block:
                            raise IntegrityError(
                                f"{source} is too short.", f"It ends {length} bytes early.", "Copy it again."
                            )
                        writer.write(block)
                        length -= len(block)
            writer.truncate(self.size)


@dataclass(frozen=True)
class File:
    """One file of a package.

    Args:
        path: its place in the package, POSIX.
        content: its text or bytes; or a file that is copied; or pieces of files; or a function that writes
            it to the path it is given.
        executable: whether it may be run.
    """

    path: str
    content: str | bytes | Path | Pieces | Callable[[Path], object]
    executable: bool = False

    @property
    def size(self) -> int | None:
        """Bytes; None where they are known only when it is written."""
        if isinstance(self.content, str | bytes):
            return len(self.content.encode() if isinstance(self.content, str) else self.content)
        if isinstance(self.content, Pieces):
            return self.content.size
        return self.content.stat().st_size if isinstance(self.content, Path) else None


@dataclass(frozen=True)
class Job:
    """A package to make: the opened bundle, the name that it is given, and the format's settings."""

    bundle: Bundle
    name: str
    settings: Mapping[str, Any]

    @cached_property
    def abilities(self) -> frozenset[Ability]:
        """What the bundle's components can do."""
        if is_chat(self.bundle):
            return frozenset({"chat"})
        return frozenset(_ABILITIES[output] for output in _ABILITIES if self.gives(output))

    def gives(self, output: str) -> str:
        """The component that has ``output``; empty if none has."""
        parts = self.bundle.manifest.components.items()
        return next((n for n, c in parts if any(t.name == output for t in c.spec.outputs)), "")

    def bundle_files(self) -> list[File]:
        """The bundle's own files, below :data:`BUNDLE`."""
        own = [MANIFEST, *self.bundle.manifest.files]
        return [File(f"{BUNDLE}/{path}", self.bundle.root / path) for path in own]


@dataclass(frozen=True)
class Format:
    """A format of packages.

    Args:
        name: as given to ``--format``.
        summary: one line.
        settings: table of its settings.
        files: the files of a package. Errors: UsageError for settings that do not fit the bundle,
            CapabilityError for what the bundle or this installation lacks.
        complete: adds files to the staging folder that are known only then (wheels that are downloaded).
        pending: says what ``complete`` adds, for a dry run.
    """

    name: str
    summary: str
    settings: Table
    files: Callable[[Job], list[File]]
    complete: Callable[[Job, Path, Progress], None] | None = None
    pending: Callable[[Job], tuple[str, ...]] = lambda job: ()
