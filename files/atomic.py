"""Files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import BuildError


@contextmanager
def atomic(path: Path, *, durable: bool = False, alone: bool = False) -> Iterator[Path]:
    """Where to write what becomes ``path`` when the block ends; nothing stays of a block that raises.

    Args:
        path: a file.
        durable: the bytes are on the disk before the rename is, whatever then happens to the machine.
        alone: no other process writes ``path``. So the place has a fixed name: of a large file, what a killed
            process left is overwritten by the next one.
    """
    partial = path.with_name(f".{path.name}.tmp" if alone else f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        if durable:
            flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(text: str, out: Path) -> None:
    """Write ``text``, whole or not at all; BuildError if the file system refuses."""
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
