"""Time on a GPU: CUDA events around a call, and calls as CUDA graphs. Needs torch with CUDA."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

from ...engines.cuda_graphs import capture


def has_gpu() -> bool:
    """Whether torch is installed and sees a CUDA device."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def event_timer(call: Callable[[], object]) -> Callable[[], int]:
    """``call``, which queues work on torch's current stream, as one that says the GPU's nanoseconds for it.

    What the host does meanwhile is not counted unless the GPU waits for it.
    """
    torch = cast(Any, import_module("torch"))

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> int:
        begin.record()
        call()
        end.record()
        end.synchronize()
        return round(float(begin.elapsed_time(end)) * 1e6)

    return sample


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` as a CUDA graph that replays its kernels in one launch, on the same memory."""
    graph, made = capture(call)

    def replay() -> object:
        graph.replay()
        return made  # what it writes into lives as long as this

    return replay
