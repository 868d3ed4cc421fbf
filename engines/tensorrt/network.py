"""Networks of TensorRT: parsed from ONNX, always strongly typed, and compiled into engine files.

The types are the graph's: no precision flag (gone in 11) can change them, and the parser's types of inputs
and outputs are compared with the graph before and after the build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ...dtypes import find_dtype
from ...errors import BuildError
from .library import Library, make_logger, reasons

_MAX_REASONS = 8


@dataclass
class Network:
    """A parsed, strongly typed network, and the objects that must live as long as it."""

    library: Library
    graph: Path
    logger: Any
    builder: Any
    network: Any
    keep: list[Any] = field(default_factory=list)

    @property
    def inputs(self) -> dict[str, str]:
        """Name and element type of the network's inputs."""
        return _types(self.network.get_input(i) for i in range(self.network.num_inputs))

    @property
    def outputs(self) -> dict[str, str]:
        """Name and element type of the network's outputs."""
        return _types(self.network.get_output(i) for i in range(self.network.num_outputs))

    def reasons(self) -> str:
        """The library's error messages so far."""
        return reasons(self.logger)


def parse_network(lib: Library, graph: Path) -> Network:
    """Parse the ONNX file ``graph`` (external weights are found next to it) into a strongly typed network.

    Raises:
        BuildError: the parser refuses the graph; every refused node is named with the reason.
    """
    trt = lib.module
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    strongly_typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(strongly_typed))
    # Releases that no longer have precision flags (11, RTX) cannot make another kind of network.
    if hasattr(trt.BuilderFlag, "FP16") and not network.get_flag(strongly_typed):
        raise BuildError(
            f"{lib} made a weakly typed network.",
            "It could then choose other precisions than the graph's.",
            "Install a newer release: pip install -U " + lib.backend,
        )
    parser = trt.OnnxParser(network, logger)
    parsed = Network(lib, graph, logger, builder, network, [parser])
    if not parser.parse_from_file(str(graph)):
        errors = [_parser_error(parser.get_error(i)) for i in range(min(parser.num_errors, _MAX_REASONS))]
        raise BuildError(
            f"{lib} cannot parse {graph.name}.",
            " ".join(errors) or parsed.reasons(),
            "Leave the named operators out of the graph, or run this component with --backend onnxruntime.",
        )
    _let_attention_decompose(trt, network)
    return parsed


def check_types(parsed: Network, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """BuildError if the network has other inputs or outputs than the graph, or gives them other types."""
    for what, have, want in (("inputs", parsed.inputs, inputs), ("outputs", parsed.outputs, outputs)):
        for name in sorted({*have, *want}):
            if have.get(name) != want.get(name):
                raise BuildError(
                    f"{parsed.library} reads {parsed.graph.name} as another network than it is.",
                    f"Of its {what}, {name} is {have.get(name, 'missing')} in the network and "
                    f"{want.get(name, 'missing')} in the graph.",
                    "Use a release that the graph was tested with, or --backend onnxruntime.",
                )


def write_engine(parsed: Network, config: Any, out: BinaryIO) -> int:
    """Compile the network and write the engine to ``out``, in pieces where the library can (less memory).

    Returns:
        Bytes written.

    Raises:
        BuildError: the library refuses the network; its reasons are given.
        OSError: ``out`` cannot be written.
    """
    lib = parsed.library
    if hasattr(parsed.builder, "build_serialized_network_to_stream"):  # 10.13 and RTX 1.0 on
        writer = _writer(lib.module, out)
        written = parsed.builder.build_serialized_network_to_stream(parsed.network, config, writer)
        if writer.error is not None:
            raise writer.error
        size = int(writer.size) if written else 0
    else:
        engine = parsed.builder.build_serialized_network(parsed.network, config)
        size = out.write(engine) if engine is not None else 0
    if not size:
        raise BuildError(
            f"{lib} cannot build {parsed.graph.name}.",
            parsed.reasons(),
            "Change the part that the message names, or run this component with --backend onnxruntime.",
        )
    return size


def _types(tensors: Any) -> dict[str, str]:
    return {tensor.name: element_type(tensor.dtype) for tensor in tensors}


def element_type(dtype: Any) -> str:
    """The library's DataType by its name in :mod:`...dtypes`; its own where that has none."""
    known = find_dtype(dtype.name)
    return known.name if known else str(dtype.name).lower()


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Let attentions without a fused kernel (head size 8, say) be built from plain products.

    Otherwise the builder refuses the whole network. Which ones are fused is in the verification report.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)  # TensorRT 10.14 and RTX 1.2 on
    for i in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(i)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings hand out the base class
            layer.attention.decomposable = True


def _writer(trt: Any, out: BinaryIO) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Writes the builder's chunks; an OSError is stored, for it cannot pass through the library."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.size = 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                count = 0 if self.error else out.write(data)
            except OSError as error:
                self.error, count = error, 0
            self.size += count
            return count

    return Writer()


def _parser_error(error: Any) -> str:
    name = f" {error.node_name()!r}" if error.node_name() else ""
    kind = f" ({error.node_operator()})" if error.node_operator() else ""
    return f"Node {error.node()}{name}{kind}: {error.desc().strip()}"
