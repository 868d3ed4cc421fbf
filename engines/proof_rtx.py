"""The proof of a TensorRT-RTX engine, from the program inside its file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .graph import read_graph
from .products import AttentionBlock, Product, why_not_8_bits
from .program import Kernel, Program, read_programs
from .proof import AttentionProof, GemmProof, KernelReport, graph_products

_FLOATS = frozenset({"fp8", "bf16", "fp16", "fp32", "fp64"})
_OPERANDS = _FLOATS | {"int8", "uint8"}


def proof_from_engine(engine: Path, graph: Path) -> KernelReport:
    """Read what the TensorRT-RTX engine file ``engine`` does for each product of ``graph``.

    Raises:
        IntegrityError: either file cannot be read.
    """
    programs, onnx_graph = read_programs(engine), read_graph(graph)
    products, attention = graph_products(onnx_graph)
    names = frozenset(p.node for p in products)
    return KernelReport(
        backend="tensorrt-rtx",
        profiles=len(programs),
        kernels=sum(len(p.kernels) for p in programs),
        gemms=tuple(_gemm(p, programs, names) for p in products),
        attention=tuple(_attention(a, programs) for a in attention),
        casts=sum(_is_cast(k) for p in programs for k in p.kernels),
    )


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


def _is_cast(kernel: Kernel) -> bool:
    if kernel.op != "cast" and kernel.name != "__myl_Cast":
        return False
    kinds = set(kernel.args + kernel.results)
    return kinds <= _FLOATS and len(kinds) > 1
