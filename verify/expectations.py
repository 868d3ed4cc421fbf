"""Fails a build whose engine does not run the precisions that the recipe promised."""

from __future__ import annotations

from collections.abc import Mapping

from ..engines.products import FACTORS, factors
from ..errors import BuildError, UsageError
from .report import VerificationReport, VerifiedProduct, agrees

SCHEMES = (*FACTORS, "bf16", "fp16", "fp32", "int8-weight", "int4-weight")
"""Precision that a recipe can promise for a matrix product: types of both factors, or of the stored weight,
which is dequantised for a product in 16 bits."""

CPU_KERNELS: dict[str, dict[str, str]] = {
    "onnxruntime": {"int8": "int8"},
    "torch": {"int8": "int8", "w4a8": "w4a8", "w4a4": "w4a8"},
}
"""Library -> promised scheme -> the scheme whose kernel it runs on a CPU. Products of other schemes run in 16
or 32 bits there, on the rounded values."""

_BASES = frozenset({"bf16", "fp16"})
_LISTED = 6


def check_expectations(
    report: VerificationReport, promised: Mapping[str, str], *, require_proof: bool = True
) -> tuple[str, ...]:
    """Compare an engine with the recipe's promises.

    Args:
        report: verification report of the engine.
        promised: ONNX node name, or weight name, -> scheme (one of :data:`SCHEMES`). Of a node of an
            attention it is the type of q, k and v; of its Softmax, also that one kernel takes them. A product
            in 8 or 4 bits that is not promised is a difference too.
        require_proof: whether a type that the engine does not tell is a difference.

    Returns:
        The promises that the engine does not tell enough about, each with what it tells; empty with
        ``require_proof``.

    Raises:
        BuildError: engine and promise differ; the layers are named with the likely causes.
        UsageError: an unknown scheme.
    """
    known: dict[str, list[VerifiedProduct]] = {}
    for product in report.products:
        for name in {product.node, product.weight, product.weight.removesuffix(".weight")} - {""}:
            known.setdefault(name, []).append(product)
    attention = {node: block for block in report.attention for node in block.nodes}
    wrong: list[str] = []
    not_told: dict[str, str] = {}
    checked: set[str] = set()
    for name, scheme in promised.items():
        if scheme not in SCHEMES:
            raise UsageError(
                f"Unknown scheme {scheme!r} promised for {name}.", f"Known: {', '.join(SCHEMES)}."
            )
        block = attention.get(name)
        if name not in known and block is None:
            wrong.append(f"{name}: promised {scheme}, the graph has no such matrix product.")
        apart = block is not None and name in block.nodes[1:2] and not block.fused
        if block is not None and (apart or set(block.types[:3]) != {scheme}):
            runs = "x".join(block.types[:3])
            if not apart and not require_proof and agrees(runs, "x".join([scheme] * 3)):
                not_told[name] = runs
            else:
                wrong.append(_mismatch(name, scheme, runs + (" unfused" if apart else ""), block.cause))
        for product in known.get(name, ()):
            checked.add(product.node)
            accepted = _accepted(scheme)
            if product.precision in accepted:
                continue
            if not require_proof and any(agrees(product.precision, other) for other in accepted):
                not_told[product.node] = product.precision
            else:
                wrong.append(_mismatch(name, scheme, product.precision, product.cause))
    wrong += [
        f"{product.node}: runs {product.precision}, which nothing promised."
        for product in report.products
        if product.node not in checked and product.precision in map(factors, FACTORS)
    ]
    if wrong:
        more = f" And {len(wrong) - _LISTED} more." if len(wrong) > _LISTED else ""
        raise BuildError(
            f"{len(wrong)} of {len(promised)} promised matrix products do not run as promised.",
            " ".join(wrong[:_LISTED]) + more,
            "Take these layers out of the recipe, or build for a target that has the type.",
        )
    return tuple(f"{name}: {runs}" for name, runs in not_told.items())


def _mismatch(name: str, scheme: str, precision: str, cause: str) -> str:
    return f"{name}: promised {scheme}, runs {precision or 'nowhere'}{f' ({cause})' if cause else ''}."


def _accepted(scheme: str) -> frozenset[str]:
    """Precisions that fulfil ``scheme``."""
    stored = scheme.removesuffix("-weight")
    return frozenset({factors(scheme)} if stored == scheme else {f"{base}x{stored}" for base in _BASES})
