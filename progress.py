"""Progress of long work: the one protocol that builds, exports, evaluations and profiles report to."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the steps of some work, one after another."""

    def started(self, step: str, total: int | None) -> None:
        """A step begins; ``total`` is the count that :meth:`advanced` reaches, None where it is not known."""
        ...

    def advanced(self, done: int, total: int | None = None) -> None:
        """``done`` of the step's count is done; ``total`` where that is known only now."""
        ...

    def finished(self, step: str, seconds: float, reused: bool = False) -> None:
        """The step ended; ``reused``: an earlier result was taken, and nothing was run."""
        ...


class Silent:
    """A :class:`Progress` that shows nothing."""

    def started(self, step: str, total: int | None) -> None:
        """Nothing."""

    def advanced(self, done: int, total: int | None = None) -> None:
        """Nothing."""

    def finished(self, step: str, seconds: float, reused: bool = False) -> None:
        """Nothing."""
