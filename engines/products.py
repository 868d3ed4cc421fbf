"""The products, convolutions and attentions of an ONNX graph, and their precision in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .onnx_graph import Graph, Node

_FORWARDING = frozenset({"Transpose", "Cast", "Identity", "Reshape", "DequantizeLinear"})
_BEFORE_SOFTMAX = frozenset({"Add", "Where", "Mul", "Div", "Cast", "Identity", "Concat"})
_AFTER_SOFTMAX = frozenset({"Cast", "Identity", "Dropout", "QuantizeLinear", "DequantizeLinear", "Slice"})
_MAX_STEPS = 8
_MAX_REACH = 32  # from an attention to the Reshape into heads: norms, rotary positions, Q/DQ

FACTORS = {
    "fp8": ("fp8", "fp8"),
    "int8": ("int8", "int8"),
    "w4a8": ("int8", "int4"),
    "w4a4": ("int4", "int4"),
}
"""Schemes that quantise both factors of a product -> types of the activation and of the stored weight."""


@dataclass(frozen=True)
class Product:
    """A MatMul, Gemm or Conv (``op``).

    ``weight`` is the initializer it multiplies by (empty: both factors are computed), ``shape`` its sizes as
    the graph has them, ``k`` and ``n`` its in and out features (0: unknown; a Conv sums over ``k`` values for
    each of ``n`` channels). ``activation`` and ``stored`` are the types its factors are dequantised from
    (``fp8``, ``int8``, ``int4``), empty where the graph does not quantise that factor. ``split`` says that
    the result is cut into pieces at once (a joint q/k/v), ``dequantised_by`` is the node that dequantises the
    weight.
    """

    node: str
    weight: str = ""
    k: int = 0
    n: int = 0
    activation: str = ""
    stored: str = ""
    split: bool = False
    dequantised_by: str = ""
    op: str = "MatMul"
    shape: tuple[int, ...] = ()

    @property
    def scheme(self) -> str:
        """The precision in the graph: one of :data:`FACTORS` if both factors are quantised so, else empty."""
        types = (self.activation, self.stored)
        return next((scheme for scheme, pair in FACTORS.items() if pair == types), "")


@dataclass(frozen=True)
class AttentionBlock:
    """An ``Attention`` node, or the two products around a Softmax; ``nodes`` are the ONNX names.

    ``rows`` and ``head_size`` are the sizes of one head's query (0: dynamic, or not found). ``scheme`` is
    the 8-bit type that q and k are dequantised from, empty where they are not quantised.
    """

    nodes: tuple[str, ...]
    rows: int = 0
    head_size: int = 0
    scheme: str = ""


def node_name(node: Node) -> str:
    """The node's name, or one made from its operator and output where the graph gives none."""
    return node.name or f"{node.op}:{node.outputs[0] if node.outputs else ''}"


def find_products(graph: Graph) -> tuple[Product, ...]:
    """Every MatMul and Gemm, in file order."""
    producers, users = graph.producers(), _users(graph.nodes)
    return tuple(
        _product(node, graph, producers, users)
        for node in graph.nodes
        if node.op in ("MatMul", "Gemm") and len(node.inputs) >= 2
    )


def find_attention(graph: Graph) -> tuple[AttentionBlock, ...]:
    """Every ``Attention`` node, and every Softmax between two products of computed factors."""
    producers, users = graph.producers(), _users(graph.nodes)
    blocks = []
    for node in graph.nodes:
        if node.op == "Attention":
            blocks.append(_block((node,), graph, producers))
        elif node.op == "Softmax":
            scores = _walk(
                node.inputs[:1], _BEFORE_SOFTMAX, lambda v: [producers[v]] if v in producers else []
            )
            mixed = _walk(node.outputs, _AFTER_SOFTMAX, lambda v: users.get(v, []))
            if scores and mixed:
                blocks.append(_block((scores, node, mixed), graph, producers))
    return tuple(blocks)


def find_convolutions(graph: Graph) -> tuple[Product, ...]:
    """Every Conv, in file order."""
    producers = graph.producers()
    return tuple(_convolution(n, graph, producers) for n in graph.nodes if n.op == "Conv")


def factors(scheme: str) -> str:
    """Precision of a product of ``scheme``, one of :data:`FACTORS` or the type of both factors."""
    return "x".join(FACTORS.get(scheme, (scheme, scheme)))


def why_not_8_bits(product: Product, precision: str) -> str:
    """The likely cause why ``product`` runs as ``precision``; empty if that is 8 or 4 bits on both sides."""
    if precision in map(factors, FACTORS):
        return ""
    if not precision:
        return "the engine has no kernel of this name: it was folded away or renamed"
    if not product.weight and not product.scheme:
        return "both factors are computed and not quantised"
    if not product.stored and not product.activation:
        return "the graph quantises neither factor"
    if not product.stored:
        return "the graph quantises its input only, not its weight"
    if not product.activation:
        return "the graph quantises its weight only, not its input"
    if not product.scheme:
        return f"its weight is {product.stored}, its input {product.activation}"
    odd = [f"{name} = {size}" for name, size in (("K", product.k), ("N", product.n)) if size % 16]
    if odd:
        return f"{' and '.join(odd)}: 8-bit kernels need multiples of 16"
    if product.split:
        return "its result is split at once, so the builder splits its weight, dequantised first"
    return "the builder chose a 16- or 32-bit kernel for this target"


