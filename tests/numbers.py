"""How near is near: every tolerance of the numeric tests has one name, one value and one reason here.

A tolerance is at least three times the measured noise, and at most a third of the
smallest mistake that it must catch. Noise is the spread over instruction sets, numbers of threads, kernel
libraries and inputs that differ by one unit in the last place; ``tests/tools/numerics.py`` measures it again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def near(got: Any, want: Any, tolerance: float) -> None:
    """Every value (of tensors or arrays) is within ``tolerance`` times the largest value of ``want``.

    Of the largest, not of each: where large values cancel in a sum, their noise is left.
    """
    got, want = (np.asarray(x.detach() if hasattr(x, "detach") else x) for x in (got, want))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * float(np.abs(want).max()))


def sqnr(got: Array, want: Array) -> float:
    """Signal to quantisation noise in dB: ``10 log10(sum want^2 / sum (got - want)^2)``; equal: infinite."""
    error = float(((got.astype(np.float64) - want) ** 2).sum())
    return (
        float("inf")
        if error == 0
        else 10 * float(np.log10(float((want.astype(np.float64) ** 2).sum()) / error))
    )


HIDDEN = 1e-5
"""Hidden states of one stack in fp32. Noise 8e-7; a tanh GELU moves them by 1e-4."""

FEATURES = 2e-5
"""Embeddings, queries and texts in fp32, after two stacks. Noise 4e-6; a tanh GELU moves them by 1e-4."""

LOGITS = 5e-5
"""After the decoder too. Noise 6e-6; a tanh GELU moves them by 2.5e-4."""

LOSS = 1e-5
"""Of a loss in fp32, which is 1 to 6. Noise 2e-6."""

GRADIENT = 5e-5
"""Of the largest value of a gradient. Noise 1.4e-5."""

FP32_SQNR = 100.0
"""A model in fp32 on another engine. Measured 116 dB and more; a tanh instead of an erf GELU leaves 74 dB."""

BF16_SQNR = 24.0
"""A model of random weights in bf16 against fp32. Measured 34 dB and more."""

LAYER_SQNR = 80.0
"""One quantised layer on another engine, given the same input. Measured 132 dB and more, other sums.
A rounding left out, a scale half a percent off or one wrong channel leave 45 dB at most."""

MODEL_SQNR = 24.0
"""All quantised layers in a row on another engine. A value halfway between two codes is rounded up by one
engine and down by the other, and from there on the results differ as two roundings of the model do: measured
34 to 50 dB where that happens, 120 dB where it does not. Swapped layers leave 10 dB; smaller mistakes are
for :data:`LAYER_SQNR` to find."""
