"""Time on a GPU by its own clock: CUDA events around a call, component calls in GPU memory, CUDA graphs.

Needs torch with CUDA, imported when it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, cast

from ...arrays import Array
from ...engines.base import Engine
from ...engines.chain import ChainedEngine
from ...engines.cuda_graphs import capture
from ...engines.device import HOST, as_tensor
from ...runtime.components import Components
from .cases import GRAPHS, Task


def has_gpu() -> bool:
    """Whether torch is installed and finds a CUDA device."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def event_timer(call: Callable[[], object]) -> Callable[[], int]:
    """``call``, which queues work on torch's current stream, as one that says the GPU's nanoseconds for it.

    The host's time is not counted unless the GPU waits for it.
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
    graph, outputs = capture(call)

    def replay() -> object:
        graph.replay()
        return outputs  # its buffers live as long as this

    return replay


_BOUNDARY = "one engine call: tensors in GPU memory in, all outputs in GPU memory out"


def resident_tasks(task: Task, components: Components, inputs: Callable[[], dict[str, Array]]) -> list[Task]:
    """``task``, the call of a component, without copies to and from the host; none where no GPU computes.

    Replayed calls come where the backend can record CUDA graphs; their ``backend`` is :data:`GRAPHS`.
    """
    engine = components.open(task.name)
    if engine.device == HOST or not has_gpu():
        return []
    tasks = [replace(task, boundary=_BOUNDARY, prepare=partial(_call, engine, inputs), timer=event_timer)]
    if (graphed := with_graphs(engine)) is not None:
        boundary = f"{_BOUNDARY}; replayed from a CUDA graph"
        prepare = partial(_call, graphed, inputs)
        tasks.append(replace(tasks[0], boundary=boundary, prepare=prepare, backend=GRAPHS))
    return tasks


def with_graphs(engine: Engine) -> Engine | None:
    """``engine`` over the same weights, replayed from CUDA graphs; None if its backend cannot."""
    if isinstance(engine, ChainedEngine):
        parts = [with_graphs(part) for part in engine.parts]
        whole = [part for part in parts if part is not None]
        return ChainedEngine(engine.spec, whole) if len(whole) == len(parts) else None
    make = getattr(engine, "with_graphs", None)
    return None if make is None else cast(Engine, make())


def _call(engine: Engine, inputs: Callable[[], dict[str, Array]]) -> Callable[[], object]:
    tensors: dict[str, Any] = {name: as_tensor(array, engine.device) for name, array in inputs().items()}
    return partial(engine.run_tensors, tensors)
