"""Tracing a component to an ONNX graph that holds no weights.

The module is on the meta device, so a 14-billion-parameter model is traced in the memory of its graph.
Every initializer is left unbound (name, type, shape; no data) under its published key; :mod:`.binding` binds
them to stored bytes.

One trace serves all compute types: it is made in bf16, where every deliberate fp32 region shows as a pair of
Casts, and retyped before anything is folded. So fp32, bf16 and fp16 graphs have the same structure.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

from ..bundle.spec import ComponentSpec
from ..dtypes import COMPUTE, dtype_of
from ..errors import BuildError
from ..models.checkpoint import Checkpoint
from ..models.registry import ModelConfig, component_module, component_of, component_spec
from .blocks import repeat_blocks

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

OPSET = 24  # the first with 16-bit Attention
_TRACED = dtype_of("bf16")
_NOISY_LOGGERS = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnx_ir", "onnxscript")


def export_component(name: str, checkpoint: Checkpoint, compute_dtype: str = "bf16") -> ir.Model:
    """The graph of component ``name``, initializers unbound.

    Inputs, outputs and symbolic dimensions are named as in the component's spec. Every linear layer is
    ``weight [out, in] -> Transpose -> MatMul``, and the MatMul node is named as its weight, without
    ``.weight``; other nodes are named ``<module path>/<operator>``.

    Args:
        name: a component that ``checkpoint`` has.
        checkpoint: gives the sizes; no weights are read.
        compute_dtype: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        UsageError, CapabilityError: no such component, or not in this checkpoint.
        BuildError: the exporter produced a graph that does not fit the spec.
    """
    from .binding import unbound
    from .graph import finish, retype

    if compute_dtype not in COMPUTE:
        raise ValueError(f"compute_dtype {compute_dtype!r} is none of {', '.join(COMPUTE)}")
    spec = component_spec(name, checkpoint.model)
    model = repeated_graph(name, checkpoint.model).clone()
    retype(model, _TRACED.onnx, dtype_of(compute_dtype).onnx)
    with _quiet():
        finish(model, spec)
    strangers = [key for key in unbound(model) if key not in checkpoint.tensors]
    if strangers:
        raise BuildError(f"Graph {name} reads weights that no checkpoint has.", ", ".join(strangers[:5]))
    return model


@lru_cache(maxsize=8)
def repeated_graph(name: str, config: ModelConfig) -> ir.Model:
    """:func:`traced_graph` of a component of any depth: as many blocks as need be are traced, and repeated.

    The graph is shared with later calls: change a clone.
    """
    component = component_of(name, config)
    traced, times = component.period(config)
    model = traced_graph(name, traced)
    if times > 1:
        spec = component_spec(name, traced)
        inputs, outputs = (sum(t.name[-1].isdigit() for t in part) for part in (spec.inputs, spec.outputs))
        taps, exit_period = component.taps(config), component.exit_reads(config)
        repeat_blocks(model.graph, component.place(config), times, inputs, outputs, taps, exit_period)
    return model


def traced_graph(name: str, config: ModelConfig) -> ir.Model:
    """The exporter's graph of component ``name`` in bf16, each block traced; weights dropped."""
    import torch

    spec = component_spec(name, config)
    with torch.device("meta"):
        module = component_module(name, config).to(_TRACED.torch)
        args, shapes = example_inputs(spec)
    with _quiet(), torch.no_grad():
        program = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    if exported is None:
        raise BuildError(f"Component {name} could not be exported.", "torch.onnx.export returned nothing.")
    model: ir.Model = exported.model
    for value in model.graph.initializers.values():
        value.const_value = None
    model.graph.name = name
    return model


def example_inputs(spec: ComponentSpec) -> tuple[tuple[torch.Tensor, ...], list[object]]:
    """Inputs of distinct small sizes on the meta device, and which of their dimensions are dynamic.

    The ranges of the spec do not enter: one graph serves every engine profile. ``total`` is derived from past
    and text, which the exporter finds out for itself.
    """
    import torch

    sizes = {axis.name: 3 + 2 * i for i, axis in enumerate(spec.axes)}
    dims = {name: torch.export.Dim(name, min=1) for name in sizes}
    if "total" in sizes:
        sizes["total"] = sizes["past"] + sizes["text"]
        dims["total"] = torch.export.Dim.DYNAMIC
    args, shapes = [], []
    for tensor in spec.inputs:
        dtype = (_TRACED if tensor.dtype == "float" else dtype_of(tensor.dtype)).torch
        args.append(torch.zeros([d if isinstance(d, int) else sizes[d] for d in tensor.shape], dtype=dtype))
        shapes.append({i: dims[d] for i, d in enumerate(tensor.shape) if isinstance(d, str)})
    flat = sum(not t.name.startswith("past_") for t in spec.inputs)  # the rest is the variadic past
    rest = [tuple(shapes[flat:])] if flat < len(shapes) else []
    return tuple(args), [*shapes[:flat], *rest]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on packages it does not need and on unbound initializers."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
