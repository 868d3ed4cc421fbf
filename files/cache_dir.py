"""The user's cache folder: results for later builds, verified, bounded in size, safe to delete.

``$IVL_EXPORT_CACHE``, or ``ivl-export`` in the user's cache folder, holds ``engines/``
(built engines), ``timing/`` (TensorRT's kernel times), ``weights/`` (weights packed for ONNX Runtime),
``evaluations/`` (task scores) and ``images/`` (decoded calibration images). Everything in it follows from its
key, so that deleting any of it costs time only. Without a home, or with one that cannot be written to, the
folder is below the temporary folder.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import UsageError

KINDS = ("engines", "timing", "weights", "evaluations", "images")
DEFAULT_LIMIT = 20 << 30
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True)
class Entry:
    """Something kept: its kind, name, place, size in bytes, and when it was last used (Unix time)."""

    kind: str
    name: str
    path: Path
    size: int
    used: float


def cache_folder() -> Path:
    """The folder of results that several builds share; it need not exist, and nothing here raises.

    ``$IVL_EXPORT_CACHE``, or ``ivl-export`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Where there is no home
    (containers, users without a passwd entry), or where that folder is missing and cannot be made, it is a
    private folder below the temporary one.
    """
    try:
        if own := os.environ.get("IVL_EXPORT_CACHE"):
            return Path(own).expanduser()  # where no shell did it
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # ignored where it is relative, as XDG says
        folder = (base if base.is_absolute() else Path.home() / ".cache") / "ivl-export"
    except RuntimeError:  # neither HOME nor an entry in passwd
        return _temporary_cache()
    return folder if _can_exist(folder) else _temporary_cache()


def _can_exist(folder: Path) -> bool:
    """Whether ``folder`` is there (perhaps read-only: its entries are used), or can be made."""
    try:
        while not folder.exists():
            if folder == folder.parent:
                return False
            folder = folder.parent
            if folder.exists():
                return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:  # a parent that may not be entered
        return False
    return True


@cache
def _temporary_cache() -> Path:
    """``ivl-export-<user>`` below the temporary folder, if it is this user's alone.

    Entries are trusted as far as their hashes, which are stored with them: a folder of that name that another
    user made is not used, but one with a random name, for this process.
    """
    try:
        parent = Path(tempfile.gettempdir())
        folder = parent / f"ivl-export-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        state = folder.lstat()
        private = stat.S_ISDIR(state.st_mode) and not state.st_mode & 0o022
        if os.name == "nt" or (private and state.st_uid == os.getuid()):
            return folder
        return Path(tempfile.mkdtemp(prefix="ivl-export-", dir=parent))
    except OSError:  # no temporary folder either: a place where nothing can be, so that nothing is kept
        return Path(os.devnull) / "ivl-export"


def cache_limit() -> int:
    """The most bytes kept of engines or weights: ``$IVL_EXPORT_CACHE_SIZE``, or 20 GiB.

    UsageError if it is not a size.
    """
    text = os.environ.get("IVL_EXPORT_CACHE_SIZE")
    return DEFAULT_LIMIT if text is None else parse_size(text, "IVL_EXPORT_CACHE_SIZE")


def parse_size(text: str, what: str) -> int:
    """Bytes of ``"512M"``, ``"20g"``, ``"1.5 GiB"`` or ``"4096"``; UsageError names ``what``."""
    plain = text.strip().lower().removesuffix("b").removesuffix("i").strip()
    unit = plain[-1:] if plain[-1:].isalpha() else ""
    number = plain.removesuffix(unit).strip()
    if unit not in _UNITS or not number.replace(".", "", 1).isdecimal():
        raise UsageError(
            f"{what} is not a size: {text!r}.", "", "Give bytes, or a number with K, M, G or T: 20G."
        )
    return int(float(number) * _UNITS[unit])


def entries(kinds: tuple[str, ...] = KINDS) -> list[Entry]:
    """All entries, most recently used first."""
    entries_there = []
    for kind in kinds:
        folder = cache_folder() / kind
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name.startswith(".") or path.suffix == ".lock":
                continue
            files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            try:
                size = sum(p.stat().st_size for p in files)
                entries_there.append(
                    Entry(kind, path.stem if path.is_file() else path.name, path, size, _used(path))
                )
            except OSError:
                continue  # deleted by another process meanwhile
    return sorted(entries_there, key=lambda entry: -entry.used)


def prune(
    *, limit: int | None = None, older_than: float | None = None, kinds: tuple[str, ...] = KINDS
) -> list[Entry]:
    """Delete entries unused for ``older_than`` seconds, then the least recently used above ``limit`` bytes.

    With neither, everything of ``kinds``. Returns the deleted ones.
    """
    now, total, gone = time.time(), 0, []
    for entry in entries(kinds):
        old = older_than is not None and now - entry.used > older_than
        above = limit is not None and total + entry.size > limit
        if old or above or (limit is None and older_than is None):
            remove(entry.path)
            gone.append(entry)
        else:
            total += entry.size
    return gone


def remove(path: Path) -> None:
    """Delete a file or folder of the cache; renamed first, so that no reader finds half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.gone")
    try:
        path.rename(aside)
    except OSError:
        return  # another process was faster, or the folder is read-only
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)


def touch(path: Path) -> None:
    """Note that an entry was used now."""
    try:
        os.utime(path)
    except OSError:
        return  # read-only: it only counts as used longer ago


def _used(path: Path) -> float:
    return path.stat().st_mtime
