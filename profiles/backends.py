"""Each backend on this machine: installed release, whether it runs here, and the install command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ..engines.base import BACKENDS
from ..engines.gpu import gpus
from ..engines.tensorrt import library as trt
from ..errors import CapabilityError

_NO_GPU = "there is no GPU, or no driver for it"


@dataclass(frozen=True)
class Here:
    """A backend on this machine.

    Args:
        backend: its name in :data:`~ivl_export.engines.base.BACKENDS`.
        release: the installed release; None: not installed.
        blocked: why it does not run here; empty if it does.
        note: where or how it runs.
        install: the line that installs it.
    """

    backend: str
    release: str | None
    blocked: str
    note: str
    install: str


def backends_here() -> tuple[Here, ...]:
    """Every backend, in the registry's order. Those that are installed are loaded, except torch."""
    look: dict[str, Callable[[], tuple[str | None, str, str]]] = {
        "onnxruntime": _onnxruntime,
        "torch": _torch,
        "torch-tensorrt": _torch_tensorrt,
    }
    backends = []
    for name, backend in BACKENDS.items():
        release, blocked, note = look[name]() if name in look else _tensorrt(name)
        backends.append(Here(name, release, blocked, note, backend.install))
    return tuple(backends)


def installed(package: str) -> str | None:
    """The installed version of ``package``; None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _onnxruntime() -> tuple[str | None, str, str]:
    release = installed("onnxruntime-gpu") or installed("onnxruntime")
    if release is None:
        return None, "it is not installed", ""
    try:
        from onnxruntime import get_available_providers

        providers = get_available_providers()
    except (ImportError, OSError) as error:
        return release, f"it cannot be loaded: {error}", ""
    names = [name.removesuffix("ExecutionProvider") for name in providers]
    return release, "", f"providers: {', '.join(names)}"


def _torch() -> tuple[str | None, str, str]:
    release = installed("torch")
    if release is None:
        return None, "it is not installed", ""
    return release, "", "on the CPU" if release.endswith("+cpu") or not gpus() else "on the CPU and the GPU"


def _torch_tensorrt() -> tuple[str | None, str, str]:
    release = installed("torch-tensorrt")
    return release, "it is not installed" if release is None else "" if gpus() else _NO_GPU, ""


def _tensorrt(name: str) -> tuple[str | None, str, str]:
    release = trt.installed_release(name)
    if release is None:
        return None, "it is not installed", ""
    if (problem := trt.release_problem(name)) is not None:
        return release, f"it is too old: {problem.fix}", ""
    try:
        library = trt.library(name)
    except CapabilityError as error:  # the bindings are there, the libraries are not
        return release, f"it cannot be loaded: {error.why}", ""
    builds = "builds engines here" if library.cross_builds or gpus() else ""
    return release, "" if gpus() else _NO_GPU, builds
