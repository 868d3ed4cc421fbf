"""A bundle, or another folder, in the place of an older one: by two renames, under a lock on the parent.

``out`` becomes ``.out.old.<pid>``, the staging folder becomes ``out``, the old one is deleted. A process
killed before the first rename leaves the old bundle, after the second the new one; between the two, the next
:func:`restore` or :func:`swap` puts the old one back. (Python has no call for Linux' exchanging rename; other
systems have no such rename.)
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import BuildError
from ..files.locks import locked
from ..files.write import flush
from .manifest import MANIFEST


def swap(staging: Path, out: Path, marker: str = MANIFEST, kind: str = "a bundle") -> None:
    """Rename ``staging`` to ``out``, in the place of one that is there; BuildError for anything else.

    ``marker`` is the file by which a folder is known to be ``kind``.
    """
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    old = parent / f".{out.name}.old.{os.getpid()}"
    with _locked(parent):
        _restore(out, marker)
        refuse_foreign(out, marker, kind)
        for leftover in _leftovers(out):
            _remove(leftover, marker)
        replaced = out.exists()
        if replaced:
            os.rename(out, old)  # noqa: PTH104 - os.rename says which of the two paths failed
        try:
            os.rename(staging, out)  # noqa: PTH104
        except OSError:
            if replaced:
                os.rename(old, out)  # noqa: PTH104
            raise
        flush(parent)
    if replaced:
        _remove(old, marker)


def restore(out: Path) -> None:
    """Undo a swap that was killed between its two renames."""
    with _locked(out.absolute().parent):
        _restore(out, MANIFEST)


def refuse_foreign(out: Path, marker: str = MANIFEST, kind: str = "a bundle") -> None:
    """BuildError if ``out`` exists and is neither ``kind`` nor an empty folder: it is never replaced."""
    if out.exists() and not (out / marker).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise BuildError(
            f"{out} is not replaced.",
            f"It exists and is not {kind}.",
            "Give --out a new folder, or remove that one.",
        )


def _restore(out: Path, marker: str) -> None:
    old = [p for p in _leftovers(out) if (p / marker).is_file()]
    if old and not out.exists():
        max(old, key=lambda p: p.stat().st_mtime).rename(out)


def _remove(old: Path, marker: str) -> None:
    (old / marker).unlink(missing_ok=True)  # first, so that a half-deleted one is never put back
    shutil.rmtree(old, ignore_errors=True)


def _leftovers(out: Path) -> list[Path]:
    parent, pattern = out.absolute().parent, re.compile(re.escape(f".{out.name}.old.") + r"\d+")
    if not parent.is_dir():
        return []
    return [p for p in parent.iterdir() if pattern.fullmatch(p.name)]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, if it can be opened: a bundle may be read where nothing may be locked."""
    with ExitStack() as stack:
        if folder.is_dir():  # a missing one would be made, as a file
            with suppress(OSError):
                stack.enter_context(locked(folder))
        yield
