"""Verification of ONNX Runtime on this CPU, from the optimised form of a component's graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..engines.onnx_graph import Graph, Node, read_graph, stored_bytes
from ..engines.onnxruntime.backend import optimized_graph
from ..engines.products import AttentionBlock, Product, factors, node_name, why_not_8_bits
from .report import GraphProducts, VerificationReport, VerifiedAttention, VerifiedProduct

_INT8 = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "MatMulInteger", "QLinearConv"})
_FLOAT = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv"})
_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
_RESTORE = "DequantizeLinear"
_BLOCKED = "_nchwc"
"""Suffix of the output's name of a convolution that ONNX Runtime runs on blocks of channels."""


def read_onnxruntime(graph: Path) -> VerificationReport:
    """The report of ``graph`` on this CPU, read from the graph that ONNX Runtime optimises it to.

    FP8 products run in fp32 there, on values rounded to FP8: they are listed as fallbacks. Weights are those
    of the optimised graph; copies that a kernel packs at opening are not counted.

    Raises:
        CapabilityError: onnxruntime is not installed.
        BuildError: onnxruntime refuses the graph.
    """
    source, optimised = read_graph(graph), optimized_graph(graph)
    in_graph = GraphProducts.of(source)
    names = {f"{n.outputs[0]}{_BLOCKED}": node_name(n) for n in source.nodes if n.op == "Conv"}
    runs = {names.get(name := _unfused_name(node_name(n)), name): n for n in optimised.nodes}
    return VerificationReport(
        backend="onnxruntime",
        profiles=1,
        kernels=len(optimised.nodes),
        gemms=tuple(_product(p, runs, optimised) for p in in_graph.products),
        attention=tuple(_attention(a, runs) for a in in_graph.attention),
        casts=tuple(node_name(n) for n in optimised.nodes if n.op == "Cast"),
        convolutions=tuple(_product(p, runs, optimised) for p in in_graph.convolutions),
        constant_bytes=sum(stored_bytes(*tensor) for tensor in optimised.initializers.values()),
    )


def _product(product: Product, runs: Mapping[str, Node], optimised: Graph) -> VerifiedProduct:
    node, restored = runs.get(product.node), runs.get(product.dequantised_by)
    op = "" if node is None else node.op
    kind = "int8" if op in _INT8 else "fp32" if op in _FLOAT else ""
    precision = factors(kind) if kind else ""
    unfused = restored is not None and restored.op == _RESTORE
    if not product.activation and (op == "MatMulNBits" or unfused):
        precision = f"fp32x{product.stored}"
    cause = why_not_8_bits(product, precision)
    if precision and product.scheme == "fp8":
        cause = "ONNX Runtime has no FP8 kernels on the CPU: it multiplies the rounded values in fp32"
    elif precision and product.scheme in ("w4a8", "w4a4"):
        cause = "ONNX Runtime has no such INT4 kernels: it multiplies the rounded values in fp32"
    elif product.scheme == "int8" and kind == "fp32":
        cause = "ONNX Runtime fuses INT8 only where the product has a QuantizeLinear of its own"
    reader = restored if unfused else node
    return VerifiedProduct(
        product.node,
        product.weight,
        product.scheme,
        precision,
        op,
        cause=cause,
        op=product.op,
        shape=product.shape,
        weight_bytes=_weight_bytes(reader, optimised) if product.weight and reader is not None else 0,
        fused=(op,) if op.startswith("Fused") else (),
    )


def _weight_bytes(node: Node, optimised: Graph) -> int:
    """Bytes of the largest constant that ``node`` reads: its weight."""
    constants = (optimised.initializers[name] for name in node.inputs if name in optimised.initializers)
    return max((stored_bytes(*tensor) for tensor in constants), default=0)


def _attention(block: AttentionBlock, runs: Mapping[str, Node]) -> VerifiedAttention:
    operators = [runs[name].op for name in block.nodes if name in runs]
    op = next((op for op in operators if op in _ATTENTION), "")
    cause = "" if op else "ONNX Runtime runs its products one by one"
    return VerifiedAttention(
        block.nodes, bool(op), op, ("fp32",) * 3 if operators else (), block.head_size, cause
    )


def _unfused_name(name: str) -> str:
    """The product's own name; ``fused x/MatMulAddFusion`` is x with a bias and an activation."""
    return (
        name.removeprefix("fused ").removesuffix("/MatMulAddFusion").removesuffix("/MatmulTransposeFusion/")
    )
