"""The user's cache folder: what later builds take over, verified, bounded in size, safe to delete.

``$IVL_EXPORT_CACHE``, or ``ivl-export`` in the user's cache folder, holds ``engines/``
(:mod:`.tensorrt.engine_cache`), ``timing/`` (:mod:`.tensorrt.timing_cache`), ``weights/``
(:mod:`.onnxruntime.weights`),
``evaluations/`` (task scores) and ``images/`` (decoded calibration images). Everything in it follows from its
key, so that deleting any of it costs time only. A folder that cannot be written to is as good as none.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """Where results that several builds share are kept."""
    if own := os.environ.get("IVL_EXPORT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivl-export"


def cache_limit() -> int:
    """The most bytes kept of engines or weights: ``$IVL_EXPORT_CACHE_SIZE``, or 20 GiB.

    UsageError if it is no size.
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
            f"{what} is no size: {text!r}.", "", "Give bytes, or a number with K, M, G or T: 20G."
        )
    return int(float(number) * _UNITS[unit])


def entries(kinds: tuple[str, ...] = KINDS) -> list[Entry]:
    """All that is kept, what was used last first."""
    found = []
    for kind in kinds:
        folder = cache_folder() / kind
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name.startswith(".") or path.suffix == ".lock":
                continue
            files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            try:
                size = sum(p.stat().st_size for p in files)
                found.append(Entry(kind, path.stem if path.is_file() else path.name, path, size, _used(path)))
            except OSError:
                continue  # deleted by another process meanwhile
    return sorted(found, key=lambda entry: -entry.used)


def prune(
    *, limit: int | None = None, older_than: float | None = None, kinds: tuple[str, ...] = KINDS
) -> list[Entry]:
    """Delete what was not used for ``older_than`` seconds, then the longest unused above ``limit`` bytes.

    With neither, everything of ``kinds``. Returns what was deleted.
    """
    now, kept, gone = time.time(), 0, []
    for entry in entries(kinds):
        old = older_than is not None and now - entry.used > older_than
        above = limit is not None and kept + entry.size > limit
        if old or above or (limit is None and older_than is None):
            remove(entry.path)
            gone.append(entry)
        else:
            kept += entry.size
    return gone


def remove(path: Path) -> None:
    """Delete a file or folder of the cache; out of sight first, so that nobody finds half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.gone")
    try:
        path.rename(aside)
    except OSError:
        return  # somebody else was faster, or the folder is read-only
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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` (no lock on systems without flock); a killed process lets go of it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        except ImportError:
            pass  # Windows: two writers at once lose the entries of one, never the file
        yield
    finally:
        os.close(handle)


def _used(path: Path) -> float:
    return path.stat().st_mtime
