"""Proof of what really runs: the precision of each matrix product, the fusion of each attention.

:func:`proof_from_engine` reads a TensorRT-RTX engine, :func:`proof_from_onnxruntime` ONNX Runtime's optimised
graph; both give a :class:`KernelReport`. :func:`check_promise` fails a build whose engine differs from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BuildError, UsageError
from .graph import Graph, read_graph
from .onnxruntime_backend import optimized_nodes
from .products import AttentionBlock, Product, find_attention, find_products, node_name, why_not_8_bits
from .program import Kernel, Program, read_programs

SCHEMES = ("fp8", "int8", "bf16", "fp16", "fp32", "int8-weight", "int4-weight")
"""What can be promised of a matrix product: the type of both its factors, or that of its stored weight, which
is dequantised for a product in 16 bits."""

_FLOATS = frozenset({"fp8", "bf16", "fp16", "fp32", "fp64"})
_BASES = frozenset({"bf16", "fp16"})
_OPERANDS = _FLOATS | {"int8", "uint8"}
_ORT_INT8 = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "MatMulInteger"})
_ORT_FLOAT = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm"})
_ORT_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
_RESTORE = "DequantizeLinear"
_LISTED = 6


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
        return tuple(g for g in self.gemms if g.scheme and g.precision != _both(g.scheme))

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


def proof_from_engine(engine: Path, graph: Path) -> KernelReport:
    """Read what the TensorRT-RTX engine file ``engine`` does for each product of ``graph``.

    Raises:
        IntegrityError: either file cannot be read.
    """
    programs, onnx_graph = read_programs(engine), read_graph(graph)
    products, attention = _products(onnx_graph)
    names = frozenset(p.node for p in products)
    return KernelReport(
        backend="tensorrt-rtx",
        profiles=len(programs),
        kernels=sum(len(p.kernels) for p in programs),
        gemms=tuple(_gemm(p, programs, names) for p in products),
        attention=tuple(_attention(a, programs) for a in attention),
        casts=sum(_is_cast(k) for p in programs for k in p.kernels),
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


def proof_from_onnxruntime(graph: Path) -> KernelReport:
    """Read what ONNX Runtime makes of ``graph`` on this CPU, from the graph it optimises it to.

    FP8 products run in fp32 there, on values rounded to FP8: they are listed as fallbacks.

    Raises:
        CapabilityError: onnxruntime is not installed.
        BuildError: onnxruntime refuses the graph.
    """
    products, blocks = _products(read_graph(graph))
    nodes = optimized_nodes(graph)
    runs = {_unfused_name(node_name(n)): n.op for n in nodes}
    gemms = []
    for product in products:
        op = runs.get(product.node, "")
        kind = "int8" if op in _ORT_INT8 else "fp32" if op in _ORT_FLOAT else ""
        precision = _both(kind) if kind else ""
        if not product.activation and (op == "MatMulNBits" or runs.get(product.dequantised_by) == _RESTORE):
            precision = f"fp32x{product.stored}"
        cause = why_not_8_bits(product, precision)
        if precision and product.scheme == "fp8":
            cause = "ONNX Runtime has no FP8 kernels on the CPU: it multiplies the rounded values in fp32"
        elif product.scheme == "int8" and kind == "fp32":
            cause = "ONNX Runtime fuses INT8 only where the product has a QuantizeLinear of its own"
        gemms.append(GemmProof(product.node, product.weight, product.scheme, precision, op, (), cause))
    attention = []
    for block in blocks:
        op = next((runs[n] for n in block.nodes if runs.get(n) in _ORT_ATTENTION), "")
        attention.append(AttentionProof(block.nodes, bool(op), op))
    casts = sum(n.op == "Cast" for n in nodes)
    return KernelReport("onnxruntime", 1, len(nodes), tuple(gemms), tuple(attention), casts)


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
        if gemm.node not in kept and gemm.precision in (_both("fp8"), _both("int8"))
    ]
    if wrong:
        more = f" And {len(wrong) - _LISTED} more." if len(wrong) > _LISTED else ""
        raise BuildError(
            f"{len(wrong)} of {len(promised)} promised matrix products do not run as promised.",
            " ".join(wrong[:_LISTED]) + more,
            "Take these layers out of the recipe, or build for a target that has the type.",
        )


def _products(graph: Graph) -> tuple[tuple[Product, ...], tuple[AttentionBlock, ...]]:
    """The graph's products, without those that are parts of an attention, and its attentions."""
    attention = find_attention(graph)
    inside = {name for block in attention for name in block.nodes}
    return tuple(p for p in find_products(graph) if p.node not in inside), attention


