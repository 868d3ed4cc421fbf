"""A pytest plugin: how much of its tolerances a test uses, as the property ``tolerance_used`` of its report.

Used is the largest error as a part of what is allowed, over all values and comparisons of numpy and torch
that a test makes; 0 where values are equal. A test that uses over a third on one processor may use all on
another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

PROPERTY = "tolerance_used"
_most = 0.0


def used(got: Any, want: Any, rtol: float, atol: float) -> float:
    """The largest error of ``got`` as a part of ``atol + rtol |want|``; 0 without a tolerance."""
    a, b = (np.asarray(x.detach().double() if isinstance(x, torch.Tensor) else x) for x in (got, want))
    if not (rtol or atol) or a.dtype.kind not in "fiu" or b.dtype.kind not in "fiu":
        return 0.0
    with np.errstate(all="ignore"):
        error = np.abs(a.astype(np.float64) - b)
        parts = np.where(error == 0, 0.0, error / (atol + rtol * np.abs(b.astype(np.float64))))
    return float(np.nanmax(parts, initial=0.0))


def _note(part: float) -> None:
    global _most
    _most = max(_most, part)


def pytest_configure() -> None:
    """Look at every comparison before it is made."""
    for module, name, rtol, atol in (
        (np.testing, "assert_allclose", 1e-7, 0.0),
        (np, "allclose", 1e-5, 1e-8),
        (torch.testing, "assert_close", None, None),
        (torch, "allclose", 1e-5, 1e-8),
    ):
        setattr(module, name, _watched(getattr(module, name), rtol, atol))


def _watched(compare: Callable[..., Any], rtol: float | None, atol: float | None) -> Callable[..., Any]:
    def watched(got: Any, want: Any, *args: Any, **options: Any) -> Any:
        relative = args[0] if args else options.get("rtol", rtol)
        absolute = args[1] if len(args) > 1 else options.get("atol", atol)
        if relative is not None and absolute is not None and np.shape(got) == np.shape(want):
            _note(used(got, want, float(relative), float(absolute)))
        return compare(got, want, *args, **options)

    return watched


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Report the most that the test used."""
    global _most
    _most = 0.0
    try:
        return (yield)
    finally:
        item.user_properties.append((PROPERTY, f"{_most:.3f}"))
