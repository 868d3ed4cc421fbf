"""The engines of a bundle: opened on first use, run in batches that they were built for, timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..arrays import Array
from ..bundle import Bundle
from ..bundle.manifest import Component, EngineFile
from ..bundle.spec import ComponentSpec
from ..engines.base import BACKENDS, Engine, open_engine
from ..engines.chain import ChainedEngine
from ..engines.compatibility import fitting_target, gpu_number, rebuild_line
from ..engines.device import HOST, Buffer, as_tensor, concatenate, to_host
from ..engines.onnxruntime.memory import hand_back
from ..engines.onnxruntime.weights import SharedWeights, shared_weights
from ..engines.tensorrt.library import BUILDERS
from ..engines.tensorrt.shapes import restrict_axes
from ..errors import InputError, UsageError
from ..forks import cached_property, fork_safe_lock, renew_after_fork
from ..models.registry import PIXELS
from .timings import Timings


class Components:
    """Engines of one backend and target by component name. Safe to use from several threads.

    Args:
        bundle: an opened bundle.
        backend: ``onnxruntime`` or another backend that the bundle has engines for.
        target: which of them (``sm89``); None takes the first.
        batch: images run at once; None: on the CPU the batch the engines were tuned for (more only takes
            memory there), elsewhere the most they take.
        share_weights: see :func:`.load.load`.
        options: passed on to the backend (``threads``, ``device``).
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        target: str | None = None,
        batch: int | None = None,
        share_weights: bool | None = False,
        **options: Any,
    ) -> None:
        self.bundle, self.backend, self.options = bundle, backend, options
        self._gpu = gpu_number(options.get("device", "cuda:0")) if backend in BUILDERS else 0
        if target is None and backend in BUILDERS:  # of several the one of this GPU
            target = fitting_target(bundle.manifest, backend, self._gpu)
        self.target = target
        self._batch, self._share_weights = batch, share_weights
        self.timings = Timings()
        self._engines: dict[str, Engine] = {}
        self._specs: dict[str, ComponentSpec] = {}
        self._locks = {name: fork_safe_lock() for name in bundle.manifest.components}
        self._closed = self._lost = False
        renew_after_fork(self)

    def after_fork(self) -> None:
        """In a forked child: ONNX Runtime's engines are opened again when they are used, if they had threads.

        A GPU's memory, and other libraries' caches, cannot be freed in this process.
        """
        if self.backend != "onnxruntime" or not self.on_cpu:
            self._lost = bool(self._engines)
        elif self.options.get("threads") != 1:
            for engine in self._engines.values():
                _never_destroy(engine)
            self._engines.clear()

    def spec(self, name: str) -> ComponentSpec:
        """The contract of component ``name``, with the ranges that its engine was built for."""
        if name not in self._specs:
            spec = self.bundle.spec(name)
            if self.backend in BUILDERS:
                limits = self.bundle.engines(name, self.backend, self.target)[0].built
                spec = restrict_axes(spec, limits.profiles) if limits is not None else spec
            self._specs[name] = spec
        return self._specs[name]

    @property
    def on_cpu(self) -> bool:
        """Whether the engines compute on the CPU."""
        known = BACKENDS.get(self.backend)
        return known is not None and known.on_cpu and self.options.get("device", HOST) == HOST

    @cached_property
    def image_component(self) -> str:
        """The component that takes images; empty in a bundle without one."""
        parts = self.bundle.manifest.components.items()
        return next((n for n, c in parts if any(t.name == PIXELS for t in c.spec.inputs)), "")

    def gives(self, output: str) -> str:
        """The component that has ``output``; empty if none has."""
        parts = self.bundle.manifest.components.items()
        return next((n for n, c in parts if any(t.name == output for t in c.spec.outputs)), "")

    @cached_property
    def batch(self) -> int:
        """Images run at once."""
        axis = self.spec(self.image_component or next(iter(self._locks))).axis("batch")
        usual = axis.opt if self.on_cpu else axis.max
        return min(self._batch or usual, axis.max)

    def open(self, name: str) -> Engine:
        """The engine of ``name``, opened if it is not yet; IntegrityError or CapabilityError."""
        spec = self.spec(name)
        with self._locks[name]:
            if self._closed:
                raise InputError("The model was closed.", fix="Load it again.")
            self._check_fork()
            if name not in self._engines:
                with self.timings.measure(f"open {name}"):
                    self._engines[name] = self._opened(name, spec)
            return self._engines[name]

    def _opened(self, name: str, spec: ComponentSpec) -> Engine:
        known = BACKENDS.get(self.backend)
        if known is not None and known.reads_bundle:
            return open_engine(self.backend, spec, self.bundle.root, **self.options)
        files = self.bundle.engines(name, self.backend, self.target)
        if len(files) == 1:
            return self._open_file(self.bundle.manifest.components[name], files[0])
        parts = self.bundle.manifest.components[name].parts
        with ExitStack() as opened:
            engines = [
                opened.enter_context(self._open_file(part, file))
                for part, file in zip(parts, files, strict=True)
            ]
            opened.pop_all()
        return ChainedEngine(spec, engines)

    @cached_property
    def _shared(self) -> SharedWeights | None:
        return shared_weights(self.bundle, self._share_weights) if self.backend == "onnxruntime" else None

    def _open_file(self, component: Component, file: EngineFile) -> Engine:
        options, known = dict(self.options), BACKENDS.get(self.backend)
        if known is not None and known.reads_record:
            graph = component.graphs.get(file.built.dtype) if file.built is not None else None
            options["record"] = file
            options["rebuild"] = rebuild_line(self.bundle.manifest, file, self._gpu)
            options["graph"] = self.bundle.path(graph) if graph is not None else None
        if self._shared is not None:
            options["share"] = self._shared
        return open_engine(self.backend, component.spec, self.bundle.path(file.file), **options)

    def run(
        self, name: str, inputs: Mapping[str, Buffer], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run ``name`` over any number of rows (at least one), split into batches the engine takes.

        ``outputs`` names the outputs to return (None: all); each has the rows of all batches, in order.
        """
        return {key: to_host(buffer) for key, buffer in self.run_device(name, inputs, outputs).items()}

    def run_device(
        self, name: str, inputs: Mapping[str, Buffer], outputs: Sequence[str] | None = None
    ) -> dict[str, Buffer]:
        """As :meth:`run`, the outputs on the engine's device, to be handed to the next engine.

        From an engine on the CPU they are arrays if ``inputs`` are, from one on a GPU tensors there.
        """
        self._check_fork()
        engine, limit = self._engines.get(name) or self.open(name), self.spec(name).axis("batch").max
        on_host = engine.device == HOST and all(type(buffer) is np.ndarray for buffer in inputs.values())
        run: Any = engine.run if on_host else engine.run_tensors
        buffers: dict[str, Any] = dict(inputs)
        if not on_host:
            buffers = {key: as_tensor(buffer, engine.device) for key, buffer in inputs.items()}
        rows = len(next(iter(buffers.values())))
        if rows <= limit:
            with self.timings.measure(name):
                results: dict[str, Buffer] = run(buffers, outputs)
            return results
        per_batch: list[Mapping[str, Buffer]] = []
        for start in range(0, rows, limit):
            rows_of = {key: values[start : start + limit] for key, values in buffers.items()}
            with self.timings.measure(name):
                per_batch.append(run(rows_of, outputs))
        return {key: concatenate([some[key] for some in per_batch]) for key in per_batch[0]}

    def _check_fork(self) -> None:
        if self._lost:
            raise UsageError(
                "This model was used before the process was forked.",
                f"Engines of {self.backend} do not survive os.fork().",
                "Load the model in each process, or fork before it is first used; with multiprocessing, "
                "take the start method 'spawn'.",
            )

    def release_memory(self) -> None:
        """Hand free memory back to the system; the next call takes it again."""
        if self.backend == "onnxruntime":
            hand_back()

    def close(self) -> None:
        """Close all engines; the model cannot be used afterwards."""
        self._closed = True
        for name, lock in self._locks.items():
            with lock:
                if name in self._engines:
                    self._engines.pop(name).close()
        self.release_memory()


def _never_destroy(engine: Engine) -> None:
    """Keep an engine of the parent: destroying a session waits for threads that are not in this process."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


def fixed(size: int | str) -> int:
    """A size that a contract must not leave open; InputError if it does."""
    if not isinstance(size, int):
        raise InputError("This bundle cannot be run.", f"Its contract leaves {size!r} open.")
    return size


VISUAL_OUTPUTS = ("query_embeds", "visual_embeds")
"""Outputs that a chat decoder reads for an image, in order; only models with queries have the first."""


def visual_shape(components: Components) -> tuple[int, int]:
    """Rows of one image, or tile, in :func:`visual_embeds`, and their width."""
    parts = components.bundle.manifest.components
    shapes = [t.shape for c in parts for t in components.spec(c).outputs if t.name in VISUAL_OUTPUTS]
    return sum(fixed(shape[1]) for shape in shapes), fixed(shapes[0][2])


def visual_embeds(components: Components, pixel_values: Buffer) -> Buffer:
    """Visual embeddings of a chat model: [I, 3, S, S] -> [I, V, H], on the engines' device."""
    buffers = components.run_device(components.image_component, {PIXELS: pixel_values})
    for output in VISUAL_OUTPUTS:
        maker = components.gives(output)
        if maker and output not in buffers:
            feeds = {tensor.name: buffers[tensor.name] for tensor in components.spec(maker).inputs}
            buffers |= components.run_device(maker, feeds)
    embeds: Buffer = concatenate([buffers[name] for name in VISUAL_OUTPUTS if name in buffers], 1)
    return embeds
