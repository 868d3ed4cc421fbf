"""Cutting a component's graph at block boundaries into parts that run one after another.

A part is a separate graph with its own contract. Of the blocks before it, it takes ``hidden.<k>`` only, the
residual stream that part k - 1 ends with (by its own name if the component has it as an output). Inputs
that all blocks share (masks, rotary tables) are cheap and follow from the component's inputs, so each part
computes them again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..bundle.spec import Axis, ComponentSpec, TensorSpec, part_starts, terms
from ..errors import BuildError, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

PartOf = Callable[[str | None], int | None]
"""Name of a weight -> the part that holds its block; None for weights outside the blocks."""


def split_graph(
    model: ir.Model, spec: ComponentSpec, place: str, count: int
) -> list[tuple[ir.Model, ComponentSpec]]:
    """``count`` parts of ``model`` in the order they run, each with its contract; ``model`` stays as it is.

    Run in order, each fed from the component's inputs and from the parts before it, they compute by the same
    nodes. Every output of the component is an output of just one part.

    Args:
        model: a component's graph, quantised or not, its initializers under their published names.
        spec: the component's contract.
        place: module path of the stack of blocks.
        count: how many parts; their numbers of blocks differ by one at most.

    Raises:
        UsageError: more parts than blocks, or none.
        BuildError: something else than one residual stream goes from part to part.
    """
    block, blocks = _pattern(place), block_count(place, model.graph.initializers)
    check_split(spec.name, blocks, count)
    starts = part_starts(blocks, count)

    def part_of(name: str | None) -> int | None:
        match = block.match(name or "")
        return None if match is None else sum(start <= int(match[1]) for start in starts) - 1

    stages = _stages(model.graph, part_of)
    streams = [_stream(model.graph, stages, k) for k in range(1, count)]
    return [_part(model, spec, part_of, stages, streams, k) for k in range(count)]


def _pattern(place: str) -> re.Pattern[str]:
    """Matches the weights in the blocks under ``place``; its group is the block's number."""
    return re.compile(rf"{re.escape(place)}\.(\d+)\.")


def block_count(place: str, names: Iterable[str]) -> int:
    """How many blocks under ``place`` have weights among ``names``."""
    block = _pattern(place)
    return 1 + max((int(m[1]) for name in names if (m := block.match(name))), default=-1)


def check_split(component: str, blocks: int, count: int) -> None:
    """UsageError unless ``count`` parts get one block each at least."""
    if not 1 <= count <= blocks:
        raise UsageError(
            f"Component {component} cannot be split into {count} parts.",
            f"It has {blocks} blocks, and a part holds one at least.",
            f"Give -O split a number from 1 to {blocks}.",
        )


def _stages(graph: ir.Graph, part_of: PartOf) -> dict[ir.Value, int]:
    """The part that computes a value, for all that depend on the weights of a block."""
    stages: dict[ir.Value, int] = {}
    for value in graph.initializers.values():
        if (part := part_of(value.name)) is not None:
            stages[value] = part
    for node in graph:
        input_stages = [stages[value] for value in node.inputs if value is not None and value in stages]
        if input_stages:
            stages.update(dict.fromkeys(node.outputs, max(input_stages)))
    return stages


def _stream(graph: ir.Graph, stages: dict[ir.Value, int], part: int) -> ir.Value:
    """The one value that ``part`` and later ones take from the blocks before."""
    streams = {
        value
        for node in graph
        for value in node.inputs
        if value is not None
        and stages.get(value, part) < part <= stages.get(node.outputs[0], -1)
        and not value.is_initializer()
    }
    if len(streams) != 1:
        raise BuildError(
            f"Graph {graph.name} cannot be split.",
            f"{len(streams)} values go from its blocks before part {part} to later ones.",
            "Leave -O split out.",
        )
    return streams.pop()


def _part(
    model: ir.Model,
    spec: ComponentSpec,
    part_of: PartOf,
    stages: dict[ir.Value, int],
    streams: list[ir.Value],
    part: int,
) -> tuple[ir.Model, ComponentSpec]:
    import onnx_ir as ir
    from onnx_ir.passes import common

    last = part == len(streams)
    part_model = model.clone()
    graph = part_model.graph
    graph.name = f"{spec.name}.{part}"
    # A clone keeps the order of nodes and outputs, and the names.
    values = {value.name: value for node in graph for value in node.outputs}
    part_outputs = [
        new for old, new in zip(model.graph.outputs, graph.outputs, strict=True) if stages[old] == part
    ]
    outputs = [tensor for tensor in spec.outputs if tensor.name in {value.name for value in part_outputs}]
    inputs = []
    graph.outputs[:] = part_outputs
    if not last:
        leaving = values[streams[part].name]
        stream = _tensor(leaving, spec, part + 1)
        if stream not in outputs:
            outputs.append(stream)
            graph.outputs.append(leaving)
    if part:
        old = values[streams[part - 1].name]
        inputs.append(_tensor(old, spec, part))
        entering = ir.val(inputs[0].name, shape=old.shape, type=old.type)
        old.replace_all_uses_with(entering)
        graph.inputs.insert(0, entering)
    if not last:
        leaving.name = stream.name
    common.RemoveUnusedNodesPass()(part_model)
    _merge_shapes(graph)
    strangers = [name for name in graph.initializers if part_of(name) not in (None, part)]
    if strangers:
        raise BuildError(f"Graph {model.graph.name} cannot be split.", f"Part {part} reads {strangers[0]}.")
    for value in [v for v in graph.inputs if not v.uses()]:
        graph.inputs.remove(value)
    names = {value.name for value in graph.inputs}
    inputs += [tensor for tensor in spec.inputs if tensor.name in names]
    sizes = {str(size): None for tensor in (*inputs, *outputs) for size in tensor.shape}
    axes = (*(a for a in spec.axes if a.name in sizes), *filter(None, (_sum(name, spec) for name in sizes)))
    return part_model, replace(
        spec, name=f"{spec.name}.{part}", inputs=tuple(inputs), outputs=tuple(outputs), axes=axes
    )


def _tensor(value: ir.Value, spec: ComponentSpec, part: int) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else d.value for d in value.shape or ())
    axes = {axis.name for axis in spec.axes}
    if not shape or any(not isinstance(d, int) and d not in axes and not _sum(str(d), spec) for d in shape):
        raise BuildError(f"Graph {spec.name} cannot be split.", f"{value.name} has shape {list(shape)}.")
    name = next((tensor.name for tensor in spec.outputs if tensor.name == value.name), f"hidden.{part}")
    return TensorSpec(name, "float", tuple(d if isinstance(d, int) else str(d) for d in shape))


def _sum(name: str, spec: ComponentSpec) -> Axis | None:
    """The axis of a size that the component has no axis for: queries and text together."""
    if name in {axis.name for axis in spec.axes} or not terms(name):
        return None
    parts = [Axis("", t, t, t) if isinstance(t, int) else spec.axis(t) for t in terms(name)]
    return Axis(name, *(sum(sizes) for sizes in zip(*((p.min, p.opt, p.max) for p in parts), strict=True)))


def _merge_shapes(graph: ir.Graph) -> None:
    """Read a size off an input that the part has anyway, rather than off one that it needs for nothing else.

    Masks take the length of the past from the first layer's keys.
    """
    inputs_read = [v for v in graph.inputs if any(node.op_type != "Shape" for node, _ in v.uses())]
    for value in graph.inputs:
        twin = next((v for v in inputs_read if v.shape == value.shape and v.type == value.type), None)
        if value not in inputs_read and twin is not None:
            value.replace_all_uses_with(twin)
