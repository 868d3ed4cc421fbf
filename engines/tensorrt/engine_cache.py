"""Built engines, kept for later builds of anything that asks for the same one.

An engine follows from its graph, its weights, the recipe they were made by, the shapes and options it is
built with, the library's release, its target or GPU, and our own building code: together they are its key.
An entry is a folder of the engine and ``entry.json``, written aside and renamed; the engine is checked
against the hash noted there while it is copied out, and a damaged one is deleted and built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import IntegrityError
from ...files.strict_json import Node, read_json
from ..cache_dir import cache_folder, cache_limit, prune, remove, touch

_CODE = ("build.py", "config.py", "network.py")
_ENGINE, _ENTRY = "engine", "entry.json"
_HEADROOM = 1 << 30
"""Free disk that an engine is not kept into."""


@dataclass(frozen=True)
class EngineKey:
    """What an engine follows from. ``graph`` and ``weights`` are content hashes; the rest is plain data."""

    graph: str
    weights: tuple[str, ...]
    recipe: Mapping[str, Any]
    profiles: Sequence[Mapping[str, Sequence[int]]]
    options: Mapping[str, Any]
    backend: str
    release: str
    target: str

    @property
    def digest(self) -> str:
        """The key as a sha256, this package's building code included."""
        content = json.dumps([asdict(self), _code()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def take_engine(key: EngineKey, out: Path) -> dict[str, Any] | None:
    """Copy the engine of ``key`` to ``out``: what was noted of it, or None if it is not there or damaged."""
    folder = cache_folder() / "engines" / key.digest
    staging = out.with_name(f".{out.name}.tmp")
    try:
        entry = Node("", read_json(folder / _ENTRY)).keys({"sha256", "record"})
        wanted, record = entry["sha256"].sha256(), entry["record"].object().data
        out.parent.mkdir(parents=True, exist_ok=True)
        if _copy(folder / _ENGINE, staging) != wanted:
            raise IntegrityError(f"{folder} is damaged.")
        staging.replace(out)
    except FileNotFoundError:
        return None
    except IntegrityError:
        remove(folder)
        return None
    except OSError:
        return None  # cannot be read, or the disk is full: the build will say so
    finally:
        staging.unlink(missing_ok=True)
    touch(folder)
    return dict(record)


def keep_engine(key: EngineKey, engine: Path, record: Mapping[str, Any], limit: int | None = None) -> bool:
    """Keep a copy of ``engine`` and ``record`` under ``key``; whether that was done.

    ``limit`` bounds the bytes of all engines kept (None: :func:`..cache_dir.cache_limit`); the longest
    unused go.
    """
    limit = cache_limit() if limit is None else limit
    folder = cache_folder() / "engines" / key.digest
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        size = engine.stat().st_size
        aside.mkdir(parents=True)
        if size > limit or shutil.disk_usage(aside).free < size + _HEADROOM:
            return False
        digest = _copy(engine, aside / _ENGINE)
        (aside / _ENTRY).write_text(json.dumps({"sha256": digest, "record": dict(record)}), encoding="utf-8")
        aside.rename(folder)
    except OSError:
        return False  # it is there already, or cannot be written: costs time, not correctness
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    prune(limit=limit, kinds=("engines",))
    return True


def file_hash(path: Path) -> str:
    """sha256 of a file's content, read once for each state of it."""
    state = path.stat()
    return _hashed(path, state.st_size, state.st_mtime_ns)


@cache
def _hashed(path: Path, size: int, changed: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _copy(source: Path, target: Path) -> str:
    """Copy a file; the sha256 of what was copied."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as written:
        while block := read.read(1 << 20):
            digest.update(block)
            written.write(block)
    return digest.hexdigest()


@cache
def _code() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in _CODE)).hexdigest()
