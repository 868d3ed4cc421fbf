"""Wall time by stage, summed over all threads of a loaded model; OpenTelemetry spans where it is set up."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..forks import fork_safe_lock

_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Timing:
    """How often a stage ran and for how many seconds in all."""

    calls: int
    seconds: float


class Timings:
    """A thread-safe sum of stage times. A stage is a component's name, ``preprocess`` or ``tokenize``."""

    def __init__(self) -> None:
        self._lock = fork_safe_lock()
        self._stages: dict[str, list[float]] = {}  # calls, seconds

    def measure(self, stage: str) -> _Stage:
        """Add the time of the ``with`` block to ``stage``, also when it raises."""
        total = self._stages.get(stage)
        if total is None:
            with self._lock:
                total = self._stages.setdefault(stage, [0, 0.0])
        return _Stage(self._lock, total, stage)

    def snapshot(self) -> dict[str, Timing]:
        """The timings so far, in the order of first use."""
        with self._lock:
            return {stage: Timing(int(n), seconds) for stage, (n, seconds) in self._stages.items() if n}

    def reset(self) -> None:
        """Forget everything measured so far."""
        with self._lock:
            for total in self._stages.values():
                total[:] = 0, 0.0


class _Stage:
    """One call of a stage. As little as can be: between two engines nothing of Python is in the caches."""

    __slots__ = ("_lock", "_name", "_span", "_start", "_sum")

    def __init__(self, lock: threading.Lock, total: list[float], name: str) -> None:
        self._lock, self._sum, self._name = lock, total, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        self._span: Any = None
        if (tracer := _spans.tracer_at(self._start)) is not None:
            self._span = tracer.start_as_current_span(f"ivl_export.{self._name}")
            self._span.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._start
        with self._lock:
            self._sum[0] += 1
            self._sum[1] += seconds
        if self._span is not None:
            self._span.__exit__(kind, error, trace)


class _Spans:
    """OpenTelemetry's tracer, once the application has set one up; that is looked for once a second."""

    def __init__(self) -> None:
        self.tracer: Any = None
        self.looked = -_LOOK_SECONDS

    def tracer_at(self, now: float) -> Any:
        """The tracer; None where it is not installed or nothing is set up: an unheard span costs 10 us."""
        if self.tracer is None and now - self.looked >= _LOOK_SECONDS:
            self.looked = now
            with suppress(ImportError):
                from opentelemetry import trace

                if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
                    self.tracer = trace.get_tracer("ivl_export")
        return self.tracer


_spans = _Spans()
