"""Schemes: stored type of a linear layer's weight, and factor types of its product. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """A way to quantise a layer.

    Args:
        weight: type its weight is stored in: ``fp8`` (E4M3) or ``int8``, with one scale an output channel;
            ``int4`` with one for each block of an output channel (:func:`block_size`), or for all of it
            where the input is rounded too: integer products sum over the whole channel.
        activation: type its input is rounded to, with one scale for the tensor; empty if it is left alone:
            then the weight is dequantised and the product runs in the base type.
        fold: how large channels of the input are moved into the weight first: ``smooth``
        (:mod:`..calibration.smoothquant`) or
            ``awq`` (:mod:`..calibration.awq`); empty if they are not.
        per_tensor: the weight has one scale in all, for every type.
    """

    weight: str
    activation: str = ""
    fold: str = ""
    per_tensor: bool = False


SCHEMES = {
    "fp8": Scheme("fp8", "fp8"),
    "int8": Scheme("int8", "int8"),
    "fp8-tensor": Scheme("fp8", "fp8", per_tensor=True),
    "int8-tensor": Scheme("int8", "int8", per_tensor=True),
    "int8-smooth": Scheme("int8", "int8", fold="smooth"),
    "int8-weight": Scheme("int8"),
    "int4-weight": Scheme("int4"),
    "int4-awq": Scheme("int4", fold="awq"),
    "w4a8": Scheme("int4", "int8"),
    "w4a4": Scheme("int4", "int4"),
}
"""Schemes that quantise, by the name that recipes and receipts know them under."""

PROMISES = {(s.activation, s.weight): name for name, s in SCHEMES.items() if not (s.fold or s.per_tensor)}
"""Types of both factors -> the scheme whose kernel that is: smoothing is in the weights already."""

BASES = ("bf16", "fp16", "fp32")
"""Types that everything a recipe does not name computes in; with the last one, that is everything."""

DIMENSION_MULTIPLE = {"fp8": 16, "fp8-tensor": 16, "w4a8": 16, "w4a4": 32}
"""In and out features of a layer must be multiples of this, or TensorRT has no kernel for the scheme."""

BLOCKS = (128, 64, 32)
"""In features of an INT4 weight that share a scale: the first of these that divides them. TensorRT-RTX and
ONNX Runtime take all three."""


def promise(scheme: str) -> str:
    """The precision that ``scheme`` promises of a layer's product: one of :data:`PROMISES`."""
    return PROMISES[SCHEMES[scheme].activation, SCHEMES[scheme].weight]


def block_size(scheme: str, in_features: int) -> int:
    """In features that share a scale; 0 where all of an output channel do, or where no block fits."""
    if not _blocked(scheme):
        return 0
    return next((block for block in BLOCKS if in_features % block == 0), 0)


def excluded(scheme: str, out_features: int, in_features: int) -> str:
    """Why a layer of this size cannot have ``scheme``; empty if it can."""
    multiple = DIMENSION_MULTIPLE.get(scheme, 1)
    if out_features % multiple or in_features % multiple:
        return (
            f"in features {in_features} and out features {out_features} must both be multiples of "
            f"{multiple} for {scheme} matrix products in TensorRT"
        )
    if scheme in SCHEMES and _blocked(scheme) and not block_size(scheme, in_features):
        return f"in features {in_features} must be a multiple of {BLOCKS[-1]} for blocks of INT4 weights"
    return ""


def _blocked(scheme: str) -> bool:
    return SCHEMES[scheme].weight == "int4" and not SCHEMES[scheme].activation


def folded_layers(schemes: Mapping[str, str], fold: str = "") -> list[str]:
    """The layers whose scheme has ``fold``, or any fold if that is empty."""
    folds = {name: SCHEMES[scheme].fold for name, scheme in schemes.items() if scheme in SCHEMES}
    return [name for name, own in folds.items() if own and own == (fold or own)]


def rounded_inputs(schemes: Mapping[str, str]) -> dict[str, str]:
    """Layer -> the type its input is rounded to, for those whose input is: their ranges are measured."""
    kinds = {name: SCHEMES[scheme].activation for name, scheme in schemes.items() if scheme in SCHEMES}
    return {name: kind for name, kind in kinds.items() if kind}


def element_types(base: str, schemes: frozenset[str]) -> frozenset[str]:
    """Element types in a graph that computes in ``base``, its layers in ``schemes``."""
    used = (SCHEMES[name] for name in schemes if name in SCHEMES)
    return frozenset({base, *(kind for s in used for kind in (s.weight, s.activation) if kind)})
