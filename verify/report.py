"""The verification report: precision and stored weights of each product that really runs, fusion of each
attention.

One reader a library makes it: :mod:`.rtx` of a TensorRT-RTX engine, :mod:`.inspector` of TensorRT 10 and 11,
:mod:`.onnxruntime` of ONNX Runtime's optimised graph, :mod:`.torch` of one call. :mod:`.expectations` fails a
build whose engine differs from the recipe's promises.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any

from ..engines.onnx_graph import Graph
from ..engines.products import (
    AttentionBlock,
    Product,
    factors,
    find_attention,
    find_convolutions,
    find_products,
    node_name,
)
from ..files.json import decode
from .program import UNTOLD

_PLUMBING = frozenset(
    {"Cast", "DequantizeLinear", "Expand", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Slice"}
    | {"Split", "Squeeze", "Transpose", "Unsqueeze", "Constant", "Shape", "Concat", "Gather"}
)
"""Operators that move or convert values; not listed among a kernel's fused nodes."""


@dataclass(frozen=True)
class VerifiedProduct:
    """One matrix product or convolution of the graph and how it runs.

    Args:
        node: its ONNX node name.
        weight: the initializer it multiplies by; empty if both factors are computed.
        scheme: one of :data:`..engines.products.FACTORS` if the graph quantises both factors so, else empty.
        precision: types of the factors in the engine, ``fp8xfp8``; the stored type of a weight that is
            dequantised before the product: ``bf16xint4``, or ``int8xint4`` of a product in INT8; several
            joined by ``|`` where optimization profiles differ; ``unknown`` for a type the engine does
            not show; empty if the product is not in the engine.
        kernel: name of the kernel.
        merged: nodes that share the kernel (q/k/v, gate/up), this one among them; empty if there is no other.
        cause: why it does not run in 8 bits; empty if it does.
        op: ``MatMul``, ``Gemm`` or ``Conv``.
        shape: the weight's sizes as the graph has them.
        weight_bytes: bytes of the weight in the engine, its share of a merged one; 0: unknown.
        fused: computing nodes that the same kernel does besides (an activation, a residual).
    """

    node: str
    weight: str
    scheme: str
    precision: str
    kernel: str
    merged: tuple[str, ...] = ()
    cause: str = ""
    op: str = "MatMul"
    shape: tuple[int, ...] = ()
    weight_bytes: int = 0
    fused: tuple[str, ...] = ()

    @property
    def weight_bits(self) -> float | None:
        """Bits that a weight takes in the engine; None: unknown."""
        return 8 * self.weight_bytes / math.prod(self.shape) if self.weight_bytes and self.shape else None


@dataclass(frozen=True)
class VerifiedAttention:
    """One attention: its ONNX nodes, whether one kernel does all of it, that kernel and its operand types.

    ``types`` are q's, k's and v's (and the mask's); ``head_size`` is 0 if unknown;
    ``cause`` says why it is not fused.
    """

    nodes: tuple[str, ...]
    fused: bool
    kernel: str = ""
    types: tuple[str, ...] = ()
    head_size: int = 0
    cause: str = ""


