"""What a build promised of its products, held against what an engine really runs."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import BuildError, UsageError
from .proof import GemmProof, KernelReport, both

SCHEMES = ("fp8", "int8", "bf16", "fp16", "fp32", "int8-weight", "int4-weight")
"""What can be promised of a matrix product: the type of both its factors, or that of its stored weight, which
is dequantised for a product in 16 bits."""

_BASES = frozenset({"bf16", "fp16"})
_LISTED = 6


def check_promise(report: KernelReport, promised: Mapping[str, str]) -> None:
    """Hold an engine to what was promised.

    Args:
        report: what the engine does.
        promised: ONNX node name, or weight name, -> scheme (one of :data:`SCHEMES`). An 8-bit product that is
            not promised is a difference too.

    Raises:
        BuildError: engine and promise differ; the layers are named with the likely causes.
        UsageError: an unknown scheme.
    """
    known: dict[str, list[GemmProof]] = {}
    for gemm in report.gemms:
        for name in {gemm.node, gemm.weight, gemm.weight.removesuffix(".weight")} - {""}:
            known.setdefault(name, []).append(gemm)
    wrong: list[str] = []
    kept: set[str] = set()
    for name, scheme in promised.items():
        if scheme not in SCHEMES:
            raise UsageError(
                f"Unknown scheme {scheme!r} promised for {name}.", f"Known: {', '.join(SCHEMES)}."
            )
        if name not in known:
            wrong.append(f"{name}: promised {scheme}, the graph has no such matrix product.")
        for gemm in known.get(name, ()):
            kept.add(gemm.node)
            if gemm.precision not in _kept(scheme):
                wrong.append(
                    f"{name}: promised {scheme}, runs {gemm.precision or 'nowhere'}{_because(gemm)}."
                )
    wrong += [
        f"{gemm.node}: runs {gemm.precision}, which nothing promised."
        for gemm in report.gemms
        if gemm.node not in kept and gemm.precision in (both("fp8"), both("int8"))
    ]
    if wrong:
        more = f" And {len(wrong) - _LISTED} more." if len(wrong) > _LISTED else ""
        raise BuildError(
            f"{len(wrong)} of {len(promised)} promised matrix products do not run as promised.",
            " ".join(wrong[:_LISTED]) + more,
            "Take these layers out of the recipe, or build for a target that has the type.",
        )


def _because(gemm: GemmProof) -> str:
    return f" ({gemm.cause})" if gemm.cause else ""


def _kept(scheme: str) -> frozenset[str]:
    """Precisions that keep a promise of ``scheme``."""
    stored = scheme.removesuffix("-weight")
    return frozenset({both(scheme)} if stored == scheme else {f"{base}x{stored}" for base in _BASES})
