"""Schemes: how a linear layer's weight is stored, and what its product multiplies. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """What a recipe can do to a layer.

    Args:
        weight: type its weight is stored in: ``fp8`` (E4M3) or ``int8``, with one scale an output channel.
        activation: type its input is rounded to, with one scale for the tensor.
    """

    weight: str
    activation: str


SCHEMES = {"fp8": Scheme("fp8", "fp8"), "int8": Scheme("int8", "int8")}
"""Schemes that quantise, by the name that recipes and receipts know them under."""

BASES = ("bf16", "fp16")
"""Types that everything a recipe does not name computes in."""

DIMENSION_MULTIPLE = {"fp8": 16}
"""In and out features of a layer must be multiples of this, or TensorRT has no kernel for the scheme."""


def excluded(scheme: str, out_features: int, in_features: int) -> str:
    """Why a layer of this size cannot have ``scheme``; empty if it can."""
    multiple = DIMENSION_MULTIPLE.get(scheme, 1)
    if out_features % multiple or in_features % multiple:
        return (
            f"in features {in_features} and out features {out_features} must both be multiples of "
            f"{multiple} for {scheme} matrix products in TensorRT"
        )
    return ""


def element_types(base: str, schemes: frozenset[str]) -> frozenset[str]:
    """Element types in a graph that computes in ``base``, its layers in ``schemes``."""
    used = (SCHEMES[name] for name in schemes if name in SCHEMES)
    return frozenset({base, *(kind for s in used for kind in (s.weight, s.activation) if kind)})
