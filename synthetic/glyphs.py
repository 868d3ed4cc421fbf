"""Glyphs for rendered text: digits, capital letters and 320 Chinese characters, 16 pixels high.

They are a part of GNU Unifont 15.0.01, unchanged (``unifont/glyphs.hex``, SIL Open Font License 1.1): digits
and letters are 8 pixels wide, Chinese characters 16.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

HEIGHT = 16
DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FILE = Path(__file__).with_name("unifont") / "glyphs.hex"

Mask = np.ndarray[Any, np.dtype[np.bool_]]


@cache
def glyphs() -> dict[str, Mask]:
    """Every character and its pixels, bool [16, 8] or [16, 16], in the order of their code points."""
    masks = {}
    for line in _FILE.read_text(encoding="ascii").splitlines():
        code, rows = line.split(":")
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(rows), np.uint8))
        masks[chr(int(code, 16))] = bits.reshape(HEIGHT, -1).astype(np.bool_)
    return masks


@cache
def chinese() -> tuple[str, ...]:
    """The Chinese characters."""
    return tuple(letter for letter, mask in glyphs().items() if mask.shape[1] == HEIGHT)


def text_mask(text: str) -> Mask:
    """``text`` in one line, bool [16, W]; KeyError: a character that has no glyph here."""
    return np.concatenate([glyphs()[letter] for letter in text], axis=1)