def _product(node: Node, graph: Graph, producers: dict[str, Node], users: dict[str, list[Node]]) -> Product:
    weight, stored = _source(node.inputs[1], graph, producers)
    _, activation = _source(node.inputs[0], graph, producers)
    if not weight:
        return Product(node_name(node), activation=activation, stored=stored, op=node.op)
    dims = graph.initializers[weight][1]
    k, n = (dims[0], dims[1]) if len(dims) == 2 else (0, 0)
    if _transposed(node, producers):
        k, n = n, k
    cut = any(user.op in ("Split", "Slice", "Gather") for out in node.outputs for user in users.get(out, []))
    restored = next((node_name(u) for u in users.get(weight, []) if u.op == "DequantizeLinear"), "")
    return Product(node_name(node), weight, k, n, activation, stored, cut, restored, node.op, dims)


def _convolution(node: Node, graph: Graph, producers: dict[str, Node]) -> Product:
    weight, stored = _source(node.inputs[1], graph, producers)
    _, activation = _source(node.inputs[0], graph, producers)
    shape = graph.initializers[weight][1] if weight else ()
    n, k = (shape[0], math.prod(shape[1:])) if shape else (0, 0)
    return Product(node_name(node), weight, k, n, activation, stored, op="Conv", shape=shape)


def _block(nodes: tuple[Node, ...], graph: Graph, producers: dict[str, Node]) -> AttentionBlock:
    """The attention of ``nodes``; the first one's first two inputs are q and k."""
    schemes = {_source(value, graph, producers)[1] for value in nodes[0].inputs[:2]}
    rows, head_size = _query_sizes(nodes[0].inputs[0], graph, producers)
    scheme = schemes.pop() if len(schemes) == 1 else ""
    return AttentionBlock(tuple(node_name(node) for node in nodes), rows, head_size, scheme)


def _query_sizes(value: str, graph: Graph, producers: dict[str, Node]) -> tuple[int, int]:
    """Rows and head size of a query, from the Reshape to ``[batch, rows, heads, head size]`` after it."""
    for _ in range(_MAX_REACH):
        node = producers.get(value)
        if node is None or not node.inputs:
            break
        if node.op == "Reshape":
            sizes = _shape_values(node.inputs[1], graph, producers)
            if len(sizes) == 4:
                return max(sizes[1], 0), max(sizes[3], 0)
        value = node.inputs[0]
    return 0, 0


def _shape_values(value: str, graph: Graph, producers: dict[str, Node]) -> tuple[int, ...]:
    """A shape's sizes, 0 where they are computed."""
    node = producers.get(value)
    if node is not None and node.op == "Concat":
        return tuple(size for part in node.inputs for size in graph.integers.get(part, (0,)))
    return graph.integers.get(value, ())


def _source(value: str, graph: Graph, producers: dict[str, Node]) -> tuple[str, str]:
    """The initializer of ``value`` (empty: it is computed) and the 8-bit type it is dequantised from."""
    scheme = ""
    for _ in range(_MAX_STEPS):
        if value in graph.initializers:
            return value, scheme
        node = producers.get(value)
        if node is None or node.op not in _FORWARDING:
            return "", scheme
        if node.op == "DequantizeLinear":
            scheme = _quantised_type(node, graph, producers)
        value = node.inputs[0]
    return "", scheme


def _quantised_type(node: Node, graph: Graph, producers: dict[str, Node]) -> str:
    """Element type of a DequantizeLinear's input: the initializer's, or its zero point's."""
    if node.inputs[0] in graph.initializers:
        return graph.initializers[node.inputs[0]][0]
    source = producers.get(node.inputs[0])
    for candidate in (node, source):
        if candidate is not None and len(candidate.inputs) > 2 and candidate.inputs[2] in graph.initializers:
            return graph.initializers[candidate.inputs[2]][0]
    return "uint8"  # ONNX's default without a zero point


def _transposed(node: Node, producers: dict[str, Node]) -> bool:
    """Whether the weight is stored [out, in]."""
    turned = bool(node.ints.get("transB", 0))
    value = node.inputs[1]
    for _ in range(_MAX_STEPS):
        source = producers.get(value)
        if source is None or source.op not in _FORWARDING:
            break
        turned ^= source.op == "Transpose"
        value = source.inputs[0]
    return turned


def _users(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    users: dict[str, list[Node]] = {}
    for node in nodes:
        for value in node.inputs:
            users.setdefault(value, []).append(node)
    return users


def _walk(
    values: Iterable[str], through: frozenset[str], step: Callable[[str], list[Node]], left: int = _MAX_STEPS
) -> Node | None:
    """The first MatMul reached from ``values`` by ``step`` through operators of ``through`` only."""
    for value in values:
        for node in step(value):
            if node.op == "MatMul":
                return node
            if node.op in through and left:
                upwards = value in node.outputs
                product = _walk(node.inputs if upwards else node.outputs, through, step, left - 1)
                if product is not None:
                    return product
    return None
