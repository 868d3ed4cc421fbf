"""Writing Q/DQ into a traced component graph.

For every layer of the plan, ``W -> [Cast] -> Transpose -> MatMul(x, .)`` becomes

    x  -> QuantizeLinear -> DequantizeLinear -> MatMul
    Wq -> DequantizeLinear(axis 0) -> Transpose -> MatMul

with per-tensor activation scales, stored 8- or 4-bit weights [out, in] and per-channel scales of the type the
graph computes in. Weight-only schemes leave x alone; their INT4 weights have a scale for each block of in
features.
TensorRT and ONNX Runtime both look through the Transpose. Activations differ between the two:

* TensorRT: one Q/DQ pair on a value, shared by its GEMMs (q/k/v, gate/up): they merge into one kernel.
* ONNX Runtime, INT8: a separate pair for every GEMM, with separate scale and zero-point initializers;
  GEMMs that share a Q stay in fp32 there. Weights with a scale for each row have a zero point for each
  row: on x86 processors without VNNI ONNX Runtime makes them unsigned, and without zero points of theirs
  gives all rows one, which its DequantizeLinear refuses.

Weights stay unbound: the new initializers carry the names of :func:`.quantize.stored_names`, types and
shapes; they are bound to the store when the graph is saved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from ..errors import BuildError
from ..export.nodes import constant
from .qdq_attention import quantised_attentions, write_attention
from .qdq_nodes import Form, Style, dequantised, drop_unused, initializer, pair
from .quantize import activation_scale, scale_shape, stored_names
from .schemes import PROMISES, SCHEMES, promise

if TYPE_CHECKING:
    import onnx_ir as ir


def write_qdq(
    model: ir.Model,
    schemes: Mapping[str, str],
    amax: Mapping[str, float],
    *,
    compute: str,
    base: str = "bf16",
    style: Style,
    attentions: Collection[str] = (),
) -> dict[str, str]:
    """Quantise ``model`` in place.

    Args:
        model: a component's graph; its initializers may be unbound.
        schemes: the plan of the whole model; layers whose weights are not in this graph are left alone.
        amax: largest input magnitude of the layers that ran in this component.
        compute: compute type of the graph: ``fp32``, ``bf16`` or ``fp16``.
        base: the recipe's base; scales are rounded to it, with every ``compute``.
        style: the runtime that reads the graph.
        attentions: those of the whole model that run in FP8 (:mod:`.attention`).

    Returns:
        Node name -> scheme of every quantised GEMM, and name of its Softmax -> scheme of every quantised
        attention: the promise that the engine is held to.

    Raises:
        BuildError: graph and calibration disagree about which layers this component has, a weight is used for
            something else than a matrix product, or the quantised GEMMs are not the expected ones.
    """
    layers = _wanted(model.graph, schemes, amax)
    form = Form(compute, base, style)
    pairs: dict[tuple[ir.Value, str, float], ir.Value] = {}
    promised: dict[str, str] = {}
    for layer, scheme in layers.items():
        nodes = _gemms(model.graph, layer)
        weight = _stored_weight(model.graph, layer, scheme, form)
        for i, node in enumerate(nodes):
            name = layer if len(nodes) == 1 else f"{layer}.{i}"
            if kind := SCHEMES[scheme].activation:
                _quantise_input(node, name, kind, amax[layer], form, pairs)
            _replace_weight(node, name, weight, _row_zeros(model.graph, layer, weight, form))
            node.name = node.name or name
            promised[node.name] = promise(scheme)
        drop_unused(model.graph, f"{layer}.weight")
    promised |= write_attention(model.graph, attentions, amax, form)
    check_products(model, layers, promised)
    return promised


def quantised_gemms(model: ir.Model) -> dict[str, str]:
    """Node name -> scheme of every MatMul whose inputs come from DQs as a scheme says (read back).

    The products of an attention, whose factors are both computed, are not among them.
    """
    gemms = {}
    for node in model.graph:
        if node.op_type == "MatMul" and _stored(node.inputs[1]):
            scheme = PROMISES.get((dequantised(node.inputs[0]), dequantised(node.inputs[1])))
            if scheme is not None:
                gemms[str(node.name)] = scheme
    return gemms


def check_products(model: ir.Model, layers: Mapping[str, str], promised: Mapping[str, str]) -> None:
    """BuildError unless the graph's quantised GEMMs are ``promised``, at least one for each of ``layers``."""
    products = quantised_gemms(model) | quantised_attentions(model)
    if products != promised or len(promised) < len(layers):
        different = sorted(set(products.items()) ^ set(promised.items()))
        raise BuildError(
            f"Graph {model.graph.name} has {len(products)} quantised matrix products, {len(promised)} were "
            f"written for {len(layers)} layers.",
            f"They differ in {different[:5] or 'number'}.",
            "This is a fault of the graph writer: report it with the recipe and the model's config.json.",
        )


