"""The cache of built engines, reused by later builds with the same inputs.

An engine follows from its graph, its weights, the recipe they were made by, the shapes and options it is
built with, the library's release, its target or GPU, and our own building code: together they are its key.
An entry is a folder of the engine and ``entry.json``, written aside and renamed; the engine is checked
against the hash noted there while it is copied out, and a damaged one is deleted and built again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import IntegrityError
from ...files.cache_dir import cache_folder, cache_limit, prune, remove, touch
from ...files.hashing import copy_with_sha256, sha256_json, sha256_sources
from ...files.json import Sha256, decode
from ...files.write import temporary_path

_CODE = ("build.py", "config.py", "network.py")
"""The modules that decide how an engine is built."""
_ENGINE, _ENTRY = "engine", "entry.json"
_HEADROOM = 1 << 30
"""Free disk that an engine is not kept into."""


def _code() -> str:
    return sha256_sources(Path(__file__).parent, _CODE)


@dataclass(frozen=True)
class EngineKey:
    """Everything that decides an engine; ``graph``, ``weights`` and ``code`` are content hashes."""

    graph: str
    weights: tuple[str, ...]
    recipe: Mapping[str, Any]
    profiles: Sequence[Mapping[str, Sequence[int]]]
    options: Mapping[str, Any]
    backend: str
    release: str
    target: str
    code: str = field(default_factory=_code)
    """Of this package's building code."""

    @property
    def digest(self) -> str:
        """The key as a sha256."""
        return sha256_json(asdict(self))


@dataclass(frozen=True)
class _Entry:
    """``entry.json``: the engine's hash, and its build record."""

    sha256: Sha256
    record: dict[str, Any]


def take_engine(key: EngineKey, out: Path) -> dict[str, Any] | None:
    """Copy the engine of ``key`` to ``out``: its build record, or None if it is not there or damaged."""
    folder = cache_folder() / "engines" / key.digest
    staging = temporary_path(out, exclusive=True)
    try:
        entry = decode(_Entry, folder / _ENTRY, what="The cache's entry")
        out.parent.mkdir(parents=True, exist_ok=True)
        if copy_with_sha256(folder / _ENGINE, staging) != entry.sha256:
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
    return entry.record


def keep_engine(key: EngineKey, engine: Path, record: Mapping[str, Any], limit: int | None = None) -> bool:
    """Keep a copy of ``engine`` and ``record`` under ``key``; whether that was done.

    ``limit`` bounds the bytes of all engines kept (None: :func:`...files.cache_dir.cache_limit`); the longest
    unused go.
    """
    limit = cache_limit() if limit is None else limit
    folder = cache_folder() / "engines" / key.digest
    aside = temporary_path(folder)
    try:
        size = engine.stat().st_size
        aside.mkdir(parents=True)
        if size > limit or shutil.disk_usage(aside).free < size + _HEADROOM:
            return False
        digest = copy_with_sha256(engine, aside / _ENGINE)
        (aside / _ENTRY).write_text(json.dumps({"sha256": digest, "record": dict(record)}), encoding="utf-8")
        aside.rename(folder)
    except OSError:
        return False  # it is there already, or cannot be written: costs time, not correctness
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    prune(limit=limit, kinds=("engines",))
    return True
