"""Compiling a component's graph into an engine file."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...bundle.manifest import Built
from ...bundle.spec import ComponentSpec
from ...errors import BuildError, CapabilityError, UsageError
from ...files.write import atomic
from ..gpu import Gpu, gpus
from ..memory import check_memory, graph_load
from ..onnx_graph import Graph, read_graph
from ..targets import check_types, parse_targets
from . import config as trt_config
from . import library as trt
from . import network as trt_network
from .config import Shape
from .options import BuildOptions
from .shapes import Profile, profiles_of, ranges_of
from .timing_cache import timing_cache

_FLOATS = ("fp32", "fp16", "bf16")
NATIVE = "native"
"""The target of a builder that compiles for the GPU of the machine it runs on (``tensorrt``)."""


@dataclass(frozen=True)
class EngineRecord:
    """A built engine.

    ``target`` joins several with ``+``; ``release`` is the library that built it and must load it;
    ``peak_rss`` is the process's largest resident memory so far, in bytes (0 where the system does not say);
    ``predicted_bytes`` is the anonymous memory that was expected, see :mod:`..memory`.
    """

    component: str
    backend: str
    target: str
    file: str
    release: str
    seconds: float
    size: int
    peak_rss: int
    predicted_bytes: int
    built: Built

    def to_json(self) -> dict[str, Any]:
        """Plain data for receipts."""
        return asdict(self)


def build_engine(
    graph: Path,
    spec: ComponentSpec,
    out: Path,
    *,
    backend: str = trt.RTX,
    target: str = "sm89",
    options: BuildOptions | None = None,
    profiles: tuple[Profile, ...] = (),
    parts: int = 1,
    cache: bool = True,
) -> EngineRecord:
    """Compile ``graph`` into the engine file ``out``; a failed or killed build leaves no file of that name.

    Args:
        graph: an ONNX file, its external weights next to it.
        spec: the component's contract.
        out: the engine file; its folder is made.
        backend: one of :data:`.library.BUILDERS`.
        target: GPUs that it is for: ``"sm89"``, several as ``"sm89+sm120"``, or :data:`NATIVE` with a
            builder that compiles for the GPU in the machine.
        options: builder settings.
        profiles: for each optimization profile the ranges of axes, the spec's where one is not named; empty:
            :func:`.shapes.profiles_of`.
        parts: how many parts the component is split into, if ``graph`` is one of them.
        cache: whether measured times of kernels are kept for later builds (``tensorrt``).

    Raises:
        UsageError: an unknown backend or target.
        CapabilityError: the library is not installed, a target lacks an element type of the graph, or the
            library does not support an option.
        IntegrityError: ``graph`` is not a valid ONNX model.
        BuildError: too little memory is free, graph and spec differ, the library refuses the graph, or the
            file cannot be written.
    """
    options = options or BuildOptions()
    profiles = tuple({**ranges_of(spec), **profile} for profile in profiles) or profiles_of(spec)
    targets = () if target == NATIVE else parse_targets(target)
    lib = trt.library(backend)
    if lib.cross_builds and not targets:
        raise UsageError(
            f"{backend} needs the names of its targets.",
            "It compiles for GPUs that need not be in this machine.",
            "Give --targets sm89, for example.",
        )
    contents = read_graph(graph)
    check_types(spec.name, contents.element_types, targets)
    gpu = None if lib.cross_builds else native_gpu(lib)
    load = graph_load(contents)
    check_memory(spec.name, load, parts)
    started = time.perf_counter()
    parsed = trt_network.parse_network(lib, graph)
    _check_names(contents, spec, graph)
    inputs, outputs = _kinds(contents.inputs), _kinds(contents.outputs)
    trt_network.check_types(parsed, inputs, outputs)
    shapes = [_shapes(spec, profile) for profile in profiles]
    config = trt_config.builder_config(parsed, [t.name for t in targets], shapes, options)
    with timing_cache(lib, config, gpu, enabled=cache):
        size = _write(parsed, config, spec, out)
    trt_network.check_types(parsed, inputs, outputs)
    return EngineRecord(
        component=spec.name,
        backend=backend,
        target="+".join(t.name for t in targets) or NATIVE,
        file=out.name,
        release=lib.release,
        seconds=time.perf_counter() - started,
        size=size,
        peak_rss=_peak_rss(),
        predicted_bytes=load.build_bytes,
        built=Built(
            dtype=next((kind for kind in (*inputs.values(), *outputs.values()) if kind in _FLOATS), "fp32"),
            profiles=profiles,
            options=options.to_json(),
            gpu=gpu.name if gpu else "",
            sm=gpu.sm if gpu else "",
        ),
    )


def native_gpu(lib: trt.Library) -> Gpu:
    """The GPU that ``lib`` builds for; CapabilityError if there is none."""
    if not gpus():
        raise CapabilityError(
            f"{lib} cannot build here.",
            "It builds for the GPU of this machine, and there is none, or no driver for it.",
            "Build on the machine that will run it, or with --backend tensorrt-rtx --targets sm89.",
        )
    return gpus()[0]


def _kinds(values: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    return {name: kind for name, (kind, _) in values.items()}


def _shapes(spec: ComponentSpec, profile: Profile) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Smallest, tuned-for and largest shape of every input."""

    def shape(dims: Sequence[int | str], which: int) -> Shape:
        return tuple(profile[dim][which] if isinstance(dim, str) else dim for dim in dims)

    return {t.name: (shape(t.shape, 0), shape(t.shape, 1), shape(t.shape, 2)) for t in spec.inputs}


def _check_names(contents: Graph, spec: ComponentSpec, graph: Path) -> None:
    pairs = (
        ("inputs", list(contents.inputs), [t.name for t in spec.inputs]),
        ("outputs", list(contents.outputs), [t.name for t in spec.outputs]),
    )
    for what, have, want in pairs:
        if sorted(have) != sorted(want):
            raise BuildError(
                f"{graph.name} is not the graph of component {spec.name}.",
                f"Its {what} are {sorted(have)}, the component has {sorted(want)}.",
                "Export the component again.",
            )


def _write(parsed: trt_network.Network, config: Any, spec: ComponentSpec, out: Path) -> int:
    """Write the engine, and return its bytes; ``out`` is whole or not there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic(out, durable=True, exclusive=True) as partial, partial.open("wb") as file:
            return trt_network.write_engine(parsed, config, file)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise BuildError(
            f"The engine of {spec.name} could not be written to {out}.",
            str(error),
            "Free some space or give --out a folder on another disk; 'build' again continues from here."
            if full
            else "Make the folder writable, or give --out another one.",
        ) from error


def _peak_rss() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
