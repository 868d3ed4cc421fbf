"""Verification of a TensorRT-RTX engine, from the program inside its file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..engines.onnx_graph import read_graph
from ..engines.products import AttentionBlock, Product, why_not_8_bits
from .program import UNTOLD, Kernel, Program, program_digest, read_programs
from .report import GraphProducts, VerificationReport, VerifiedAttention, VerifiedProduct, shares

_FLOATS = frozenset({"fp8", "bf16", "fp16", "fp32", "fp64"})
_OPERANDS = _FLOATS | {"int8", "uint8", "int4", UNTOLD}
_MATRIX = frozenset({"fully_connected", "runtime_fusion", "corrltn"})  # corrltn: a convolution
_LARGEST_HEAD = 256
_SMALLEST_HEAD = 9
_FEWEST_FP8_ROWS = 32
"""Limits of the fused attention of TensorRT-RTX 1.7, measured: heads of 9 to 256 values in 16 bits; in FP8
heads up to 256, of sequences from 32 rows on (17 were not fused); nothing in INT8 or fp32."""


def read_rtx(engine: Path, graph: Path) -> VerificationReport:
    """The report of the TensorRT-RTX engine file ``engine``, built from ``graph``.

    Raises:
        IntegrityError: either file cannot be read.
    """
    report = report_of(
        read_programs(engine), graph, "tensorrt-rtx", engine.stat().st_size, why_unfused=_why_unfused
    )
    return replace(report, program=program_digest(engine))


def report_of(
    programs: tuple[Program, ...],
    graph: Path,
    backend: str,
    file_bytes: int = 0,
    *,
    why_unfused: Callable[[AttentionBlock, tuple[str, ...]], str],
) -> VerificationReport:
    """The report of ``programs``, one for each optimization profile; IntegrityError if ``graph`` is not a
    valid ONNX model.

    ``why_unfused`` gives the likely cause for an attention and the types it was computed in.
    """
    in_graph = GraphProducts.of(read_graph(graph))
    names = {p.node: p for p in in_graph.products}
    return VerificationReport(
        backend=backend,
        profiles=len(programs),
        kernels=sum(len(p.kernels) for p in programs),
        gemms=tuple(_product(p, programs, in_graph, names) for p in in_graph.products),
        attention=tuple(_attention(a, programs, why_unfused) for a in in_graph.attention),
        casts=tuple(" ".join(k.layers) or k.name for p in programs for k in p.kernels if _is_cast(k)),
        convolutions=tuple(_product(p, programs, in_graph, {}) for p in in_graph.convolutions),
        constant_bytes=max(p.constant_bytes for p in programs),
        file_bytes=file_bytes,
    )


def _product(
    product: Product, programs: tuple[Program, ...], in_graph: GraphProducts, names: dict[str, Product]
) -> VerifiedProduct:
    """``names`` are the products that may share a kernel with this one."""
    precisions, nbytes = set(), 0
    first: Kernel | None = None
    for program in programs:
        kernel, operands = _find(product.node, program)
        if kernel is None:
            continue
        first = first or kernel
        size = max(kernel.constants, default=0)
        if product.stored not in ("", product.activation):
            packed = _packed(product, program)
            operands = (*operands[:1], product.stored if packed else operands[-1] if operands else "")
            size = packed or size
        precisions.add("x".join(operands))
        nbytes = max(nbytes, size if product.weight else 0)
    layers = () if first is None else first.layers
    merged = tuple(sorted(names.keys() & set(layers))) if first is not None and _is_matrix(first) else ()
    if len(merged) > 1:
        nbytes = shares([names[n] for n in merged], nbytes)[merged.index(product.node)]
    precision = "|".join(sorted(precisions))
    return VerifiedProduct(
        product.node,
        product.weight,
        product.scheme,
        precision,
        "" if first is None else first.name,
        merged if len(merged) > 1 else (),
        why_not_8_bits(product, precision),
        product.op,
        product.shape,
        nbytes,
        in_graph.fused(layers, names.keys() | {product.node}),
    )


def _find(node: str, program: Program) -> tuple[Kernel | None, tuple[str, ...]]:
    """The kernel that computes ``node`` and the types of its two factors.

    Other kernels list the node as well (scales are applied after the product), so matrix kernels go first;
    tiny products are done by plain kernels, whose first two operands are the factors.
    """
    users = [k for k in program.kernels if node in k.layers]
    for kernel in filter(_is_matrix, users):
        parts = [f for f in program.fused if f.op == "fully_connected" and node in f.layers]
        return kernel, _factors(parts[0] if kernel.op == "runtime_fusion" and parts else kernel)
    return (users[0], _factors(users[0])) if users else (None, ())


def _packed(product: Product, program: Program) -> int:
    """Bytes kept of the weight of ``product`` in its stored type; 0 if it was unpacked."""
    nodes = {product.node, product.dequantised_by}
    users = [k for k in program.kernels if nodes & set(k.layers)]
    operands = [pair for k in users for pair in zip(k.args, k.constants, strict=True)]
    return max((size for kind, size in operands if kind == product.stored), default=0)


def _is_matrix(kernel: Kernel) -> bool:
    return kernel.op in _MATRIX or "gemm" in kernel.name


def _factors(kernel: Kernel) -> tuple[str, ...]:
    return tuple(kind for kind in kernel.args if kind in _OPERANDS)[:2]


def _attention(
    block: AttentionBlock,
    programs: tuple[Program, ...],
    why_unfused: Callable[[AttentionBlock, tuple[str, ...]], str],
) -> VerifiedAttention:
    """Fused if, in every profile, a kernel with ``mha`` in its name lists one of the nodes."""
    kernels = [
        next((k for k in p.kernels if "mha" in k.name and set(block.nodes) & set(k.layers)), None)
        for p in programs
    ]
    whole = [k for k in kernels if k is not None]
    if len(whole) < len(kernels) or not whole:
        types = _unfused_types(block, programs[kernels.index(None)])
        return VerifiedAttention(block.nodes, False, "", types, block.head_size, why_unfused(block, types))
    types = tuple(kind for kind in whole[0].args if kind in _FLOATS)
    cause = "" if block.scheme in ("", *types[:1]) else f"its {block.scheme} values are dequantised before it"
    return VerifiedAttention(block.nodes, True, whole[0].name, types, block.head_size, cause)


def _unfused_types(block: AttentionBlock, program: Program) -> tuple[str, ...]:
    """Types of q, k and v in the two products of an attention that is not one kernel."""
    scores, mixed = block.nodes[0], block.nodes[-1]
    products = [k for k in program.kernels if _is_matrix(k) and {scores, mixed} & set(k.layers)]
    first = _find(scores, program)[1]
    last = _factors(products[-1]) if products else _find(mixed, program)[1]
    return (*first, *last[1:])


def _why_unfused(block: AttentionBlock, types: tuple[str, ...]) -> str:
    """The likely cause, by the limits measured."""
    kind = types[0] if types else ""
    if not kind:
        return "the engine has no kernel of these names: they were folded away or renamed"
    if kind not in ("fp8", "bf16", "fp16"):
        return f"there is no fused kernel in {kind}"
    if block.head_size > _LARGEST_HEAD:
        return f"head size {block.head_size}: fused kernels take {_LARGEST_HEAD} at most"
    if kind != "fp8" and 0 < block.head_size < _SMALLEST_HEAD:
        return f"head size {block.head_size}: fused kernels take {_SMALLEST_HEAD} at least"
    if kind == "fp8" and 0 < block.rows < _FEWEST_FP8_ROWS:
        return f"{block.rows} rows: fused FP8 kernels take {_FEWEST_FP8_ROWS} at least"
    if kind == "fp8":
        return "an Attention operator elsewhere in the network, or a mask's shape, kept it from being fused"
    return "the builder chose single kernels for this target"


def _is_cast(kernel: Kernel) -> bool:
    if kernel.op != "cast" and kernel.name != "__myl_Cast":
        return False
    kinds = set(kernel.args + kernel.results)
    return kinds <= _FLOATS and len(kinds) > 1
