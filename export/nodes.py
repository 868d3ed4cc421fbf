"""Building blocks of graph rewriting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


class NodeInserter:
    """Adds nodes before ``node``, named after a module or their purpose."""

    def __init__(self, graph: ir.Graph, node: ir.Node, name: str) -> None:
        self.graph, self.node, self.name = graph, node, name

    def add(
        self,
        op: str,
        what: str,
        inputs: Sequence[ir.Value],
        dims: Sequence[Any],
        dtype: ir.DataType,
        **attributes: Any,
    ) -> ir.Value:
        """The value ``<name>.<what>`` of shape ``dims``, made by the node ``<name>/<what>``."""
        import onnx_ir as ir

        out = ir.Value(name=f"{self.name}.{what}", shape=ir.Shape(dims), type=ir.TensorType(dtype))
        new_node = ir.node(op, inputs, attributes, outputs=[out], name=f"{self.name}/{what}")
        self.graph.insert_before(self.node, new_node)
        return out


def constant(graph: ir.Graph, name: str, number: float | list[int], dtype: ir.DataType) -> ir.Value:
    """A scalar or vector, made if no constant of that name is there."""
    import onnx_ir as ir

    if name not in graph.initializers:
        array = np.array(number, dtype=dtype.numpy())
        tensor = ir.tensor(array, dtype=dtype, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor
        )
        graph.register_initializer(value)
    return graph.initializers[name]
