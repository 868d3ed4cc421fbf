"""Names of the algorithms that pick an activation range: ``max``, ``percentile``, ``entropy``, ``mse``."""

from __future__ import annotations

import math

from ..errors import UsageError

ALGORITHMS = ("max", "percentile", "entropy", "mse")
PERCENTILE = 99.99
"""Of the magnitudes, where ``percentile`` says no other."""

BY_TYPE = ("entropy", "mse")
"""Algorithms whose range depends on the type that inputs are rounded to."""


def algorithm_name(algorithm: str) -> str:
    """``algorithm`` as recorded in ``ranges.json``: ``percentile`` alone is ``percentile-99.99``.

    Raises:
        UsageError: no such algorithm, or a percentile that is none.
    """
    name, dash, text = algorithm.partition("-")
    if name not in ALGORITHMS or (dash and name != "percentile"):
        known = ", ".join(ALGORITHMS)
        raise UsageError(
            f"Unknown calibration algorithm {algorithm!r}.",
            f"Known: {known}; percentile-99.9 names its own.",
            "Give --algorithm max.",
        )
    if name != "percentile":
        return name
    try:
        percentile = float(text) if dash else PERCENTILE
    except ValueError:
        percentile = math.nan
    if not 50 < percentile <= 100:
        raise UsageError(f"Percentile {text!r} is out of range.", fix="Use over 50, up to 100: 99.99.")
    return f"percentile-{percentile:g}"


def depends_on_type(algorithm: str) -> bool:
    """Whether the ranges that ``algorithm`` picks suit one activation type only."""
    return algorithm in BY_TYPE
