"""Torch-TensorRT: a bundle's component as an exported program, compiled by TensorRT inside torch.

Types are the program's (``use_explicit_typing``), as everywhere in this package. Torch-TensorRT has no
converter for torch's 8-bit products: it leaves those to torch's own kernels and compiles the parts between.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...bundle import Bundle
from ...bundle.spec import ComponentSpec
from ...dtypes import dtype_of
from ...errors import BuildError, CapabilityError
from ...export.trace import example_inputs
from .engine import TorchEngine, device_of
from .module import component_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

INSTALL = "pip install torch-tensorrt"


def open_torch_tensorrt(
    spec: ComponentSpec, path: Path, *, device: str = "cuda", dtype: str | None = None, **settings: Any
) -> TorchEngine:
    """Open component ``spec`` of the bundle in the folder ``path``; it is compiled now, for this GPU.

    Args:
        spec: the component's contract; its axes give the range of shapes.
        path: the bundle; its stored weights and ``ranges.json`` are read.
        device: ``cuda`` or ``cuda:N``.
        dtype: as for :func:`.engine.open_torch`.
        settings: further arguments of ``torch_tensorrt.dynamo.compile`` (``optimization_level``,
            ``workspace_size``, ``cache_built_engines``, ...).

    Raises:
        CapabilityError: Torch-TensorRT is not installed, or there is no GPU.
        BuildError: it cannot compile the component.
    """
    try:
        import torch_tensorrt
    except (ImportError, OSError) as error:  # OSError: the package is there, TensorRT's libraries are not
        raise CapabilityError(
            "torch-tensorrt is not installed.", str(error), f"Install it: {INSTALL}"
        ) from error
    place, bundle = device_of(device), Bundle.open(path)
    if place.type != "cuda":
        raise CapabilityError(
            "torch-tensorrt needs a GPU.", f"The device is {place}.", "Use --backend torch."
        )
    chosen = dtype_of(dtype or bundle.manifest.compute_dtype).torch
    program = exported(spec, bundle, chosen, place)
    inputs = [
        torch_tensorrt.Input(
            **{f"{which}_shape": spec.shape(tensor, which) for which in ("min", "opt", "max")},
            dtype=chosen if tensor.dtype == "float" else dtype_of(tensor.dtype).torch,
        )
        for tensor in spec.inputs
    ]
    try:
        compiled = torch_tensorrt.dynamo.compile(
            program, arg_inputs=inputs, device=place, use_explicit_typing=True, **settings
        )
    except Exception as error:  # conversion errors share no base class but this
        raise BuildError(
            f"torch-tensorrt cannot compile {spec.name}.",
            str(error).strip().split("\n", 1)[0],
            "Use --backend torch, or --backend tensorrt.",
        ) from error
    return TorchEngine(spec, compiled, chosen, place)


def exported(
    spec: ComponentSpec, bundle: Bundle, dtype: torch.dtype, device: torch.device
) -> ExportedProgram:
    """Component ``spec`` of ``bundle`` as an exported program, its batch and lengths dynamic."""
    module = component_of(bundle, spec.name, dtype=dtype, device=device)
    args, shapes = example_inputs(spec)
    feeds = tuple(a.to(device, dtype if a.is_floating_point() else a.dtype) for a in args)
    with torch.no_grad():
        return torch.export.export(module, feeds, dynamic_shapes=shapes, strict=False)
