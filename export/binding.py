"""Pointing a graph's initializers at the weights store, and saving the graph.

Graphs hold names, types and shapes; an initializer becomes external data (file, offset, length). ONNX and
ONNX Runtime refuse external data outside the graph's folder, so the store is below it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..dtypes import COMPUTE, dtype_of, find_dtype
from ..errors import BuildError
from ..files.write import atomic
from .weight_store import Store, cannot_write

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOATS = {dtype_of(name).onnx for name in COMPUTE}


def unbound(model: ir.Model) -> list[str]:
    """Names of the initializers that have no data yet: the tensors that a store must hold."""
    return [name for name, value in model.graph.initializers.items() if value.const_value is None]


def bind(model: ir.Model, store: Store, folder: Path) -> None:
    """Point every unbound initializer of ``model`` at its bytes in ``store``, in place.

    Where the graph computes in another float type than the store holds, the initializer takes the stored
    type and a Cast follows it; engines fold that when they load.

    Args:
        model: a graph of :func:`.trace.export_component`, quantised or not.
        store: from :func:`.weight_store.open_store`, or a safetensors checkpoint's ``tensors``: then
        nothing is
            copied, and the graph must be saved next to the shards.
        folder: where the graph will be saved; the store's files must be below it.

    Raises:
        BuildError: a tensor is missing, or has another shape or type, or its file is not below ``folder``.
    """
    import onnx_ir as ir

    for name in unbound(model):
        value, ref = model.graph.initializers[name], store.get(name)
        if ref is None:
            raise BuildError(f"Graph {model.graph.name} needs {name}.", "It is not in the weights store.")
        if ref.offset is None:
            raise BuildError(
                f"Graph {model.graph.name} cannot use {name} where it is stored.",
                f"{ref.file} does not say at which byte it begins.",
                "Copy the weights with write_store.",
            )
        shape = ir.Shape(ref.shape)
        known = find_dtype(ref.dtype)
        onnx_type = known.onnx if known else ref.dtype
        dtype = value.dtype.name if value.dtype is not None else "an unknown type"
        if dtype == "INT4" and ref.dtype == "uint8" and shape:  # safetensors has no 4-bit types
            shape, onnx_type = ir.Shape([*ref.shape[:-1], 2 * ref.shape[-1]]), dtype
        if value.shape != shape or (dtype != onnx_type and not {dtype, onnx_type} <= _FLOATS):
            raise BuildError(
                f"Graph {model.graph.name} and the weights store differ in {name}.",
                f"The graph has {dtype} {value.shape}, the store {onnx_type} {shape}.",
            )
        stored = ir.DataType[onnx_type]
        value.const_value = ir.ExternalTensor(
            _below(ref.file, folder), ref.offset, ref.nbytes, stored, shape=shape, name=name, base_dir=folder
        )
        if dtype != onnx_type:
            _cast(model.graph, value, stored, ir.DataType[dtype])


def save_graph(model: ir.Model, path: Path) -> None:
    """Check ``model`` (all initializers bound) and write it; the file appears whole or not at all.

    Raises:
        BuildError: unbound initializers, onnx.checker finds fault, or the file cannot be written.
    """
    import onnx
    import onnx_ir as ir

    loose = unbound(model)
    if loose:
        raise BuildError(f"Graph {model.graph.name} has {len(loose)} weights without data.", loose[0])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial:
            ir.save(model, partial, format="protobuf")
            onnx.checker.check_model(str(partial), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"Graph {model.graph.name} is not valid ONNX.", str(error)) from error
    except OSError as error:
        raise cannot_write(path, error) from error


def _cast(graph: ir.Graph, value: ir.Value, stored: ir.DataType, dtype: ir.DataType) -> None:
    import onnx_ir as ir

    users = list(value.uses())
    value.type = ir.TensorType(stored)
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}/Cast")
    output = cast.outputs[0]
    output.name = f"{value.name}.{dtype.name.lower()}"
    output.type, output.shape = ir.TensorType(dtype), value.shape
    graph.insert_before(graph[0], cast)
    for node, index in users:
        node.replace_input_with(index, output)


def _below(file: Path, folder: Path) -> str:
    try:
        return file.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        raise BuildError(
            f"Weights in {file} cannot be used by graphs in {folder}.",
            "ONNX readers refuse external data outside the graph's folder.",
            "Write the store below the graphs.",
        ) from None
