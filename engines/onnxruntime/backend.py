"""ONNX Runtime: the backend that runs everywhere, on the CPU or by its CUDA and TensorRT providers.

Buffers are bound by address (IO binding): inputs in place, outputs into tensors made for them, whose
sizes follow from the contract. On a GPU nothing passes through host memory.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ...arrays import Array
from ...bundle.spec import ComponentSpec
from ...dtypes import find_dtype
from ...errors import BuildError, CapabilityError, IntegrityError, IvlError, UsageError
from ...forks import no_fork
from ..device import HOST, Buffer, as_tensor, deliver, in_place, on_stream, require_torch
from ..onnx_graph import Graph, read_graph
from .providers import Placement, placement
from .session import first_line, make_session
from .weights import SharedWeights

if TYPE_CHECKING:
    import torch

_TENSOR = re.compile(r"tensor\((.+)\)")
"""How a session names the types of its inputs and outputs: ``tensor(bfloat16)``."""
_HOST_FLOATS = ("fp32", "fp16", "fp64")
"""Types of float inputs that numpy's arrays are cast to."""
_NARROW = (np.float16, np.float64)
_PLANS = 64
"""Kept at a time by an engine: sizes of batches, texts and caches that come again and again are few."""


@dataclass(frozen=True)
class _Plan:
    """How inputs of certain shapes and types are run.

    Args:
        outputs: requested names.
        cast: inputs whose float type differs from the session's, and the session's.
        widen: whether an output is not float32.
    """

    outputs: list[str]
    cast: dict[str, Any]
    widen: bool


