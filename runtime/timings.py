"""Wall time by stage, summed over all threads of a loaded model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


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
        start = time.perf_counter()
        try:
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
