"""The weights store: one safetensors file that all graphs of a bundle point into.

Graphs hold names, types and shapes; :func:`bind` makes each initializer point at its bytes (file, offset,
length), so a tensor that several components and both graph variants use is stored once. Any safetensors
reader opens the store.

ONNX and ONNX Runtime refuse external data outside the graph's folder, so the store lies below it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from ..errors import BuildError, CheckpointError
from ..models.checkpoint import Checkpoint
from ..models.storage import TensorRef, read_header

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

ALIGNMENT = 4096  # a page: what memory maps and direct reads like
_SAFETENSORS = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}
_ONNX = {
    "float32": "FLOAT",
    "bfloat16": "BFLOAT16",
    "float16": "FLOAT16",
    "F8_E4M3": "FLOAT8E4M3FN",
    "I8": "INT8",
}
_FLOATS = ("FLOAT", "BFLOAT16", "FLOAT16")

Store = dict[str, TensorRef]
"""Stored name to its place, over all files of a store."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a store: its name, torch dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


class StoreWriter:
    """Writes a store of known tensors as a stream; a context manager.

    Offsets are fixed by the layout, so rows of different tensors may come in any interleaving. The file
    appears under ``path`` when the block ends without an error, all of it or nothing.

    Tensors stand sorted by the power of two in their size, largest first: each then starts at a multiple of
    that power (up to a page) without holes, which safetensors forbids.
    """

    def __init__(self, path: Path, tensors: Sequence[StoredTensor]) -> None:
        names = [t.name for t in tensors]
        if len(set(names)) != len(names):
            raise ValueError("a tensor is listed twice")
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._tensors = {t.name: t for t in sorted(tensors, key=lambda t: (-_power_of_two(t.nbytes), t.name))}
        self._begin: dict[str, int] = {}
        self._written = dict.fromkeys(self._tensors, 0)
        self._file: BinaryIO | None = None

    def __enter__(self) -> StoreWriter:
        header: dict[str, object] = {}
        end = 0
        for name, tensor in self._tensors.items():
            self._begin[name], end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _SAFETENSORS[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [self._begin[name], end],
            }
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
        self._data = 8 + len(raw)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("wb")
            self._file.write(len(raw).to_bytes(8, "little") + raw)
            self._file.truncate(self._data + end)
        except OSError as error:
            self._abandon()
            raise _cannot_write(self.path, error) from error
        return self

    def write(self, name: str, values: torch.Tensor) -> None:
        """Append ``values`` (whole rows, of the tensor's dtype) to tensor ``name``.

        Raises:
            BuildError: more rows than the tensor has, another dtype, or the disk is full.
        """
        import torch

        tensor, done = self._tensors[name], self._written[name]
        nbytes = values.numel() * values.element_size()
        if str(values.dtype) != f"torch.{tensor.dtype}" or done + nbytes > tensor.nbytes:
            raise BuildError(
                f"The weights store got the wrong values for {name}.",
                f"{list(values.shape)} {values.dtype} after {done} of {tensor.nbytes} bytes of "
                f"{list(tensor.shape)} {tensor.dtype}.",
            )
        assert self._file is not None, "used outside its with block"
        try:
            self._file.seek(self._data + self._begin[name] + done)
            self._file.write(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._written[name] = done + nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        short = [n for n, t in self._tensors.items() if self._written[n] != t.nbytes]
        if short:
            self._abandon()
            raise BuildError(
                f"{len(short)} tensors of the weights store are incomplete.", f"For example {short[0]}."
            )
        try:
            assert self._file is not None
            self._file.close()
            self._temporary.replace(self.path)
        except OSError as failure:
            self._abandon()
            raise _cannot_write(self.path, failure) from failure

    def _abandon(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:  # the buffered rest does not fit either; the file goes anyway
                pass
        self._temporary.unlink(missing_ok=True)


def write_store(checkpoint: Checkpoint, keys: Iterable[str], path: Path, dtype: str) -> None:
    """Copy tensors of ``checkpoint`` to the store ``path``, one at a time.

    Args:
        checkpoint: where they come from.
        keys: published keys; a key given twice is stored once.
        path: the file to write, ``<graph folder>/weights/<name>.safetensors``.
        dtype: what they are stored as: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        CheckpointError: no such tensor, or a value too large for float16.
        BuildError: the file cannot be written.
    """
    import torch

    wanted: torch.dtype = getattr(torch, dtype)
    listed = list(dict.fromkeys(keys))
    absent = [key for key in listed if key not in checkpoint.tensors]
    if absent:
        raise CheckpointError(f"{checkpoint.path} lacks {len(absent)} tensors.", ", ".join(absent[:5]))
    with StoreWriter(path, [StoredTensor(k, dtype, checkpoint.tensors[k].shape) for k in listed]) as store:
        for key in listed:
            values = checkpoint.load(key)
            stored = values.to(wanted)
            if wanted == torch.float16 and bool((torch.isinf(stored) & torch.isfinite(values)).any()):
                raise CheckpointError(
                    f"{key} holds values too large for float16.",
                    f"Its largest magnitude is {float(values.abs().max()):.3g}, float16 ends at 65504.",
                    "Use --precision bf16, or fp8 / int8, which build on bf16.",
                )
            store.write(key, stored)


def open_store(*paths: Path) -> Store:
    """Every tensor of the given store files, from their headers.

    Raises:
        CheckpointError: a file is missing or damaged.
        BuildError: a name is in two of them.
    """
    store: Store = {}
    for path in paths:
        refs = read_header(path)
        twice = sorted(set(refs) & set(store))
        if twice:
            raise BuildError(
                f"{len(twice)} tensors are in two weights stores.", f"{twice[0]} is in {path} and before."
            )
        store.update(refs)
    return store


def unbound(model: ir.Model) -> list[str]:
    """Names of the initializers that have no data yet: what a store must hold."""
    return [name for name, value in model.graph.initializers.items() if value.const_value is None]


def bind(model: ir.Model, store: Store, folder: Path) -> None:
    """Point every unbound initializer of ``model`` at its bytes in ``store``, in place.

    Where the graph computes in another float type than the store holds, the initializer takes the stored
    type and a Cast follows it; engines fold that when they load.

    Args:
        model: a graph of :func:`.trace.export_component`, quantised or not.
        store: from :func:`open_store`.
        folder: where the graph will be saved; the store's files must lie below it.

    Raises:
        BuildError: a tensor is missing, or has another shape or type, or its file is not below ``folder``.
    """
    import onnx_ir as ir

    for name in unbound(model):
        value, ref = model.graph.initializers[name], store.get(name)
        if ref is None:
            raise BuildError(f"Graph {model.graph.name} needs {name}.", "It is not in the weights store.")
        shape = ir.Shape(ref.shape)
        onnx_type = _ONNX.get(ref.dtype, ref.dtype)
        wanted = value.dtype.name if value.dtype is not None else "an unknown type"
        if value.shape != shape or (wanted != onnx_type and not {wanted, onnx_type} <= set(_FLOATS)):
            raise BuildError(
                f"Graph {model.graph.name} and the weights store differ in {name}.",
                f"The graph has {wanted} {value.shape}, the store {onnx_type} {shape}.",
            )
        stored = ir.DataType[onnx_type]
        value.const_value = ir.ExternalTensor(
            _below(ref.file, folder), ref.offset, ref.nbytes, stored, shape=shape, name=name, base_dir=folder
        )
        if wanted != onnx_type:
            _cast(model.graph, value, stored, ir.DataType[wanted])


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, temporary, format="protobuf")
        onnx.checker.check_model(str(temporary), full_check=True)
        temporary.replace(path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"Graph {model.graph.name} is not valid ONNX.", str(error)) from error
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _cast(graph: ir.Graph, value: ir.Value, stored: ir.DataType, wanted: ir.DataType) -> None:
    import onnx_ir as ir

    users = list(value.uses())
    value.dtype = stored
    cast = ir.node("Cast", [value], {"to": int(wanted)}, name=f"{value.name}/Cast")
    output = cast.outputs[0]
    output.name = f"{value.name}.{wanted.name.lower()}"
    output.dtype, output.shape = wanted, value.shape
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


def _power_of_two(nbytes: int) -> int:
    """The largest power of two that divides ``nbytes``, at most a page."""
    return min(nbytes & -nbytes or ALIGNMENT, ALIGNMENT)


def _cannot_write(path: Path, error: OSError) -> BuildError:
    return BuildError(
        f"{path} cannot be written.",
        error.strerror or str(error),
        "Free disk space or choose another --out; what was built so far is kept.",
    )
