"""Times of an engine's layers in one call, in the form that every backend's own profiler is read into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Event:
    """Work on one layer in one call: name and operator, begin within the call and length in microseconds."""

    name: str
    op: str
    start_us: float
    us: float


@dataclass(frozen=True)
class TimedCall:
    """One call: its length in microseconds, and its layers in the order they ran."""

    us: float
    events: tuple[Event, ...]


def concatenate_calls(parts: Sequence[TimedCall]) -> TimedCall:
    """Calls of the parts of a component, one after another, as one."""
    events: list[Event] = []
    begin = 0.0
    for part in parts:
        events += [replace(event, start_us=event.start_us + begin) for event in part.events]
        begin += part.us
    return TimedCall(begin, tuple(events))
