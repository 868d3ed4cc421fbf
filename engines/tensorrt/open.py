"""Opening engines of TensorRT and TensorRT-RTX: what is checked before the library sees a file, and after."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...bundle.manifest import EngineFile
from ...bundle.spec import ComponentSpec
from ...errors import CapabilityError, IntegrityError
from ..compatibility import check_loadable, gpu_number
from ..device import require_torch
from . import library as trt
from .backend import TensorRTEngine
from .network import element_type
from .options import BuildOptions
from .shapes import narrowed


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
        record: what the bundle's manifest says of it: it is checked before the library sees the file.
        rebuild: the line that builds it again, for errors.
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
            f"Nothing says what built {path}.",
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
    spec, device = narrowed(spec, profiles), f"cuda:{number}"
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
    """IntegrityError unless inputs and outputs are the spec's, floats of the type that was promised."""
    for tensor in (*spec.inputs, *spec.outputs):
        wanted = dtype if tensor.dtype == "float" else tensor.dtype
        if kinds.get(tensor.name, "missing") != wanted:
            raise IntegrityError(
                f"{path} is not the engine of component {spec.name}.",
                f"{tensor.name} is {kinds.get(tensor.name, 'missing')} in it and should be {wanted}.",
                "Rebuild the bundle.",
            )
    if strange := sorted(set(kinds) - {t.name for t in (*spec.inputs, *spec.outputs)}):
        raise IntegrityError(f"{path} is not the engine of component {spec.name}.", f"It has {strange[0]}.")
