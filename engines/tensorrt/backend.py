"""TensorRT and TensorRT-RTX: engines run on a GPU, on torch's memory and the caller's stream.

Written against NVIDIA's documentation of TensorRT 10.16, 11.4 and TensorRT-RTX 1.7 and checked against the
names and signatures of their bindings; not yet run on a GPU. A context holds the state of one optimization
profile; there is one for each, made when shapes first need it, and one run at a time enters it.

With CUDA graphs TensorRT's runs are recorded here, each graph with a separate context: it
writes into that context's memory. TensorRT-RTX's contexts record their own graphs, by a setting.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ...arrays import Array
from ...bundle.manifest import EngineFile
from ...bundle.spec import ComponentSpec
from ...dtypes import dtype_of
from ...errors import BuildError, CapabilityError, InputError, IntegrityError, UsageError
from ..base import run_from_host
from ..compatibility import check_loadable, gpu_number
from ..cuda_graphs import Call, CudaGraphs
from ..device import (
    HOST,
    Buffer,
    as_tensor,
    deliver,
    in_place,
    off_default_stream,
    on_stream,
    require_torch,
    to_host,
)
from . import library as trt
from .network import element_type
from .options import BuildOptions
from .shapes import Profile, choose_profile, restrict_axes

if TYPE_CHECKING:
    import torch

MAX_GRAPHS = 8
"""CUDA graphs kept of one engine: each has a separate context."""


class TensorRTEngine:
    """A component in a TensorRT engine. See :class:`~ivl_export.engines.base.Engine`.

    Args:
        spec: the contract, with the ranges that the profiles cover.
        logger: the library's logger, which collects its errors.
        engine: the library's ``ICudaEngine``.
        kinds: name -> element type of inputs and outputs.
        profiles: ranges of the axes for each optimization profile, in the engine's order.
        device: ``cuda:0``.
        module: the library.
        cuda_graphs: replay runs from CUDA graphs.
    """

    def __init__(
        self,
        spec: ComponentSpec,
        logger: Any,
        engine: Any,
        kinds: Mapping[str, str],
        profiles: tuple[Profile, ...],
        device: str,
        module: Any,
        cuda_graphs: bool = False,
    ) -> None:
        self.spec, self.device, self._module = spec, device, module
        self._logger, self._engine, self._kinds, self._profiles = logger, engine, kinds, profiles
        self._contexts: dict[int, Any] = {}
        self._config = self._graph_config() if cuda_graphs else None
        own = cuda_graphs and self._config is None
        self._graphs = CudaGraphs(self._recordable, MAX_GRAPHS) if own else None
        self._lock = threading.Lock()
        self._stream: int | None = None  # that of the run before
        self._own: Any = None

    def run(self, inputs: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once from and to host memory; see :meth:`~ivl_export.engines.base.Engine.run`."""
        return run_from_host(self, inputs, outputs)

    def run_tensors(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Sequence[str] | None = None,
        *,
        out: Mapping[str, Buffer] | None = None,
        stream: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Enqueue one run on ``stream``; see :meth:`~ivl_export.engines.base.Engine.run_tensors`."""
        require_torch()
        sizes, names = self.spec.check(inputs), self.spec.select(outputs)
        index = self._profile(sizes)
        with self._lock, on_stream(self.device, stream), self._enqueues() as handle:
            buffers = {} if out is None else {name: in_place(buffer) for name, buffer in out.items()}
            feeds = {  # held until the work is enqueued; torch reuses memory in the stream's order
                name: as_tensor(buffer, self.device).to(self._dtype(name)).contiguous()
                for name, buffer in inputs.items()
            }
            if self._graphs is not None:
                values = self._graphs(*(feeds[t.name] for t in self.spec.inputs))
                outputs_of = dict(zip((t.name for t in self.spec.outputs), values, strict=True))
            else:
                if self._stream not in (None, handle):
                    self._wait()  # a context's memory is that of one stream at a time
                self._stream = handle
                if index not in self._contexts:
                    self._contexts[index] = self._context(index, handle)
                outputs_of = self._enqueue(self._contexts[index], sizes, feeds, buffers, handle)
            return deliver({name: outputs_of[name] for name in names}, buffers)

    def _enqueue(
        self,
        context: Any,
        sizes: Mapping[str, int],
        feeds: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        stream: int,
    ) -> dict[str, torch.Tensor]:
        """One run of ``context`` on ``stream``: every output, in ``given`` where it fits."""
        import torch

        for name, tensor in feeds.items():
            self._done(context.set_input_shape(name, tuple(tensor.shape)), f"the shape of {name}")
            self._done(context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name}")
        values: dict[str, torch.Tensor] = {}
        for spec in self.spec.outputs:  # every output needs memory, requested or not
            shape = tuple(d if isinstance(d, int) else sizes[d] for d in spec.shape)
            target = buffers.get(spec.name)
            if target is None or not self._fits(target, spec.name, shape):
                target = torch.empty(shape, dtype=self._dtype(spec.name), device=self.device)
            values[spec.name] = target
            address = context.set_tensor_address(spec.name, target.data_ptr())
            self._done(address, f"the address of {spec.name}")
        self._done(context.execute_async_v3(stream), "the run")
        return values

    def with_graphs(self) -> TensorRTEngine:
        """The same engine with separate contexts, its runs replayed from CUDA graphs."""
        return TensorRTEngine(
            self.spec,
            self._logger,
            self._engine,
            self._kinds,
            self._profiles,
            self.device,
            self._module,
            True,
        )

    def profiled(
        self, inputs: dict[str, Array], calls: int, warmup: int = 2
    ) -> tuple[list[tuple[float, list[tuple[str, float]]]], dict[str, Array]]:
        """Run ``calls`` times after ``warmup`` runs, in a context that times every layer.

        Returns:
            For each run its milliseconds by the host's clock until the GPU was done, and (layer,
            milliseconds) in the library's order and words; and the last run's outputs.

        Raises:
            InputError, BuildError: as :meth:`run_tensors`.
        """
        sizes, profiler = self.spec.check(inputs), trt.make_profiler(self._module)
        feeds = {name: as_tensor(a, self.device).to(self._dtype(name)) for name, a in inputs.items()}
        timed: list[tuple[float, list[tuple[str, float]]]] = []
        values: dict[str, torch.Tensor] = {}
        with self._lock, self._enqueues() as handle:
            context = self._context(self._profile(sizes), handle)
            context.profiler = profiler
            context.enqueue_emits_profile = False  # layers are reported by report_to_profiler
            for _ in range(warmup + calls):
                self._wait()
                began = time.perf_counter()
                values = self._enqueue(context, sizes, feeds, {}, handle)
                self._wait()
                length = (time.perf_counter() - began) * 1e3
                profiler.times = []
                self._done(context.report_to_profiler(), "the layers' times")
                timed.append((length, profiler.times))
        return timed[warmup:], {name: to_host(tensor) for name, tensor in values.items()}

    def layers(self) -> str:
        """The engine inspector's layer information, as JSON."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._module.LayerInformationFormat.JSON))

    def _profile(self, sizes: dict[str, int]) -> int:
        """The optimization profile for ``sizes``; InputError if there is none, UsageError if it is closed."""
        if self._engine is None:
            raise UsageError(f"Component {self.spec.name} is closed.", "", "Open it again.")
        index = choose_profile(self._profiles, sizes)
        if index is None:
            raise InputError(
                f"The engine of {self.spec.name} has no profile for these sizes.",
                f"{sizes} is in none of {list(self._profiles)}.",
                "Split the request, or build with other --shapes.",
            )
        return index

    def _enqueues(self) -> AbstractContextManager[int]:
        """The stream of a run: the current one, or the engine's own in the place of the default stream."""
        return off_default_stream(self.device, self._own_stream)

    def _own_stream(self) -> torch.cuda.Stream:
        import torch

        if self._own is None:
            self._own = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        own: torch.cuda.Stream = self._own
        return own

    def _context(self, index: int, stream: int) -> Any:
        """A new context in profile ``index``, with the memory of that profile, not of the largest one."""
        by_profile = self._module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        context = self._engine.create_execution_context(by_profile if self._config is None else self._config)
        self._done(context is not None, "a context: is there enough GPU memory?")
        self._done(context.set_optimization_profile_async(index, stream), f"profile {index}")
        self._wait()
        return context

    def _graph_config(self) -> Any:
        """Runtime config with which TensorRT-RTX's contexts record graphs; None: the library has none."""
        if not hasattr(self._module, "CudaGraphStrategy"):
            return None
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        by_profile = self._module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        config.set_execution_context_allocation_strategy(by_profile)
        return config

    def _recordable(self) -> Call:
        """A run on a separate context, for one graph."""
        context: Any = None

        def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            nonlocal context
            feeds = dict(zip((t.name for t in self.spec.inputs), tensors, strict=True))
            sizes = self.spec.check(feeds)
            with on_stream(self.device, None) as handle:
                if context is None:  # in the first run, which is not recorded
                    context = self._context(self._profile(sizes), handle)
                values = self._enqueue(context, sizes, feeds, {}, handle)
            return tuple(values[t.name] for t in self.spec.outputs)

        return call

    def _fits(self, target: torch.Tensor, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the engine can write output ``name`` into ``target`` itself."""
        same = target.dtype == self._dtype(name) and str(target.device) == self.device
        return same and tuple(target.shape) == shape and target.is_contiguous()

    def _dtype(self, name: str) -> torch.dtype:
        return dtype_of(self._kinds[name]).torch

    def _done(self, worked: bool, what: str) -> None:
        if not worked:
            raise BuildError(
                f"TensorRT refuses {what}, of component {self.spec.name}.",
                trt.reasons(self._logger),
                "Build the engine again on this machine.",
            )

    def _wait(self) -> None:
        import torch

        if self.device != HOST:
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Free contexts and engine, after the runs that are enqueued."""
        with self._lock:
            if self._contexts or self._graphs is not None:
                self._wait()
            self._contexts.clear()
            if self._graphs is not None:
                self._graphs.close()
            self._engine = None

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_tensorrt(
    spec: ComponentSpec,
    path: Path,
    *,
    record: EngineFile | None = None,
    rebuild: str = "",
    graph: Path | None = None,
    device: str = "cuda:0",
    weight_budget: int | None = None,
    host_code: bool = False,
    any_gpu: bool = False,
    cuda_graphs: bool = False,
) -> TensorRTEngine:
    """Open an engine of ``tensorrt`` or ``tensorrt-rtx``.

    Args:
        spec: the component's contract.
        path: the engine file.
        record: the manifest's entry: it is checked before the library reads the file.
        rebuild: the command that rebuilds it, for errors.
        graph: the ONNX graph it was built from, whose weights a stripped engine takes.
        device: the GPU.
        weight_budget: bytes of weights kept on the GPU, of an engine built with weight streaming; None: all.
        host_code: let a version-compatible engine run the code of its library that it carries. It is as
            trusted as a program: only for bundles of your own.
        any_gpu: try it on a GPU that it was not built for.
        cuda_graphs: record a CUDA graph for each set of shapes and replay it; ``MAX_GRAPHS`` of
            :mod:`.backend` are kept, each with the memory of one more context. TensorRT-RTX
            bounds its own.

    Raises:
        CapabilityError: torch, the library or the GPU are missing, or not those that it was built for.
        IntegrityError: no record, an engine that cannot be read, or one with other inputs and outputs.
    """
    if record is None or record.built is None:
        raise IntegrityError(
            f"The builder of {path} is unknown.",
            "An engine is opened through the manifest of its bundle, which names release, target and shapes.",
            "Open the bundle with ivl_export.runtime.InternVL.load, or build it again.",
        )
    number = gpu_number(device)
    check_loadable(record, rebuild, number, any_gpu)
    require_torch()
    import torch

    if not torch.cuda.is_available():
        raise CapabilityError(
            f"{record.backend} engines need torch with CUDA.",
            f"torch {torch.__version__} cannot use the GPU; it holds the buffers.",
            "Install the torch of your CUDA version: https://pytorch.org/get-started",
        )
    lib, options = trt.library(record.backend), BuildOptions.from_json(record.built.options)
    logger = trt.make_logger(lib.module)
    with torch.cuda.device(number):
        engine = _deserialised(lib, logger, path, host_code and options.version_compatible)
        if options.strip_plan:
            _refit(lib, logger, engine, path, graph)
        if options.weight_streaming and weight_budget is not None:
            engine.weight_streaming_budget_v2 = weight_budget
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    kinds = {name: element_type(engine.get_tensor_dtype(name)) for name in names}
    _check_tensors(spec, path, kinds, record.built.dtype)
    profiles = record.built.profiles
    spec, device = restrict_axes(spec, profiles), f"cuda:{number}"
    return TensorRTEngine(spec, logger, engine, kinds, profiles, device, lib.module, cuda_graphs)


def _deserialised(lib: trt.Library, logger: Any, path: Path, host_code: bool) -> Any:
    runtime = lib.module.Runtime(logger)
    if host_code:
        runtime.engine_host_code_allowed = True
    try:
        # Mapped: the file's pages are read once and never held twice.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = runtime.deserialize_cuda_engine(data)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read.", str(error), "Copy the bundle again.") from error
    if engine is None:
        raise IntegrityError(
            f"{lib} refuses {path}.", trt.reasons(logger), "Copy the bundle again, or rebuild it."
        )
    return engine


def _refit(lib: trt.Library, logger: Any, engine: Any, path: Path, graph: Path | None) -> None:
    """Put the weights of ``graph`` into an engine that was built without."""
    refitter = lib.module.Refitter(engine, logger)
    parser = lib.module.OnnxParserRefitter(refitter, logger)
    if graph is None or not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        raise IntegrityError(
            f"The stripped engine {path} did not get its weights.",
            trt.reasons(logger) if graph else "There is no graph to take them from.",
            "Copy the bundle again, or rebuild it without -O strip-plan.",
        )


def _check_tensors(spec: ComponentSpec, path: Path, kinds: Mapping[str, str], dtype: str) -> None:
    """IntegrityError unless inputs and outputs are the spec's, floats in ``dtype``."""
    for tensor in (*spec.inputs, *spec.outputs):
        expected = dtype if tensor.dtype == "float" else tensor.dtype
        if kinds.get(tensor.name, "missing") != expected:
            raise IntegrityError(
                f"{path} is not the engine of component {spec.name}.",
                f"{tensor.name} is {kinds.get(tensor.name, 'missing')} in it and should be {expected}.",
                "Rebuild the bundle.",
            )
    if strange := sorted(set(kinds) - {t.name for t in (*spec.inputs, *spec.outputs)}):
        raise IntegrityError(f"{path} is not the engine of component {spec.name}.", f"It has {strange[0]}.")
