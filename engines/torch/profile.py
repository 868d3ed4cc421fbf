"""Torch's profile of a component's module: the time of each operator, by the module that it is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ...arrays import Array
from ...bundle import Bundle
from ..layer_times import Event, TimedCall
from .module import component_of
from .trace import MODULE, named_ranges


def profiled_calls(
    bundle: Bundle, component: str, inputs: dict[str, Array], calls: int, threads: int | None
) -> tuple[TimedCall, ...]:
    """Calls of a component on the CPU after one more: each operator's own time, named by its module."""
    if threads is not None:
        torch.set_num_threads(threads)
    place = torch.device("cpu")
    module = component_of(bundle, component, dtype=torch.float32, device=place, product=None)
    feeds = [torch.from_numpy(inputs[tensor.name]) for tensor in bundle.spec(component).inputs]
    timed = []
    with torch.no_grad(), named_ranges(module):
        module(*feeds)
        for _ in range(calls):
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                module(*feeds)
            timed.append(_call(recorded.events()))
    return tuple(timed)


def _call(events: Sequence[Any]) -> TimedCall:
    whole = [event.time_range for event in events if event.name == MODULE]  # the component itself
    begin = min((span.start for span in whole), default=0.0)
    events_found = []
    for event in events:
        if event.name.startswith(MODULE):
            continue
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith(MODULE):
            parent = parent.cpu_parent
        if parent is not None and event.self_cpu_time_total > 0:
            name = parent.name.removeprefix(MODULE)
            start = event.time_range.start - begin
            events_found.append(Event(name, event.name, start, event.self_cpu_time_total))
    return TimedCall(sum(span.elapsed_us() for span in whole), tuple(events_found))
