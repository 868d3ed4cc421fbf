"""MACs and bytes of a component, from its ONNX graph at given sizes.

Counted: MatMul, Gemm, Conv and Attention (both of its products, over every key position even where a mask
hides it). One multiply-accumulate is two FLOPs. Norms, activations, rotary positions and other elementwise
work are not counted. Bytes are those of the graph as stored: an engine may hold its weights in another type
(ONNX Runtime unpacks FP8 weights to fp32 when it loads them).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...bundle.spec import ComponentSpec, terms
from ...dtypes import COMPUTE, dtype_of, find_dtype
from ...errors import BuildError, CapabilityError, IntegrityError

Shape = tuple[int, ...]
Typed = tuple[int, Shape]
"""Element type (TensorProto.DataType) and shape of a value."""

_MULTIPLIED_AS = {kind: kind for kind in (*COMPUTE, "fp8", "int8")} | {"fp8_e5m2": "fp8", "uint8": "int8"}
_THROUGH = frozenset({"Transpose", "Cast", "DequantizeLinear", "Identity"})
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
_REPEAT = re.compile(r"(/\w+)\.\d+$")
_PIECE = re.compile(r"/(past|new)_(scores|mixed)$")
"""Products of an attention computed in pieces (:mod:`...export.cached_attention`): four are one attention."""
_FIRST_PIECE = "/past_scores"


@dataclass(frozen=True)
class LayerCost:
    """All layers of one type (``vision_model.encoder.layers.*.attn.qkv``) in one call of a component.

    ``weight_bytes`` are read once; ``activation_bytes`` are the operator's inputs and outputs, which a fused
    kernel need not move through memory. ``kind`` is the type it multiplies in as the graph has it: that of
    its activations before their DequantizeLinear (``fp32``, ``bf16``, ``fp8``, ``int8``).
    """

    layer: str
    op: str
    count: int
    macs: int
    weight_bytes: int
    activation_bytes: int
    kind: str = ""


@dataclass(frozen=True)
class ComponentCost:
    """FLOPs and bytes of one call of a component at ``sizes``.

    ``weight_bytes`` is everything it reads of its weights (looked-up embeddings: the rows looked up only),
    ``input_bytes`` and ``output_bytes`` its inputs and outputs. No kernel can move less than their sum.
    """

    component: str
    dtype: str
    sizes: dict[str, int]
    layers: tuple[LayerCost, ...]
    weight_bytes: int
    input_bytes: int
    output_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return sum(layer.macs for layer in self.layers)

    @property
    def flops(self) -> int:
        """Floating-point (or integer) operations: two a MAC."""
        return 2 * self.macs

    @property
    def bytes(self) -> int:
        """Weights, inputs and outputs."""
        return self.weight_bytes + self.input_bytes + self.output_bytes

    @property
    def intensity(self) -> float:
        """FLOPs for each byte of :attr:`bytes`."""
        return self.flops / self.bytes

    def to_json(self) -> dict[str, Any]:
        """Plain data with the derived figures."""
        totals = {"macs": self.macs, "flops": self.flops, "bytes": self.bytes}
        return {**vars(self), **totals, "layers": [vars(layer) for layer in self.layers]}


def layer_type(name: str) -> str:
    """A node's name without its layer number: common to the same node of all layers."""
    return _PIECE.sub("/Attention", _REPEAT.sub(r"\1", _INDEX.sub("*", name)))


def graph_cost(path: Path, spec: ComponentSpec, sizes: Mapping[str, int], dtype: str = "") -> ComponentCost:
    """Cost of one call of the graph ``path`` with every dynamic axis of ``spec`` at its size in ``sizes``.

    Weights are not opened. ``dtype`` is noted in the result.

    Raises:
        CapabilityError: the onnx package is not installed.
        IntegrityError: ``path`` is not a valid ONNX model.
        BuildError: a size is missing, or the shapes of a counted operator do not follow from ``sizes``.
    """
    values = _Values(_resolved(path, spec, sizes), path)
    layers: dict[str, LayerCost] = {}
    for node in values.graph.node:
        macs = _macs(node, values)
        if macs is None:
            continue
        key = layer_type(node.name or node.op_type)
        before = layers.get(key, LayerCost(key, node.op_type, 0, 0, 0, 0, values.kind(node)))
        weights, activations = values.traffic(node)
        further = _PIECE.search(node.name) is not None and not node.name.endswith(_FIRST_PIECE)
        layers[key] = LayerCost(
            key,
            node.op_type,
            before.count + (not further),
            before.macs + macs,
            before.weight_bytes + weights,
            before.activation_bytes + activations,
            before.kind,
        )
    names = {"in": [t.name for t in spec.inputs], "out": [t.name for t in spec.outputs]}
    moved = {way: sum(_nbytes(values.typed(name)) for name in names[way]) for way in names}
    return ComponentCost(
        spec.name,
        dtype,
        dict(sizes),
        tuple(layers.values()),
        values.weights_read(),
        moved["in"],
        moved["out"],
    )


