"""Files that appear whole or not at all: written next to their place, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import BuildError


@contextmanager
def atomic(path: Path, *, durable: bool = False, exclusive: bool = False) -> Iterator[Path]:
    """The temporary file that becomes ``path`` when the block ends; a block that raises leaves nothing.

    Args:
        path: a file; its folder exists.
        durable: flush the bytes to the disk before the rename, so that a power cut cannot leave half a file.
        exclusive: the caller knows (by a lock, or because the folder is its own) that no other process writes
            ``path``. The temporary name is then a fixed one, so that the next writer overwrites the rest
            that a killed process left of a large file.
    """
    partial = temporary_path(path, exclusive=exclusive)
    try:
        yield partial
        if durable:
            flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def temporary_path(path: Path, *, exclusive: bool = False) -> Path:
    """The hidden name next to ``path`` that its content has while it is written.

    The process id is part of it, unless ``exclusive`` (see :func:`atomic`).
    """
    return path.with_name(f".{path.name}.tmp" if exclusive else f".{path.name}.{os.getpid()}.tmp")


def write_text(text: str, out: Path) -> None:
    """Write ``text`` in UTF-8, whole or not at all; BuildError if the file system refuses."""
    try:
        with atomic(out) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        why = error.strerror or str(error)
        raise BuildError(f"Cannot write {out}.", f"{why}.", "Choose another place for it.") from error


def flush(path: Path) -> None:
    """fsync a file or folder, so that a rename that follows cannot reach the disk before its content."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_binary(path: Path) -> BinaryIO:
    """A new file that is written in binary."""
    return path.open("wb")


@contextmanager
def atomic_binary(path: Path, *, durable: bool = False, exclusive: bool = False) -> Iterator[BinaryIO]:
    """As :func:`atomic`, the temporary file opened for writing."""
    with atomic(path, durable=durable, exclusive=exclusive) as partial, open_binary(partial) as file:
        yield file
