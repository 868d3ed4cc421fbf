"""The protocol of engines (named arrays in and out), and the registry of backends that open them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..arrays import Array
from ..bundle.spec import ComponentSpec
from ..errors import CapabilityError, UsageError
from .device import Buffer, as_tensor, to_host
from .tensorrt.library import BUILDERS

if TYPE_CHECKING:
    import torch


class Engine(Protocol):
    """A loaded component. Use as a context manager, or call :meth:`close`."""

    @property
    def spec(self) -> ComponentSpec:
        """The contract this engine was loaded with."""
        ...

    @property
    def device(self) -> str:
        """Where it computes, in torch's words: ``cpu``, ``cuda:0``."""
        ...

    def run(self, inputs: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once.

        Args:
            inputs: every input of the spec; ``float`` inputs as float32, for every compute type of the graph.
            outputs: names to compute, all if None.

        Returns:
            The requested outputs; ``float`` outputs as float32.

        Raises:
            InputError: inputs that do not fit the spec.
            UsageError: an output that the spec does not have.
        """
        ...

    def run_tensors(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Sequence[str] | None = None,
        *,
        out: Mapping[str, Buffer] | None = None,
        stream: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run once on buffers in place (:mod:`.device`); needs torch.

        Args:
            inputs: every input of the spec, ``float`` inputs of any float type. Those on the engine's device
                are read in place, others are copied to it once.
            outputs: names to compute, all if None.
            out: output name -> a buffer of its shape that it is written into and that is handed back.
            stream: a ``cudaStream_t`` as an integer; None: torch's current stream. The inputs are ready on
                it, and so are the outputs; the call may return before the GPU is done.

        Returns:
            The requested outputs, on the engine's device, in the engine's compute type (or that of the
            buffer in ``out``).

        Raises:
            InputError: inputs or buffers that do not fit the spec.
            UsageError: an output that the spec does not have.
            CapabilityError: torch is not installed.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory; it cannot run any more. A second call does nothing."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Loader(Protocol):
    """Opens an engine file."""

    def __call__(self, spec: ComponentSpec, path: Path, **options: Any) -> Engine:
        """Open ``path`` for a component; ``options`` are the backend's own."""
        ...


@dataclass(frozen=True)
class Backend:
    """A way to run engines.

    Args:
        name: as given to ``--backend``.
        install: the line that installs it.
        loader: ``module:function`` of its :class:`Loader`.
        reads_bundle: its engine is the bundle: the loader is given the bundle's folder, and takes weights and
            scales from there.
        on_cpu: it runs on the CPU unless a device is given.
        reads_record: the loader checks the manifest's entry of the engine: it takes ``record``,
            ``rebuild`` (a command line) and ``graph``.
    """

    name: str
    install: str
    loader: str
    reads_bundle: bool = False
    on_cpu: bool = False
    reads_record: bool = False

    def load(self) -> Loader:
        """Import the loader (the backend's library is imported when an engine is opened)."""
        module, _, function = self.loader.partition(":")
        try:
            return cast(Loader, getattr(importlib.import_module(module, __package__), function))
        except ImportError as error:
            raise CapabilityError(
                f"{self.name} is not installed.", str(error), f"Install it: {self.install}"
            ) from error


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "onnxruntime",
            "pip install 'ivl-export[cpu]'",
            ".onnxruntime.backend:open_onnxruntime",
            on_cpu=True,
        ),
        # Above this floor, since it uses the model's modules: imported by name, when it is chosen.
        Backend("torch", "pip install torch", ".torch.engine:open_torch", True, True),
        Backend(
            "torch-tensorrt",
            "pip install torch-tensorrt",
            ".torch.exported:open_torch_tensorrt",
            reads_bundle=True,
        ),
        *(
            Backend(name, f"pip install {name}", ".tensorrt.backend:open_tensorrt", reads_record=True)
            for name in BUILDERS
        ),
    )
}


def known_backend(name: str) -> Backend:
    """The backend ``name``; UsageError lists the known ones with the line that installs each."""
    if name not in BACKENDS:
        known = "; ".join(f"{b.name} ({b.install})" for b in BACKENDS.values())
        raise UsageError(f"Unknown backend {name!r}.", f"Known: {known}.", "Name one of these.")
    return BACKENDS[name]


def open_engine(backend: str, spec: ComponentSpec, path: Path, **options: Any) -> Engine:
    """Open the engine file ``path`` of component ``spec`` with ``backend``.

    Raises:
        UsageError: an unknown backend, or an option that it does not have.
        CapabilityError: the backend's library is not installed, or the engine was built for another release,
            GPU or target.
        IntegrityError: the file is missing or damaged.
    """
    loader = known_backend(backend).load()
    if strange := sorted(set(options) - set(inspect.signature(loader).parameters)):
        raise UsageError(f"Engines of {backend} have no option {strange[0]!r}.", "", "Leave it out.")
    return loader(spec, path, **options)


def run_from_host(
    engine: Engine, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
) -> dict[str, Array]:
    """``run`` of an engine on a GPU: host arrays are copied there once, and the outputs back once."""
    tensors = {name: as_tensor(array, engine.device) for name, array in inputs.items()}
    return {name: to_host(tensor) for name, tensor in engine.run_tensors(tensors, outputs).items()}