def _resolved(path: Path, spec: ComponentSpec, sizes: Mapping[str, int]) -> Any:
    """The graph with concrete sizes on its inputs, and shapes inferred from them."""
    try:
        import onnx
    except ImportError as error:
        raise CapabilityError(
            "FLOPs cannot be counted without the onnx package.", str(error), "pip install onnx"
        ) from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's and the file system's
        raise IntegrityError(
            f"{path} is not a valid ONNX model.", str(error), "Rebuild the bundle."
        ) from error
    graph = model.graph
    # The exporter's shapes of inner values help where inference gives up (the length of a Range).
    for value in graph.value_info:
        for dim in value.type.tensor_type.shape.dim:
            noted = terms(dim.dim_param) or (dim.dim_param,)
            if all(isinstance(term, int) or term in sizes for term in noted):
                dim.dim_value = sum(term if isinstance(term, int) else sizes[term] for term in noted)
            elif dim.HasField("dim_param"):
                dim.ClearField("dim_param")
    shapes = {t.name: t.shape for t in spec.inputs}
    for value in graph.input:
        spec_shape = shapes.get(value.name, ())
        dims = value.type.tensor_type.shape.dim
        if len(dims) != len(spec_shape):
            raise IntegrityError(
                f"{path} is not the graph of component {spec.name}.",
                f"Input {value.name} has {len(dims)} dimensions, its contract {len(spec_shape)}.",
            )
        for dim, size in zip(dims, spec_shape, strict=True):
            if isinstance(size, str) and size not in sizes:
                raise BuildError(f"The cost of {spec.name} needs a size for axis {size}.")
            dim.dim_value = sizes[size] if isinstance(size, str) else size
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise BuildError(f"Shapes in {path} cannot be inferred.", str(error)) from error


class _Values:
    """Types and shapes of a graph's values, and where they come from."""

    def __init__(self, graph: Any, path: Path) -> None:
        self.graph, self._path = graph, path
        self._typed: dict[str, Typed | None] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            dims = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
            known = tensor.HasField("shape") and -1 not in dims
            self._typed[value.name] = (tensor.elem_type, tuple(dims)) if known else None
        self._weights: dict[str, Typed] = {t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer}
        self._producer = {output: node for node in graph.node for output in node.output}

    def typed(self, name: str) -> Typed:
        """Type and shape of a value; BuildError if inference did not find them."""
        typed = self._weights.get(name) or self._typed.get(name)
        if typed is None:
            raise BuildError(
                f"The size of {name} in {self._path.name} is unknown.",
                "It does not follow from the sizes of the inputs.",
                "Export the graph again with this release of ivl-export.",
            )
        return typed

    def shape(self, name: str) -> Shape:
        """Shape of a value."""
        return self.typed(name)[1]

    def traffic(self, node: Any) -> tuple[int, int]:
        """Bytes of weights, and of activations in and out, of one operator."""
        weights, activations = 0, _nbytes(self.typed(node.output[0]))
        for name in filter(None, node.input):
            sources = self._sources(name)
            if sources is not None:
                weights += sum(_nbytes(self._weights[s]) for s in sources)
            else:
                activations += _nbytes(self._stored(name))
        return weights, activations

    def kind(self, node: Any) -> str:
        """The type that an operator multiplies in: that of its first input as an engine passes it."""
        element, _ = self._stored(node.input[0])
        dtype = find_dtype(element)
        return _MULTIPLIED_AS.get(dtype.name, "") if dtype else ""

    def weights_read(self) -> int:
        """Bytes of all weights one call reads; of a looked-up table its rows, at most all of them."""
        tables = {node.input[0]: node for node in self.graph.node if self._is_lookup(node)}
        total = 0
        for name, typed in self._weights.items():
            nbytes = _nbytes(typed)
            if name in tables:
                rows = math.prod(self.shape(tables[name].input[1]))
                nbytes = min(nbytes, rows * nbytes // max(typed[1][0], 1))
            total += nbytes
        return total

    def _is_lookup(self, node: Any) -> bool:
        if node.op_type != "Gather" or node.input[0] not in self._weights:
            return False
        return all(a.i == 0 for a in node.attribute if a.name == "axis")

    def _sources(self, name: str) -> set[str] | None:
        """The initializers of a value that is computed from initializers only."""
        if name in self._weights:
            return {name}
        node = self._producer.get(name)
        if node is None or node.op_type not in _THROUGH:
            return None
        parts = [self._sources(i) for i in node.input if i]
        if any(part is None for part in parts):
            return None
        return {source for part in parts if part is not None for source in part}

    def _stored(self, name: str) -> Typed:
        """Type and shape of an activation as an engine passes it: before its DequantizeLinear."""
        node = self._producer.get(name)
        if node is not None and node.op_type == "DequantizeLinear":
            return self.typed(node.input[0])
        return self.typed(name)


def _macs(node: Any, values: _Values) -> int | None:
    """MACs of one operator, None if it is not of the counted ones."""
    if node.op_type == "MatMul":
        return math.prod(values.shape(node.output[0])) * values.shape(node.input[0])[-1]
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(values.shape(node.output[0])) * values.shape(node.input[0])[0 if transposed else 1]
    if node.op_type == "Conv":
        # weight [out, in / groups, ...]: each output element takes one filter's worth of products
        return math.prod(values.shape(node.output[0])) * math.prod(values.shape(node.input[1])[1:])
    if node.op_type == "Attention":
        return _attention(node, values)
    return None


def _attention(node: Any, values: _Values) -> int:
    """q k^T over every key, and its softmax times v. Inputs are [batch, heads, positions, width]."""
    query, key, value = (values.shape(name) for name in node.input[:3])
    if len(query) != 4 or len(key) != 4 or len(value) != 4:
        raise BuildError(
            f"The cost of {node.name or 'an Attention'} is unknown.",
            f"Its query has shape {list(query)}; [batch, heads, positions, width] is counted.",
        )
    batch, heads, new, width = query
    return batch * heads * new * key[2] * (width + value[3])


def _nbytes(typed: Typed) -> int:
    kind, shape = typed
    return (find_dtype(kind) or dtype_of("fp32")).nbytes(math.prod(shape))