@dataclass(frozen=True)
class VerificationReport:
    """How an engine runs each product and attention of its graph.

    ``casts`` are conversions between float types that are not fused, by node name. ``constant_bytes`` is
    the bytes of weights, scales and tables for one optimization profile, ``file_bytes`` the
    engine's file (its program and its kernels as well); 0 where there is none. ``program`` is
    :func:`.program.program_digest` of the engine, equal for two builds of one graph even if their bytes
    differ; empty if there is none.
    """

    backend: str
    profiles: int
    kernels: int
    gemms: tuple[VerifiedProduct, ...]
    attention: tuple[VerifiedAttention, ...]
    casts: tuple[str, ...]
    convolutions: tuple[VerifiedProduct, ...] = ()
    constant_bytes: int = 0
    file_bytes: int = 0
    program: str = ""

    @property
    def products(self) -> tuple[VerifiedProduct, ...]:
        """Convolutions and matrix products."""
        return (*self.convolutions, *self.gemms)

    @property
    def precisions(self) -> dict[str, int]:
        """Precision -> number of matrix products."""
        return dict(Counter(g.precision for g in self.gemms))

    @property
    def fallbacks(self) -> tuple[VerifiedProduct, ...]:
        """Products that the graph quantises and the engine does not run so."""
        return tuple(p for p in self.products if p.scheme and not agrees(p.precision, factors(p.scheme)))

    @property
    def not_told(self) -> tuple[VerifiedProduct, ...]:
        """Products that the graph quantises and the engine does not tell both types of; none contradicts."""
        quantised = (p for p in self.products if p.scheme and p not in self.fallbacks)
        return tuple(p for p in quantised if UNTOLD in p.precision.split("x"))

    @property
    def fused_attention(self) -> int:
        """Number of attentions that are one kernel."""
        return sum(a.fused for a in self.attention)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all products in the engine."""
        return sum(p.weight_bytes for p in self.products)

    def to_json(self) -> dict[str, Any]:
        """Plain data for receipts, with the summaries."""
        return {
            **asdict(self),
            "precisions": self.precisions,
            "fallbacks": [g.node for g in self.fallbacks],
            "not_told": [g.node for g in self.not_told],
            "fused_attention": self.fused_attention,
            "weight_bytes": self.weight_bytes,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VerificationReport:
        """Inverse of :meth:`to_json`; entries that an older receipt lacks have defaults.

        Raises:
            KeyError, TypeError: it is not such data.
        """
        return decode(cls, data, what="The verification report", fix="Build it again.", ignore_unknown=True)


def agrees(precision: str, wanted: str) -> bool:
    """Whether ``precision`` is ``wanted`` as far as it is told: ``fp8xunknown`` agrees with ``fp8xfp8``."""
    told, types = precision.split("x"), wanted.split("x")
    return len(told) == len(types) and all(
        kind in (UNTOLD, other) for kind, other in zip(told, types, strict=True)
    )


@dataclass(frozen=True)
class GraphProducts:
    """The products of a graph (without those inside an attention), its convolutions and attentions, and the
    names of the nodes that only move or convert values."""

    products: tuple[Product, ...]
    convolutions: tuple[Product, ...]
    attention: tuple[AttentionBlock, ...]
    plumbing: frozenset[str]

    @classmethod
    def of(cls, graph: Graph) -> GraphProducts:
        """Read from ``graph``."""
        attention = find_attention(graph)
        inside = {name for block in attention for name in block.nodes}
        products = tuple(p for p in find_products(graph) if p.node not in inside)
        plumbing = frozenset(node_name(n) for n in graph.nodes if n.op in _PLUMBING)
        return cls(products, find_convolutions(graph), attention, plumbing)

    def fused(self, layers: Iterable[str], products: Iterable[str]) -> tuple[str, ...]:
        """Of the nodes ``layers`` of a kernel, those that compute something besides ``products``."""
        return tuple(dict.fromkeys(n for n in layers if n not in self.plumbing and n not in products))


def shares(products: Sequence[Product], nbytes: int) -> tuple[int, ...]:
    """``nbytes`` of one merged weight as the shares of the products in it, by their elements."""
    sizes = [math.prod(p.shape) for p in products]
    total = sum(sizes)
    return tuple(nbytes * size // total if total else 0 for size in sizes)


def _joined(digests: Sequence[str]) -> str:
    """One digest of the parts of an engine; empty if one of them has none."""
    if not all(digests):
        return ""
    return digests[0] if len(digests) == 1 else sha256(" ".join(digests).encode()).hexdigest()


def merge_reports(reports: Sequence[VerificationReport]) -> VerificationReport:
    """The report of a split component from those of its parts, which share a backend."""
    return replace(
        reports[0],
        kernels=sum(r.kernels for r in reports),
        gemms=tuple(g for r in reports for g in r.gemms),
        attention=tuple(a for r in reports for a in r.attention),
        casts=tuple(c for r in reports for c in r.casts),
        convolutions=tuple(c for r in reports for c in r.convolutions),
        constant_bytes=sum(r.constant_bytes for r in reports),
        file_bytes=sum(r.file_bytes for r in reports),
        program=_joined([r.program for r in reports]),
    )
