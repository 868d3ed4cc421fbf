"""Progress of long work: the one protocol that builds, exports, evaluations and profiles report to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives the steps of some work, mostly one after another.

    Where two run at once, :meth:`advanced` is about the one that started last and has not ended, and a step
    may end that was never said to have started. Calls come one at a time.
    """

    def started(self, step: str, total: int | None, unit: str = "") -> None:
        """A step begins.

        Args:
            step: its name.
            total: the count that :meth:`advanced` reaches; None where it is not known.
            unit: of the count.
        """
        ...

    def advanced(self, done: int, total: int | None = None, detail: str = "") -> None:
        """Part of the step is done.

        Args:
            done: of its count.
            total: the whole count, where it is known only now.
            detail: the current work.
        """
        ...

    def finished(self, step: str, seconds: float, reused: bool = False) -> None:
        """The step ended; ``reused``: an earlier result was taken, and nothing was run."""
        ...


class Silent:
    """A :class:`Progress` that shows nothing."""

    def started(self, step: str, total: int | None, unit: str = "") -> None:
        """Nothing."""

    def advanced(self, done: int, total: int | None = None, detail: str = "") -> None:
        """Nothing."""

    def finished(self, step: str, seconds: float, reused: bool = False) -> None:
        """Nothing."""


SILENT = Silent()


@contextmanager
def reported(progress: Progress, step: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """The block is ``step``; yields :meth:`Progress.advanced`. A block that raises has not finished."""
    progress.started(step, total)
    start = time.perf_counter()
    yield progress.advanced
    progress.finished(step, time.perf_counter() - start)
