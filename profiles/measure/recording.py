"""Records which engine calls one chained call makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from ...runtime.components import Components
from .cases import EngineCalls

Key = tuple[str, tuple[tuple[str, int], ...]]


class RecordingComponents(Components):
    """Components whose :meth:`calls` lists the engine calls of one call. Nothing is recorded while timing."""

    _log: Counter[Key] | None = None

    def run_device(self, name: str, inputs: Any, *rest: Any, **options: Any) -> Any:
        """As :meth:`.Components.run_device`."""
        if self._log is not None:
            self._log[name, tuple(self._sizes(name, inputs).items())] += 1
        return super().run_device(name, inputs, *rest, **options)

    def calls(self, call: Callable[[], object]) -> tuple[EngineCalls, ...]:
        """Make ``call`` once; the engine calls in it, equal ones together, in order of first use."""
        log: Counter[Key] = Counter()
        self._log = log
        try:
            call()
        finally:
            self._log = None
        return tuple(EngineCalls(name, dict(sizes), count) for (name, sizes), count in log.items())

    def _sizes(self, name: str, inputs: Any) -> dict[str, int]:
        """Every dynamic axis at the size that ``inputs`` have."""
        tensors = self.spec(name).inputs
        return {
            dim: int(size)
            for tensor in tensors
            for dim, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True)
            if isinstance(dim, str)
        }
