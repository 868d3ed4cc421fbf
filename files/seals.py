"""Seals: that files still hold what was written, without reading them at every start.

A seal is a small JSON file that lists, for files of its own folder, their SHA-256 and the file system's
data on them: size, inode, times of change. :func:`damaged` compares these data, which takes microseconds a
file, and reads and hashes only files whose notes differ: after a copy of the folder, or damage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import IntegrityError
from .hashing import file_notes, sha256_file
from .json import Count, RelativePath, Sha256, decode
from .write import atomic


@dataclass(frozen=True)
class _Sealed:
    sha256: Sha256
    notes: tuple[Count, ...]


@dataclass(frozen=True)
class _Seal:
    files: dict[RelativePath, _Sealed]


def write_seal(seal: Path, digests: Mapping[str, str]) -> None:
    """Seal files that are on the disk, flushed.

    Args:
        seal: the seal's own file.
        digests: name of a file next to it -> its SHA-256.

    Raises:
        OSError: a file is not there, or the seal cannot be written.
    """
    entries = {
        name: {"sha256": digest, "notes": list(file_notes(seal.parent / name))}
        for name, digest in digests.items()
    }
    with atomic(seal, durable=True) as partial:
        partial.write_text(json.dumps({"files": entries}), encoding="utf-8")


def damaged(seal: Path) -> frozenset[str] | None:
    """Names of sealed files that are gone or hold something else; None where there is no readable seal.

    A file that was only copied or touched is read once: the seal is renewed then, where that is possible.
    """
    entries = _read(seal)
    if entries is None:
        return None
    wrong, renewed = set(), False
    for name, sealed in entries.items():
        path = seal.parent / name
        try:
            if file_notes(path) == sealed.notes:
                continue
            if sha256_file(path) != sealed.sha256:
                wrong.add(name)
            renewed = True
        except OSError:
            wrong.add(name)
    if renewed and not wrong:
        with suppress(OSError):  # read-only: read again at the next start
            write_seal(seal, {name: sealed.sha256 for name, sealed in entries.items()})
    return frozenset(wrong)


def _read(seal: Path) -> dict[str, _Sealed] | None:
    try:
        return decode(_Seal, seal, what=f"The seal {seal.name}").files
    except (OSError, IntegrityError):
        return None
