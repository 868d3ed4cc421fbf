"""CUDA graphs of a callable on torch tensors: recorded once for each set of shapes, replayed from then on.

A replay launches all kernels at once, whose launches dominate small batches and single decode steps.
Needs torch with CUDA.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Call = Callable[..., "tuple[Tensor, ...]"]

MAX_SHAPES = 16
"""Graphs kept; each holds the memory of its activations. The least used one goes first."""
WARM_CALLS = 3
"""Calls on a side stream before a capture, so that libraries have made their plans and workspaces."""
_capturing = threading.Lock()
"""One capture at a time in the process: its beginning synchronises the device."""


@dataclass(frozen=True)
class _Recorded:
    graph: Any
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    call: Call  # it may own memory of the recorded kernels


class CudaGraphs:
    """A call on tensors of one GPU, replayed from graphs. Calls of several threads wait for each other.

    Args:
        make: returns the call to record, once for each graph, and it is kept as long as that graph. It takes
            and returns tensors on that GPU, launches the same kernels for all values, and never
            waits for the GPU once it has run.
        most: graphs kept, one for each set of input shapes.
    """

    def __init__(self, make: Callable[[], Call], most: int = MAX_SHAPES) -> None:
        self._make, self._most = make, most
        self._recorded: OrderedDict[tuple[Any, ...], _Recorded] = OrderedDict()
        self._stream: Any = None  # that of the call before
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """As the call; the outputs are the caller's own."""
        shape = tuple((tuple(t.shape), t.dtype) for t in inputs)
        with self._lock:
            stream = _torch().cuda.current_stream() if inputs[0].is_cuda else None
            full = shape not in self._recorded and len(self._recorded) >= self._most
            if inputs[0].is_cuda and (full or self._stream not in (None, stream)):
                # A graph's memory is that of one stream at a time, and of none when it is let go.
                _torch().cuda.synchronize()
            self._stream = stream
            if full:
                self._recorded.popitem(last=False)
            if shape not in self._recorded:
                self._recorded[shape] = self._record(inputs)
            self._recorded.move_to_end(shape)
            recorded = self._recorded[shape]
            for static, value in zip(recorded.inputs, inputs, strict=True):
                static.copy_(value)
            recorded.graph.replay()
            # Copied on the caller's stream before the lock is free: the next replay writes there again.
            return tuple(out.clone() for out in recorded.outputs)

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recorded:
        static = tuple(t.clone().contiguous() for t in inputs)
        call = self._make()
        graph, outputs = capture(lambda: call(*static))
        return _Recorded(graph, static, outputs, call)

    def close(self) -> None:
        """Let go of all graphs; the caller has waited for the GPU."""
        with self._lock:
            self._recorded.clear()


def capture(call: Callable[[], Any]) -> tuple[Any, Any]:
    """A ``torch.cuda.CUDAGraph`` of ``call``, after warm-up calls, and the recorded outputs."""
    torch = _torch()
    with _capturing:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Without a stream of ours all captures of the process are on one of torch's. Other threads may take
        # memory meanwhile, which would spoil a capture of the whole process.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            outputs = call()
    return graph, outputs


def _torch() -> Any:
    return import_module("torch")
