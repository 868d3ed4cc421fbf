"""Proof of what really runs: the precision of each matrix product, the fusion of each attention.

Every reader gives a :class:`KernelReport`: :mod:`.proof_rtx` that of a TensorRT-RTX engine,
:mod:`.proof_onnxruntime` that of ONNX Runtime's optimised graph. :mod:`.promise` fails a build whose engine
differs from what was promised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .graph import Graph
from .products import AttentionBlock, Product, find_attention, find_products


@dataclass(frozen=True)
class GemmProof:
    """One matrix product of the graph and how it runs.

    Args:
        node: its ONNX node name.
        weight: the initializer it multiplies by; empty if both factors are computed.
        scheme: ``fp8`` or ``int8`` if the graph quantises both factors so, else empty.
        precision: types of the factors in the engine, ``fp8xfp8``, or ``bf16xint4`` where the weight is
            stored in INT4 and dequantised for a product in bf16; several joined by ``|`` where optimization
            profiles differ; empty if the product is not in the engine.
        kernel: name of the kernel.
        merged: nodes that share the kernel (q/k/v, gate/up), this one among them; empty if it stands alone.
        cause: why it does not run in 8 bits; empty if it does.
    """

    node: str
    weight: str
    scheme: str
    precision: str
    kernel: str
    merged: tuple[str, ...] = ()
    cause: str = ""


@dataclass(frozen=True)
class AttentionProof:
    """One attention: its ONNX nodes, whether one kernel does all of it, that kernel and its operand types.

    ``types`` are q's, k's and v's (and the mask's); unfused, those of the first product's factors.
    """

    nodes: tuple[str, ...]
    fused: bool
    kernel: str = ""
    types: tuple[str, ...] = ()


@dataclass(frozen=True)
class KernelReport:
    """What an engine is made of. ``casts`` counts conversions between float types that stand alone."""

    backend: str
    profiles: int
    kernels: int
    gemms: tuple[GemmProof, ...]
    attention: tuple[AttentionProof, ...]
    casts: int

    @property
    def precisions(self) -> dict[str, int]:
        """Precision -> number of matrix products."""
        return dict(Counter(g.precision for g in self.gemms))

    @property
    def fallbacks(self) -> tuple[GemmProof, ...]:
        """Products that the graph quantises and the engine does not run so."""
        return tuple(g for g in self.gemms if g.scheme and g.precision != both(g.scheme))

    @property
    def fused_attention(self) -> int:
        """Number of attentions that are one kernel."""
        return sum(a.fused for a in self.attention)

    def to_json(self) -> dict[str, Any]:
        """Plain data for receipts, with the summaries."""
        return {
            **asdict(self),
            "precisions": self.precisions,
            "fallbacks": [g.node for g in self.fallbacks],
            "fused_attention": self.fused_attention,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> KernelReport:
        """Inverse of :meth:`to_json`."""
        gemms = (GemmProof(**{**g, "merged": tuple(g["merged"])}) for g in data["gemms"])
        attention = (
            AttentionProof(tuple(a["nodes"]), a["fused"], a["kernel"], tuple(a["types"]))
            for a in data["attention"]
        )
        return cls(
            data["backend"], data["profiles"], data["kernels"], tuple(gemms), tuple(attention), data["casts"]
        )


def joined(reports: Sequence[KernelReport]) -> KernelReport:
    """The report of a split component from those of its parts, which share a backend."""
    return replace(
        reports[0],
        kernels=sum(r.kernels for r in reports),
        gemms=tuple(g for r in reports for g in r.gemms),
        attention=tuple(a for r in reports for a in r.attention),
        casts=sum(r.casts for r in reports),
    )


def graph_products(graph: Graph) -> tuple[tuple[Product, ...], tuple[AttentionBlock, ...]]:
    """The graph's products, without those that are parts of an attention, and its attentions."""
    attention = find_attention(graph)
    inside = {name for block in attention for name in block.nodes}
    return tuple(p for p in find_products(graph) if p.node not in inside), attention


def both(scheme: str) -> str:
    """Precision of a product whose factors are both of type ``scheme``."""
    return f"{scheme}x{scheme}"
