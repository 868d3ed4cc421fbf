"""Time on a GPU: CUDA events around a call, and calls as CUDA graphs. Needs torch with CUDA."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

WARM_CALLS = 3
"""Calls on a side stream before a capture, so that libraries have made their plans and workspaces."""


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
    torch = cast(Any, import_module("torch"))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return cast(Callable[[], object], graph.replay)
