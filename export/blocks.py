"""Repeating a traced block instead of tracing it again.

A transformer is one block many times over, and the exporter spends its time on symbolic shapes: 48 blocks
take 48 times as long as one. So one period of blocks is traced, and its nodes are copied for the rest with
the block number changed in the weights' names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import BuildError

if TYPE_CHECKING:
    import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
_NORMS = ("RMSNormalization", "LayerNormalization")
"""Operators that a block begins with."""


def repeat_blocks(
    graph: ir.Graph,
    prefix: str,
    times: int,
    inputs: int,
    outputs: int,
    taps: Sequence[int] = (),
    exit_period: int | None = None,
) -> None:
    """Make ``times`` copies of the blocks under ``prefix`` in an unoptimised graph, chained; in place.

    Args:
        graph: holds blocks 0 to period - 1.
        prefix: module path of the stack: its blocks' nodes have ``<prefix>.<i>`` among their scopes, and
            their weights' names begin with it.
        times: how many periods there shall be.
        inputs: how many inputs of the graph, its last ones, belong to the blocks (a past).
        outputs: how many outputs, its last ones, belong to them (new keys and values).
        taps: periods, counted from 1, after which the hidden states become outputs too, the last ones.
        exit_period: number of periods after which the following nodes read the hidden states; None: all. An
            output that is the hidden states is always those after all.

    Raises:
        BuildError: the blocks do not form one chain.
    """
    number = re.compile(rf"(?<![\w.])({re.escape(prefix)}\.)(\d+)(?!\w)")
    scoped = re.compile(rf"['\"]{re.escape(prefix)}\.(\d+)\b")
    blocks = [n for n in graph if scoped.search(n.metadata_props.get(SCOPES, ""))]
    if not blocks:
        raise BuildError(f"Graph {graph.name} has no blocks under {prefix}.", "They cannot be repeated.")
    period = 1 + max(int(m[1]) for n in blocks for m in scoped.finditer(n.metadata_props[SCOPES]))
    first = next(node for node in blocks if node.op_type in _NORMS).inputs[0]
    last = blocks[-1].outputs[0]
    own = {v for node in blocks for v in node.outputs}
    block_inputs = list(graph.inputs[len(graph.inputs) - inputs :])
    block_outputs = list(graph.outputs[len(graph.outputs) - outputs :]) if outputs else []
    # A constant of a block may be read again after the blocks: that is not part of their chain.
    computed = {v for node in blocks if node.op_type != "Constant" for v in node.outputs}
    leaving = {v for v in computed if any(user not in set(blocks) for user in v.consumers())}
    if first is None or first in own or leaving - {last} or not set(block_outputs) <= own:
        raise BuildError(f"The blocks of graph {graph.name} do not form one chain.", f"Under {prefix}.")

    users = [(node, i) for node, i in last.uses() if node not in set(blocks)]
    last_node, x = blocks[-1], last
    ends = [last]
    for k in range(1, times):
        copy = _Copy(graph, first, x, block_inputs, number, k * period, f".{k}")
        nodes = [copy.node(node) for node in blocks]
        graph.insert_after(last_node, nodes)
        graph.outputs.extend(copy.values[v] for v in block_outputs)
        last_node, x = nodes[-1], copy.values[last]
        ends.append(x)
    for node, i in users:
        node.replace_input_with(i, ends[(exit_period or times) - 1])
    for i, value in enumerate(graph.outputs):
        if value is last:
            graph.outputs[i] = x
    graph.outputs.extend(ends[k - 1] for k in taps)


class _Copy:
    """One more copy of the blocks: its values by those of the first."""

    def __init__(
        self,
        graph: ir.Graph,
        first: ir.Value,
        x: ir.Value,
        block_inputs: list[ir.Value],
        number: re.Pattern[str],
        shift: int,
        suffix: str,
    ) -> None:
        import onnx_ir as ir

        self.graph, self.number, self.shift, self.suffix = graph, number, shift, suffix
        self.values = {first: x}
        for value in block_inputs:
            self.values[value] = ir.Value(name=f"{value.name}{suffix}", type=value.type, shape=value.shape)
            graph.inputs.append(self.values[value])

    def node(self, node: ir.Node) -> ir.Node:
        import onnx_ir as ir

        outputs = []
        for value in node.outputs:
            self.values[value] = ir.Value(
                name=f"{value.name}{self.suffix}", type=value.type, shape=value.shape
            )
            outputs.append(self.values[value])
        copy = ir.Node(
            node.domain,
            node.op_type,
            [self._value(v) for v in node.inputs],
            node.attributes.values(),
            overload=node.overload,
            outputs=outputs,
            version=node.version,
            name=f"{node.name}{self.suffix}",
        )
        copy.metadata_props[SCOPES] = self._shifted(node.metadata_props[SCOPES])
        return copy

    def _value(self, value: ir.Value | None) -> ir.Value | None:
        """The copy's value: its own, its block's weight, or the one that all blocks share."""
        import onnx_ir as ir

        if value is None or value in self.values:
            return None if value is None else self.values[value]
        name = self._shifted(value.name or "")
        if name == value.name or not value.is_initializer():
            return value
        if name not in self.graph.initializers:
            self.graph.initializers.add(ir.Value(name=name, type=value.type, shape=value.shape))
        return self.graph.initializers[name]

    def _shifted(self, text: str) -> str:
        return self.number.sub(lambda m: f"{m[1]}{int(m[2]) + self.shift}", text)
