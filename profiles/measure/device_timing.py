"""Component calls within a GPU's own memory, by its own clock: as they are, and replayed from CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

from ...engines.base import Engine
from ...engines.chain import ChainedEngine
from ...engines.device import HOST, Array, as_tensor
from ...runtime.components import Components
from .cases import GRAPHS, Task
from .cuda import event_timer, has_gpu

_BOUNDARY = "one engine call: tensors in GPU memory in, all outputs in GPU memory out"


def resident_tasks(task: Task, components: Components, inputs: Callable[[], dict[str, Array]]) -> list[Task]:
    """``task``, the call of a component, without copies to and from the host; none where no GPU computes.

    Replayed calls come where the backend can record CUDA graphs; their ``backend`` is :data:`GRAPHS`.
    """
    engine = components.open(task.name)
    if engine.device == HOST or not has_gpu():
        return []
    found = [replace(task, boundary=_BOUNDARY, prepare=partial(_call, engine, inputs), timer=event_timer)]
    if (graphed := with_graphs(engine)) is not None:
        boundary = f"{_BOUNDARY}; replayed from a CUDA graph"
        prepare = partial(_call, graphed, inputs)
        found.append(replace(found[0], boundary=boundary, prepare=prepare, backend=GRAPHS))
    return found


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
