"""A bundle's engines, each opened on first use, fed in batches that it was built for, and timed."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..bundle.manifest import Component, EngineFile
from ..bundle.spec import ComponentSpec
from ..engines.base import BACKENDS, Engine, open_engine
from ..engines.chain import ChainedEngine
from ..engines.compatibility import fitting_target, gpu_number, rebuild_line
from ..engines.device import HOST, Array, Buffer, as_tensor, concatenate, to_host
from ..engines.onnxruntime.memory import hand_back
from ..engines.onnxruntime.weights import SharedWeights, shared_weights
from ..engines.tensorrt.library import BUILDERS
from ..engines.tensorrt.shapes import narrowed
from ..errors import InputError
from .timings import Timings


class Components:
    """Engines of one backend and target by component name. Safe to use from several threads.

    Args:
        bundle: an opened bundle.
        backend: ``onnxruntime`` or another backend that the bundle has engines for.
        target: which of them (``sm89``); None takes the first.
        batch: images run at once; None: on the CPU what the engines were tuned for (more only takes memory
            there), elsewhere the most they take.
        share_weights: see :meth:`.loaded.Loaded.load`.
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
        self._locks = {name: threading.Lock() for name in bundle.manifest.components}
        self._closed = False

    def spec(self, name: str) -> ComponentSpec:
        """The contract of component ``name``, with the ranges that its engine was built for."""
        if name not in self._specs:
            spec = self.bundle.spec(name)
            if self.backend in BUILDERS:
                built = self.bundle.engines(name, self.backend, self.target)[0].built
                spec = narrowed(spec, built.profiles) if built is not None else spec
            self._specs[name] = spec
        return self._specs[name]

    @property
    def on_cpu(self) -> bool:
        """Whether the engines compute on the CPU."""
        known = BACKENDS.get(self.backend)
        return known is not None and known.on_cpu and self.options.get("device", HOST) == HOST

    @cached_property
    def batch(self) -> int:
        """Images run at once."""
        chat = "vision_chat" in self.bundle.manifest.components
        axis = self.spec("vision_chat" if chat else "vision").axis("batch")
        usual = axis.opt if self.on_cpu else axis.max
        return min(self._batch or usual, axis.max)

    def open(self, name: str) -> Engine:
        """The engine of ``name``, opened if it is not yet; IntegrityError or CapabilityError."""
        spec = self.spec(name)
        with self._locks[name]:
            if self._closed:
                raise InputError("The model was closed.", fix="Load it again.")
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

        ``outputs`` names the outputs wanted (None: all); each has the rows of all batches, in order.
        """
        return {key: to_host(buffer) for key, buffer in self.run_device(name, inputs, outputs).items()}

    def run_device(
        self, name: str, inputs: Mapping[str, Buffer], outputs: Sequence[str] | None = None
    ) -> dict[str, Buffer]:
        """As :meth:`run`, the outputs where the engine left them: what goes on to another engine.

        From an engine on the CPU they are arrays if ``inputs`` are, from one on a GPU tensors there.
        """
        engine, limit = self._engines.get(name) or self.open(name), self.spec(name).axis("batch").max
        plain = engine.device == HOST and all(type(buffer) is np.ndarray for buffer in inputs.values())
        run: Any = engine.run if plain else engine.run_tensors
        whole: dict[str, Any] = dict(inputs)
        if not plain:
            whole = {key: as_tensor(buffer, engine.device) for key, buffer in inputs.items()}
        rows = len(next(iter(whole.values())))
        if rows <= limit:
            with self.timings.measure(name):
                found: dict[str, Buffer] = run(whole, outputs)
            return found
        parts: list[Mapping[str, Buffer]] = []
        for start in range(0, rows, limit):
            part = {key: values[start : start + limit] for key, values in whole.items()}
            with self.timings.measure(name):
                parts.append(run(part, outputs))
        return {key: concatenate([part[key] for part in parts]) for key in parts[0]}

    def rest(self) -> None:
        """Hand back memory that nothing is computed in; the next call takes it anew."""
        if self.backend == "onnxruntime":
            hand_back()

    def close(self) -> None:
        """Close all engines; the model cannot be used afterwards."""
        self._closed = True
        for name, lock in self._locks.items():
            with lock:
                if name in self._engines:
                    self._engines.pop(name).close()
        self.rest()
