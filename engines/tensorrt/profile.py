"""TensorRT's own profile of an engine: the times of its layers, named by the ONNX nodes they compute.

Written against NVIDIA's documentation of ``IProfiler``, as :mod:`.backend`; not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...arrays import Array
from ..layer_times import Event, TimedCall
from .backend import TensorRTEngine
from .layer_names import layer_names


def profiled_calls(
    engine: TensorRTEngine, inputs: Mapping[str, Array], calls: int
) -> tuple[tuple[TimedCall, ...], dict[str, Array]]:
    """``calls`` calls of an engine by TensorRT's profiler, and its outputs.

    A layer is named by the ONNX node that it computes, the plainest of them where it computes several
    (products have no suffix), and by the library's own name where the engine has no node names.

    Raises:
        InputError, BuildError: as running the engine.
    """
    names = layer_names(engine.layers())
    runs, outputs = engine.profiled(dict(inputs), calls)
    return tuple(_call(length, layers, names) for length, layers in runs), outputs


def _call(
    length: float, layers: Sequence[tuple[str, float]], names: Mapping[str, tuple[str, tuple[str, ...]]]
) -> TimedCall:
    events: list[Event] = []
    begin = 0.0
    for name, ms in layers:
        op, nodes = names.get(name, ("", (name,)))
        plainest = min(nodes, key=lambda node: node.count("/"))
        events.append(Event(plainest, op, begin * 1e3, ms * 1e3))
        begin += ms
    return TimedCall(length * 1e3, tuple(events))
