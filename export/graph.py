"""From the exporter's graph to the one that is stored: types, optimisation, shapes, names."""

from __future__ import annotations

import ast
import re
from collections import Counter
from typing import TYPE_CHECKING

from ..bundle.spec import ComponentSpec
from ..errors import BuildError
from .blocks import SCOPES

if TYPE_CHECKING:
    import onnx_ir as ir

_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # the exporter's name for the top level
_CORE = ".core"  # of CoreAttention: an attention is named after the module that holds it
_PLUS = re.compile(r"^(\w+) \+ (\d+)$")
_SYMBOL = re.compile(r"\bs\d+\b")


def retype(model: ir.Model, traced: str, dtype: str) -> None:
    """Turn the traced float type of an unoptimised graph into ``dtype``, in place (onnx_ir type names).

    Raises:
        BuildError: a constant is of the traced type; it would have been rounded to it.
    """
    import onnx_ir as ir

    old, new = ir.DataType[traced], ir.DataType[dtype]
    if old == new:
        return
    for graph in model.graphs():
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        for value in values:
            if value.dtype == old:
                value.type = ir.TensorType(new)  # setting dtype would reach the clones that share the type
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == old:
                    raise BuildError(
                        f"Graph {model.graph.name} holds a {traced} constant.", f"In node {node.name}."
                    )
            if node.op_type == "Cast" and node.attributes["to"].as_int() == old:
                node.attributes["to"] = ir.AttrInt64("to", new)


def finish(model: ir.Model, spec: ComponentSpec) -> None:
    """Optimise ``model``, and name everything as ``spec`` and the checkpoint do; in place."""
    from onnxscript import optimizer

    graph = model.graph
    weights = set(graph.initializers.values())
    optimizer.optimize_ir(
        model, should_fold=lambda node: False if weights.intersection(node.inputs) else None
    )
    _name_interface(graph, spec)
    _name_dimensions(graph, spec)
    _static_reshapes(graph)
    _remove_unused(model)
    _name_nodes(graph)
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.inputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "ivl-export", None
    model.metadata_props.clear()
    graph.metadata_props.clear()


def _name_interface(graph: ir.Graph, spec: ComponentSpec) -> None:
    for got, want in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        if len(got) != len(want):
            raise BuildError(
                f"Graph {spec.name} does not fit its spec.",
                f"It has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, "
                f"the spec {len(spec.inputs)} and {len(spec.outputs)}.",
            )
        for value, tensor in zip(got, want, strict=True):
            value.name = tensor.name


def _name_dimensions(graph: ir.Graph, spec: ComponentSpec) -> None:
    """Replace the exporter's symbols (``s15``, ``s15 + 16``) by axis names, in every shape."""
    import onnx_ir as ir

    axes: dict[str, str] = {}
    for value, tensor in zip(graph.inputs, spec.inputs, strict=True):
        for got, want in zip(value.shape or (), tensor.shape, strict=True):
            if isinstance(want, str) and isinstance(got, ir.SymbolicDim):
                axes.setdefault(str(got.value), want)

    def name(symbol: str) -> str:
        named = axes.get(symbol) or _SYMBOL.sub(lambda m: axes.get(m[0], m[0]), symbol)
        return _PLUS.sub(r"\1.plus.\2", named)

    for value in [*graph.inputs, *(v for node in graph for v in node.outputs)]:
        if value.shape is not None:
            dims = [d if isinstance(d, int) else d.value and name(str(d.value)) for d in value.shape]
            value.shape = ir.Shape(dims)
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            shape = tuple(d if isinstance(d, int) else d.value for d in value.shape or ())
            if shape != tensor.shape:
                raise BuildError(
                    f"Graph {spec.name} does not fit its spec.",
                    f"{tensor.name} has shape {list(shape)} instead of {list(tensor.shape)}.",
                )


def _static_reshapes(graph: ir.Graph) -> None:
    """Give every Reshape a constant shape: 0 copies a dimension that stays in place, one -1 is left over.

    The exporter computes shapes in the graph; constant ones load faster and are easier on engine builders.
    """
    import numpy as np
    import onnx_ir as ir

    constants: dict[tuple[int, ...], ir.Value] = {}
    for node in graph:
        before, after = (node.inputs[0], node.outputs[0]) if node.op_type == "Reshape" else (None, None)
        if before is None or after is None or before.shape is None or after.shape is None:
            continue
        target = []
        for i, dim in enumerate(after.shape):
            stays = i < len(before.shape) and before.shape[i] == dim
            target.append(dim if isinstance(dim, int) else 0 if stays and dim.value else -1)
        if target.count(-1) > 1:
            continue
        key = tuple(target)
        if key not in constants:
            name = "shape." + "x".join(map(str, key))
            tensor = ir.tensor(np.array(key, dtype=np.int64), name=name)
            constants[key] = ir.Value(
                name=name,
                shape=ir.Shape([len(key)]),
                type=ir.TensorType(ir.DataType.INT64),
                const_value=tensor,
            )
            graph.register_initializer(constants[key])
        node.replace_input_with(1, constants[key])
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _remove_unused(model: ir.Model) -> None:
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)


def _name_nodes(graph: ir.Graph) -> None:
    """``<module path>/<operator>``, numbered where it repeats; layers with a weight are named after it."""
    counts: Counter[str] = Counter()
    modules: dict[ir.Node | None, str] = {}
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        if len(scopes) > 1:
            module = "" if scopes[-2] == _NO_MODULE else scopes[-2].removesuffix(_CORE)
        else:  # made by the optimizer: belongs to its input's module
            module = next((modules.get(v.producer(), "") for v in node.inputs if v is not None), "")
        modules[node] = module
        name = _layer(node) if node.op_type in ("MatMul", "Gemm", "Conv") else None
        name = name or "/".join(filter(None, (module, node.op_type)))
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}.{counts[name] - 1}"


def _layer(node: ir.Node) -> str | None:
    """The name of the weight that a matrix product or convolution multiplies by, without ``.weight``."""
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
    if value is None or value.name is None or not value.is_initializer() or value.const_value is not None:
        return None
    return value.name.removesuffix(".weight")
