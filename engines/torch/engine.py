"""The torch backend: a bundle's component as a torch module with the engines' protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ...arrays import Array
from ...bundle import Bundle
from ...bundle.spec import ComponentSpec
from ...calibration.magnitudes import Magnitudes, refuse_type
from ...dtypes import COMPUTE, dtype_of, name_of_torch
from ...errors import BuildError, CapabilityError, UsageError
from ..base import run_from_host
from ..cuda_graphs import Call, CudaGraphs
from ..device import Buffer, as_tensor, deliver, on_stream
from .linears import Product
from .module import compile_blocks, component_of

_COMPILERS = ("torch._dynamo", "torch._inductor")


class TorchEngine:
    """A module as an engine. See :class:`~ivl_export.engines.base.Engine`.

    Args:
        spec: the component's contract.
        call: takes the spec's inputs in its order, gives its outputs in its order.
        dtype: type of ``float`` inputs.
        device: device of the module's weights.
    """

    def __init__(self, spec: ComponentSpec, call: Call, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        self.device = str(device)
        self._call: Call | None = call
        self._dtype = dtype

    def run(self, inputs: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once; see :meth:`~ivl_export.engines.base.Engine.run`."""
        return run_from_host(self, inputs, outputs)

    def run_tensors(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Sequence[str] | None = None,
        *,
        out: Mapping[str, Buffer] | None = None,
        stream: int | None = None,
    ) -> dict[str, Tensor]:
        """Run once on tensors; see :meth:`~ivl_export.engines.base.Engine.run_tensors`.

        All outputs are computed, with any ``outputs``.
        """
        call = self._opened()
        self.spec.check(inputs)
        names = self.spec.select(outputs)
        with on_stream(self.device, stream), torch.no_grad():
            feeds = []
            for tensor in self.spec.inputs:
                value = as_tensor(inputs[tensor.name], self.device)
                feeds.append(value.to(self._dtype) if tensor.dtype == "float" else value)
            try:
                results = call(*feeds)
            except torch.OutOfMemoryError as error:
                raise BuildError(
                    f"Component {self.spec.name} does not fit on {self.device}.",
                    str(error).split("\n", 1)[0],
                    "Give fewer rows at a time (--batch).",
                ) from error
            except Exception as error:
                if not type(error).__module__.startswith(_COMPILERS):
                    raise
                raise BuildError(
                    f"Component {self.spec.name} cannot be compiled for these shapes.",
                    str(error).split("\n", 1)[0],
                    "Open it with compile=False.",
                ) from error
            values = dict(zip((t.name for t in self.spec.outputs), results, strict=True))
            return deliver({name: values[name] for name in names}, out)

    def with_graphs(self) -> TorchEngine:
        """The same module, replayed from a CUDA graph for each set of shapes; UsageError if it is closed."""
        call = self._opened()
        return TorchEngine(self.spec, CudaGraphs(lambda: call), self._dtype, torch.device(self.device))

    def _opened(self) -> Call:
        if self._call is None:
            raise UsageError(f"Component {self.spec.name} is closed.", "", "Open it again.")
        return self._call

    def close(self) -> None:
        """Let go of the module; weights that no other component reads are freed."""
        self._call = None

    def __enter__(self) -> TorchEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_torch(
    spec: ComponentSpec,
    path: Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    compile: bool | str = False,
    cuda_graphs: bool = False,
    product: Product | None = None,
    threads: int | None = None,
) -> TorchEngine:
    """Open component ``spec`` of the bundle in the folder ``path``.

    Args:
        spec: the component's contract.
        path: the bundle; its stored weights and ``ranges.json`` are read, graphs and engines are not.
        device: ``cpu``, ``cuda``, ``cuda:N``.
        dtype: type of everything unquantised: ``fp32``, ``bf16``, ``fp16``; None: fp32 on the CPU,
            else the base type of the bundle's recipe.
        compile: run its blocks through ``torch.compile``; a text is its ``mode``. The first calls compile.
        cuda_graphs: record one CUDA graph for each shape and replay it.
        product: how FP8 values are multiplied, see :data:`.linears.Product`.
        threads: torch's threads on the CPU, for the whole process; None: as they are.

    Raises:
        CapabilityError: no such device here, CUDA graphs without a GPU, or a ``dtype`` that overflows on
            the component's values.
        UsageError: an unknown ``dtype``.
        IntegrityError: the bundle lacks weights or scales of the component.
    """
    place = device_of(device)
    bundle = Bundle.open(path)
    computes = compute_type(bundle, place, dtype)
    if cuda_graphs and place.type != "cuda":
        raise CapabilityError("CUDA graphs need a GPU.", f"The device is {place}.", "Leave cuda_graphs out.")
    if threads is not None:
        torch.set_num_threads(threads)
    check_type(bundle, spec.name, computes)
    module = component_of(bundle, spec.name, dtype=computes, device=place, product=product)
    call: Call = module
    if compile:
        compile_blocks(module, None if compile is True else compile)
    engine = TorchEngine(spec, call, computes, place)
    return engine.with_graphs() if cuda_graphs else engine


def check_type(bundle: Bundle, component: str, computes: torch.dtype) -> None:
    """CapabilityError where the fp32 model reached values that ``computes`` does not hold.

    A bundle that was built before magnitudes were measured passes.
    """
    if "accuracy" in bundle.manifest.receipts:
        magnitudes = bundle.receipt("accuracy").get("magnitudes")
        if magnitudes is not None:
            refuse_type(Magnitudes.from_json(magnitudes), component, name_of_torch(computes))


def compute_type(bundle: Bundle, device: torch.device, dtype: str | None = None) -> torch.dtype:
    """Type of everything unquantised, see :func:`open_torch`; UsageError if ``dtype`` is unknown."""
    chosen = dtype or ("fp32" if device.type == "cpu" else bundle.manifest.compute_dtype)
    if chosen not in COMPUTE:
        raise UsageError(f"Unknown dtype {chosen!r}.", "", f"Choose from {', '.join(COMPUTE)}.")
    return dtype_of(chosen).torch


def device_of(name: str) -> torch.device:
    """The torch device ``name``; UsageError if there is none of that name, CapabilityError if not here."""
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"Unknown device {name!r}.", "", "Give cpu, cuda or cuda:N.") from error
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise CapabilityError(
                "torch finds no GPU.",
                f"The device is {name}, torch is {torch.__version__}.",
                "Give -O device=cpu, or install a torch built for CUDA and a driver.",
            )
        return torch.device("cuda", place.index if place.index is not None else torch.cuda.current_device())
    return place
