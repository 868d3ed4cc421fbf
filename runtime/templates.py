"""Prompt templates of zero-shot classification, by name: ``imagenet``, ``food101``, ...

``photo`` are the seven that CLIP's authors found to do as well as their eighty, ``imagenet`` those eighty
(CLIP repository, notebooks). The others are the lists of CLIP_benchmark, which InternVL's published accuracy
was measured with, also ImageNet's in Chinese, Italian, Japanese and Arabic; spelt as published.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from ..errors import UsageError

PLAIN = ("{}",)
"""The template of the label alone."""


def templates(name: str) -> tuple[str, ...]:
    """The list called ``name``, texts with ``{}`` for the label; UsageError names those there are."""
    known = _known()
    if name not in known:
        raise UsageError(
            f"Unknown templates {name!r}.",
            f"Known: {', '.join(known)}.",
            "Give --template one of these, or a text with {} for the label.",
        )
    return known[name]


def names() -> tuple[str, ...]:
    """Names that :func:`templates` takes."""
    return tuple(_known())


@cache
def _known() -> dict[str, tuple[str, ...]]:
    text = Path(__file__).with_name("templates.json").read_text(encoding="utf-8")
    return {name: tuple(texts) for name, texts in json.loads(text).items()}
