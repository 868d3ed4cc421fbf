"""SHA-256 of files, of code and of plain data, always as 64 lower-case hex digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


def sha256_file(path: Path) -> str:
    """The hash of a file's content, read in blocks of 1 MiB."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def sha256_file_once(path: Path) -> str:
    """As :func:`sha256_file`, but read again only when the file system notes a change of the file."""
    return _sha256_of_state(path, file_notes(path))


def file_notes(path: Path) -> tuple[int, ...]:
    """Size, inode, and times of the last change: no program can change a file and leave all of them."""
    state = path.stat()
    return state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns


@cache
def _sha256_of_state(path: Path, notes: tuple[int, ...]) -> str:
    return sha256_file(path)


def copy_with_sha256(source: Path, target: Path) -> str:
    """Copy a file's content to ``target`` (created or overwritten); the hash of the bytes copied."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(_BLOCK):
            digest.update(block)
            writer.write(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """The hash of plain data: equal for equal values, in any order of a mapping's keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_sources(folder: Path, names: Iterable[str]) -> str:
    """The hash of the named files below ``folder`` (POSIX paths), names included, in the order given."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()
