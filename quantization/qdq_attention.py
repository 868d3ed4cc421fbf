"""Writing FP8 attention into a traced graph, as :mod:`.attention` describes it.

ONNX's ``Attention`` operator hides its products, so they are spelled out. Masked scores become the lowest
number of the type: a row without visible keys stays finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BuildError
from ..export.nodes import NodeInserter, constant
from .attention import SOFTMAX_AMAX, attention_scales, operand_names
from .qdq_nodes import Form, dequantised, pair
from .quantize import activation_scale

if TYPE_CHECKING:
    import onnx_ir as ir

_CAUSAL = "attention.causal"
_LOWEST = {"fp32": -3.4e38, "bf16": -3.3e38, "fp16": -65504.0}


def write_attention(
    graph: ir.Graph, attentions: Iterable[str], amax: Mapping[str, float], form: Form
) -> dict[str, str]:
    """Replace the ``Attention`` nodes of ``attentions`` that ``graph`` has by FP8 ones, in place.

    The graph's other attentions are spelled out too, in the type it computes in: one ``Attention`` operator
    is enough for TensorRT-RTX 1.7 to leave every FP8 attention of the network unfused.

    Returns:
        Name of the Softmax -> ``fp8``, for each.

    Raises:
        BuildError: calibration did not see its inputs, or the node is of a kind that has no such graph.
    """
    nodes = {node.name: node for node in graph if node.op_type == "Attention"}
    promised = {}
    for attention in attentions:
        node = nodes.pop(f"{attention}/Attention", None)
        if node is None:
            continue  # another component's
        if missing := [name for name in operand_names(attention) if name not in amax]:
            raise BuildError(
                f"The attention {attention} of graph {graph.name} has no FP8 scales.",
                f"Calibration recorded no {missing[0]}.",
                "Calibrate again with this component, or use 'attention: base' in the recipe.",
            )
        scales = attention_scales(attention, amax, form.base)
        promised[_write(graph, node, attention, scales, form)] = "fp8"
    for name, node in nodes.items() if promised else ():
        _write(graph, node, str(name).removesuffix("/Attention"), None, form)
    return promised


def quantised_attentions(model: ir.Model) -> dict[str, str]:
    """Name of every Softmax between two products of factors dequantised from FP8 -> ``fp8`` (read back)."""
    fp8 = {
        node
        for node in model.graph
        if node.op_type == "MatMul" and [dequantised(v) for v in node.inputs] == ["fp8", "fp8"]
    }
    schemes = {}
    for node in fp8:
        softmax = _behind(node.inputs[0], ("DequantizeLinear", "QuantizeLinear"))
        if softmax is not None and softmax.op_type == "Softmax":
            scores = _behind(softmax.inputs[0], ("Where",))
            if scores in fp8:
                schemes[str(softmax.name)] = "fp8"
    return schemes


def _behind(value: ir.Value | None, through: Sequence[str]) -> ir.Node | None:
    """The node that computes ``value``, before operators of ``through``; of a Where, its second input."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in through:
        source = node.inputs[1 if node.op_type == "Where" else 0]
        node = source.producer() if source is not None else None
    return node


def _write(
    graph: ir.Graph, node: ir.Node, name: str, scales: tuple[float, float, float] | None, form: Form
) -> str:
    """Spell out ``node``, quantised where there are ``scales``; the name of the Softmax."""
    q, k, v, *rest = node.inputs
    if q is None or k is None or v is None or q.shape is None or k.shape is None or any(rest[1:]):
        raise BuildError(
            f"The attention {name} of graph {graph.name} cannot be spelled out.",
            "It has its own past, or unknown shapes.",
            "Use 'attention: base' in the recipe.",
        )
    place, dtype = NodeInserter(graph, node, name), form.dtype
    batch, heads, rows, width = q.shape
    columns = k.shape[2]
    assert isinstance(width, int)
    factor = constant(graph, f"{name}.factor", width**-0.5, dtype)
    q = place.add("Mul", "scaled", [q, factor], [batch, heads, rows, width], dtype)
    k = place.add("Transpose", "turned", [k], [batch, heads, width, columns], dtype, perm=[0, 1, 3, 2])
    if scales:
        q, k, v = (
            pair(graph, x, operand, "fp8", scale, form)
            for x, operand, scale in zip((q, k, v), operand_names(name), scales, strict=True)
        )
    table = [batch, heads, rows, columns]
    scores = place.add("MatMul", "scores", [q, k], table, dtype)
    mask = rest[0] if rest else None
    if node.attributes["is_causal"].as_int():
        mask = _causal(graph, node, rows)
    if mask is not None:
        lowest = constant(graph, "attention.lowest", _LOWEST[form.compute], dtype)
        scores = place.add("Where", "masked", [mask, scores, lowest], table, dtype)
    weights = place.add("Softmax", "softmax", [scores], table, dtype, axis=-1)
    if scales:
        top = activation_scale(SOFTMAX_AMAX, "fp8", form.base)
        weights = pair(graph, weights, f"{name}.weights", "fp8", top, form)
    out = place.add("MatMul", "mixed", [weights, v], [batch, heads, rows, width], dtype)
    node.outputs[0].replace_all_uses_with(out)
    graph.remove(node, safe=True)
    return f"{name}/softmax"


def _causal(graph: ir.Graph, node: ir.Node, rows: Any) -> ir.Value:
    """[rows, rows], True where a column is not after the row; one for the graph.

    Its size is read off an input, so that a split component can compute it in every part.
    """
    import onnx_ir as ir

    for other in graph:
        if other.name == f"{_CAUSAL}/seen":
            return other.outputs[0]
    value, axis = next(
        (value, axis) for value in graph.inputs for axis, dim in enumerate(value.shape or ()) if dim == rows
    )
    place, whole = NodeInserter(graph, node, _CAUSAL), ir.DataType.INT64

    def number(what: str, value: int | list[int]) -> ir.Value:
        return constant(graph, f"{_CAUSAL}.{what}", value, whole)

    length = place.add("Shape", "length", [value], [1], whole, start=axis, end=axis + 1)
    count = place.add("Squeeze", "count", [length], [], whole)
    row = place.add("Range", "range", [number("zero", 0), count, number("one", 1)], [rows], whole)
    column = place.add("Unsqueeze", "column", [row, number("axes", [1])], [rows, 1], whole)
    return place.add("LessOrEqual", "seen", [row, column], [rows, rows], ir.DataType.BOOL)
