"""CUDA graphs of a callable: recorded once for each shape, replayed from then on.

A replay launches all kernels at once, which is what small batches and single decode steps wait for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_SHAPES = 16
"""Graphs kept; each holds the memory of its activations. The least used one goes first."""

_WARMUP = 3


@dataclass(frozen=True)
class _Recorded:
    graph: Any
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class CudaGraphs:
    """``call`` on tensors of one GPU, replayed from graphs. Calls of several threads wait for each other.

    Args:
        call: takes and gives tensors on that GPU, launches the same kernels whatever their values are, and
            never waits for the GPU.
    """

    def __init__(self, call: Callable[..., tuple[Tensor, ...]]) -> None:
        self._call = call
        self._recorded: OrderedDict[tuple[Any, ...], _Recorded] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """As ``call``; the outputs are the caller's own."""
        shape = tuple((tuple(t.shape), t.dtype) for t in inputs)
        with self._lock:
            if shape not in self._recorded:
                self._recorded[shape] = self._record(inputs)
                if len(self._recorded) > MAX_SHAPES:
                    self._recorded.popitem(last=False)
            self._recorded.move_to_end(shape)
            recorded = self._recorded[shape]
            for static, given in zip(recorded.inputs, inputs, strict=True):
                static.copy_(given)
            recorded.graph.replay()
            # Copied on the caller's stream before the lock is free: the next replay writes there again.
            return tuple(out.clone() for out in recorded.outputs)

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recorded:
        static = tuple(t.clone(memory_format=torch.contiguous_format) for t in inputs)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries allocate and choose kernels now, which a graph may not
            for _ in range(_WARMUP):
                self._call(*static)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._call(*static)
        return _Recorded(graph, static, outputs)