def _gemm(product: Product, programs: Iterable[Program], names: frozenset[str]) -> GemmProof:
    found: list[tuple[str, Kernel]] = []
    for program in programs:
        kernel, operands = _find(product.node, program)
        if kernel is not None:
            if product.stored and not product.activation:
                operands = (*operands[:1], _stored(product, program, operands[-1] if operands else ""))
            found.append(("x".join(operands), kernel))
    precision = "|".join(sorted({p for p, _ in found}))
    kernel = found[0][1] if found else None
    together = names.intersection(kernel.layers) if kernel is not None and _is_matrix(kernel) else ()
    return GemmProof(
        product.node,
        product.weight,
        product.scheme,
        precision,
        kernel.name if kernel is not None else "",
        tuple(sorted(together)) if len(together) > 1 else (),
        why_not_8_bits(product, precision),
    )


def _find(node: str, program: Program) -> tuple[Kernel | None, tuple[str, ...]]:
    """The kernel that computes ``node`` and the types of its two factors.

    Other kernels list the node as well (scales are applied behind the product), so matrix kernels go first;
    tiny products are done by plain kernels, whose first two operands are the factors.
    """
    users = [k for k in program.kernels if node in k.layers]
    matrix = [k for k in users if _is_matrix(k)]
    for kernel in matrix:
        parts = [f for f in program.fused if f.op == "fully_connected" and node in f.layers]
        return kernel, _factors(parts[0] if kernel.op == "runtime_fusion" and parts else kernel)
    return (users[0], _factors(users[0])) if users else (None, ())


def _stored(product: Product, program: Program, factor: str) -> str:
    """The type in which the engine keeps the weight of a weight-only ``product``; ``factor`` if unpacked."""
    wanted = {product.node, product.dequantised_by}
    users = [k for k in program.kernels if wanted & set(k.layers)]
    return product.stored if any(product.stored in k.args for k in users) else factor


def _is_matrix(kernel: Kernel) -> bool:
    return kernel.op in ("fully_connected", "runtime_fusion") or "gemm" in kernel.name


def _factors(kernel: Kernel) -> tuple[str, ...]:
    return tuple(kind for kind in kernel.args if kind in _OPERANDS)[:2]


def _attention(block: AttentionBlock, programs: tuple[Program, ...]) -> AttentionProof:
    """Fused if, in every profile, a kernel with ``mha`` in its name lists one of the nodes."""
    kernels = [
        next((k for k in p.kernels if "mha" in k.name and set(block.nodes) & set(k.layers)), None)
        for p in programs
    ]
    whole = [k for k in kernels if k is not None]
    if len(whole) < len(kernels) or not whole:
        return AttentionProof(block.nodes, False, "", _find(block.nodes[0], programs[0])[1])
    types = tuple(kind for kind in whole[0].args if kind in _FLOATS)
    return AttentionProof(block.nodes, True, whole[0].name, types)


def _unfused_name(name: str) -> str:
    """The product's own name; ``fused x/MatMulAddFusion`` is x with a bias and an activation."""
    return (
        name.removeprefix("fused ").removesuffix("/MatMulAddFusion").removesuffix("/MatmulTransposeFusion/")
    )


def _is_cast(kernel: Kernel) -> bool:
    if kernel.op != "cast" and kernel.name != "__myl_Cast":
        return False
    kinds = set(kernel.args + kernel.results)
    return kinds <= _FLOATS and len(kinds) > 1


def _because(gemm: GemmProof) -> str:
    return f" ({gemm.cause})" if gemm.cause else ""


def _kept(scheme: str) -> frozenset[str]:
    """Precisions that keep a promise of ``scheme``."""
    stored = scheme.removesuffix("-weight")
    return frozenset({_both(scheme)} if stored == scheme else {f"{base}x{stored}" for base in _BASES})


def _both(scheme: str) -> str:
    return f"{scheme}x{scheme}"
