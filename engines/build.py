"""Compiling a component's graph into an engine file."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import BuildError, UsageError
from ..specs import ComponentSpec
from . import trt
from .graph import read_graph
from .memory import check_memory, graph_load
from .targets import check_types, parse_targets

NATIVE = "native"
"""The target of a builder that compiles for the GPU of the machine it runs on (``tensorrt``)."""


@dataclass(frozen=True)
class BuildOptions:
    """Builder settings; None means the library's default.

    Args:
        optimization_level: 0 (fast build) to 5 (fast engine).
        workspace_bytes: scratch memory an engine may use.
        profiles: axis name -> (min, opt, max) that differ from the spec's, one mapping for each
            optimization profile; empty: one profile with the spec's ranges. A profile whose sequence is
            always 1 doubles the weights in the engine (measured on TensorRT-RTX 1.7): let it reach 4.
    """

    optimization_level: int | None = None
    workspace_bytes: int | None = None
    profiles: tuple[dict[str, tuple[int, int, int]], ...] = ()


@dataclass(frozen=True)
class EngineRecord:
    """A built engine.

    ``target`` joins several with ``+``; ``release`` is the library that built it and must load it;
    ``peak_rss`` is the process's largest resident memory so far, in bytes (0 where the system does not say);
    ``predicted_bytes`` is the anonymous memory that was expected, see :mod:`.memory`.
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

    def to_json(self) -> dict[str, Any]:
        """Plain data for receipts."""
        return asdict(self)


def build_engine(
    graph: Path,
    spec: ComponentSpec,
    out: Path,
    *,
    backend: str = "tensorrt-rtx",
    target: str = "sm89",
    options: BuildOptions | None = None,
    parts: int = 1,
) -> EngineRecord:
    """Compile ``graph`` into the engine file ``out``; a failed or killed build leaves no file of that name.

    Args:
        graph: an ONNX file, its external weights beside it.
        spec: the component's contract; its axes give the optimization profile.
        out: the engine file; its folder is made.
        backend: one of :data:`.trt.BUILDERS`.
        target: what it is for: ``"sm89"``, several as ``"sm89+sm120"``, or :data:`NATIVE` with a builder that
            compiles for the GPU in the machine.
        options: builder settings.
        parts: how many parts the component is split into, if ``graph`` is one of them.

    Raises:
        UsageError: an unknown backend or target.
        CapabilityError: the library is not installed, or a target lacks an element type of the graph.
        IntegrityError: ``graph`` is no ONNX model.
        BuildError: too little memory is free, graph and spec differ, the library refuses the graph, or the
            file cannot be written.
    """
    options = options or BuildOptions()
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
    load = graph_load(contents)
    check_memory(spec.name, load, parts)
    started = time.perf_counter()
    parsed = trt.parse_network(lib, graph)
    _check_names(parsed, spec, graph)
    config = trt.builder_config(
        parsed,
        [t.name for t in targets],
        [_profile(spec, ranges) for ranges in options.profiles or ({},)],
        optimization_level=options.optimization_level,
        workspace_bytes=options.workspace_bytes,
    )
    size = _write(parsed, config, spec, out)
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
    )


def _profile(
    spec: ComponentSpec, ranges: dict[str, tuple[int, int, int]]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    def shape(dims: Sequence[int | str], which: int) -> tuple[int, ...]:
        sizes = []
        for dim in dims:
            if isinstance(dim, str):
                axis = spec.axis(dim)
                dim = ranges.get(dim, (axis.min, axis.opt, axis.max))[which]
            sizes.append(dim)
        return tuple(sizes)

    return {t.name: (shape(t.shape, 0), shape(t.shape, 1), shape(t.shape, 2)) for t in spec.inputs}


def _check_names(parsed: trt.Network, spec: ComponentSpec, graph: Path) -> None:
    pairs = (
        ("inputs", [t.name for t in parsed.inputs], [t.name for t in spec.inputs]),
        ("outputs", parsed.output_names, [t.name for t in spec.outputs]),
    )
    for what, have, want in pairs:
        if sorted(have) != sorted(want):
            raise BuildError(
                f"{graph.name} is not the graph of component {spec.name}.",
                f"Its {what} are {sorted(have)}, the component has {sorted(want)}.",
                "Export the component again.",
            )


def _write(parsed: trt.Network, config: Any, spec: ComponentSpec, out: Path) -> int:
    """Write beside ``out`` and rename, so that ``out`` is whole or not there.

    The temporary name is fixed: what a killed build left is overwritten by the next one.
    """
    staging = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with staging.open("wb") as file:
            size = trt.write_engine(parsed, config, file)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(out)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise BuildError(
            f"The engine of {spec.name} could not be written to {out}.",
            str(error),
            "Free some space or give --out a folder on another disk; 'build' again goes on from here."
            if full
            else "Make the folder writable, or give --out another one.",
        ) from error
    finally:
        staging.unlink(missing_ok=True)
    return size


def _peak_rss() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
