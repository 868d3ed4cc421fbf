"""Candidates for a calibration set: an image in a file or inside a container."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..inputs.chat_template import Turn
from ..inputs.images import load_image
from ..inputs.webdataset import MAX_CAPTION_BYTES
from .dataset import Sample, Skipped, Stored, read_bytes

MAX_ENTRIES = 10_000_000

Caption = Callable[[], "str | None"]


@dataclass(frozen=True)
class Entry:
    """An image that may be chosen.

    Args:
        name: the same on every machine.
        image: a file, or something in one.
        caption: reads its caption, if there is one.
        turns: a conversation about it; empty: the set has none.
    """

    name: str
    image: Path | Stored
    caption: Caption
    turns: tuple[Turn, ...] = ()

    def check(self) -> Sample | Skipped:
        """Decode it; a sample, or why it can be none."""
        try:
            data = read_bytes(self.image)
            load_image(data, self.name)
            caption = plain(self.caption())
        except InputError as error:
            return Skipped(self.name, error.why or error.what)
        return Sample(self.name, hashlib.sha256(data).hexdigest(), caption, self.image, self.turns)


def plain(caption: str | None) -> str | None:
    """A caption without space around it; None if it is empty. InputError if it is not text."""
    text = (caption or "").strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can name lone surrogates, which no tokenizer takes
        raise InputError("A caption is not text.", f"{text[:200]!r}: {error}") from error
    return text[:MAX_CAPTION_BYTES] or None
