"""Wall time by stage, summed over all threads of a loaded model; a span for each where OpenTelemetry is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Timing:
    """How often a stage ran and for how many seconds in all."""

    calls: int
    seconds: float


class Timings:
    """A thread-safe sum of stage times. A stage is a component's name, ``preprocess`` or ``tokenize``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: dict[str, Timing] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time of the ``with`` block to ``stage``, also when it raises."""
        tracer = _tracer()
        start = time.perf_counter()
        try:
            with tracer.start_as_current_span(f"ivl_export.{stage}") if tracer else nullcontext():
                yield
        finally:
            seconds = time.perf_counter() - start
            with self._lock:
                before = self._stages.get(stage, Timing(0, 0.0))
                self._stages[stage] = Timing(before.calls + 1, before.seconds + seconds)

    def snapshot(self) -> dict[str, Timing]:
        """What was measured so far, in the order of first use."""
        with self._lock:
            return dict(self._stages)

    def reset(self) -> None:
        """Forget everything measured so far."""
        with self._lock:
            self._stages.clear()


@cache
def _tracer() -> Any:
    """OpenTelemetry's tracer; None where it is not installed. What it does is the application's to set up."""
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace.get_tracer("ivl_export")
