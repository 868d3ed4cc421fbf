"""Attention over a cache that is not copied: for ONNX Runtime, whose Concat of past and new keys copies both.

softmax(q [K, k]^T) [V, v] is computed in two pieces, over the past K, V and the new k, v:

    s = [q K^T, q k^T] / sqrt(d),  w = softmax(s),  w[:past] V + w[past:] v

or zero, as torch has it, in a row without visible keys. Where a key head serves g query heads, their rows are
one block of g * new rows in the products, [B, heads, new, d] -> [B, kv_heads, g * new, d]: keys are not
repeated.

Only scores and weights are joined and cut: a number a pair of positions, not a key and a value. Scores
are scaled once they are joined: ONNX Runtime would take a scale before them into the product, and then
multiply a single row (a decoding step) by its slower kernel. Graphs for TensorRT keep their ``Attention``,
which it fuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .nodes import NodeInserter, constant

if TYPE_CHECKING:
    import onnx_ir as ir

_LOWEST = -3.4e38  # not -inf: the softmax of a row without visible keys stays finite
_LAST = 3
_SLICE = {"start": 0, "end": 2**63 - 1, "axis": _LAST}


def separate_past(model: ir.Model) -> int:
    """Compute the attentions of an fp32 graph that join a past and new positions in two pieces, in place.

    Returns:
        How many there were: none in a component without a cache. Quantised attention is left as it is.
    """
    graph = model.graph
    attentions = [(node, joins) for node in graph if (joins := _joins(node))]
    for node, joins in attentions:
        _separate(graph, node, *joins)
        for join in joins:
            graph.remove(join, safe=True)
    return len(attentions)


def _joins(node: ir.Node) -> tuple[ir.Node, ...]:
    """The Concats of past and new keys, and values, of an attention with a mask; empty if it is another kind.

    One whose mask is numbers (attention sinks) is left as it is.
    """
    import onnx_ir as ir

    mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) == 4 else None
    if mask is None or mask.dtype != ir.DataType.BOOL:
        return ()
    makers = [value.producer() for value in node.inputs[1:3] if value is not None]
    return tuple(m for m in makers if m is not None and m.op_type == "Concat" and len(m.inputs) == 2)


def _separate(graph: ir.Graph, node: ir.Node, keys: ir.Node, values: ir.Node) -> None:
    """Put the two pieces in the place of ``node``, which leaves the graph."""
    import onnx_ir as ir

    query, mask, past_key, new_key, past_value, new_value = (
        value for value in (node.inputs[0], node.inputs[3], *keys.inputs, *values.inputs) if value is not None
    )
    assert query.shape is not None
    assert past_key.shape is not None
    name = str(node.name).removesuffix("/Attention")
    place, dtype, whole = NodeInserter(graph, node, name), ir.DataType.FLOAT, ir.DataType.INT64
    batch, heads, new, width = query.shape
    key_heads, past = past_key.shape[1], past_key.shape[2]
    assert isinstance(width, int)
    assert isinstance(heads, int)
    assert isinstance(key_heads, int)
    grouped = heads != key_heads

    def grouped_rows(kind: str, rows: ir.Value, last: Any) -> ir.Value:
        return _regroup(place, f"{kind}_grouped", rows, [batch, key_heads, None, last]) if grouped else rows

    def single_rows(kind: str, rows: ir.Value, last: Any) -> ir.Value:
        return _regroup(place, f"{kind}_single", rows, [batch, heads, new, last]) if grouped else rows

    queries = grouped_rows("query", query, width)

    def scores(kind: str, key: ir.Value, count: Any) -> ir.Value:
        turned = place.add(
            "Transpose", f"{kind}_turned", [key], [batch, key_heads, width, count], dtype, perm=[0, 1, 3, 2]
        )
        shape = [batch, key_heads, None if grouped else new, count]
        product = place.add("MatMul", f"{kind}_scores", [queries, turned], shape, dtype)
        return single_rows(f"{kind}_scores", product, count)

    table = [batch, heads, new, None]
    both = [scores("past", past_key, past), scores("new", new_key, new)]
    joined = place.add("Concat", "joined", both, table, dtype, axis=_LAST)
    factor = constant(graph, "past.factor", width**-0.5, dtype)
    scaled = place.add("Mul", "scaled", [joined, factor], table, dtype)
    lowest = constant(graph, "past.lowest", _LOWEST, dtype)
    masked = place.add("Where", "masked", [mask, scaled, lowest], table, dtype)
    weights = place.add("Softmax", "softmax", [masked], table, dtype, axis=_LAST)

    cut = _cut(graph)
    start, end, axis = (constant(graph, f"past.{k}", [n], whole) for k, n in _SLICE.items())

    def mixed(kind: str, value: ir.Value, first: ir.Value, last: ir.Value, count: Any) -> ir.Value:
        ends = [first, last, axis]
        own = place.add("Slice", f"{kind}_weights", [weights, *ends], [batch, heads, new, count], dtype)
        shape = [batch, key_heads, None if grouped else new, width]
        rows = grouped_rows(f"{kind}_weights", own, count)
        product = place.add("MatMul", f"{kind}_mixed", [rows, value], shape, dtype)
        return single_rows(f"{kind}_mixed", product, width)

    outs = [mixed("past", past_value, start, cut, past), mixed("new", new_value, cut, end, new)]
    whole_rows = [batch, heads, new, width]
    out = place.add("Add", "mixed", outs, whole_rows, dtype)
    out = place.add("Mul", "seen", [out, _seeing(graph, node, mask)], whole_rows, dtype)
    node.outputs[0].replace_all_uses_with(out)
    graph.remove(node, safe=True)


def _regroup(place: NodeInserter, name: str, rows: ir.Value, shape: list[Any]) -> ir.Value:
    """[B, a, n, m] -> [B, b, n * a / b, m], ``shape`` being [B, b, ..., m]: numbers keep their order."""
    import onnx_ir as ir

    target = [0, shape[1], -1, 0]  # 0: as it is
    sizes = constant(place.graph, f"past.heads.{shape[1]}", target, ir.DataType.INT64)
    return place.add("Reshape", name, [rows, sizes], shape, ir.DataType.FLOAT)


def _cut(graph: ir.Graph) -> ir.Value:
    """Where new positions begin, counted from the end; one for the graph.

    It is read off ``positions``, which every part of a split component takes.
    """
    import onnx_ir as ir

    for node in graph:
        if node.name == "past/cut":
            return node.outputs[0]
    place, whole = NodeInserter(graph, graph[0], "past"), ir.DataType.INT64
    positions = next(value for value in graph.inputs if value.name == "positions")
    length = place.add("Shape", "length", [positions], [1], whole, start=1, end=2)
    return place.add("Neg", "cut", [length], [1], whole)


def _seeing(graph: ir.Graph, node: ir.Node, mask: ir.Value) -> ir.Value:
    """[batch, 1, new, 1] of a ``mask`` [batch, 1, new, past + new]: 1 in rows that see a position, else 0.

    One for the graph, whose attentions have one mask.
    """
    import onnx_ir as ir

    for other in graph:
        if other.name == "past/seeing":
            return other.outputs[0]
    assert mask.shape is not None
    place, dtype = NodeInserter(graph, node, "past"), ir.DataType.FLOAT
    numbers = place.add("Cast", "visible", [mask], list(mask.shape), dtype, to=int(dtype))
    last = constant(graph, "past.last", [_LAST], ir.DataType.INT64)
    return place.add("ReduceMax", "seeing", [numbers, last], [*mask.shape[:_LAST], 1], dtype, keepdims=1)
