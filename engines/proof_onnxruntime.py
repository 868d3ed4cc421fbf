"""The proof of ONNX Runtime on this CPU, from the graph it optimises a component's graph to."""

from __future__ import annotations

from pathlib import Path

from .graph import read_graph
from .onnxruntime_backend import optimized_nodes
from .products import node_name, why_not_8_bits
from .proof import AttentionProof, GemmProof, KernelReport, both, graph_products

_INT8 = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "MatMulInteger"})
_FLOAT = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm"})
_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
_RESTORE = "DequantizeLinear"


def proof_from_onnxruntime(graph: Path) -> KernelReport:
    """Read what ONNX Runtime makes of ``graph`` on this CPU, from the graph it optimises it to.

    FP8 products run in fp32 there, on values rounded to FP8: they are listed as fallbacks.

    Raises:
        CapabilityError: onnxruntime is not installed.
        BuildError: onnxruntime refuses the graph.
    """
    products, blocks = graph_products(read_graph(graph))
    nodes = optimized_nodes(graph)
    runs = {_unfused_name(node_name(n)): n.op for n in nodes}
    gemms = []
    for product in products:
        op = runs.get(product.node, "")
        kind = "int8" if op in _INT8 else "fp32" if op in _FLOAT else ""
        precision = both(kind) if kind else ""
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
        op = next((runs[n] for n in block.nodes if runs.get(n) in _ATTENTION), "")
        attention.append(AttentionProof(block.nodes, bool(op), op))
    casts = sum(n.op == "Cast" for n in nodes)
    return KernelReport("onnxruntime", 1, len(nodes), tuple(gemms), tuple(attention), casts)


def _unfused_name(name: str) -> str:
    """The product's own name; ``fused x/MatMulAddFusion`` is x with a bias and an activation."""
    return (
        name.removeprefix("fused ").removesuffix("/MatMulAddFusion").removesuffix("/MatmulTransposeFusion/")
    )