class OnnxRuntimeEngine:
    """A component in an ONNX Runtime session. See :class:`~ivl_export.engines.base.Engine`."""

    def __init__(self, spec: ComponentSpec, session: Any, where: Placement) -> None:
        self.spec = spec
        self._session = session
        self._where = where
        values = (*session.get_inputs(), *session.get_outputs())
        types = {value.name: find_dtype(_TENSOR.sub(r"\1", value.type).upper()) for value in values}
        self._types = {name: dtype for name, dtype in types.items() if dtype}
        self._plans: dict[Any, _Plan] = {}

    @property
    def device(self) -> str:
        """Where its provider computes."""
        return self._where.device

    def run(self, inputs: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once; see :meth:`~ivl_export.engines.base.Engine.run`."""
        session = self._open()
        kinds = tuple((key, array.shape, array.dtype) for key, array in inputs.items())
        plan_key = (None if outputs is None else tuple(outputs), kinds)
        plan = self._plans.get(plan_key) or self._planned(plan_key, inputs)
        feeds = inputs
        if plan.cast:
            feeds = inputs | {key: inputs[key].astype(kind) for key, kind in plan.cast.items()}
        try:
            with no_fork:
                values = session.run(plan.outputs, feeds)
        except Exception as error:  # its exceptions share no base class but this
            raise self._failure(error) from error
        if plan.widen:
            values = [v.astype(np.float32) if v.dtype in _NARROW else v for v in values]
        return dict(zip(plan.outputs, values, strict=True))

    def _planned(self, plan_key: Any, inputs: Mapping[str, Array]) -> _Plan:
        """Casts and bindings for inputs of these shapes and types: computed once, kept for further calls."""
        self.spec.check(inputs)
        names = self.spec.select(plan_key[0])
        floats = {key: t.numpy for key in inputs if (t := self._types[key]).name in _HOST_FLOATS}
        cast = {key: kind for key, kind in floats.items() if inputs[key].dtype != kind}
        widen = any(self._types[name].name in ("fp16", "fp64") for name in names)
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        plan = self._plans[plan_key] = _Plan(names, cast, widen)
        return plan

    def run_tensors(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Sequence[str] | None = None,
        *,
        out: Mapping[str, Buffer] | None = None,
        stream: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run once on bound buffers; see :meth:`~ivl_export.engines.base.Engine.run_tensors`.

        On a GPU: a session that was opened with the caller's stream works on it and returns at once; any
        other waits for that stream, and is done when it returns.
        """
        require_torch()
        import torch

        session, sizes, names = self._open(), self.spec.check(inputs), self.spec.select(outputs)
        shapes = {t.name: [d if isinstance(d, int) else sizes[d] for d in t.shape] for t in self.spec.outputs}
        with on_stream(self.device, stream) as caller, self._failures():
            buffers = {} if out is None else {name: in_place(buffer) for name, buffer in out.items()}
            feeds = {
                name: as_tensor(buffer, self.device).to(self._dtype(name)).contiguous()
                for name, buffer in inputs.items()
            }
            if self.device == HOST and not buffers:
                # Its own arena, whose pages are mapped already, gives large outputs ten times as fast.
                arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
                with no_fork:
                    values = session.run(names, arrays)
                return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
            binding, outputs_of = session.io_binding(), {}
            for name, tensor in feeds.items():
                self._bind(binding.bind_input, name, tensor)
            for name in names:
                target = buffers.get(name)
                if target is None or not self._fits(name, target, shapes[name]):
                    target = torch.empty(shapes[name], dtype=self._dtype(name), device=self.device)
                outputs_of[name] = target
                self._bind(binding.bind_output, name, target)
            ours = self.device == HOST or caller == self._where.stream
            if not ours:
                torch.cuda.current_stream().synchronize()
            with no_fork:
                session.run_with_iobinding(binding, _run_options(wait=self.device == HOST or not ours))
            return deliver(outputs_of, buffers)

    def _dtype(self, name: str) -> torch.dtype:

        return self._types[name].torch

    def _bind(self, bind: Any, name: str, tensor: torch.Tensor) -> None:
        kind, index = tensor.device.type, tensor.device.index or 0
        bind(name, kind, index, self._types[name].onnx_number, list(tensor.shape), tensor.data_ptr())

    def _fits(self, name: str, target: torch.Tensor, shape: list[int]) -> bool:
        """Whether the session can write output ``name`` into ``target`` itself."""
        same = target.dtype == self._dtype(name) and str(target.device) == self.device
        return same and list(target.shape) == shape and target.is_contiguous()

    def _open(self) -> Any:
        if self._session is None:
            raise UsageError(f"Component {self.spec.name} is closed.", "", "Open it again.")
        return self._session

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Errors of ONNX Runtime become BuildError."""
        try:
            yield
        except IvlError:
            raise
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> BuildError:
        return BuildError(
            f"Component {self.spec.name} failed in ONNX Runtime.", first_line(error), "Rebuild the bundle."
        )

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def __enter__(self) -> OnnxRuntimeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_onnxruntime(
    spec: ComponentSpec,
    path: Path,
    *,
    threads: int | None = None,
    settings: dict[str, str] | None = None,
    device: str | None = None,
    provider: str | None = None,
    share: SharedWeights | None = None,
    **where: Any,
) -> OnnxRuntimeEngine:
    """Open the ONNX graph ``path`` (its weights next to it).

    Args:
        spec: the component's contract.
        path: a graph that computes in fp32 (there are no bf16 kernels on the CPU).
        threads: threads for one operator; ONNX Runtime's choice if None, but no more than this process may
            use (:func:`...host.core_limit`).
        settings: further session settings (``session.…``), which win over the ones chosen here.
        device, provider, where: see :func:`.providers.placement`; the CPU by default.
        share: where its weights are shared with other components, on the CPU and without ``settings``.

    Raises:
        CapabilityError: onnxruntime or the provider is not installed, or has no kernels for the graph's
            element types.
        IntegrityError: the graph or its weights are missing or damaged, or belong to another component.
        UsageError: no such device or provider.
    """
    placed = placement(spec, device, provider, **where)
    graph, session = read_graph(path), None
    if placed.provider == "tensorrt" and "fp8" in graph.element_types:
        raise CapabilityError(
            f"ONNX Runtime's TensorRT provider does not run the FP8 products of {spec.name}.",
            "The graph computes in fp32 on values rounded to FP8; the provider refuses it, or gains nothing.",
            "Give -O provider=cuda, or build engines: --backend tensorrt.",
        )
    if share is not None and placed.device == HOST and not settings:
        session = _on_shared_weights(share, path, graph, threads)
    if session is None:
        session = make_session(path, graph, threads=threads, settings=settings or {}, where=placed)
    have = {i.name for i in session.get_inputs()}, {o.name for o in session.get_outputs()}
    want = {t.name for t in spec.inputs}, {t.name for t in spec.outputs}
    if have[0] != want[0] or not want[1] <= have[1]:
        raise IntegrityError(
            f"{path} is not the graph of component {spec.name}.",
            f"It has inputs {sorted(have[0])} and outputs {sorted(have[1])}.",
            "Rebuild the bundle.",
        )
    return OnnxRuntimeEngine(spec, session, placed)


def _on_shared_weights(share: SharedWeights, path: Path, graph: Graph, threads: int | None) -> Any:
    """A session on weights that ``share`` keeps; None if they cannot be kept or used."""

    def save(file: Path, settings: dict[str, str]) -> None:
        make_session(path, graph, threads=1, settings=settings, save=file)

    shared = share.graph(path, save)
    if shared is None:
        return None
    try:
        return make_session(shared, graph, threads=threads, settings={}, optimised=True)
    except IntegrityError:
        share.forget()
        return None


def optimized_graph(path: Path) -> Graph:
    """The graph ONNX Runtime really runs for the graph ``path`` on this CPU, after its own optimisation.

    Weights that it folds are written to a temporary file. Raises as :func:`open_onnxruntime`.
    """
    graph = read_graph(path)
    with tempfile.TemporaryDirectory(prefix="ivl-ort-") as folder:
        copy = Path(folder) / "optimized.onnx"
        settings = {
            "session.optimized_model_external_initializers_file_name": "optimized.weights",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        }
        make_session(path, graph, threads=1, settings=settings, save=copy)
        return read_graph(copy)


def _run_options(*, wait: bool) -> Any:
    """Options of one run; it returns without waiting for the GPU where ``wait`` is false."""
    import onnxruntime as ort

    options = ort.RunOptions()
    if not wait:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
