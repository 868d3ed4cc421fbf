"""Paths that came from elsewhere: a manifest, an index, an archive."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError


def inside(root: Path, text: str, where: str) -> Path:
    """``root / text``, links resolved.

    In a cache folder of the Hugging Face Hub files are links from ``snapshots/`` to ``blobs/``: these are
    followed.

    Raises:
        InputError: naming ``where``, if that leaves ``root`` (``..``, absolute, a link), or is not a
            possible path.
    """
    try:
        text.encode()  # JSON can name lone surrogates
        path = (root / text).resolve()
        good = path.is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # also a NUL, a loop of links, a long name
        raise InputError(f"{where} has an impossible path.", f"{text[:200]!r}: {error}") from error
    if not good and _in_hub_cache(root, path):
        return path
    named = Path(os.path.normpath(root.absolute() / text))
    if not good and named.is_relative_to(root.absolute()):
        raise InputError(
            f"{where} names a link out of the data folder.",
            f"{text[:200]!r} is a link to {path}.",
            "Copy the folder with its links resolved (cp -rL), or give the folder that they point into.",
        )
    if not good:
        raise InputError(
            f"{where} points outside the data folder.",
            f"{text[:200]!r} is not below {root}.",
            "Use the published file, or name files by their path relative to the folder.",
        )
    return path


def _in_hub_cache(root: Path, path: Path) -> bool:
    """Whether ``root`` is in a snapshot of a Hub cache, and ``path`` among the blobs of that repository."""
    folders = [root.absolute(), *root.absolute().parents]
    snapshots = next((folder for folder in folders[1:] if folder.name == "snapshots"), None)
    return snapshots is not None and path.is_relative_to((snapshots.parent / "blobs").resolve())
