"""Text files that people and their editors wrote: UTF-8, or what their byte order mark says.

Windows editors put a mark before UTF-8; PowerShell's ``>`` writes UTF-16 with one.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from ..errors import InputError, IvlError
from .lfs import refuse_lfs_pointer

_MARKS = (  # that of UTF-32 begins as that of UTF-16 does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(head: bytes) -> str:
    """The encoding of a text that begins with ``head``, for ``open`` and ``decode``: they drop the mark."""
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8-sig")


def decode_text(raw: bytes) -> str:
    """The text in ``raw``; UnicodeDecodeError (a ValueError) where it is none."""
    return raw.decode(encoding_of(raw[:4]))


def text_encoding(path: Path, error: type[IvlError] = InputError) -> str:
    """The encoding to open the text file ``path`` with.

    Raises:
        IvlError: of type ``error``, for a Git LFS pointer.
        OSError: it cannot be read.
    """
    refuse_lfs_pointer(path, error)
    with path.open("rb") as file:
        return encoding_of(file.read(4))


def read_text(path: Path, error: type[IvlError] = InputError) -> str:
    """The text in the file ``path``; errors as :func:`text_encoding`, and UnicodeDecodeError."""
    return path.read_text(encoding=text_encoding(path, error))
