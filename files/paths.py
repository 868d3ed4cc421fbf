"""Paths that came from elsewhere: a manifest, an index, an archive."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError


def inside(root: Path, text: str, where: str) -> Path:
    """``root / text``, links resolved.

    Raises:
        InputError: naming ``where``, if that leaves ``root`` (``..``, absolute, a link), or can be no path.
    """
    try:
        text.encode()  # JSON can name lone surrogates
        path = (root / text).resolve()
        good = path.is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # also a NUL, a loop of links, a long name
        raise InputError(f"{where} has an impossible path.", f"{text[:200]!r}: {error}") from error
    if not good:
        raise InputError(
            f"{where} points outside the data folder.",
            f"{text[:200]!r} is not below {root}.",
            "Use the published file, or name files by their path relative to the folder.",
        )
    return path