def _stored(value: ir.Value | None) -> bool:
    """Whether ``value`` is a dequantised weight."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Transpose", "DequantizeLinear"):
        source = node.inputs[0]
        if source is None or source.is_initializer():
            return source is not None
        node = source.producer()
    return False


def _wanted(graph: ir.Graph, schemes: Mapping[str, str], amax: Mapping[str, float]) -> dict[str, str]:
    """The layers to quantise in this graph: those whose weights it has, which must have been measured."""
    planned = {name: scheme for name, scheme in schemes.items() if scheme in SCHEMES}
    here = {name for name in planned if f"{name}.weight" in graph.initializers}
    needed = {name for name in here if SCHEMES[planned[name]].activation}
    unmeasured, absent = sorted(needed - set(amax)), sorted((set(amax) & set(planned)) - here)
    if unmeasured:
        raise BuildError(
            f"{len(unmeasured)} layers of graph {graph.name} have no activation scale.",
            f"For example {unmeasured[0]}: calibration recorded no input of it.",
            "Calibrate again with this component, or take the layer out of the recipe.",
        )
    if absent:
        raise BuildError(
            f"Graph {graph.name} lacks {len(absent)} layers that calibration measured in it.",
            f"For example {absent[0]}.weight is not among its weights.",
            "Calibrate again for this model; if that does not help, report the model's config.json.",
        )
    return {name: scheme for name, scheme in planned.items() if name in here}


def _gemms(graph: ir.Graph, layer: str) -> list[ir.Node]:
    """The MatMuls that multiply by the layer's weight, through Cast and Transpose."""
    gemms: list[ir.Node] = []
    open_values = [graph.initializers[f"{layer}.weight"]]
    while open_values:
        for node, index in open_values.pop().uses():
            if node.op_type in ("Cast", "Transpose"):
                open_values.append(node.outputs[0])
            elif node.op_type == "MatMul" and index == 1:
                gemms.append(node)
            else:
                raise BuildError(
                    f"Layer {layer} cannot be quantised: its weight is input {index} of {node.op_type}.",
                    "Only matrix products with the weight as second factor have kernels for it.",
                    "Take the layer out of the recipe.",
                )
    if not gemms:
        raise BuildError(f"Layer {layer} cannot be quantised.", f"Nothing in {graph.name} uses its weight.")
    return gemms


def _stored_weight(graph: ir.Graph, layer: str, scheme: str, form: Form) -> tuple[ir.Value, ir.Value]:
    """Unbound initializers for the stored values [out, in] and the scales [out] or [out, blocks]."""
    import onnx_ir as ir

    old = graph.initializers[f"{layer}.weight"]
    values_name, *scale_names = stored_names(layer, scheme, form.base)
    scale_name = scale_names[1] if form.compute == "fp32" else scale_names[0]
    if form.compute not in ("fp32", form.base):
        raise BuildError(
            f"Graph {graph.name} computes in {form.compute}, the recipe's base is {form.base}.",
            "Scales are stored in the base type and in fp32.",
        )
    if old.shape is None or len(old.shape) != 2 or not old.shape.is_static():
        raise BuildError(f"Layer {layer} has no [out, in] weight.", f"Its shape is {old.shape}.")
    out_features, in_features = old.shape.numpy()
    scales = ir.Shape(scale_shape(scheme, (out_features, in_features)))
    values = initializer(graph, values_name, old.shape, SCHEMES[scheme].weight)
    scale = initializer(graph, scale_name, scales, form.compute)
    return values, scale


def _quantise_input(
    node: ir.Node,
    name: str,
    kind: str,
    amax: float,
    form: Form,
    pairs: dict[tuple[ir.Value, str, float], ir.Value],
) -> None:
    """Put Q -> DQ before input 0 of ``node``, or reuse the pair on that value."""
    x = node.inputs[0]
    if x is None or node.graph is None:
        raise BuildError(f"Layer {name} cannot be quantised.", "Its matrix product has no first factor.")
    scale = activation_scale(amax, kind, form.base)
    key = (x, kind, scale)
    own = form.style == "onnxruntime" and kind == "int8"
    if own or key not in pairs:
        pairs[key] = pair(node.graph, x, f"{name}.input", kind, scale, form)
    node.replace_input_with(0, pairs[key])


def _row_zeros(graph: ir.Graph, layer: str, weight: tuple[ir.Value, ir.Value], form: Form) -> list[ir.Value]:
    """The zero points of INT8 rows for ONNX Runtime, int8 [out]; else none."""
    import onnx_ir as ir

    values, scale = weight
    shape = scale.shape
    if form.style != "onnxruntime" or values.dtype != ir.DataType.INT8 or shape is None or len(shape) != 1:
        return []
    return [constant(graph, f"{layer}.weight_zero", [0] * shape.numpy()[0], ir.DataType.INT8)]


def _replace_weight(
    node: ir.Node, name: str, weight: tuple[ir.Value, ir.Value], zeros: list[ir.Value]
) -> None:
    """Wq [out, in] -> DQ (axis 0, blocks of axis 1, or all) -> Transpose -> second factor."""
    import onnx_ir as ir

    graph, (values, scale) = node.graph, weight
    assert isinstance(graph, ir.Graph)
    shape, dtype = values.shape, scale.type
    assert shape is not None
    assert scale.shape is not None
    along = {"axis": 0} if len(scale.shape) else {}
    if len(scale.shape) == 2:
        along = {"axis": 1, "block_size": shape.numpy()[1] // scale.shape.numpy()[1]}
    restored = ir.Value(name=f"{name}.weight_dq", shape=shape, type=dtype)
    turned = ir.Value(name=f"{name}.weight_t", shape=ir.Shape([shape[1], shape[0]]), type=dtype)
    graph.insert_before(
        node,
        [
            ir.node(
                "DequantizeLinear",
                [values, scale, *zeros],
                along,
                outputs=[restored],
                name=f"{name}/weight_dequantize",
            ),
            ir.node("Transpose", [restored], {"perm": [1, 0]}, outputs=[turned], name=f"{name}/weight_t"),
        ],
    )
    node.replace_input_with(1, turned)
