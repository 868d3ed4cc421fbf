"""The one module that imports tensorrt and tensorrt_rtx, and knows how their releases differ.

Both have the same Python API; 10.x, 11.x and RTX differ in what exists, so every optional call is guarded by
``hasattr``. Networks are always strongly typed: the types are the graph's, and no precision flag (gone in 11)
can change them. A machine without a driver can parse and, with RTX, build.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import BuildError, CapabilityError, UsageError

_MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
BUILDERS = tuple(_MODULES)
"""Backends that compile engines."""

_NO_DRIVER = "cudaError 35"  # logged with every failure on a machine without a driver, whatever the cause
_MAX_REASONS = 8


@dataclass(frozen=True)
class Library:
    """An imported TensorRT: its backend name, module and exact release (engines are tied to it)."""

    backend: str
    module: Any
    release: str

    @property
    def cross_builds(self) -> bool:
        """Whether it compiles for GPUs that are not in this machine."""
        return hasattr(self.module.IBuilderConfig, "set_compute_capability")


def library(backend: str) -> Library:
    """Import the TensorRT of ``backend``.

    Raises:
        UsageError: ``backend`` is none of :data:`BUILDERS`.
        CapabilityError: it is not installed, or its libraries cannot be loaded.
    """
    if backend not in _MODULES:
        raise UsageError(
            f"Unknown engine builder {backend!r}.",
            f"Known: {', '.join(BUILDERS)}.",
            f"Give --backend {BUILDERS[0]}.",
        )
    try:
        module = importlib.import_module(_MODULES[backend])
    except (ImportError, OSError) as error:  # OSError: the bindings are there, the shared libraries are not
        raise CapabilityError(
            f"{backend} is not installed.", str(error), f"Install it: pip install {backend}"
        ) from error
    return Library(backend, module, str(module.__version__))


@dataclass
class Network:
    """A parsed, strongly typed network, and what must live as long as it does."""

    library: Library
    graph: Path
    logger: Any
    builder: Any
    network: Any
    keep: list[Any] = field(default_factory=list)

    @property
    def inputs(self) -> list[Any]:
        """The network's input tensors."""
        return [self.network.get_input(i) for i in range(self.network.num_inputs)]

    @property
    def output_names(self) -> list[str]:
        """Names of the network's outputs."""
        return [self.network.get_output(i).name for i in range(self.network.num_outputs)]

    def reasons(self) -> str:
        """The library's error messages so far, without the one that only says there is no driver."""
        errors = list(dict.fromkeys(self.logger.errors))
        told = [text for text in errors if _NO_DRIVER not in text] or errors
        return " ".join(told[:_MAX_REASONS]) or "The library gave no reason."


def parse_network(lib: Library, graph: Path) -> Network:
    """Parse the ONNX file ``graph`` (external weights beside it are found) into a strongly typed network.

    Raises:
        BuildError: the parser refuses the graph; every refused node is named with the reason.
    """
    trt = lib.module
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = Network(lib, graph, logger, builder, network, [parser])
    if not parser.parse_from_file(str(graph)):
        errors = [_parser_error(parser.get_error(i)) for i in range(min(parser.num_errors, _MAX_REASONS))]
        raise BuildError(
            f"{lib.backend} {lib.release} cannot parse {graph.name}.",
            " ".join(errors) or parsed.reasons(),
            "Leave the named operators out of the graph, or run this component with --backend onnxruntime.",
        )
    _let_attention_decompose(trt, network)
    return parsed


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Let attentions without a fused kernel (head size 8, say) be built from plain products.

    Otherwise the builder refuses the whole network. Which ones are fused is in the proof.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)  # TensorRT 10.14 and RTX 1.2 on
    for i in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(i)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings hand out the base class
            layer.attention.decomposable = True


def builder_config(
    parsed: Network,
    targets: Sequence[str],
    profiles: Sequence[dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]],
    *,
    optimization_level: int | None = None,
    workspace_bytes: int | None = None,
) -> Any:
    """A builder configuration.

    Args:
        parsed: the network.
        targets: compute capabilities (``"sm89"``); empty: the GPU of this machine.
        profiles: for each optimization profile, input name -> (min, opt, max) shape.
        optimization_level: 0 to 5, the library's default if None.
        workspace_bytes: scratch memory an engine may use, the library's default if None.

    Raises:
        CapabilityError: this library only builds for the GPU in the machine, or not for a target.
    """
    lib, trt = parsed.library, parsed.library.module
    config = parsed.builder.create_builder_config()
    if targets:
        if not lib.cross_builds:
            raise CapabilityError(
                f"{lib.backend} {lib.release} cannot build for {', '.join(targets)}.",
                "It builds for the GPU of this machine only.",
                "Build on that GPU without --targets, or with --backend tensorrt-rtx.",
            )
        config.num_compute_capabilities = len(targets)
        for i, name in enumerate(targets):
            if not hasattr(trt.ComputeCapability, name.upper()):
                raise CapabilityError(
                    f"{lib.backend} {lib.release} cannot build for {name}.",
                    f"It knows {', '.join(trt.ComputeCapability.__members__)}.",
                    f"Install a newer release: pip install -U {lib.backend}",
                )
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), i)
    if optimization_level is not None:
        config.builder_optimization_level = optimization_level
    if workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    for shapes in profiles:
        profile = parsed.builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            profile.set_shape(name, low, best, high)
        config.add_optimization_profile(profile)
        parsed.keep.append(profile)
    return config


def write_engine(parsed: Network, config: Any, out: BinaryIO) -> int:
    """Compile the network and write the engine to ``out``, in pieces where the library can (less memory).

    Returns:
        Bytes written.

    Raises:
        BuildError: the library refuses the network; its reasons are given.
        OSError: ``out`` cannot be written.
    """
    lib = parsed.library
    if hasattr(parsed.builder, "build_serialized_network_to_stream"):
        writer = _writer(lib.module, out)
        built = parsed.builder.build_serialized_network_to_stream(parsed.network, config, writer)
        if writer.error is not None:
            raise writer.error
        size = int(writer.size) if built else 0
    else:
        engine = parsed.builder.build_serialized_network(parsed.network, config)
        size = out.write(engine) if engine is not None else 0
    if not size:
        raise BuildError(
            f"{lib.backend} {lib.release} cannot build {parsed.graph.name}.",
            parsed.reasons(),
            "Change what the message names, or run this component with --backend onnxruntime.",
        )
    return size


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Collects errors; warnings and below are of no use to a caller."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.Logger.ERROR, trt.Logger.INTERNAL_ERROR):
                self.errors.append(message.strip())

    return Logger()


def _writer(trt: Any, out: BinaryIO) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Writes what the builder hands over; an OSError is kept, for it cannot pass through the library."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.size = 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                done = 0 if self.error else out.write(data)
            except OSError as error:
                self.error, done = error, 0
            self.size += done
            return done

    return Writer()


def _parser_error(error: Any) -> str:
    name = error.node_name() if hasattr(error, "node_name") else ""
    kind = error.node_operator() if hasattr(error, "node_operator") else ""
    node = f"Node {error.node()}" + (f" {name!r}" if name else "") + (f" ({kind})" if kind else "")
    return f"{node}: {error.desc().strip()}"
