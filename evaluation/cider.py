"""CIDEr as published captions are scored: PTB tokens, then the standard package's CIDEr."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from ..errors import CapabilityError


def check_cider() -> None:
    """CapabilityError where captions cannot be scored here; asked before hours of captioning."""
    try:
        import pycocoevalcap.cider.cider
        import pycocoevalcap.tokenizer.ptbtokenizer  # noqa: F401
    except ImportError as error:
        raise CapabilityError(
            "CIDEr cannot be computed here.",
            f"{error}.",
            "Install it: pip install 'ivl-export[eval]'.",
        ) from error
    if shutil.which("java") is None:
        raise CapabilityError(
            "CIDEr cannot be computed here.",
            "Its tokenizer, Stanford's PTBTokenizer, is a Java program, and there is no java.",
            "Install a Java runtime (Debian: apt install default-jre-headless).",
        )


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr of each caption against its references (1.0 is what is printed as 100).

    Document frequencies come from ``references``: scores of a part of a set are not those of the whole.
    Raises CapabilityError as :func:`check_cider`, and where the tokenizer fails.
    """
    check_cider()
    from pycocoevalcap.cider.cider import Cider

    said = _tokens([[caption] for caption in captions])
    asked = _tokens(references)
    _, scores = Cider().compute_score(asked, said)
    return [float(score) for score in scores]


def _tokens(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # One text a line, and none empty: lines that are left out would shift all that follow.
    rows = {i: [{"caption": " ".join(t.split()) or "."} for t in group] for i, group in enumerate(texts)}
    try:
        tokens = PTBTokenizer().tokenize(rows)
    except OSError as error:  # it writes beside itself
        raise CapabilityError(
            "The captions cannot be tokenized.",
            str(error),
            "Install pycocoevalcap where it can be written to.",
        ) from error
    if {i: len(group) for i, group in tokens.items()} != {i: len(group) for i, group in rows.items()}:
        raise CapabilityError(
            "The captions cannot be tokenized.",
            "PTBTokenizer did not answer.",
            "Check that java -version works.",
        )
    return dict(tokens)
