"""A pytest plugin: moves every floating-point input of ONNX Runtime by at most one unit in the last place.

ONNX Runtime picks its kernels by the processor and has no setting for others. Such inputs change a result
as another order of sums does. The ways depend on the last axis alone: equal inputs stay equal, also as
rows of another batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

TOWARDS = np.array([0, np.inf, -np.inf], np.float32)
"""By way: 0, up, down (-1)."""


def moved(array: Any) -> Any:
    """``array``; of fp32 with some values one place up, some one down; zeros stay."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or not array.ndim:
        return array
    ways = np.random.default_rng(array.shape[-1]).choice([-1, 0, 1], array.shape[-1:])
    other = np.nextafter(array, TOWARDS[ways], where=ways != 0, out=array.copy())
    return np.where(array == 0, array, other)


def pytest_configure() -> None:
    """Move the inputs before every run, plain or with bound inputs."""
    run, value = ort.InferenceSession.run, ort.OrtValue.ortvalue_from_numpy

    def moved_run(self: Any, names: Any, feeds: dict[str, Any], *rest: Any) -> Any:
        return run(self, names, {name: moved(array) for name, array in feeds.items()}, *rest)

    def moved_value(array: Any, *rest: Any, **options: Any) -> Any:
        return value(moved(array), *rest, **options)

    ort.InferenceSession.run = moved_run
    ort.OrtValue.ortvalue_from_numpy = staticmethod(moved_value)
