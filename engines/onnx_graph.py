"""Reading an ONNX file's structure without the onnx package.

Building, proving and running engines need a graph's nodes and the types of its weights, not the weights. This
is a bounded reader of the protobuf fields in question, so that a runtime image needs neither onnx nor
protobuf. Field numbers are those of onnx.proto3 (IR version 11).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ..dtypes import find_dtype
from ..errors import IntegrityError
from .protobuf import fields, messages, packed

_TENSOR_DATA = frozenset({4, 5, 6, 10, 11})
"""TensorProto's payload fields that are skipped unread."""
_MAX_INTEGERS = 8


@dataclass(frozen=True)
class Node:
    """A node: ``ints`` holds its integer attributes (``axis``, ``transB``, ``to``, ...)."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ints: dict[str, int]


@dataclass(frozen=True)
class Graph:
    """Nodes in file order; initializers, inputs and outputs by name with element type and sizes.

    Dynamic sizes are 0. Element types have the names of :mod:`..dtypes`, ``?`` for any other. ``integers``
    are the values of short int64 constants: shapes, axes, ranges.
    """

    nodes: tuple[Node, ...]
    initializers: dict[str, tuple[str, tuple[int, ...]]]
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    integers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def element_types(self) -> frozenset[str]:
        """Every element type among weights, constants, inputs and Cast results."""
        casts = {_kind(n.ints.get("to", 0)) for n in self.nodes if n.op == "Cast"}
        named = {kind for kind, _ in (*self.initializers.values(), *self.inputs.values())}
        return frozenset(named | casts)

    def producers(self) -> dict[str, Node]:
        """Value name -> the node that makes it."""
        return {output: node for node in self.nodes for output in node.outputs}


def stored_bytes(kind: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor of element type ``kind``; two 4-bit values share one."""
    dtype = find_dtype(kind)
    return dtype.nbytes(math.prod(shape)) if dtype else math.prod(shape)


def _kind(number: int) -> str:
    """The name of TensorProto.DataType ``number``."""
    dtype = find_dtype(number)
    return dtype.name if dtype else "?"


def read_graph(path: Path) -> Graph:
    """The structure of the ONNX model at ``path``; external weight files are not opened.

    Raises:
        IntegrityError: the file is missing, empty, truncated, or no ONNX model.
    """
    try:
        with path.open("rb") as file:
            # Not closed by hand: slices of it live on in the traceback of a malformed file.
            return _model(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except FileNotFoundError as error:
        raise IntegrityError(f"There is no ONNX graph {path}.", "", "Export it again.") from error
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} is not a valid ONNX model.", str(error), "Export it again.") from error


def _model(data: memoryview) -> Graph:
    nodes: list[Node] = []
    initializers: dict[str, tuple[str, tuple[int, ...]]] = {}
    inputs: dict[str, tuple[str, tuple[int, ...]]] = {}
    outputs: dict[str, tuple[str, tuple[int, ...]]] = {}
    integers: dict[str, tuple[int, ...]] = {}

    def enter(name: str, tensor: _Tensor) -> None:
        initializers[name] = (tensor.kind, tensor.dims)
        if tensor.values:
            integers[name] = tensor.values

    seen_graph = False
    for number, value in fields(data):
        if number != 7 or isinstance(value, int):
            continue
        seen_graph = True
        for key, part in fields(value):
            if isinstance(part, int):
                continue
            if key == 1:
                node, constant = _node(part)
                nodes.append(node)
                if node.op == "Constant" and constant is not None and node.outputs:
                    enter(node.outputs[0], constant)
            elif key == 5:
                tensor = _tensor(part)
                enter(tensor.name, tensor)
            elif key in (11, 12):
                name, kind, dims = _value_info(part)
                (inputs if key == 11 else outputs)[name] = (kind, dims)
    if not seen_graph:
        raise ValueError("it holds no graph")
    return Graph(tuple(nodes), initializers, inputs, outputs, integers)


@dataclass(frozen=True)
class _Tensor:
    """A TensorProto; ``values`` are those of a short int64 one."""

    name: str
    kind: str
    dims: tuple[int, ...]
    values: tuple[int, ...]


def _node(data: memoryview) -> tuple[Node, _Tensor | None]:
    """A NodeProto, and its tensor attribute."""
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    ints: dict[str, int] = {}
    tensor: _Tensor | None = None
    for number, value in fields(data):
        if isinstance(value, int):
            continue
        if number in texts:
            texts[number].append(str(value, "utf-8"))
        elif number == 5:
            name = ""
            for key, part in fields(value):
                if key == 1 and not isinstance(part, int):
                    name = str(part, "utf-8")
                elif key == 3 and isinstance(part, int):
                    ints[name] = _signed(part)
                elif key == 5 and not isinstance(part, int):
                    tensor = _tensor(part)
    node = Node("".join(texts[4]), "".join(texts[3]), tuple(texts[1]), tuple(texts[2]), ints)
    return node, tensor


def _tensor(data: memoryview) -> _Tensor:
    name, kind, dims, raw = "", "?", [], memoryview(b"")
    values: list[int] = []
    for number, value in fields(data):
        if number in _TENSOR_DATA:
            continue
        if number == 1:
            dims += [value] if isinstance(value, int) else list(packed(value))
        elif number == 2 and isinstance(value, int):
            kind = _kind(value)
        elif number == 7 and len(values) <= _MAX_INTEGERS:
            values += [value] if isinstance(value, int) else islice(packed(value), _MAX_INTEGERS + 1)
        elif number == 8 and not isinstance(value, int):
            name = str(value, "utf-8")
        elif number == 9 and not isinstance(value, int):
            raw = value
    if kind != "int64" or math.prod(dims) > _MAX_INTEGERS:
        values = []
    elif len(raw) == 8 * math.prod(dims):
        values = [number for (number,) in struct.iter_unpack("<Q", raw)]
    elif len(values) != math.prod(dims):
        values = []
    return _Tensor(name, kind, tuple(dims), tuple(map(_signed, values)))


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _value_info(data: memoryview) -> tuple[str, str, tuple[int, ...]]:
    name, kind = "", "?"
    dims: list[int] = []
    for number, value in fields(data):
        if isinstance(value, int):
            continue
        if number == 1:
            name = str(value, "utf-8")
        elif number == 2:
            for _, tensor in messages(value, 1):
                for key, part in fields(tensor):
                    if key == 1 and isinstance(part, int):
                        kind = _kind(part)
                    elif key == 2 and not isinstance(part, int):
                        dims = [_dim(size) for _, size in messages(part, 1)]
    return name, kind, tuple(dims)


def _dim(data: memoryview) -> int:
    return next((v for key, v in fields(data) if key == 1 and isinstance(v, int)), 0)
