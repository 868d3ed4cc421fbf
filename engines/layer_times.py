"""When each layer of an engine ran and for how long: what every backend's own profiler is read into."""

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
class Call:
    """One call: its length in microseconds, and its layers in the order they ran."""

    us: float
    events: tuple[Event, ...]


def in_a_row(parts: Sequence[Call]) -> Call:
    """Calls of the parts of a component, one after another, as one."""
    events: list[Event] = []
    begin = 0.0
    for part in parts:
        events += [replace(event, start_us=event.start_us + begin) for event in part.events]
        begin += part.us
    return Call(begin, tuple(events))
