"""The one module that imports tensorrt and tensorrt_rtx.

Both have the same Python API; differences between 10.x, 11.x and RTX are found with
``hasattr``, here and in the files that use this one: :mod:`.network` (parse and build),
:mod:`.config` (builder options) and :mod:`.backend` (run). A machine without a driver can parse
and, with RTX, build.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from ...errors import CapabilityError, UsageError

RTX = "tensorrt-rtx"
TENSORRT = "tensorrt"
_MODULES = {RTX: "tensorrt_rtx", TENSORRT: "tensorrt"}
_PACKAGES = {RTX: ("tensorrt-rtx",), TENSORRT: ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")}
BUILDERS = tuple(_MODULES)
"""Backends that compile engines."""
OLDEST = {TENSORRT: (10, 15)}
"""The first release that parses our graphs: RMSNormalization came with 10.15, Attention with 10.14."""

_NO_DRIVER = "cudaError 35"  # logged with every failure on a machine without a driver, with any cause
_MAX_REASONS = 8


@dataclass(frozen=True)
class Library:
    """An imported TensorRT: its backend name, module and exact release (engines are tied to it)."""

    backend: str
    module: Any
    release: str

    @property
    def cross_builds(self) -> bool:
        """Whether it compiles for GPUs that are not in this machine: RTX does."""
        return hasattr(self.module.IBuilderConfig, "set_compute_capability")

    def __str__(self) -> str:
        return f"{self.backend} {self.release}"


def library(backend: str) -> Library:
    """Import the TensorRT of ``backend``.

    Raises:
        UsageError: ``backend`` is none of :data:`BUILDERS`.
        CapabilityError: it is not installed, or its libraries cannot be loaded.
    """
    _known(backend)
    try:
        module = importlib.import_module(_MODULES[backend])
    except (ImportError, OSError) as error:  # OSError: the bindings are there, the shared libraries are not
        raise CapabilityError(
            f"{backend} is not installed.", str(error), f"Install it: pip install {backend}"
        ) from error
    return Library(backend, module, str(module.__version__))


def installed_release(backend: str) -> str | None:
    """The release of ``backend`` that is installed, without importing it; None if none is."""
    _known(backend)
    return next((release for package in _PACKAGES[backend] if (release := _version(package))), None)


def release_problem(backend: str) -> CapabilityError | None:
    """Why ``backend`` cannot build here: it is not installed, or too old to parse our graphs."""
    release, oldest = installed_release(backend), OLDEST.get(backend, ())
    if release is None:
        return CapabilityError(
            f"{backend} is not installed.",
            "It builds the engines.",
            f"pip install 'ivl-export[{'rtx' if backend == RTX else 'gpu'}]'",
        )
    if tuple(int(part) for part in re.findall(r"\d+", release)[: len(oldest)]) < oldest:
        least = ".".join(map(str, oldest))
        return CapabilityError(
            f"{backend} {release} is too old.",
            f"It does not parse RMSNormalization or Attention of ONNX, which the graphs hold; {least} does.",
            f"pip install '{backend}>={least}'",
        )
    return None


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # 50 ms that the runtime need not wait for

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _known(backend: str) -> None:
    if backend not in _MODULES:
        raise UsageError(
            f"Unknown engine builder {backend!r}.",
            f"Known: {', '.join(BUILDERS)}.",
            f"Give --backend {BUILDERS[0]}.",
        )


def make_logger(trt: Any) -> Any:
    """A logger of the module ``trt`` that collects messages of errors in ``errors``."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Warnings and below are of no use to a caller."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.Logger.ERROR, trt.Logger.INTERNAL_ERROR):
                self.errors.append(message.strip())

    return Logger()


def make_profiler(trt: Any) -> Any:
    """A profiler of the module ``trt`` that collects (layer, milliseconds) in ``times``, in their order."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        """Collects every layer of a run."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.append((layer_name, float(ms)))

    return Profiler()


def reasons(logger: Any) -> str:
    """The error messages so far, without the one that only says there is no driver."""
    errors = list(dict.fromkeys(logger.errors))
    texts = [text for text in errors if _NO_DRIVER not in text] or errors
    return " ".join(texts[:_MAX_REASONS]) or "The library gave no reason."
