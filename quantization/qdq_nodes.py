"""Building blocks of Q/DQ graphs: pairs, constants, unbound initializers; reading them back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..dtypes import dtype_of, find_dtype
from ..errors import BuildError
from ..export.nodes import constant

if TYPE_CHECKING:
    import onnx_ir as ir

Style = Literal["tensorrt", "onnxruntime"]

_QUANTISED = ("fp8", "int8", "int4")


@dataclass(frozen=True)
class Form:
    """How one graph is written: its compute type, the recipe's base type, and for which runtime."""

    compute: str
    base: str
    style: Style

    @property
    def dtype(self) -> ir.DataType:
        """The compute type."""
        import onnx_ir as ir

        return ir.DataType[dtype_of(self.compute).onnx]


def pair(graph: ir.Graph, x: ir.Value, name: str, kind: str, scale: float, form: Form) -> ir.Value:
    """``x`` after a new QuantizeLinear and DequantizeLinear with one ``scale``.

    Args:
        graph: holds ``x``.
        x: an activation of the type that the graph computes in.
        name: of the pair, ``<name>_quantize``, and of its values.
        kind: ``fp8`` or ``int8``.
        scale: exact in the recipe's base type.
        form: of the graph.
    """
    import onnx_ir as ir

    stored = ir.DataType[dtype_of(kind).onnx]
    if x.dtype not in (None, form.dtype):
        raise BuildError(
            f"{name} cannot be quantised.",
            f"It is {x.dtype}, the graph is said to compute in {form.compute}.",
            "Trace the component again with that type.",
        )
    scale_value = constant(graph, f"{name}_scale", scale, form.dtype)
    zero_value = constant(graph, f"{name}_zero", 0, stored)
    quantised = ir.Value(name=f"{name}_q", shape=x.shape, type=ir.TensorType(stored))
    restored = ir.Value(name=f"{name}_dq", shape=x.shape, type=ir.TensorType(form.dtype))
    where = "/".join(name.rsplit(".", 1))
    pair_inputs = [scale_value, zero_value]
    nodes = [
        ir.node("QuantizeLinear", [x, *pair_inputs], outputs=[quantised], name=f"{where}_quantize"),
        ir.node(
            "DequantizeLinear", [quantised, *pair_inputs], outputs=[restored], name=f"{where}_dequantize"
        ),
    ]
    producer = x.producer()  # directly after it, so that the pair comes before all nodes that share it
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)
    return restored


def drop_unused(graph: ir.Graph, name: str) -> None:
    """Remove the initializer and the Casts and Transposes after it that are unused."""
    outputs = set(graph.outputs)

    def drop(value: ir.Value) -> bool:
        for node, _ in list(value.uses()):
            if node.op_type in ("Cast", "Transpose") and drop(node.outputs[0]):
                graph.remove(node, safe=True)
        return not value.uses() and value not in outputs

    if drop(graph.initializers[name]):
        del graph.initializers[name]


def initializer(graph: ir.Graph, name: str, shape: ir.Shape, dtype: str) -> ir.Value:
    """The unbound initializer of that name, made if it is not there."""
    import onnx_ir as ir

    if name not in graph.initializers:
        kind = ir.TensorType(ir.DataType[dtype_of(dtype).onnx])
        graph.initializers.add(ir.Value(name=name, shape=shape, type=kind))
    return graph.initializers[name]


def dequantised(value: ir.Value | None) -> str:
    """The type that ``value`` is dequantised from, through a Transpose; empty without a DQ."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return ""
    dtype = node.inputs[0].dtype
    stored = None if dtype is None else find_dtype(dtype.name)
    return stored.name if stored and stored.name in _QUANTISED else ""
